"""Who holds which cores: the ledger, one plan for all living workers, and what the kernel is told."""
