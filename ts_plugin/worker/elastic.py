"""Inside a worker, at the boundaries of its requests: which cores and how many threads this one computes with.

Between requests a worker computes on nothing, and its slice may be borrowed. A request waits for the worker's own slice,
takes idle neighbours' slices up to the width that pays (``planning.width``), computes, and gives all of it back. Nobody
computes on a core that somebody else computes on: the board's locks say so, and a process that dies loses them.

A worker whose boundaries are not known (asynchronous handlers, torchrun, threads of its own) holds its slice for good.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ts_plugin.leases import binding, environment, masks
from ts_plugin.leases.board import Board, Entry, Records, Totals, thread_places
from ts_plugin.leases.ledger import Lease, Ledger, State
from ts_plugin.machine.process import Identity
from ts_plugin.planning import width
from ts_plugin.planning.planner import Slice
from ts_plugin.worker import openmp

__all__ = ["Elastic"]

LOAD_PATIENCE = 1.0  # seconds that a starting worker waits for whoever computes on its slice still


@dataclass(frozen=True, slots=True)
class _Ground:
    """What a request may compute on: the worker's slice, and the neighbours it may borrow from, nearest first."""

    own: Slice
    neighbours: tuple[Lease, ...] = ()


class Elastic:
    """The requests of this process. The thread that follows the ledger calls ``adopt``, the one that computes the rest."""

    def __init__(self, ledger: Ledger, lease: Lease, report: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._identity = lease.identity
        self._report = report
        self._mutex = threading.Lock()  # the follower's thread against the beginning and the end of a request
        self._ground = _Ground(lease.slice)
        self._policy = lease.demand.policy
        self._name = lease.queue
        self._computes = False  # a request, or the start of the worker
        self._applied: Slice | None = None
        self._threads = 0
        self._cpus = frozenset(lease.slice.cpus)
        self._keeps: str | None = None  # why this worker neither lends nor borrows
        self._board: Board | None = None
        self._records: Records | None = None
        self._slot = 0
        self._record = width.new_record(lease.queue, lease.slice.threads, time.monotonic())
        self._decision: width.Decision | None = None
        self._lenders: dict[int, Lease] = {}
        self._lent = False
        self._held: tuple[int, ...] = ()
        self._began = 0.0
        self.totals = Totals()
        os.register_at_fork(after_in_child=self._narrow_child)

    @property
    def cpus(self) -> frozenset[int]:
        """The CPUs that the threads of this process may run on now."""
        return self._cpus if self._computes else frozenset(self._ground.own.cpus)

    # ---- from the follower's thread -------------------------------------------------------------

    def adopt(self, lease: Lease, state: State) -> None:
        """Own ``lease`` from the next request on; bind what does not compute now."""
        before = self._ground.own
        with self._mutex:
            self._ground = _Ground(lease.slice, _neighbours(lease, state))
            self._policy, self._name = lease.demand.policy, lease.queue
            if lease.slice != before:
                self._decision = None
                if self._keeps is not None and self._board is not None:
                    self._board.release()
                    self._take(self._board, LOAD_PATIENCE)
            if not self._computes or self._board is None:
                masks.enforce(lease, cpus=lease.slice.cpus, before=self._cpus)
                self._cpus = frozenset(lease.slice.cpus)
