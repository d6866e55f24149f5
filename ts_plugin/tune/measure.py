"""Profiling an archive in bare processes: which cells, in which order, within a budget of time and of memory.

A cell is so many threads, so many instances at once, and a batch size. For every thread count as many instances compute
at once as fit the free cores, because neighbours share memory bandwidth, and again one alone. All cells get their turn
in every round, and every other round goes backwards: what changes on the machine meanwhile meets all of them alike.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ts_plugin.errors import CommandError
from ts_plugin.machine import process
from ts_plugin.machine.words import count
from ts_plugin.planning.policy import Policy
from ts_plugin.trial.archive import Archive
from ts_plugin.trial.bare import Bare, BareError, Binding
from ts_plugin.trial.load import Body
from ts_plugin.trial.room import Room, free_memory
from ts_plugin.trial.store import Store
from ts_plugin.trial.turns import FRONTEND, USABLE_MEMORY, Tell, packed
from ts_plugin.tune.values import Cell, Profile, fitting
from ts_plugin.worker.environment import preload, prepare_environment

BATCHES = (1, 2, 4, 8, 16, 32, 64)
ALWAYS = 8  # batches up to this size are measured even if a smaller one was as good
GROWS = 1.02  # a larger batch pays if it has so many times the throughput of the one before
ROUNDS = 4  # of a quick model; a slow one gets fewer
PIECE = 0.5  # seconds of a cell in one round, at least
FEWEST = 3  # batches of a cell in one round, at least
WARM_UP = 3  # batches of a new size that do not count: TorchScript and oneDNN prepare themselves


def thread_counts(node_cores: int) -> list[int]:
    """Return 1, 2, 4 ... and the cores of a node.

    >>> thread_counts(12)
    [1, 2, 4, 8, 12]
    """
    counts = [1]
    while counts[-1] * 2 < node_cores:
        counts.append(counts[-1] * 2)
    return counts + [node_cores] * (node_cores > 1)


def together(sets: Sequence[tuple[int, int]], fit: int) -> list[list[tuple[int, int]]]:
    """Return groups of (threads, instances) that run at once, as large as ``fit`` processes allow; none has more."""
    return packed([(threads, min(instances, fit)) for threads, instances in sets], lambda item: item[1], fit)


def measure(
    archive: Archive,
    body: Body,
    room: Room,
    *,
    store: Store,
    seconds: float,
    memory: int | None = None,
    longest: float | None = None,
    tell: Tell = lambda what, left: None,
) -> Profile:
    """Return the profile, of which ``store`` keeps every measurement at once.

    ``seconds`` is the budget, of which the last round may take somewhat more. ``memory`` in bytes is what a server may
    use at most; None: what is free. No batch that takes longer than ``longest`` seconds is made larger.

    Raises:
        BareError: the archive cannot be loaded, or its handler rejects the body.
        CommandError: there is no memory for one worker.
    """
    limit = min(int(USABLE_MEMORY * free_memory()), memory or sys.maxsize) - FRONTEND
    profiler = _Profiler(archive, body, room, store, limit, longest, tell)
    if not store.get(f"profiled {longest}"):
        profiler.run(seconds)
        store.set(f"profiled {longest}", True)
    return profiler.profile()


def bare(
    model: Path, body: Body, room: Room, *, threads: int, instances: int, policy: Policy, change: str | None
) -> Bare:
    """Return processes that are bound, and started in such an environment, as workers of ts-cores would be."""
    slices = room.slices(threads, instances)
    environment = dict(os.environ)
    prepare_environment(environment, slices[0], policy, library_roots=(sys.prefix,))
    anywhere = tuple(sorted(room.cpus))
    bindings = [Binding(given.cpus if given.pinned else anywhere, given.threads) for given in slices]
    return Bare(model, body.content, bindings, content_type=body.type, environment=environment, change=change)


def allocator(policy: Policy) -> str:
    """Return the LD_PRELOAD of a worker with this policy."""
    environment = dict(os.environ)
    preload(environment, policy, (sys.prefix,))
    return environment.get("LD_PRELOAD", "")


@contextlib.contextmanager
def unpacked(archive: Archive) -> Iterator[Path]:
    """Extract the archive for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="ts-cores-") as directory:
        with zipfile.ZipFile(archive.path) as parts:
            parts.extractall(directory)
        yield Path(directory)


@dataclass(slots=True)
class _Fleet:
    """The processes of one thread count, and the batch sizes that they have come to."""

    threads: int
    instances: int
    processes: Bare
    batches: list[int] = field(default_factory=lambda: [1])
    warm: set[int] = field(default_factory=set)
    grows: bool = True


