"""Affinity masks: the one file that sets any, with ``regions.c`` for the threads of a request that borrows.

- Who holds the ledger's lock binds all workers to their slices, and moves the frontends aside (``ledger.binding``).
- A worker binds its own process to its slice again where something has changed its masks (``worker.requests``).
- An owner that has waited too long for its slice takes it back from the worker that computes there (``evict``).

In a request that computes wide, those threads of the OpenMP team that are more than the slice has run on borrowed CPUs
alone: ``regions.c`` sets their masks, and ends them when the CPUs go back.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ts_plugin.machine import process
from ts_plugin.machine.cpulist import format_cpulist

MOST_CPUS = 8192  # Linux is built for no more


class Outcome(NamedTuple):
    """How many threads got another mask, and which children's masks the kernel does not let this user set."""

    changed: int
    refused: tuple[int, ...] = ()


def bind_tree(pid: int, cpus: Iterable[int], *, before: Iterable[int] = (), borrows: Iterable[int] = ()) -> Outcome:
    """Keep every thread of ``pid`` and of its descendants on ``cpus``.

    A thread that was narrowed on purpose stays so: inside ``cpus``, or inside what ``borrows`` has beyond them, since
    no thread of a wide request spans both. One that spanned all of ``before`` follows. Threads that start meanwhile
    inherit their creator's mask, so the walk repeats until nothing is left to do.

    Raises:
        OSError: the kernel takes none of ``cpus`` (EINVAL), or refuses ``pid`` itself (EPERM: another user, seccomp).
    """
    changed, refused = 0, []
    for member in process.tree(pid):
        try:
            changed += bind_process(member, cpus, before=before, borrows=borrows)
        except OSError:
            if member == pid:
                raise
            refused.append(member)
    return Outcome(changed, tuple(refused))


def bind_process(pid: int, cpus: Iterable[int], *, before: Iterable[int] = (), borrows: Iterable[int] = ()) -> int:
    """Do what ``bind_tree`` does for the threads of ``pid`` alone; return how many masks had to change."""
    target, old = frozenset(cpus), frozenset(before)
    borrowed = frozenset(borrows) - target
    changed = 0
    for _ in range(8):
        moved = [tid for tid in process.threads(pid) if _bind_thread(tid, target, old, borrowed)]
        if not moved:
            break
        changed += len(moved)
    return changed


def _bind_thread(tid: int, target: frozenset[int], old: frozenset[int], borrowed: frozenset[int]) -> bool:
    try:
        before = os.sched_getaffinity(tid)
        narrowed = before <= target or before <= borrowed
        if before == target or (narrowed and before != old):
            return False
        os.sched_setaffinity(tid, target)
        now = os.sched_getaffinity(tid)
    except ProcessLookupError:
        return False
    if not now <= target:
        raise OSError(errno.ENOTSUP, f"accepted CPUs {format_cpulist(target)}, left {format_cpulist(now)}")
    return now != before  # a cpuset may cut the new mask back to the old one


def evict(pid: int, cpus: Iterable[int], *, otherwise: Iterable[int]) -> None:
    """Take ``cpus`` from all threads of ``pid``; one that has no others left goes to those in ``otherwise``."""
    unwanted = frozenset(cpus)
    for tid in process.threads(pid):
        with contextlib.suppress(OSError):  # just ended
            before = os.sched_getaffinity(tid)
            if before & unwanted:
                os.sched_setaffinity(tid, before - unwanted or otherwise)


def outside(pid: int, cpus: Iterable[int]) -> int:
    """Return how many threads of ``pid``, without its children, may run outside of ``cpus``."""
    inside = frozenset(cpus)
    return sum(1 for tid in process.threads(pid) if not mask(tid) <= inside)


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """Let the calling thread use every CPU that its cpuset has, for a while.

    Raises:
        OSError: the kernel refuses it.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(MOST_CPUS))  # the kernel leaves those that the cpuset has
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def mask(tid: int) -> frozenset[int]:
    """Return the CPUs that a thread may use; none if it has ended."""
    with contextlib.suppress(OSError):
        return frozenset(os.sched_getaffinity(tid))
    return frozenset()
