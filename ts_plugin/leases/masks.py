"""The only place that sets affinity masks. Who may set whose:

- Who holds the ledger's lock binds every worker to what the new plan lets it reach, and moves the frontends aside.
- A worker's follower binds its own process, children included, to what its own lease lets it reach.
- Inside that, the thread that runs a request may narrow itself and the threads that it started: a mask that is a part
  of what the worker may reach is left alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from ts_plugin.leases import binding
from ts_plugin.leases.binding import Outcome
from ts_plugin.leases.ledger import Lease, Server, State
from ts_plugin.machine import process

__all__ = ["enforce", "enforce_all", "outside", "reach", "release"]


def reach(lease: Lease) -> frozenset[int]:
    """Return the CPUs that the threads of a worker may run on at most: its slice.

    Whoever binds a worker asks here, so a worker that may borrow CPUs beyond its slice needs a change here alone.
    """
    return frozenset(lease.slice.cpus)


def enforce(lease: Lease, *, before: Iterable[int] = ()) -> Outcome:
    """Keep all threads of a worker and of its children on what it may reach; see ``binding.bind_tree``.

    ``before`` is what it could reach until now: threads that spanned it follow.

    Raises:
        OSError: the kernel refuses this for the worker itself.
    """
    return binding.bind_tree(lease.pid, reach(lease), before=before)


def outside(lease: Lease) -> int:
    """Return how many threads of a worker, without its children, may run outside of what it may reach."""
    return sum(1 for tid in process.threads(lease.pid) if not _mask(tid) <= reach(lease))


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
            enforce(lease, before=old or os.sched_getaffinity(lease.pid))
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
    """Keep the frontend's own threads off the slices where they can go elsewhere: reserved cores, idle SMT siblings."""
    held = {cpu for lease in state.leases if lease.slice.pinned for cpu in lease.slice.cpus}
    free = (server.allowed & state.reserved) or (server.allowed - held)
    with contextlib.suppress(OSError):  # gone already
        binding.bind_process(server.pid, free or server.allowed, before=os.sched_getaffinity(server.pid))


def _mask(tid: int) -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(tid))
    except ProcessLookupError:
        return frozenset()
