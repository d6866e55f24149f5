"""Where a worker's memory lies: the policy that the kernel is told, and pages that follow to other NUMA nodes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from ts_plugin.machine import discovery
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.planning.policy import Memory

# Source: <linux/mempolicy.h>; arch/*/entry/syscalls: (set_mempolicy, migrate_pages)
MPOL_PREFERRED, MPOL_BIND, MPOL_LOCAL, MPOL_PREFERRED_MANY = 1, 2, 4, 5
SYSCALLS = {"x86_64": (238, 256), "aarch64": (237, 238), "riscv64": (237, 238), "loongarch64": (237, 238)}
SYSCALLS |= {"ppc64le": (261, 258), "s390x": (270, 287)}


def bind_memory(kind: Memory, nodes: Iterable[int]) -> str | None:
    """Set the calling thread's memory policy; threads and programs that it starts inherit it.

    Returns a note where the kernel refuses (containers often answer EPERM): first touch under the mask decides then.
    Source: man 2 set_mempolicy; MPOL_PREFERRED_MANY needs Linux 5.15.
    """
    present = discovery.memory_nodes()
    wanted = sorted(present.intersection(nodes))
    if kind is Memory.NONE or not wanted or len(present) < 2:
        return None
    mode = MPOL_PREFERRED if len(wanted) == 1 else MPOL_PREFERRED_MANY
    mode = {Memory.LOCAL: MPOL_LOCAL, Memory.BIND: MPOL_BIND}.get(kind, mode)
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