@dataclass
class _Profiler:
    archive: Archive
    body: Body
    room: Room
    store: Store
    limit: int
    longest: float | None
    tell: Tell
    memory: tuple[int, int] | None = field(default=None, init=False)  # of the first process, of each further one

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        sizes = thread_counts(self.room.node_cores)[::-1]
        with unpacked(self.archive) as model:
            with self._start(model, sizes[0], 1) as first:
                self.tell(f"loading {self.archive.path.name}", seconds)
                first.work(0, fewest=2)
                self._weigh([first])
            groups = together([(threads, self.room.instances(threads)) for threads in sizes], self._fit())
            for number, group in enumerate(groups):
                now = time.monotonic()
                self._rounds(model, group, now + (deadline - now) / (len(groups) - number))

    def _start(self, model: Path, threads: int, instances: int) -> Bare:
        return bare(model, self.body, self.room, threads=threads, instances=instances, policy=Policy(), change=None)

    def _fit(self) -> int:
        """Return how many processes fit into the memory.

        Raises:
            CommandError: none.
        """
        if self.memory is None:  # the kernel does not say what a process takes
            return sys.maxsize
        fit = fitting(self.limit, *self.memory)
        if not fit:
            first = self.memory[0]
            raise CommandError(
                f"{self.archive.path}: a server needs {_mib(FRONTEND + first)}, of which one worker takes "
                f"{_mib(first)}, and {_mib(FRONTEND + self.limit)} may be used; free some memory, or raise --memory "
                "or the container's limit"
            )
        return fit

    def _weigh(self, running: Sequence[Bare]) -> None:
        """Learn what processes take; they must be all that run. What was seen larger before stays."""
        seen = [found for each in running for pid in each.pids if (found := process.memory(pid)) is not None]
        if not seen:
            return
        whole = sum(pss for pss, _ in seen)
        further = int(statistics.fmean(private for _, private in seen))
        first = whole - (len(seen) - 1) * further
        known = self.memory or (0, 0)
        # What one process alone has to itself is what all of them share, too.
        self.memory = max(first, known[0]), further if len(seen) > 1 or not known[1] else known[1]
        self.store.set("memory", list(self.memory))

    def _rounds(self, model: Path, group: Sequence[tuple[int, int]], deadline: float) -> None:
        with contextlib.ExitStack() as stack:
            fleets = []
            for threads, instances in group:
                self.tell(f"starting {instances} x {threads} threads", deadline - time.monotonic())
                fleets.append(_Fleet(threads, instances, stack.enter_context(self._start(model, threads, instances))))
            if len(fleets) > 1 or group[0][1] > 1:
                for fleet in fleets:
                    fleet.processes.work(0, fewest=1)
                self._weigh([fleet.processes for fleet in fleets])
            took = 0.0
            for number in range(ROUNDS):
                began = time.monotonic()
                if number and began + 0.8 * took > deadline:
                    break
                if number == 0:
                    self._first_round(fleets, deadline)
                else:
                    order = [(fleet, batch) for fleet in fleets for batch in fleet.batches]
                    left = min((ROUNDS - number) * took, deadline - began)
                    for place, (fleet, batch) in enumerate(order[:: -1 if number % 2 else 1]):
                        self._cell(fleet, batch, number, left - took * place / len(order))
                if not took:  # the first round also warms up
                    took = sum(
                        2 * max(PIECE, FEWEST * self._seconds(fleet, batch))
                        for fleet in fleets
                        for batch in fleet.batches
                    )
            self._weigh([fleet.processes for fleet in fleets])

    def _first_round(self, fleets: Sequence[_Fleet], deadline: float) -> None:
        for batch in BATCHES:
            for fleet in fleets:
                if not fleet.grows:
                    continue
                if batch > 1:
                    if batch > 2 and not self._pays(fleet, batch, deadline):
                        fleet.grows = False
                        continue
                    fleet.batches.append(batch)
                try:
                    self._cell(fleet, batch, 0, deadline - time.monotonic())
                except BareError as error:
                    if batch == 1 or error.stage != "handle":
                        raise
                    fleet.batches.remove(batch)  # its handler answers one request at a time
                    fleet.grows = False
                    if batch == 2:
                        self.store.set("single", error.reason)

    def _pays(self, fleet: _Fleet, batch: int, deadline: float) -> bool:
        """Tell whether a batch of this size is worth measuring, and can be afforded."""
        before, last = (self._seconds(fleet, size) for size in (batch // 4, batch // 2))
        if self.longest is not None and last > self.longest:
            return False
        costs = 2 * last * (WARM_UP + 2 * FEWEST)
        if time.monotonic() + costs > deadline:
            return False
        if free_memory() < FRONTEND:
            return False
        return batch <= ALWAYS or 2 * before >= GROWS * last

    def _cell(self, fleet: _Fleet, batch: int, number: int, left: float) -> None:
        """Measure as many instances as there are, and one alone."""
        for instances in sorted({fleet.instances, 1}, reverse=True):
            name = _name(fleet.threads, batch, instances)
            if len(self.store.rounds(name)) > number:
                continue
            self.tell(f"{instances} x {count(fleet.threads, 'thread')}, batch {batch}", left)
            if batch not in fleet.warm:
                fleet.processes.work(0, batch=batch, fewest=WARM_UP)
                fleet.warm.add(batch)
            took = fleet.processes.work(PIECE, batch=batch, fewest=FEWEST, processes=instances)
            mean = statistics.fmean(took)
            self.store.add(name, [len(took), mean, statistics.pvariance(took, mean)])

    def _seconds(self, fleet: _Fleet, batch: int) -> float:
        return _pooled(self.store.rounds(_name(fleet.threads, batch, fleet.instances)))[0]

    def profile(self) -> Profile:
        cells = []
        for name in self.store.names():
            if name.startswith("cell "):
                threads, batch, instances = map(int, name.split()[1:])
                rounds = self.store.rounds(name)
                cells.append(Cell(threads, batch, instances, *_pooled(rounds), sum(each[0] for each in rounds)))
        first, further = self.store.get("memory", (0, 0))
        return Profile(
            archive=self.archive.path.name,
            cores=self.room.cores,
            node_cores=self.room.node_cores,
            first_memory=first,
            next_memory=further,
            free_memory=self.limit,
            batches="single" not in self.store,
            cells=tuple(sorted(cells, key=lambda cell: (cell.threads, cell.instances, cell.batch))),
        )


def _name(threads: int, batch: int, instances: int) -> str:
    return f"cell {threads} {batch} {instances}"


def _pooled(rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean seconds and the squared coefficient of variation: the median round's, which one pause leaves."""
    seconds = statistics.median(mean for _, mean, _ in rounds)
    return seconds, statistics.median(variance for _, _, variance in rounds) / seconds**2


def _mib(amount: int) -> str:
    return f"{amount / 2**20:.0f} MiB"
