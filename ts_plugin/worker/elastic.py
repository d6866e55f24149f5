"""Inside a worker, at the boundaries of its requests: the cores and the number of threads that each one computes with.

Between requests a worker computes on nothing, and its slice may be borrowed. A request waits for the worker's own slice,
takes idle neighbours' slices up to the width that pays (``planning.width``), computes, and gives all of it back. Nobody
computes on a core that somebody else computes on: the locks of the board say who does, and die with their process.

A worker whose boundaries are not known (asynchronous handlers, torchrun, threads of its own) holds its slice for good.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ts_plugin.leases import binding, masks
from ts_plugin.leases.board import Board, Entry, Records, Totals, thread_places
from ts_plugin.leases.environment import set_thread_count
from ts_plugin.leases.ledger import Lease, Ledger, State
from ts_plugin.planning import width
from ts_plugin.planning.planner import Slice
from ts_plugin.worker import hooks, openmp

__all__ = ["Elastic"]

START_PATIENCE = 1.0  # seconds that a starting worker waits for whoever still computes on its slice


@dataclass(frozen=True, slots=True)
class _Ground:
    """What the next request may compute on: the worker's slice, and the slices it may borrow, nearest first."""

    lease: Lease
    neighbours: tuple[Lease, ...] = ()

    @property
    def own(self) -> Slice:
        return self.lease.slice


