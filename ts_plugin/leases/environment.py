"""What the runtimes of a worker are told before they are loaded: environment variables, and libraries to preload."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping

from ts_plugin.planning.planner import Slice
from ts_plugin.planning.policy import Allocator, OmpRuntime, Policy

__all__ = ["COLLAPSING", "SPIN_COUNT", "THREAD_COUNTS", "collapsing", "prepare_environment", "set_thread_count"]

# These make the OpenMP runtime shrink the main thread's mask to one CPU at `import torch`, and children inherit that.
COLLAPSING = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
# How often libgomp's threads look before they sleep. By default 300,000 times, 20 ms if a pause takes long: a forward
# pass that loses a CPU half-way, to a newcomer or a busy neighbour, takes 30 times as long then, rather than 4 times.
SPIN_COUNT = "20000"
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def set_thread_count(environment: MutableMapping[str, str], threads: int) -> None:
    """Let runtimes that are yet to be loaded start with that many intra-op threads."""
    for name in THREAD_COUNTS:
        environment[name] = str(threads)
    # Without it the code that Inductor caches keeps the thread count of its first run.
    environment["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] = "1"


def collapsing(environment: Mapping[str, str]) -> list[str]:
    """Return the variables in ``environment`` that make an OpenMP runtime bind threads by itself."""
    return [name for name in COLLAPSING if name in environment]


def prepare_environment(
    environment: MutableMapping[str, str], cores: Slice, policy: Policy, *, library_roots: Iterable[str]
) -> list[str]:
    """Make the runtimes of a worker start with the slice's thread count; return notes on what was changed and why.

    ``library_roots`` are directories such as the interpreter's prefix, below which allocator libraries are looked for.
    """
    set_thread_count(environment, cores.threads)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    removed = collapsing(environment)
    for name in removed:
        del environment[name]
    notes = [
        f"{name} removed: it would shrink the worker's affinity mask to one CPU at `import torch`" for name in removed
    ]
    return notes + _preload(environment, policy, tuple(library_roots))


def _preload(environment: MutableMapping[str, str], policy: Policy, roots: tuple[str, ...]) -> list[str]:
    """Put the allocator and OpenMP runtime that the policy wants, and that exist, in front of LD_PRELOAD."""
    notes = []
    wanted: list[str] = []
    # Not jemalloc unless asked for, which run_cpu takes second: ResNet-50 lost a tenth to a fifth with it.
    allocator = policy.allocator or Allocator.TCMALLOC
    if allocator is not Allocator.DEFAULT:
        if found := _library(f"lib{allocator.value}", environment, roots):
            wanted.append(found)
            if allocator is Allocator.JEMALLOC:
                environment.setdefault("MALLOC_CONF", "oversize_threshold:1,background_thread:true,metadata_thp:auto")
        elif policy.allocator is not None:
            name = f"lib{allocator.value}.so"
            notes.append(f"{name} not found: glibc's allocator serves; install it or drop the option")
    if policy.omp_runtime is OmpRuntime.INTEL:
        bundled = _bundled_openmp(roots)
        if bundled:
            notes.append(f"libiomp5 not preloaded: this torch brings {bundled}, and two runtimes in one process clash")
        elif found := _library("libiomp5", environment, roots):
            wanted.append(found)
        else:
            notes.append("libiomp5.so not found: torch's own runtime serves; install intel-openmp or drop the option")
    present = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    names = [os.path.basename(path).partition(".so")[0] for path in present]
    wanted = [path for path in wanted if os.path.basename(path).partition(".so")[0] not in names]
    if wanted:
        environment["LD_PRELOAD"] = ":".join(wanted + present)
    return notes


def _library(name: str, environment: Mapping[str, str], roots: tuple[str, ...]) -> str | None:
    """Return the path of a shared library, or None, from the places where run_cpu looks, and Debian's."""
    prefixes = [environment[key] for key in ("CONDA_PREFIX", "VIRTUAL_ENV") if environment.get(key)]
    directories = [f"{prefix}/lib" for prefix in (*prefixes, *roots)]
    directories += [os.path.expanduser("~/.local/lib"), "/usr/local/lib", "/usr/local/lib64"]
    directories += [f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib", "/usr/lib64"]
    for directory in directories:
        try:
            files = os.listdir(directory)
        except OSError:
            continue
        matches = sorted(file for file in files if file == f"{name}.so" or file.startswith(f"{name}.so."))
        if matches:
            return f"{directory}/{matches[0]}"
    return None


def _bundled_openmp(roots: tuple[str, ...]) -> str | None:
    """Return the name of the OpenMP runtime inside the torch wheel, if there is one."""
    for root in roots:
        for place in ("torch/lib", "torch.libs"):
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            directory = f"{root}/lib/{version}/site-packages/{place}"
            try:
                files = os.listdir(directory)
            except OSError:
                continue
            for file in files:
                if file.startswith(("libgomp", "libomp", "libiomp")):
                    return file
    return None
