"""What the kernel and the runtimes are told about a slice: affinity, memory policy, environment."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import NamedTuple

from ts_plugin.machine import discovery, process
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.planning.planner import Slice
from ts_plugin.planning.policy import Allocator, Memory, OmpRuntime, Policy

__all__ = [
    "Outcome",
    "bind_process",
    "bind_tree",
    "bind_memory",
    "collapsing",
    "move_pages",
    "prepare_environment",
    "set_thread_count",
]

# These make the OpenMP runtime shrink the main thread's mask to one CPU at `import torch`, and children inherit that.
COLLAPSING = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
# How often libgomp's threads look before they sleep. By default 300,000 times, 20 ms if a pause takes long: a forward
# pass that loses a CPU half-way, to a newcomer or a busy neighbour, takes 30 times as long then, rather than 4 times.
SPIN_COUNT = "20000"
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Source: <linux/mempolicy.h>; arch/*/entry/syscalls: (set_mempolicy, migrate_pages)
MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_LOCAL, MPOL_PREFERRED_MANY = 0, 1, 2, 4, 5
SYSCALLS = {"x86_64": (238, 256), "aarch64": (237, 238), "riscv64": (237, 238), "loongarch64": (237, 238)}
SYSCALLS |= {"ppc64le": (261, 258), "s390x": (270, 287)}


class Outcome(NamedTuple):
    """How many threads got another mask, and which children's masks the kernel does not let this user set."""

    changed: int
    refused: tuple[int, ...] = ()


def bind_tree(pid: int, cpus: Iterable[int], *, before: Iterable[int] = ()) -> Outcome:
    """Keep every thread of ``pid`` and of its descendants on ``cpus``.

    A thread that was narrowed on purpose inside ``cpus`` stays so; one that spanned all of ``before`` follows.
    Threads that start meanwhile inherit their creator's mask, so the walk repeats until it finds nothing to do.

    Raises:
        OSError: the kernel takes none of ``cpus`` (EINVAL), or refuses ``pid`` itself (EPERM: another user, seccomp).
    """
    changed, refused = 0, []
    for member in process.tree(pid):
        try:
            changed += bind_process(member, cpus, before=before)
        except OSError:
            if member == pid:
                raise
            refused.append(member)
    return Outcome(changed, tuple(refused))


def bind_process(pid: int, cpus: Iterable[int], *, before: Iterable[int] = ()) -> int:
    """Do what ``bind_tree`` does for the threads of ``pid`` alone; return how many masks had to change."""
    target, old = frozenset(cpus), frozenset(before)
    changed = 0
    for _ in range(8):
        moved = [tid for tid in process.threads(pid) if _bind_thread(tid, target, old)]
        if not moved:
            break
        changed += len(moved)
    return changed


def _bind_thread(tid: int, target: frozenset[int], old: frozenset[int]) -> bool:
    try:
        mask = os.sched_getaffinity(tid)
        if mask == target or (mask < target and mask != old):
            return False
        os.sched_setaffinity(tid, target)
        now = os.sched_getaffinity(tid)
    except ProcessLookupError:
        return False
    if not now <= target:
        raise OSError(errno.ENOTSUP, f"accepted CPUs {format_cpulist(target)}, left {format_cpulist(now)}")
    return now != mask  # a cpuset may cut the new mask back to the old one


def bind_memory(kind: Memory, nodes: Iterable[int]) -> str | None:
    """Set the calling thread's memory policy; threads and programs that it starts inherit it.

    Returns a note where the kernel refuses (containers often answer EPERM): first touch under the mask decides then.
    Source: man 2 set_mempolicy; MPOL_PREFERRED_MANY needs Linux 5.15.
    """
    present = discovery.memory_nodes()
    wanted = sorted(present.intersection(nodes))
    if kind is Memory.NONE or not wanted or len(present) < 2:
        return None
    modes: tuple[int, ...]
    if kind is Memory.LOCAL:
        modes = (MPOL_LOCAL, MPOL_DEFAULT)  # before Linux 3.8 the default was the only name of local
    elif kind is Memory.BIND:
        modes = (MPOL_BIND,)
    else:
        modes = (MPOL_PREFERRED,) if len(wanted) == 1 else (MPOL_PREFERRED_MANY,)
    failure = 0
    for mode in modes:
        failure = _syscall(0, mode, *_node_mask(() if kind is Memory.LOCAL else wanted))
        if not failure:
            return None
    return f"memory policy {kind.value} for nodes {format_cpulist(wanted)}: {os.strerror(failure)}; first touch decides"


def move_pages(pid: int, sources: Iterable[int], targets: Iterable[int]) -> str | None:
    """Move the pages of ``pid`` from one set of NUMA nodes to another; return a note where the kernel refuses.

    Source: man 2 migrate_pages; same user or CAP_SYS_NICE.
    """
    old, size = _node_mask(sources)
    new, new_size = _node_mask(targets)
    size = max(size, new_size)
    failure = _syscall(1, pid, size, old, new)
    return f"pages of {pid} stay where they are: {os.strerror(failure)}" if failure else None


def _node_mask(nodes: Iterable[int]) -> tuple[object, int]:
    """Return an array of unsigned longs with a bit per node, and its size in bits plus one, as the kernel counts."""
    import ctypes  # only machines with several NUMA nodes come here: others need not wait for the import

    width = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = (ctypes.c_ulong * 16)()  # 1,024 nodes, the most that any kernel is built for
    for node in nodes:
        words[node // width] |= 1 << (node % width)
    return words, 16 * width


def _syscall(which: int, *arguments: object) -> int:
    """Return 0 or the errno."""
    import ctypes

    numbers = SYSCALLS.get(os.uname().machine)
    if numbers is None:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return 0 if libc.syscall(ctypes.c_long(numbers[which]), *plain) >= 0 else ctypes.get_errno()


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
