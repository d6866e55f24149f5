"""Who may set which affinity mask while workers serve:

- Who holds the ledger's lock binds newcomers to their slice, keeps everybody else inside what the new plan lets it
  reach, and moves the frontends aside.
- Inside that, a worker binds its own process: to its slice, and the thread that runs a request (``bind_thread``), whose
  threads inherit its mask, to what that request computes on.
- An owner that has waited too long for its slice takes it back from the worker that computes there (``evict``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from ts_plugin.leases import binding
from ts_plugin.leases.binding import Outcome
from ts_plugin.leases.ledger import Lease, Server, State
from ts_plugin.machine import process

__all__ = ["bind_thread", "enforce", "enforce_all", "evict", "outside", "reach", "release"]


# A frontend that may run anywhere finds idle CPUs by itself; on too few, its I/O threads, compilers and garbage
# collector, which are as many as it had CPUs when it started, wait for each other, and every request waits for them.
LEAST_ASIDE = 4  # CPUs: two cores with SMT, for all threads of a JVM
PART_ASIDE = 8  # and at least one CPU for so many that it was allowed: what it has to do grows with the workers


def reach(lease: Lease) -> frozenset[int]:
    """Return the CPUs that the threads of a worker may run on at most: its slice, and those that lend to it."""
    return lease.slice.reach or frozenset(lease.slice.cpus)


def enforce(lease: Lease, cpus: Iterable[int], *, before: Iterable[int] = ()) -> Outcome:
    """Keep all threads of a worker and of its children on ``cpus``; see ``binding.bind_tree``.

    ``before`` are the CPUs that it could use until now: threads that spanned them follow.

    Raises:
        OSError: the kernel refuses this for the worker itself.
    """
    return binding.bind_tree(lease.pid, cpus, before=before)


def bind_thread(cpus: Iterable[int]) -> None:
    """Bind the calling thread; threads that it starts inherit its mask.

    Raises:
        OSError: the kernel refuses it.
    """
    os.sched_setaffinity(0, cpus)


def evict(pid: int, cpus: Iterable[int]) -> None:
    """Take ``cpus`` from all threads of a worker that has others left; it computes on with those."""
    unwanted = frozenset(cpus)
    for tid in process.threads(pid):
        with contextlib.suppress(OSError):  # just ended
            mask = os.sched_getaffinity(tid)
            if mask & unwanted and mask - unwanted:
                os.sched_setaffinity(tid, mask - unwanted)


def outside(pid: int, cpus: Iterable[int]) -> int:
    """Return how many threads of ``pid``, without its children, may run outside of ``cpus``."""
    inside = frozenset(cpus)
    return sum(1 for tid in process.threads(pid) if not _mask(tid) <= inside)


def enforce_all(before: State, after: State) -> dict[int, OSError]:
    """Bind every worker of ``after``; return what the kernel refused, by PID. The caller holds the ledger's lock.

    Those who only lose cores come first, then those who gain some, newcomers last: no two meet on a core on the way.
    """
    changes = []
    for lease in after.leases:
        known = before.lease_of(lease.pid)
        old = None if known is None else reach(known)
        changes.append((old is None, old is None or not reach(lease) <= old, lease, old))
    refused = {}
    for _, _, lease, old in sorted(changes, key=lambda change: change[:2]):
        try:
            if old is None:
                enforce(lease, lease.slice.cpus, before=os.sched_getaffinity(lease.pid))
            else:  # what lends and borrows is never widened from outside: a request may compute there
                enforce(lease, reach(lease), before=() if lease.slice.reach else old)
        except ProcessLookupError:  # just ended
            continue
        except OSError as error:
            refused[lease.pid] = error
    for server in after.servers:
        _move_aside(server, after)
    return refused


def release(pid: int, cpus: Iterable[int], *, held: Iterable[int]) -> None:
    """Let a worker that serves unbound use ``cpus`` again, where it spans what it ``held``."""
    with contextlib.suppress(OSError):  # what refused the slice may refuse this too
        binding.bind_tree(pid, cpus, before=held)


def _move_aside(server: Server, state: State) -> None:
    """Keep the frontend's own threads off the slices where they can go elsewhere.

    That is to reserved cores, however few its user gave it, or to idle cores and SMT siblings, if these are enough.
    """
    held = {cpu for lease in state.leases if lease.slice.pinned for cpu in lease.slice.cpus}
    idle = server.allowed - held
    enough = len(idle) >= max(LEAST_ASIDE, len(server.allowed) / PART_ASIDE)
    aside = (server.allowed & state.reserved) or (idle if enough else server.allowed)
    with contextlib.suppress(OSError):  # gone already
        binding.bind_process(server.pid, aside, before=os.sched_getaffinity(server.pid))


def _mask(tid: int) -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(tid))
    except ProcessLookupError:
        return frozenset()