class Elastic(hooks.Hook):
    """The requests of this process.

    The follower's thread calls ``adopt``; everything else is called by the thread that loads and runs the model.
    ``report`` writes one line into the log, once.
    """

    def __init__(self, ledger: Ledger, lease: Lease, report: Callable[[str], None]) -> None:
        self._report = report
        self._mutex = threading.Lock()  # the follower's thread against the boundaries of a request
        self._ground = _Ground(lease)
        self._computes = False
        self._cpus = frozenset(lease.slice.cpus)  # mask of the thread that computes, where CPUs are pinned
        self._threads: int | None = None
        self._applied: Slice | None = None
        self._keeps: str | None = None
        self._locks: _Locks | None = None
        self.totals = Totals()
        if lease.slice.reach:
            try:
                self._locks = _Locks(ledger, lease)
            except OSError as error:
                report(f"lends and borrows no cores: {error}")
        os.register_at_fork(after_in_child=self._narrow_child)

    @property
    def cpus(self) -> frozenset[int]:
        """The CPUs that threads of this process may run on now."""
        return self._cpus

    # ---- called by the follower's thread ------------------------------------------------------------

    def adopt(self, lease: Lease, state: State) -> binding.Outcome | None:
        """Own ``lease`` from the next request on, and bind what does not compute; see ``masks.enforce``.

        Raises:
            OSError: the kernel refuses it.
        """
        with self._mutex:
            self._ground = _Ground(lease, _neighbours(lease, state))
            if self._locks is not None:
                self._locks.forget_decision()
                if self._computes and self._keeps is None:
                    return None  # at the end of the request
                if self._keeps is not None and self._applied != lease.slice:
                    self._locks.keep(lease)
            return self._narrow()

    def _narrow(self) -> binding.Outcome:
        """Bind the whole process to its slice."""
        lease = self._ground.lease
        before, self._cpus = self._cpus, frozenset(lease.slice.cpus)
        return masks.enforce(lease, before=before)

    # ---- called by the thread that runs the model ------------------------------------------------------

    def on_load(self, context: Any) -> None:
        """Hold the slice while the model loads, which computes; ``context`` is ts.context.Context."""
        self.hold()
        settings = getattr(context, "model_yaml_config", None) or {}
        if settings.get("asyncCommunication"):
            self._keep("its handler is asynchronous: its requests overlap")
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._keep("it is one of several ranks under torchrun, which wait for each other")
        elif context.system_properties.get("gpu_id") is not None:
            self._keep("it feeds a GPU")

    def hold(self) -> None:
        """Compute on the slice alone from now on: the start of a worker, before its first request."""
        with self._mutex:
            self._computes = True
            ground = self._ground
        if self._locks is not None:
            self._locks.take_own(ground, START_PATIENCE)
        self._compute_with(ground.own.cpus, ground.own.threads)

    def on_loaded(self) -> None:
        """The model is loaded: the worker is idle."""
        if "ts.handler_utils.micro_batching" in sys.modules:
            self._keep("its handler computes in threads of its own (MicroBatching)")
        self._finish()

    def on_request_start(self) -> None:
        if self._keeps is None and self._computes and self._locks is not None:
            self._keep("its requests overlap")
        with self._mutex:
            self._computes = True
            ground = self._ground
        if self._keeps is not None or self._locks is None:
            self._compute_with(ground.own.cpus, ground.own.threads)
            return
        cpus, threads = self._locks.take(ground)
        self._compute_with(cpus, threads)
        self._locks.begin(threads)

    def on_request_end(self) -> None:
        if self._locks is None or self._keeps is not None:
            self._computes = False
            return
        self._locks.end(self._threads or 1)
        self._finish()
        self.totals = self._locks.totals

    def _finish(self) -> None:
        """Compute on nothing: end idle threads that would spin on cores that others may take, and give all back."""
        if self._keeps is not None:
            return
        with self._mutex:
            own = frozenset(self._ground.own.cpus)
            if self._locks is not None:
                wide = not self._cpus <= own or (self._threads or 1) > self._ground.own.threads
                if wide or self._locks.lent:
                    openmp.end_idle_threads()
                if self._ground.own.pinned and self._cpus != own:
                    self._narrow()
                self._locks.release()
            self._computes = False

    def _keep(self, why: str) -> None:
        if self._keeps is None:
            self._keeps = why
            self._report(f"neither lends cores nor borrows any: {why}")
            if self._locks is not None:
                self._locks.keep(self._ground.lease)

    def _compute_with(self, cpus: Sequence[int], threads: int) -> None:
        """Bind the calling thread, whose threads inherit its mask, and set the number of intra-op threads."""
        own = self._ground.own
        if own is not self._applied:
            set_thread_count(os.environ, own.threads)
            if self._applied is not None and self._applied.numa_nodes != own.numa_nodes and own.pinned:
                binding.bind_memory(self._ground.lease.demand.policy.memory, own.numa_nodes)
            self._applied = own
        if own.pinned and self._locks is not None:
            wanted = frozenset(cpus)
            if wanted != self._cpus or os.sched_getaffinity(0) != wanted:
                ended = openmp.end_idle_threads()
                masks.move_thread(wanted, whole_process=not ended)
                self._cpus = wanted
        if threads != self._threads:
            torch = sys.modules.get("torch")
            if torch is not None and torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            self._threads = threads

    def _narrow_child(self) -> None:
        """In a child that is forked while a request computes on borrowed cores: it may live longer than that."""
        own = self._ground.own
        if own.pinned and self._locks is not None and not self._cpus <= frozenset(own.cpus):
            os.sched_setaffinity(0, own.cpus)


