"""Inside a worker, at the boundaries of its requests: which cores and how many threads each one computes with.

Between requests a worker computes on nothing, and its slice may be borrowed. A request waits for the worker's own
slice, takes idle neighbours' slices up to the width that pays (``planning.width``), computes, and gives all of it back.
Nobody computes on a core that somebody else computes on: the board's locks say who does, and end with their process.

A worker whose requests have no clear boundaries (asynchronous handlers, torchrun, threads of its own) keeps its slice.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
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
NO_WAIT = 0.0002  # seconds: what taking a free slice takes at most


@dataclass(frozen=True, slots=True)
class _Ground:
    """What the next request may compute on: the worker's slice, and the slices it may borrow, nearest first."""

    lease: Lease
    neighbours: tuple[Lease, ...] = ()

    @property
    def own(self) -> Slice:
        return self.lease.slice


class Elastic(hooks.Hook):
    """The masks and the thread count of this process, which computes on the slice of ``lease`` until ``on_loaded``.

    The follower's thread calls ``adopt`` and ``bind``; the thread that loads and runs the model calls everything else.
    ``report`` writes a line into the log, once.
    """

    def __init__(self, ledger: Ledger, lease: Lease, report: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._report = report
        self._mutex = threading.Lock()  # one thread's ground and masks against the other's
        self._ground = _Ground(lease)
        self._exchange: _Exchange | None = None
        self._keeps: str | None = None  # why this worker neither lends nor borrows
        self._starts = True  # computes outside of any request
        self._requests = 0  # under way: at most one, or boundaries mean nothing
        self._cpus = self._bound = frozenset(lease.slice.cpus)  # of the thread that computes; of all others
        self._threads = 0
        self._applied: Slice | None = None
        self._join(lease)
        os.register_at_fork(after_in_child=self._narrow_child)

    @property
    def totals(self) -> Totals:
        return Totals() if self._exchange is None else self._exchange.totals

    # ---- the follower's thread -------------------------------------------------------------------------

    def adopt(self, lease: Lease, state: State) -> None:
        """Compute on the slice of ``lease`` from the next request on; ``state`` tells the neighbours."""
        with self._mutex:
            moved = lease.slice.cpus != self._ground.own.cpus
            self._ground = _Ground(lease, state.neighbours(lease))
            self._join(lease)
            if self._exchange is not None:
                self._exchange.forget_decision()
                if moved and (self._starts or self._keeps is not None):
                    self._exchange.release()
                    self._exchange.take_own(self._ground, START_PATIENCE)
                elif not self._requests:
                    self._exchange.reopen()

    def bind(self, *, before: Iterable[int] | None = None) -> binding.Outcome:
        """Keep every thread of this process and of its children on what it computes with now, or else on its slice.

        ``before``: what threads span that should follow, if not what they were bound to last.

        Raises:
            OSError: the kernel refuses it.
        """
        with self._mutex:
            lease = self._ground.lease
            lent = self._requests and self._exchange is not None and self._keeps is None
            target = self._cpus if lent else frozenset(lease.slice.cpus)
            old, self._bound = self._bound if before is None else before, target
            self._cpus = target
            return masks.enforce(lease, target, before=old)

    @property
    def cpus(self) -> frozenset[int]:
        """The CPUs that ``bind`` keeps this process on."""
        return self._bound

    def _join(self, lease: Lease) -> None:
        """Lend and borrow from now on, or stop doing so, as the plan says."""
        if not lease.slice.reach:
            if self._exchange is not None and not self._requests:
                self._exchange.close()
                self._exchange = None
        elif self._exchange is None:
            try:
                self._exchange = _Exchange(self._ledger, lease)
            except OSError as error:
                self._report(f"neither lends cores nor borrows any: {error}")

    # ---- the thread that loads and runs the model ------------------------------------------------------

    def on_load(self, context: Any) -> None:
        """Hold the slice while the model loads, which computes; ``context`` is TorchServe's ts.context.Context."""
        settings = getattr(context, "model_yaml_config", None) or {}
        if settings.get("asyncCommunication"):
            self._keep("its handler is asynchronous, so its requests overlap")
        elif int(os.environ.get("WORLD_SIZE") or 1) > 1:
            self._keep("it is one of several ranks of torchrun, which wait for each other")
        elif context.system_properties.get("gpu_id") is not None:
            self._keep("its core feeds a GPU")
        self.hold()

    def hold(self) -> None:
        """Compute on the slice alone, outside of any request: the start of a worker."""
        with self._mutex:
            self._starts = True
        ground, exchange = self._what_there_is()
        if exchange is not None:
            exchange.take_own(ground, START_PATIENCE)
        self._compute_on(ground.own, ground.own.cpus, ground.own.threads)

    def on_loaded(self) -> None:
        """Compute on nothing until the first request."""
        self._finish()

    def on_request_start(self) -> None:
        with self._mutex:
            self._requests += 1
        if self._requests > 1:
            self._keep("its requests overlap")
        ground, exchange = self._what_there_is()
        if exchange is None or self._keeps is not None:
            self._compute_on(ground.own, ground.own.cpus, ground.own.threads)
        else:
            self._compute_on(ground.own, *exchange.take(ground))
            exchange.begin()

    def _what_there_is(self) -> tuple[_Ground, _Exchange | None]:
        with self._mutex:
            return self._ground, self._exchange if self._ground.own.reach else None

    def on_compute(self) -> None:
        """Let the calling thread, one of the handler's own, compute with the slice's threads."""
        self._keep("its handler computes in threads of its own")
        _set_threads(self._ground.own.threads)

    def on_request_end(self) -> None:
        with self._mutex:
            self._requests -= 1
        if self._exchange is not None and self._keeps is None:
            evicted = self._ground.own.pinned and os.sched_getaffinity(0) != self._cpus
            self._exchange.end(self._threads, undisturbed=not evicted)
        if not self._requests:
            self._finish()

    def _compute_on(self, own: Slice, cpus: tuple[int, ...], threads: int) -> None:
        """Bind the calling thread, whose threads inherit its mask, and set the number of intra-op threads."""
        if own is not self._applied:
            set_thread_count(os.environ, own.threads)
            if self._applied is not None and self._applied.numa_nodes != own.numa_nodes and own.pinned:
                if note := binding.bind_memory(self._ground.lease.demand.policy.memory, own.numa_nodes):
                    self._report(note)
                openmp.end_team()  # its threads keep the policy of the nodes that were left
            self._applied = own
        if own.pinned and self._exchange is not None:
            wanted = frozenset(cpus)
            if self._cpus != wanted or os.sched_getaffinity(0) != wanted:
                with self._mutex:
                    self._cpus = wanted
                    if not openmp.end_team():  # another runtime: its threads live on, and must follow
                        masks.enforce(self._ground.lease, wanted, before=self._bound)
                        self._bound = wanted
                    masks.bind_thread(wanted)
        self._threads = threads
        _set_threads(threads)

    def _finish(self) -> None:
        """Compute on nothing. The team ends where others may want its cores: its threads would spin there."""
        with self._mutex:
            self._starts = False
            exchange, own = self._exchange, frozenset(self._ground.own.cpus)
            if exchange is None or self._keeps is not None:
                return
            if self._cpus != own or exchange.lent:
                openmp.end_team()
            if self._ground.own.pinned and self._cpus != own:
                self._cpus = own
                masks.bind_thread(own)
                if self._bound != own or masks.outside(os.getpid(), own):
                    masks.enforce(self._ground.lease, own, before=self._bound)
                self._bound = own
            exchange.release()

    def _keep(self, why: str) -> None:
        """Neither lend nor borrow from now on."""
        with self._mutex:
            if self._keeps is None:
                self._keeps = why
                if self._exchange is not None:
                    self._report(f"neither lends cores nor borrows any: {why}")
                    self._exchange.keep(self._ground.lease)

    def _narrow_child(self) -> None:
        """In a forked child: it may live longer than the request that computes on borrowed cores now."""
        own = self._ground.own
        if own.pinned and self._cpus != frozenset(own.cpus):
            masks.bind_thread(own.cpus)


def _set_threads(threads: int) -> None:
    """Set the intra-op threads of the calling thread, and of those that compute for the first time after this."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


class _Exchange:
    """What this worker holds on the board, what it has learned, and how wide it wants to be."""

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self._ledger = ledger
        self._identity = lease.identity
        queue = zlib.crc32(f"{lease.server_pid} {lease.model} {lease.version}".encode())
        self._record = width.new_record(queue, lease.slice.threads, time.monotonic())
        self._decision: width.Decision | None = None
        self._lenders: dict[int, Lease] = {}  # by the slot of their records
        self._began = 0.0
        self.lent = False  # somebody in this domain computes wide, or would
        self.totals = Totals()
        self._open()

    def _open(self) -> None:
        board = Board(*self._ledger.beside("board"))
        try:
            self._records = Records(*self._ledger.beside("records"))
            self._slot = board.take_slot()
        except OSError:
            board.close()
            raise
        self._board = board
        self._publish()

    def reopen(self) -> None:
        """Go where the others go if the state directory was deleted."""
        if self._board.lost:
            lost = self._board
            self._open()
            lost.close()

    def close(self) -> None:
        self._record = replace(self._record, cores=0)
        self._publish()
        self._board.close()

    def forget_decision(self) -> None:
        self._decision = None

    def keep(self, lease: Lease) -> None:
        """Hold the slice of ``lease`` for good."""
        self._board.release()
        self._record = replace(self._record, cores=0)
        self.take_own(_Ground(lease), START_PATIENCE)
        self._publish()

    def take_own(self, ground: _Ground, patience: float) -> None:
        """Take the worker's own slice, by force where somebody computes there for longer than ``patience`` seconds."""
        self.reopen()
        own = ground.own
        places = _places(self._slot, own)
        if not self._board.take(places, patience=patience) and own.pinned:
            for pid, cpus in self._board.users(places).items():
                masks.evict(pid, cpus)

    def take(self, ground: _Ground) -> tuple[tuple[int, ...], int]:
        """Take the own slice and idle neighbours' for one request; return the CPUs and the number of threads."""
        own = ground.own
        arrived = time.monotonic()
        idle_since = {slot: self._records.idle_since(slot) for slot in self._lenders}
        busy = sum(since is None for since in idle_since.values())
        self._record = width.arrived(replace(self._record, cores=own.threads), arrived, busy)
        self._publish()
        self.take_own(ground, width.patience(self._record))
        now = time.monotonic()
        if now - arrived > NO_WAIT:
            self.totals = replace(self.totals, waited=self.totals.waited + now - arrived)
        decision = self._decision
        if decision is None or now >= decision.until:
            decision = self._decision = self._decide(ground, now)
        slices, borrowed = [own.threads], list[Sequence[int]]()
        cap, lenders = width.offers(decision, {self._slot: None, **idle_since})
        for lender in lenders:
            if sum(slices) >= cap:
                break
            places = _places(lender.slot, self._lenders[lender.slot].slice)
            if self._board.borrow(places):
                slices.append(lender.cores)
                borrowed.append(places)
        kept, threads = width.fit(slices, cap, decision)
        for places in borrowed[kept - 1 :]:
            self._board.give_back(places)
        cpus = own.cpus
        if own.pinned:
            cpus += tuple(cpu for places in borrowed[: kept - 1] for cpu in places)
        return cpus, threads

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self, threads: int, *, undisturbed: bool) -> None:
        """Learn from the request that ends now, unless it lost cores half-way, and say that this worker is idle."""
        now = time.monotonic()
        seconds = now - self._began
        if undisturbed:
            self._record = width.served(self._record, threads, seconds, now)
        else:
            self._record = width.ended(self._record, now)
        borrowed = max(0, threads - self._record.cores)
        self.totals = Totals(
            requests=self.totals.requests + 1,
            wide=self.totals.wide + (borrowed > 0),
            borrowed=self.totals.borrowed + borrowed * seconds,
            waited=self.totals.waited,
        )
        self._publish()

    def release(self) -> None:
        self._board.release()

    def _decide(self, ground: _Ground, now: float) -> width.Decision:
        """Choose the width of the next requests from what this worker and its neighbours know."""
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


def _places(slot: int, own: Slice) -> Sequence[int]:
    return own.cpus if own.pinned else thread_places(slot, own.threads)
