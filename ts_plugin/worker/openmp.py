"""torch's OpenMP runtime: loaded where it sees all CPUs, and its idle threads ended when they should leave a core.

libgomp counts the CPUs of the mask once, when it is loaded. With more threads than that it lets them sleep after 100
spins instead of 300,000, and a forward pass takes up to three times as long: a worker that was bound to one core before
`import torch` stays slow on every slice that it grows into or borrows. So it is loaded under a wide mask, before torch.

Source: libgomp, config/linux/proc.c (gomp_init_num_threads), config/linux/wait.h (do_spin), team.c (gomp_pause_host).
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

__all__ = ["end_idle_threads", "load"]

MOST_CPUS = 8192  # Linux is built for no more
SOFT = 1  # omp_pause_soft of <omp.h>

_runtime: Any = None


def load() -> None:
    """Load torch's libgomp while this thread may use every CPU that its cpuset has; costs a few milliseconds.

    Does nothing where torch is loaded already or brings no libgomp: other runtimes count when they start threads.
    """
    global _runtime
    if "torch" in sys.modules or (path := _bundled()) is None:
        return
    mask = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        import ctypes

        os.sched_setaffinity(0, range(MOST_CPUS))  # the kernel leaves those that the cpuset has
        try:
            _runtime = ctypes.CDLL(path)
        finally:
            os.sched_setaffinity(0, mask)


def end_idle_threads() -> bool:
    """End the threads that wait for this thread's next parallel region; return whether the runtime can do that.

    They would spin on their cores for up to 20 ms more. The next region starts new ones, with the mask that this
    thread has then, some 20 microseconds each.

    Source: OpenMP 5.0, omp_pause_resource_all.
    """
    global _runtime
    if _runtime is None:
        _runtime = _loaded() or False
    return bool(_runtime) and _runtime.omp_pause_resource_all(SOFT) == 0


def _bundled() -> str | None:
    """Return the path of the libgomp inside the torch package; torch finds the same file and takes what is loaded."""
    from importlib.util import find_spec

    with contextlib.suppress(ImportError, ValueError):
        spec = find_spec("torch")
        for package in (spec and spec.submodule_search_locations) or ():
            for directory in (f"{package}/lib", f"{package}.libs"):
                with contextlib.suppress(OSError):
                    for file in sorted(os.listdir(directory)):
                        if file.startswith("libgomp"):
                            return f"{directory}/{file}"
    return None


def _loaded() -> Any:
    """Return the libgomp that this process has loaded, or None; Intel's and LLVM's keep their threads when paused."""
    import ctypes

    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            path = line.partition("/")[2].strip()
            if path.rpartition("/")[2].startswith("libgomp"):
                runtime = ctypes.CDLL(f"/{path}")
                return runtime if hasattr(runtime, "omp_pause_resource_all") else None
    return None
