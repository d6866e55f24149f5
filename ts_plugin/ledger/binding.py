"""A plan told to the kernel: every worker bound to its slice, every frontend moved off the slices."""

from __future__ import annotations

import contextlib
import os

from ts_plugin.kernel import affinity
from ts_plugin.ledger.model import Server, State
from ts_plugin.log import debug

# A frontend that may run anywhere finds idle CPUs by itself; on too few, its I/O threads, compilers and garbage
# collector, which are as many as it had CPUs when it started, wait for each other, and every request waits for them.
LEAST_ASIDE = 4  # CPUs: two cores with SMT, for all threads of a JVM
PART_ASIDE = 8  # and at least one CPU for so many that it was allowed: what it has to do grows with the workers


def bind_all(before: State, after: State) -> dict[int, OSError]:
    """Bind every worker of ``after``; return what the kernel refused, by PID. The caller holds the ledger's lock.

    Those who only lose cores come first, then those who gain some, newcomers last: two meet on a core on the
    way only where they exchange cores.
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
            borrows = lease.slice.reach if unchanged else ()
            told = affinity.bind_tree(lease.pid, lease.slice.cpus, before=spanned, borrows=borrows)
            if told.changed:
                debug("process %s: %s threads to CPUs %s", lease.pid, told.changed, frozenset(lease.slice.cpus))
        except ProcessLookupError:  # just ended
            continue
        except OSError as error:
            refused[lease.pid] = error
            debug("process %s: the kernel refuses CPUs %s: %s", lease.pid, frozenset(lease.slice.cpus), error)
    for server in after.servers:
        _move_aside(server, after)
    return refused


def _move_aside(server: Server, state: State) -> None:
    """Keep the frontend's own threads off the slices where they can go elsewhere.

    That is to reserved cores, however few its user gave it, or to idle cores and SMT siblings, if these are enough.
    """
    held = {cpu for lease in state.leases if lease.slice.pinned for cpu in lease.slice.cpus}
    idle = server.allowed - held
    enough = len(idle) >= max(LEAST_ASIDE, len(server.allowed) / PART_ASIDE)
    aside = (server.allowed & state.reserved) or (idle if enough else server.allowed)
    with contextlib.suppress(OSError):  # gone already
        if affinity.bind_process(server.pid, aside, before=os.sched_getaffinity(server.pid)):
            debug("the frontend %s moves to CPUs %s", server.pid, aside)
