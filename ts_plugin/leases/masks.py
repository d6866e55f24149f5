"""Who may set which affinity mask while workers serve:

- Who holds the ledger's lock binds all workers to their slices, and moves the frontends aside.
- A worker binds its own process to its slice again where something has changed its masks.
- An owner that has waited too long for its slice takes it back from the worker that computes there (``evict``).

In a request that computes wide, the threads of the OpenMP team may reach the slices that lend (regions.c sets their
masks, and takes them back), as long as no slice changes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from ts_plugin.leases import binding
from ts_plugin.leases.binding import Outcome
from ts_plugin.leases.ledger import Lease, Server, State
from ts_plugin.machine import process

__all__ = ["enforce", "enforce_all", "evict", "outside", "release"]


# A frontend that may run anywhere finds idle CPUs by itself; on too few, its I/O threads, compilers and garbage
# collector, which are as many as it had CPUs when it started, wait for each other, and every request waits for them.
LEAST_ASIDE = 4  # CPUs: two cores with SMT, for all threads of a JVM
PART_ASIDE = 8  # and at least one CPU for so many that it was allowed: what it has to do grows with the workers


def enforce(lease: Lease, *, before: Iterable[int] = (), borrows: Iterable[int] = ()) -> Outcome:
    """Keep all threads of a worker and of its children on its slice; see ``binding.bind_tree``.

    ``before`` are the CPUs that it could use until now: threads that spanned them follow. Threads that reach
    ``borrows`` too stay as they are.

    Raises:
        OSError: the kernel refuses this for the worker itself.
    """
    return binding.bind_tree(lease.pid, lease.slice.cpus, before=before, borrows=borrows)


def evict(borrower: Lease, cpus: Iterable[int]) -> None:
    """Take ``cpus`` from all threads of a worker; one that has no others left goes back to the worker's slice."""
    unwanted = frozenset(cpus)
    for tid in process.threads(borrower.pid):
        with contextlib.suppress(OSError):  # just ended
            mask = os.sched_getaffinity(tid)
            if mask & unwanted:
                os.sched_setaffinity(tid, mask - unwanted or borrower.slice.cpus)


def outside(pid: int, cpus: Iterable[int]) -> int:
    """Return how many threads of ``pid``, without its children, may run outside of ``cpus``."""
    inside = frozenset(cpus)
    return sum(1 for tid in process.threads(pid) if not _mask(tid) <= inside)


def enforce_all(before: State, after: State) -> dict[int, OSError]:
    """Bind every worker of ``after``; return what the kernel refused, by PID. The caller holds the ledger's lock.

    Those who only lose cores come first, then those who gain some, newcomers last: no two meet on a core on the way.
    """
    slices = {lease.pid: lease.slice for lease in after.leases}
    unchanged = slices == {lease.pid: lease.slice for lease in before.leases}
    changes = []
    for lease in after.leases:
        known = before.lease_of(lease.pid)
        old = None if known is None else frozenset(known.slice.cpus)
        changes.append((old is None, old is None or not old.issuperset(lease.slice.cpus), lease, old))
    refused = {}
    for _, _, lease, old in sorted(changes, key=lambda change: change[:2]):
        try:
            spanned = os.sched_getaffinity(lease.pid) if old is None else old
            enforce(lease, before=spanned, borrows=lease.slice.reach if unchanged else ())
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
