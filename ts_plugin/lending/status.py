"""What a reader can know of lending: who computes where now, and what lending has done. Nothing is made or changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ts_plugin.ledger.model import Lease, State
from ts_plugin.lending.words import Seen, Status
from ts_plugin.machine.process import Identity
from ts_plugin.machine.words import count
from ts_plugin.planning.planner import Slice


def computing(seen: Mapping[Identity, Seen] | None, state: State) -> dict[int, int] | None:
    """Return the PID of the worker that computes on each CPU now, as far as ``seen``, from ``words.look``, tells it."""
    if seen is None:
        return None
    users = {}
    for lease in state.leases:
        told = seen.get(lease.identity)
        if lease.slice.pinned and told is not None and told.user is not None:
            users.update(dict.fromkeys(lease.slice.cpus, told.user.pid))
    return users


def computes_on(pid: int | None, piece: Slice, users: Mapping[int, int] | None) -> list[int] | None:
    """Return the CPUs that the owner of a slice computes on now; None where that is not known: it does not lend."""
    if users is None or not piece.pinned or not piece.reach:
        return None
    return sorted(cpu for cpu, user in users.items() if user == pid)


def status_of(state: State, pid: int | None, seen: Mapping[Identity, Seen] | None) -> Status | None:
    """Return what the worker ``pid`` tells; None where it does not lend, or has not joined those who do."""
    lease = None if pid is None else state.lease_of(pid)
    told = None if lease is None or not lease.slice.reach else (seen or {}).get(lease.identity)
    return None if told is None else told.status


def faster(status: Status) -> float | None:
    """Return how many times as fast a request is on the most threads measured as on its slice; None: not known."""
    times = [status.times[threads] for threads in sorted(status.times)]
    return times[0] / min(times[1:]) if len(times) > 1 else None


def document(lease: Lease, seen: Mapping[Identity, Seen] | None) -> dict[str, Any] | None:
    """Return what lending has done for one worker as JSON values, times in seconds; None: it has not joined."""
    told = (seen or {}).get(lease.identity)
    if told is None or told.status is None:
        return None
    status = told.status
    return {
        "requests": status.requests,
        "wide_requests": status.wide,
        "times_faster": faster(status),
        "borrowed_core_seconds": status.borrowed,
        "handed_back": status.handed_back,
        "waited": status.waited,
        "mean_wait": status.wait / status.waited if status.waited else None,
        "longest_wait": status.longest if status.waited else None,
        "taken_by_force": status.forced,
        "service_times": {str(threads): seconds for threads, seconds in status.times.items()},
        "kept_from_borrowing_by": status.why or None,
        "keeps_its_slice": status.keeps,
    }


def summary(statuses: Iterable[Status]) -> str:
    """Return one sentence about the workers that lend; nothing if none of them has answered a request."""
    served = [status for status in statuses if status.requests]
    requests, wide = sum(status.requests for status in served), sum(status.wide for status in served)
    if not requests:
        return ""
    text = f"lending: {count(wide, 'request')} of {requests} computed on idle workers' cores, too"
    gains = [(gain, status.wide) for status in served if status.wide and (gain := faster(status))]
    if gains:
        mean = sum(gain * weight for gain, weight in gains) / sum(weight for _, weight in gains)
        text += f" ({mean:.2f} x as fast)"
    if waited := sum(status.waited for status in served):
        mean, longest = sum(status.wait for status in served) / waited, max(status.longest for status in served)
        text += f"; {waited} found their own in use, for {1000 * mean:.2f} ms (longest {1000 * longest:.1f})"
    return text
