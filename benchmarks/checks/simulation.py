"""Lending on domains that nobody has: discrete events, TorchServe's queues, the rule of lending/regions.c.

``./dev simulation --out DIR`` writes simulation.md. Every scenario runs twice, with the same arrivals and luck: slices
alone, and lending. The exit status is 1 if lending makes a mean or a 99th percentile worse by more than 2 %.

What is simulated: one queue per model, from which the idle worker that waits longest takes; the frontend's round trip
between two requests; an owner that waits for the whole of a borrower's region; service times by Amdahl's law with
noise; a slow first request on every width of a worker. What a worker learns is the product's own ``Gains``.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ts_plugin.lending.gains import Gains

MORE = 1.02  # of the times of slices alone that lending may take
REGION = 0.0003  # seconds until a borrower looks again
GRACE, SHORT_PAUSE, ASK_FROM = 0.001, 0.005, 0.01  # seconds, as in regions.c
PAUSE_PART = 8
ROUND_TRIP = 0.0015  # seconds through the frontend: longer than the grace, so a slice may be borrowed in between
COLD = 2.0  # times as long: the first request of a worker on a width
WARM_UP = 0.1  # part of the requests that does not count
LOADS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


@dataclass(frozen=True, slots=True)
class Model:
    """``seconds`` on one core, of which the part ``serial`` gains nothing by more (above 1: loses); sizes of slices."""

    seconds: float
    serial: float
    slices: tuple[int, ...]
    load: float = 0.0  # part of what its slices alone can serve, open loop
    clients: int = 0  # each sends its next request when it has its answer, closed loop
    noise: float = 0.1  # standard deviation of a service time as part of it
    bursts: tuple[float, float] | None = None  # (part of the time with traffic, mean seconds of a burst)

    def service(self, cores: int) -> float:
        return self.seconds * (self.serial + (1 - self.serial) / cores)

    def arrivals(self, chance: random.Random) -> Iterator[float]:
        """Yield times: Poisson, or Poisson with exponential bursts and pauses, at the same mean rate."""
        rate = self.load * sum(1 / (self.service(cores) + ROUND_TRIP) for cores in self.slices)
        part, length = self.bursts or (1.0, 0.0)
        now, end = 0.0, chance.expovariate(1 / length) if length else math.inf
        while True:
            now += chance.expovariate(rate / part)
            while now > end:
                pause = chance.expovariate(part / length / (1 - part))
                now, end = now + pause, end + pause + chance.expovariate(1 / length)
            yield now


class Outcome(NamedTuple):
    """Response times of one model, in seconds."""

    mean: float
    p99: float


class _Job(NamedTuple):
    number: int
    arrival: float
    luck: float  # times as long as usual


@dataclass(slots=True, eq=False)
class _Worker:
    model: int
    own: int  # threads
    gains: Gains
    near: list[_Worker] = field(default_factory=list)  # the others, nearest first
    job: _Job | None = None
    user: _Worker | None = None  # who computes on its slice
    asker: _Worker | None = None  # who asks the user for it
    idle_since: float = -math.inf
    grace: float = GRACE  # seconds after that in which nobody takes the slice
    held: list[_Worker] = field(default_factory=list)  # whose slices it has borrowed
    most: int = 0
    width: int = 0  # threads that compute; 0: none yet
    began: int = 0  # with how many threads
    start: float = 0.0
    since: float = 0.0  # it computes at this speed
    speed: float = 0.0  # requests per second
    left: float = 0.0  # of its request
    end: float = 0.0
    disturbed: bool = False
    warm: set[int] = field(default_factory=set)  # widths

    @property
    def holds(self) -> int:
        return self.own + sum(other.own for other in self.held)


class _Run:
    def __init__(self, models: Sequence[Model], requests: int, lending: bool) -> None:
        self.models, self.lending = models, lending
        self.counted = range(int(WARM_UP * requests), requests)
        self.luck = random.Random(1)
        self.workers = [_Worker(m, own, Gains(own)) for m, model in enumerate(models) for own in model.slices]
        for i, worker in enumerate(self.workers):
            worker.near = [self.workers[k] for k in sorted(range(len(self.workers)), key=lambda k, i=i: abs(k - i))[1:]]  # type: ignore[misc]
        self.everything = sum(worker.own for worker in self.workers)
        self.idle = [deque(worker for worker in self.workers if worker.model == m) for m in range(len(models))]
        self.queues: list[deque[_Job]] = [deque() for _ in models]
        self.events: list[tuple[float, int, _Worker | None, _Job | None, Callable[[], None]]] = []
        self.order, self.numbers = itertools.count(), itertools.count()
        self.times: list[list[float]] = [[] for _ in models]
        self.now = 0.0

    def go(self) -> tuple[Outcome, ...]:
        for m, model in enumerate(self.models):
            if model.load:
                times = model.arrivals(random.Random(m))
                self.at(next(times), partial(self.arrive, m, times))
            for _ in range(model.clients):
                self.at(self.luck.random() * model.seconds, partial(self.arrive, m))
        while sum(map(len, self.times)) < len(self.counted):
            self.now, _, worker, job, do = heapq.heappop(self.events)
            if worker is None or worker.job is job:
                do()
        return tuple(Outcome(sum(times) / len(times), sorted(times)[int(0.99 * len(times))]) for times in self.times)

    def at(self, time: float, do: Callable[[], None], worker: _Worker | None = None) -> None:
        """Do that then; with a ``worker`` only if its request is still the same."""
        job = worker.job if worker else None
        heapq.heappush(self.events, (time, next(self.order), worker, job, do))

    def arrive(self, m: int, times: Iterator[float] | None = None) -> None:
        luck = self.luck.gammavariate(self.models[m].noise ** -2, self.models[m].noise ** 2)  # its mean is 1
        self.queues[m].append(_Job(next(self.numbers), self.now, luck))
        self.serve(m)
        if times is not None:
            self.at(next(times), partial(self.arrive, m, times))

    def serve(self, m: int) -> None:
        if not (self.queues[m] and self.idle[m]):
            return
        worker = self.idle[m].popleft()
        worker.job, worker.width = self.queues[m].popleft(), 0
        self.at(self.now + (REGION if worker.user else 0.0), partial(self.take, worker), worker)

    def take(self, worker: _Worker) -> None:
        """Take the own slice, then idle ones, and ask for more if that is less than the fair share."""
        if worker.user:
            self.narrow(worker.user, worker)
        worker.user, worker.asker = worker, None
        pause = self.now - worker.idle_since
        soon = pause < max(SHORT_PAUSE, worker.gains.alone / PAUSE_PART)
        worker.grace = GRACE + (2 * pause if soon else 0.0)
        worker.most = worker.gains.most(self.everything, self.now) if self.lending else worker.own
        for other in worker.near:
            if worker.holds >= worker.most:
                break
            if not other.job and not other.user and other.idle_since + other.grace <= self.now:
                other.user = worker
                worker.held.append(other)
        share = min(worker.most, self.everything // sum(other.job is not None for other in self.workers))
        asks = worker.gains.alone > ASK_FROM and self.ask(worker, share)
        self.at(self.now + (REGION if asks else 0.0), partial(self.begin, worker), worker)

    def ask(self, worker: _Worker, share: int) -> bool:
        missing = share - worker.holds
        for other in worker.near:
            user = other.user
            if missing <= 0 or user is None or user in (worker, other) or other.job or other.asker:
                continue
            if user.holds - sum(one.own for one in user.held if one.asker is worker) - other.own >= share:
                other.asker = worker
                missing -= other.own
        return missing < share - worker.holds

    def begin(self, worker: _Worker) -> None:
        for other in worker.near:
            if other.asker is worker:
                other.asker = None
                if other.user:
                    self.narrow(other.user, other)
                other.user = worker
                worker.held.append(other)
        worker.start, worker.disturbed, worker.left = self.now, False, worker.job.luck if worker.job else 0.0
        self.compute(worker)
        worker.began = worker.width
        if worker.held:
            late = self.now + worker.gains.alone + REGION  # it has taken as long as it would have taken alone
            self.at(late, partial(self.narrow, worker, None), worker)

    def compute(self, worker: _Worker) -> None:
        """Compute from now on with a rounded number of threads, as regions.c does, and let the others go."""
        most = min(worker.holds, worker.most)
        few = [n for power in range(most.bit_length()) for n in (2**power, 2**power // 2 * 3) if n <= most]
        worker.width = most if most == self.everything else max(worker.own, *few)
        while worker.held and worker.holds - worker.held[-1].own >= worker.width:
            worker.held.pop().user = None
        cold = 1.0 if worker.width in worker.warm else COLD
        worker.warm.add(worker.width)
        worker.since, worker.speed = self.now, 1 / cold / self.models[worker.model].service(worker.width)
        worker.end = self.now + worker.left / worker.speed
        self.at(worker.end, partial(self.finish, worker), worker)

    def narrow(self, worker: _Worker, wanted: _Worker | None) -> None:
        """A region of a borrower has ended: it gives one slice back, or all, and goes on with fewer threads."""
        given = [wanted] if wanted else tuple(worker.held)
        for other in given:
            worker.held.remove(other)
            other.user = None
        if given and worker.width:
            worker.left -= (self.now - worker.since) * worker.speed
            worker.disturbed = wanted is not None  # one that was late is learned from
            self.compute(worker)

    def finish(self, worker: _Worker) -> None:
        if worker.end != self.now or worker.job is None:
            return  # it was narrowed since
        if not worker.disturbed:
            worker.gains.learn(worker.began, self.now - worker.start, self.now)
        if worker.job.number in self.counted:
            self.times[worker.model].append(self.now - worker.job.arrival)
        for other in (worker, *worker.held):
            other.user = None
        worker.held, worker.job, worker.idle_since = [], None, self.now
        self.at(self.now + ROUND_TRIP, partial(self.ready, worker))
        if self.models[worker.model].clients:
            self.at(self.now + ROUND_TRIP, partial(self.arrive, worker.model))

    def ready(self, worker: _Worker) -> None:
        self.idle[worker.model].append(worker)
        self.serve(worker.model)


def run(models: Sequence[Model], requests: int) -> list[tuple[Outcome, Outcome]]:
    """Simulate so many requests of all models together; return slices alone and lending, for each model."""
    alone, lending = (_Run(models, requests, lending).go() for lending in (False, True))
    return list(zip(alone, lending, strict=True))


def catalogue() -> Iterator[tuple[str, str, tuple[Model, ...]]]:
    """Yield a group, the load or the clients, and the models; their own loads are parts of that load."""
    groups: dict[str, tuple[Model, ...]] = {}
    usual = Model(0.4, 0.03, (4,) * 8, load=1.0)
    for slices, cores, serial in (2, 1, 0.18), (4, 14, 0.05), (8, 4, 0.03), (14, 2, 0.01), (28, 1, 0.01), (64, 1, 0.02):
        name, model = f"{slices} x {cores}", replace(usual, serial=serial, slices=(cores,) * slices)
        half = replace(model, slices=(cores,) * (slices // 2))
        groups |= {name: (model,), f"{name}, nine of ten on one half": (half, replace(half, load=1 / 9))}
        for clients, column in (1, "1 client"), (2, "2 clients"), (slices, "1 per slice"), (4 * slices, "4 per slice"):
            yield name, column, (replace(model, load=0.0, clients=clients),)
    groups |= {f"8 x 4, serial part {serial:g}": (replace(usual, serial=serial),) for serial in (0.0, 0.3, 1.0, 1.2)}
    groups["8 x 4, bursts"] = (replace(usual, bursts=(0.5, 5.0)),)
    groups["8 x 4, noise 0.5"] = (replace(usual, noise=0.5),)
    groups["slices of 7, 5, 4, 4, 2, 2"] = (replace(usual, slices=(7, 5, 4, 4, 2, 2)),)
    for name, one, other in (
        ("2 x 1, 110 and 44 ms", Model(0.11, 0.1, (1,), 1.0), Model(0.044, 0.15, (1,), 1.0)),
        ("12 x 1, four gain nothing", Model(0.11, 0.03, (1,) * 8, 1.0), Model(0.005, 0.95, (1,) * 4, 1.0)),
        ("2 x 1, 50 ms and 2 s", Model(0.05, 0.03, (1,), 1.0), Model(2.0, 0.03, (1,), 1.0)),
        ("8 x 1, 50 ms and 2 s", Model(0.05, 0.03, (1,) * 4, 1.0), Model(2.0, 0.03, (1,) * 4, 1.0)),
    ):
        groups[name] = (one, other)
    for name, models in groups.items():
        for load in LOADS:
            yield name, f"{load:g}", tuple(replace(model, load=load * model.load) for model in models)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev simulation", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for simulation.md")
    parser.add_argument("--requests", type=int, default=10_000, help="per scenario (default 10000)")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    options = parser.parse_args(arguments)
    tables: tuple[dict[str, dict[str, str]], ...] = {}, {}  # open and closed loops: row, column
    broken = 0
    for group, column, models in catalogue():
        for m, (alone, lending) in enumerate(run(models, options.requests) if options.only in group else ()):
            row = group + (f": model {m + 1}" if len(models) > 1 else "")
            mean, p99 = lending.mean / alone.mean, lending.p99 / alone.p99
            worse = "**" if max(mean, p99) > MORE else ""
            broken += bool(worse)
            cell = f"{worse}{mean:.2f} / {p99:.2f}{worse}"
            tables[models[m].clients > 0].setdefault(row, {})[column] = cell
            print(f"{row}, {column}: {cell}", file=sys.stderr, flush=True)
    text = f"Response times with lending, mean / p99, as part of those of slices alone. Above {MORE}: {broken}\n"
    for table in filter(None, tables):
        columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
        text += f"\n| slices x cores | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
        for row, cells in table.items():
            text += f"| {row} | {' | '.join(cells.get(column, '') for column in columns)} |\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "simulation.md").write_text(text)
    return broken > 0


if __name__ == "__main__":
    sys.exit(main())
