"""Slices and leases, for tests in which only some of their fields matter. Programs of tests import this, too."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ts_plugin.ledger.model import Lease
from ts_plugin.machine import process
from ts_plugin.planning.planner import Demand, Slice


def slice_of(cpus: Iterable[int], *, threads: int | None = None, **fields: Any) -> Slice:
    """Return a slice with a thread for each of ``cpus``, in node, L3 domain and package 0 if nothing else is said."""
    held = tuple(cpus)
    places = {"numa_nodes": (0,), "l3_domains": (0,), "packages": (0,)}
    return Slice(held, len(held) if threads is None else threads, **places | fields)


def lease_of(held: Slice | Iterable[int], pid: int | None = None, **fields: Any) -> Lease:
    """Return the lease of this process or of ``pid``; a process that does not exist is taken to have started at 1."""
    piece = held if isinstance(held, Slice) else slice_of(held)
    pid = os.getpid() if pid is None else pid
    if "start_time" not in fields:
        identity = process.identify(pid)
        fields["start_time"] = 1 if identity is None else identity.start_time
    usual = {"model": "m", "version": "1.0", "worker_id": "9000", "server_pid": None}
    return Lease(**{"pid": pid, "demand": Demand(frozenset(piece.cpus)), "slice": piece, **usual, **fields})
