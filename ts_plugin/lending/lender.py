"""A worker that lends its slice between its requests, and borrows idle ones for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ts_plugin.kernel import affinity
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease
from ts_plugin.lending import library
from ts_plugin.lending.gains import Gains
from ts_plugin.lending.words import Status, Words

UNKNOWN_YET = "it first measures how long its requests take on its slice"
NO_GAIN = "its requests are not faster on more cores: they gain nothing, or another program uses the cores"
LEAST_WAIT = 0.0001  # seconds; a slice that nobody uses is taken in less
REASONS = ("", "no neighbour's slice was idle", "its parallel regions are long against its neighbours' requests", "")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the ledger says: the worker's lease, and the workers it lends to and borrows from, nearest first."""

    generation: int
    lease: Lease
    neighbours: Sequence[Lease] = ()


class Lender:
    """The worker's part in lending.

    For one thread at a time; but any thread may ask for the properties and call ``outdated`` while a request computes.

    Its slice is its own until ``end`` is called for the first time: a worker that starts computes outside of requests.

    Raises:
        LibraryError: the library cannot be loaded. LedgerError: the shared words cannot be used.
    """

    def __init__(self, ledger: Ledger, plan: Plan) -> None:
        library.load()
        own = plan.lease
        self._words = Words(ledger)
        self._worker = library.Worker(
            self._words.memory, self._words.locks, self._words.slot, pid=own.pid, start_time=own.start_time
        )
        self._status = Status()
        self._gains = Gains(own.slice.threads)
        self._profile: Mapping[int, float] = {}
        self._lenders: dict[int, Lease] = {}  # by slot; who lends may also borrow
        self._threads = own.slice.threads
        self._all = self._threads  # threads of the whole domain
        self._follow(plan)

    def prime(self, profile: Mapping[int, float]) -> None:
        """Start with what `ts-cores tune` measured: threads -> seconds of a request."""
        self._profile = profile
        self._gains.prime(profile)
        self._worker.typical(self._gains.alone)

    def follow(self, plan: Plan) -> None:
        """Take over a plan between two requests."""
        if plan.lease.slice.threads != self._threads:
            self._gains = Gains(plan.lease.slice.threads)
            self._gains.prime(self._profile)
            self._worker.typical(self._gains.alone)
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self._joined = self._words.joined  # before the slots are read
        slots = self._words.slots()
        own = plan.lease.slice
        self._generation = plan.generation
        self._lenders = {slots[other.identity]: other for other in plan.neighbours if other.identity in slots}
        self._threads = own.threads
        self._all = own.threads + sum(other.slice.threads for other in self._lenders.values())
        if plan.lease.demand.quota is not None:  # more threads at once would only be throttled
            self._all = max(own.threads, min(self._all, int(plan.lease.demand.quota)))
        self._worker.plan(
            plan.generation,
            own.threads,
            own.cpus if own.pinned else None,
            [
                (slot, other.slice.threads, other.slice.cpus if own.pinned else None)
                for slot, other in self._lenders.items()
            ],
        )

    def begin(self, plan: Plan) -> int:
        """Start a request, with the slice of ``plan`` and idle ones; return the number of threads."""
        why = self._what_keeps_it()
        most = self._threads if why else self._gains.most(self._all, time.monotonic())
        if not why and most <= self._threads < self._all:
            why = NO_GAIN if self._gains.alone else UNKNOWN_YET
        threads = self._worker.begin(most, self._gains.alone)
        self._status = replace(self._status, why=why)
        if (slot := self._worker.forced()) >= 0 and plan.lease.slice.pinned and slot in self._lenders:
            borrower = self._lenders[slot]
            affinity.evict(borrower.pid, plan.lease.slice.cpus, otherwise=borrower.slice.cpus)
        return threads

    def end(self, *, request: bool = True) -> None:
        """End what ``begin`` or the start of the worker began, and learn from it if it was a ``request``."""
        answer, now = self._worker.end(), time.monotonic()
        if not request:
            return
        seconds = answer.took / 1e9
        if answer.began > self._threads and not answer.regions:
            answer.late = 1  # computes in another way: it gains nothing by what it borrows
        if answer.undisturbed:
            self._gains.learn(answer.began, seconds, now)
            if answer.began == self._threads:
                self._worker.typical(self._gains.alone)
        wait = answer.waited / 1e9
        before = self._status
        waited = wait > LEAST_WAIT
        self._status = replace(
            before,
            requests=before.requests + 1,
            wide=before.wide + (answer.began > self._threads),
            borrowed=before.borrowed + answer.borrowed / 1e9,
            handed_back=before.handed_back + (answer.handed_back > 0),
            waited=before.waited + waited,
            wait=before.wait + wait * waited,
            longest=max(before.longest, wait * waited),
            forced=before.forced + answer.forced,
            times=self._gains.times,
            why=before.why or REASONS[answer.why],
        )

    def _what_keeps_it(self) -> str:
        if "torch" not in sys.modules:
            return "its handler has not loaded torch, and only torch's parallel regions can hand cores back"
        return library.what_keeps_from_borrowing()

    def hold(self) -> None:
        """Take the worker's own slice outside of any request, while it loads a model for example."""
        self._worker.begin(self._threads, 0.0)

    def keep(self, why: str) -> None:
        """Say that the slice is held for good from now on; nobody calls ``end`` without ``hold`` any more."""
        self._status = replace(self._status, why=why, keeps=True)

    @property
    def status(self) -> Status:
        return self._status

    def publish(self) -> None:
        """Let people read ``status``."""
        self._words.publish(self._status)

    @property
    def width(self) -> int:
        """How many threads compute the present request."""
        return self._worker.width()

    @property
    def lost(self) -> bool:
        """Whether the words were deleted: others use new ones by now."""
        return self._words.lost

    @property
    def outdated(self) -> bool:
        """Whether this worker should look at the plan and at its neighbours again."""
        if self._words.lost:
            self._words.poison()
        return self.unannounced or self._words.joined != self._joined

    @property
    def unannounced(self) -> bool:
        """Whether the words speak of another plan than the one that is followed."""
        return self._words.generation != self._generation

    def close(self) -> None:
        """Lend and borrow no more."""
        self._worker.close()
        self._words.close()
