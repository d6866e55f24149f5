"""What the runtimes of a worker are told before they are loaded: environment variables, and libraries to preload."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping

from ts_plugin.planning.planner import Slice
from ts_plugin.planning.policy import Allocator, OmpRuntime, Policy
from ts_plugin.worker import openmp

# These can make the OpenMP runtime shrink the main thread's mask to one CPU at `import torch`; children inherit that.
COLLAPSING = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
# How libraries that replace malloc are named. Of two in LD_PRELOAD the first serves, so ours would turn off the user's.
ALLOCATORS = ("libtcmalloc", "libjemalloc", "libmimalloc", "libsnmalloc", "libtbbmalloc", "libhoard", "librpmalloc")
BINDS = ("true", "close", "spread", "master", "primary")
KMP_BINDS = ("balanced", "compact", "explicit", "logical", "physical", "scatter")
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def set_thread_count(environment: MutableMapping[str, str], threads: int) -> None:
    """Let runtimes that are yet to be loaded start with that many intra-op threads."""
    for name in THREAD_COUNTS:
        environment[name] = str(threads)
    # Without it the code that Inductor caches keeps the thread count of its first run.
    environment["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] = "1"


def collapsing(environment: Mapping[str, str]) -> list[str]:
    """Return the variables in ``environment`` that make an OpenMP runtime bind threads by itself.

    Source: OpenMP 5.2, OMP_PROC_BIND and OMP_PLACES; libgomp, env.c; Intel's runtime, "Thread Affinity Interface".
    """
    # libgomp then overlooks the others of its own.
    off = environment.get("OMP_PROC_BIND", "").strip().lower() == "false"
    return [name for name in COLLAPSING if name in environment and _binds(name, environment[name].lower(), off=off)]


def _binds(name: str, value: str, *, off: bool) -> bool:
    words = {word.strip() for word in value.split(",")}
    if name == "OMP_PROC_BIND":
        return not words.isdisjoint(BINDS)
    if name == "KMP_AFFINITY":
        return not words.isdisjoint(KMP_BINDS)
    return not off and (name == "GOMP_CPU_AFFINITY" or bool(value.strip()))  # an empty list is one for libgomp


def prepare_environment(
    environment: MutableMapping[str, str], cores: Slice, policy: Policy, *, library_roots: Iterable[str]
) -> list[str]:
    """Make the runtimes of a worker start with the slice's thread count; return notes on what was changed and why.

    ``library_roots`` are directories such as the interpreter's prefix, below which allocator libraries are looked for.
    """
    set_thread_count(environment, cores.threads)
    removed = collapsing(environment)
    for name in removed:
        del environment[name]
    notes = [
        f"{name} removed: it would shrink the worker's affinity mask to one CPU at `import torch`" for name in removed
    ]
    return notes + preload(environment, policy, library_roots)


def preload(environment: MutableMapping[str, str], policy: Policy, library_roots: Iterable[str]) -> list[str]:
    """Put the allocator and OpenMP runtime that the policy wants, and that exist, into LD_PRELOAD; return notes."""
    roots = tuple(library_roots)
    present = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    allocator, notes = _allocator(environment, policy, roots, present)
    runtime, more = _openmp_runtime(environment, policy, roots)
    names = [_stem(path) for path in present]
    wanted = [path for path in (allocator, runtime) if path is not None and _stem(path) not in names]
    if wanted:
        environment["LD_PRELOAD"] = ":".join(wanted + present)
    return notes + more


def _stem(path: str) -> str:
    return os.path.basename(path).partition(".so")[0]


def _allocator(
    environment: MutableMapping[str, str], policy: Policy, roots: tuple[str, ...], present: Iterable[str]
) -> tuple[str | None, list[str]]:
    """Return the allocator to preload, and notes; one that the user preloads already stays the only one."""
    # Not jemalloc unless asked for, which run_cpu takes second: ResNet-50 lost a tenth to a fifth with it.
    kind = policy.allocator or Allocator.TCMALLOC
    if kind is Allocator.DEFAULT:
        return None, []
    name = f"lib{kind.value}"
    preloaded = next((path for path in present if _stem(path).startswith(ALLOCATORS)), None)
    if preloaded is not None and not _stem(preloaded).startswith(name):
        left_out = f"{name}.so not preloaded: {preloaded} in LD_PRELOAD stays; remove it there or drop the option"
        return None, [left_out] if policy.allocator is not None else []
    found = preloaded or _library(name, environment, roots)
    if found is None:
        missing = f"{name}.so not found: glibc's allocator is used; install it or drop the option"
        return None, [missing] if policy.allocator is not None else []
    if kind is Allocator.JEMALLOC:
        environment.setdefault("MALLOC_CONF", "oversize_threshold:1,background_thread:true,metadata_thp:auto")
    return found, []


def _openmp_runtime(
    environment: Mapping[str, str], policy: Policy, roots: tuple[str, ...]
) -> tuple[str | None, list[str]]:
    """Return the OpenMP runtime to preload, and notes; torch must not bring another one."""
    if policy.omp_runtime is not OmpRuntime.INTEL:
        return None, []
    if path := openmp.bundled():
        own = os.path.basename(path)
        return None, [f"libiomp5 not preloaded: this torch brings {own}, and two runtimes in one process clash"]
    if found := _library("libiomp5", environment, roots):
        return found, []
    return None, ["libiomp5.so not found: torch's own runtime is used; install intel-openmp or drop the option"]


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
