"""What a reader can know of lending: who computes where now, and what the workers have learned of their requests.

Readers create no file and change nothing. What cannot be read is None or empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ts_plugin.leases.board import Board, Entry, Records, Totals
from ts_plugin.leases.ledger import Lease, Ledger, State
from ts_plugin.machine.process import Identity
from ts_plugin.planning.planner import Slice
from ts_plugin.planning.width import Decision, Record, Traffic, decide, traffic

__all__ = ["Learned", "computes_on", "computing", "entries", "learned", "learned_document"]


def computing(ledger: Ledger, state: State) -> dict[int, int] | None:
    """Return the PID of the worker that computes on each CPU now; None where nothing is known.

    Asks the board, for the CPUs of all slices. Each CPU is asked for by itself: a request may end between two. Not
    for workers: they would lose their own locks by it.
    """
    try:
        board = Board(*ledger.beside("board"), reading=True)
    except OSError:
        return None
    try:
        users = board.users(cpu for lease in state.leases if lease.slice.pinned for cpu in lease.slice.cpus)
    finally:
        board.close()
    return {cpu: pid for pid, cpus in users.items() for cpu in cpus}


def computes_on(pid: int | None, own: Slice, users: Mapping[int, int] | None) -> list[int] | None:
    """Return the CPUs that the owner of a slice computes on now; None where that is not known: it does not lend."""
    if users is None or not own.pinned or not own.reach:
        return None
    return sorted(cpu for cpu, user in users.items() if user == pid)


def entries(ledger: Ledger) -> dict[Identity, Entry]:
    """Return what the workers have published, those that have ended included."""
    try:
        records = Records(*ledger.beside("records"), reading=True)
    except OSError:
        return {}
    return {worker: entry for worker, slot in records.slots().items() if (entry := records.read(slot)) is not None}


@dataclass(frozen=True, slots=True)
class Learned:
    """What one worker knows of its requests. ``decision`` is the one that it would make now.

    ``record`` has 0 cores where the worker keeps its slice; ``traffic`` and ``decision`` are None then.
    """

    record: Record
    totals: Totals
    traffic: Traffic | None = None
    decision: Decision | None = None


def learned(lease: Lease, state: State, known: Mapping[Identity, Entry], now: float) -> Learned | None:
    """Return what a worker has published, in its domain; None where it has published nothing.

    ``known`` is what ``entries`` returned, ``now`` the time of CLOCK_MONOTONIC in seconds.
    """
    own = known.get(lease.identity)
    if own is None or not lease.slice.reach:
        return None
    if not own.record.cores:
        return Learned(own.record, own.totals)
    domain = {}
    for other in (lease, *state.neighbours(lease)):
        entry = known.get(other.identity)
        if entry is not None and entry.record.cores:
            domain[other.pid] = replace(entry.record, cores=other.slice.threads)
    return Learned(own.record, own.totals, traffic(domain, lease.pid, now), decide(domain, lease.pid, now))


def learned_document(found: Learned | None) -> dict[str, Any] | None:
    """Return what a worker knows as JSON values. Times are in seconds; None is an endless response."""
    if found is None:
        return None
    estimates = found.decision.estimates if found.decision else ()
    return {
        "cap": found.record.width if found.record.cores else None,
        "next_cap": found.decision.width if found.decision else None,
        "rate": found.traffic.rate if found.traffic else None,
        "load": found.traffic.load if found.traffic else None,
        "at_once": found.traffic.at_once if found.traffic else None,
        "measured": [
            {"cores": one.cores, "seconds": one.seconds, "requests": one.weight} for one in found.record.measured
        ],
        "estimates": [
            {
                "cores": one.cores,
                "seconds": one.seconds,
                "requests": one.weight,
                "response": one.response if math.isfinite(one.response) else None,
            }
            for one in estimates
        ],
        "requests": found.totals.requests,
        "wide_requests": found.totals.wide,
        "borrowed_core_seconds": found.totals.borrowed,
        "waited_seconds": found.totals.waited,
    }