class _Locks:
    """What this worker holds on the board, what it has learned, and how wide it should be."""

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self._ledger = ledger
        self._identity = lease.identity
        self._queue = zlib.crc32(f"{lease.server_pid} {lease.model} {lease.version}".encode())
        self._record = width.new_record(self._queue, lease.slice.threads, time.monotonic())
        self._open()
        self._decision: width.Decision | None = None
        self._lenders: dict[int, Lease] = {}
        self._began = 0.0
        self._own_threads = lease.slice.threads
        self.lent = False  # somebody borrows in this domain
        self.totals = Totals()

    def _open(self) -> None:
        self._board = Board(self._ledger.directory, self._ledger.beside("board"))
        self._records = Records(self._ledger.directory, self._ledger.beside("records"))
        self._slot = self._board.take_slot()
        self._publish()

    def forget_decision(self) -> None:
        self._decision = None

    def _places(self, slot: int, cores: Slice) -> Sequence[int]:
        return cores.cpus if cores.pinned else thread_places(slot, cores.threads)

    def take_own(self, ground: _Ground, patience: float) -> None:
        """Take the worker's own slice, by force where somebody computes there for longer than ``patience`` seconds."""
        if self._board.lost:  # the state directory was deleted: the others open a new one, too
            self._board.close()
            self._open()
        own = ground.own
        places = self._places(self._slot, own)
        if not self._board.take(places, patience=patience) and own.pinned:
            for pid, cpus in self._board.users(places).items():
                masks.evict(pid, cpus)

    def keep(self, lease: Lease) -> None:
        """Hold the slice of ``lease`` for good."""
        self._board.release()
        self.take_own(_Ground(lease), START_PATIENCE)
        self._record = replace(self._record, cores=0)
        self._publish()

    def release(self) -> None:
        self._board.release()

    def take(self, ground: _Ground) -> tuple[Sequence[int], int]:
        """Take the own slice and idle neighbours' for one request; return the CPUs and the number of threads."""
        own = ground.own
        arrived = time.monotonic()
        others = {slot: self._records.idle_since(slot) for slot in self._lenders}
        busy = sum(since is None for since in others.values())
        self._record = width.arrived(replace(self._record, cores=own.threads), arrived, busy)
        self._publish()
        self.take_own(ground, width.patience(self._record))
        now = time.monotonic()
        if now - arrived > 0.0002:
            self.totals = replace(self.totals, waited=self.totals.waited + now - arrived)
        decision = self._decision
        if decision is None or now >= decision.until:
            decision = self._decision = self._decide(ground, now)
        slices = [own.threads]
        borrowed: list[Sequence[int]] = []
        if decision.width > own.threads:
            for lender in width.order(decision.lenders, others):
                if sum(slices) >= decision.width:
                    break
                places = self._places(lender.slot, self._lenders[lender.slot].slice)
                if self._board.borrow(places):
                    slices.append(lender.cores)
                    borrowed.append(places)
        kept, threads = width.fit(slices, decision)
        for places in borrowed[kept - 1 :]:
            self._board.give_back(places)
        self._own_threads = own.threads
        if not own.pinned:
            return own.cpus, threads
        return [*own.cpus, *(cpu for places in borrowed[: kept - 1] for cpu in places)], threads

    def begin(self, threads: int) -> None:
        self._began = time.monotonic()

    def end(self, threads: int) -> None:
        """Learn from the request that ends now."""
        now = time.monotonic()
        seconds = now - self._began
        self._record = width.served(self._record, threads, seconds, now)
        extra = threads - self._own_threads
        totals = replace(self.totals, requests=self.totals.requests + 1)
        if extra > 0:
            totals = replace(totals, wide=totals.wide + 1, borrowed=totals.borrowed + extra * seconds)
        self.totals = totals
        self._publish()

    def _decide(self, ground: _Ground, now: float) -> width.Decision:
        """Read what the neighbours publish, and choose the width for the next requests."""
        slots = self._records.slots()
        domain = {self._slot: self._record}
        self._lenders = {}
        for lease in ground.neighbours:
            slot = slots.get(lease.identity)
            entry = None if slot is None else self._records.read(slot)
            if slot is not None and entry is not None and entry.record.cores:
                domain[slot] = replace(entry.record, cores=lease.slice.threads)
                self._lenders[slot] = lease
        decision = width.decide(domain, self._slot, now)
        self._record = replace(self._record, width=decision.width)
        self.lent = any(record.width > record.cores for record in domain.values())
        return decision

    def _publish(self) -> None:
        self._records.write(self._slot, Entry(self._identity, self._record, self.totals))


def _neighbours(lease: Lease, state: State) -> tuple[Lease, ...]:
    """Return the workers that lend to this one and borrow from it, nearest first."""
    own = lease.slice
    others = [other for other in state.leases if other.slice.reach == own.reach != () and other.pid != lease.pid]

    def distance(other: Lease) -> tuple[bool, int]:
        return other.slice.l3_domains != own.l3_domains, abs(other.slice.cpus[0] - own.cpus[0])

    return tuple(sorted(others, key=distance))
