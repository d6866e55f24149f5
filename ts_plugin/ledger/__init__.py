"""Who owns which cores: the file, one plan for all living workers, and what each of them is told."""
