"""Who gets which cores: pure functions from topology and demands to slices."""
