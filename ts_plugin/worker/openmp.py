"""The OpenMP runtimes that are loaded into this process."""

from __future__ import annotations

import os

__all__ = ["end_team", "runtimes"]

NAMES = ("libgomp", "libiomp5", "libomp")
PAUSE_SOFT = 1  # omp_pause_resource_t: keep what the program has set


def runtimes() -> dict[str, str]:
    """Return file name -> path of every OpenMP runtime in this process."""
    found = {}
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            for line in file:
                path = line.rstrip("\n").partition("/")[2]
                name = os.path.basename(path)
                if name.startswith(NAMES):
                    found[name] = f"/{path}"
    except OSError:
        return {}
    return dict(sorted(found.items()))


def end_team() -> None:
    """End the threads that compute for the calling one; its next parallel region starts new ones.

    A memory policy belongs to a thread, and only the thread itself can set it: new ones inherit it from the caller.
    Source: OpenMP 5.0, omp_pause_resource_all; libgomp has it since GCC 9.
    """
    import ctypes  # workers that never leave a NUMA node do without it

    for path in runtimes().values():
        try:
            ctypes.CDLL(path).omp_pause_resource_all(PAUSE_SOFT)
        except (OSError, AttributeError):  # a file that was replaced, an older runtime: its threads stay as they are
            continue
