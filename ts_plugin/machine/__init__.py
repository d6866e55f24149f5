"""What the machine is: topology, cgroups and processes, read from /sys and /proc."""
