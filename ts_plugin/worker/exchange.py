"""What a worker holds on the board, what it has learned about its requests, and how wide it wants to be."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ts_plugin.leases import masks
from ts_plugin.leases.board import Board, Entry, Records, Totals, thread_places
from ts_plugin.leases.ledger import Lease, Ledger
from ts_plugin.planning import width
from ts_plugin.planning.planner import Slice

__all__ = ["START_PATIENCE", "Exchange", "Ground"]

START_PATIENCE = 1.0  # seconds that a starting worker waits for whoever still computes on its slice
NO_WAIT = 0.0002  # seconds: what taking a free slice takes at most


@dataclass(frozen=True, slots=True)
class Ground:
    """What the next request may compute on: the worker's slice, and the slices it may borrow, nearest first."""

    lease: Lease
    neighbours: tuple[Lease, ...] = ()

    @property
    def own(self) -> Slice:
        return self.lease.slice


class Exchange:
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

    def prime(self, profile: Mapping[int, float]) -> None:
        """Start with what `ts-cores tune` measured: cores -> seconds of a request."""
        self._record = width.primed(self._record, profile)
        self._publish()

    def forget_decision(self) -> None:
        self._decision = None

    def keep(self, lease: Lease) -> None:
        """Hold the slice of ``lease`` for good."""
        self._board.release()
        self._record = replace(self._record, cores=0)
        self.take_own(Ground(lease), START_PATIENCE)
        self._publish()

    def take_own(self, ground: Ground, patience: float) -> None:
        """Take the worker's own slice, by force where another computes there for longer than ``patience`` seconds."""
        self.reopen()
        own = ground.own
        places = _places(self._slot, own)
        if not self._board.take(places, patience=patience) and own.pinned:
            for pid, cpus in self._board.users(places).items():
                masks.evict(pid, cpus)

    def take(self, ground: Ground) -> tuple[tuple[int, ...], int]:
        """Take the own slice and idle neighbours' for one request; return the CPUs and the number of threads."""
        own = ground.own
        arrived = time.monotonic()
        busy = sum(self._records.idle_since(slot) is None for slot in self._lenders)
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
        # Read after the wait: whoever was waited for is idle now, and lends.
        idle_since = {slot: self._records.idle_since(slot) for slot in self._lenders}
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

    def _decide(self, ground: Ground, now: float) -> width.Decision:
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
