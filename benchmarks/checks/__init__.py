"""Programs that look for wrong slices: under random failures, on captured machines, in virtual machines."""
