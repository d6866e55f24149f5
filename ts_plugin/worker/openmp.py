"""torch's OpenMP runtime: loaded where it sees all CPUs, and its team ended when its threads should leave a core.

libgomp counts the CPUs of the mask once, when it is loaded. With more threads than that it lets them sleep after 100
spins instead of 300,000, and a forward pass takes up to three times as long: a worker that was bound to one core before
`import torch` would stay slow on every larger slice. So libgomp is loaded before torch, under a wide mask.

Source: libgomp, config/linux/proc.c (gomp_init_num_threads), config/linux/wait.h (do_spin), team.c (gomp_pause_host).
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from ts_plugin.kernel import affinity

NAMES = ("libgomp", "libiomp5", "libomp")
PAUSE_SOFT = 1  # omp_pause_resource_t: keep what the program has set

_libgomp: Any = None


def load() -> None:
    """Load torch's libgomp while this thread may use every CPU that its cpuset has; costs a few milliseconds.

    Does nothing where torch is loaded already or brings no libgomp: other runtimes count CPUs when they start threads.
    """
    global _libgomp
    if _libgomp or "torch" in sys.modules or (path := bundled("libgomp")) is None:
        return
    import ctypes

    with contextlib.suppress(OSError), affinity.widened():
        _libgomp = ctypes.CDLL(path)


def end_team() -> bool:
    """End the threads that compute for the calling one; return False where the runtime cannot do that.

    Idle ones would spin on their cores for up to 20 ms. The next parallel region starts new ones, some 20 microseconds
    each, which inherit the mask and the memory policy that the calling thread has then.

    Source: OpenMP 5.0, omp_pause_resource_all; libgomp has it since GCC 9. Intel's and LLVM's keep their threads.
    """
    global _libgomp
    if _libgomp is None and "torch" in sys.modules:
        _libgomp = _find() or False
    return bool(_libgomp) and _libgomp.omp_pause_resource_all(PAUSE_SOFT) == 0


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


def _find() -> Any:
    """Return the libgomp that this process has loaded, or None."""
    import ctypes

    for name, path in runtimes().items():
        if name.startswith("libgomp"):
            with contextlib.suppress(OSError):  # a file that was replaced
                library = ctypes.CDLL(path)
                if hasattr(library, "omp_pause_resource_all"):
                    return library
    return None


def bundled(*names: str) -> str | None:
    """Return the path of the runtime of such a name inside the torch package; torch takes one that is loaded already.

    Returns None where there is none, which does not import torch.
    """
    from importlib.util import find_spec

    with contextlib.suppress(ImportError, ValueError):
        spec = find_spec("torch")
        for package in (spec and spec.submodule_search_locations) or ():
            for directory in (f"{package}/lib", f"{package}.libs"):
                with contextlib.suppress(OSError):
                    for file in sorted(os.listdir(directory)):
                        if file.startswith(names or NAMES):
                            return f"{directory}/{file}"
    return None
