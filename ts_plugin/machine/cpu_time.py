"""How busy the CPUs have been."""

from __future__ import annotations

from pathlib import Path


def ticks(proc: str = "/proc") -> dict[int, tuple[int, int]]:
    """Return each CPU's (busy, total) time since boot in clock ticks; utilisation is a quotient of differences.

    Source: man 5 proc, /proc/stat; guest time is part of user time, iowait counts as idle.
    """
    found = {}
    for line in Path(proc, "stat").read_text(encoding="ascii").splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, idle, iowait, irq, softirq, steal = (int(value) for value in values[:8])
            busy = user + nice + system + irq + softirq + steal
            found[int(name[3:])] = (busy, busy + idle + iowait)
    return found
