"""`ts-cores tune`: how many workers, how many cores each, which batch size. Profile, choose, confirm, report."""
