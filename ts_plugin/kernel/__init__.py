"""What the kernel is told about a slice: affinity masks and memory policy."""
