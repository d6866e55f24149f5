"""Elastic width on domains that nobody has: discrete events, the product's own decisions, TorchServe's queues.

``./dev simulation --out DIR`` writes simulation.md and simulation.png. Every scenario runs twice, with
the same arrivals and the same luck: slices alone, and elastic.

What is simulated: one queue per model, from which the idle worker that waits longest takes; a worker that waits for its
own slice, then takes idle neighbours' slices up to its cap; the frontend's round trip between two requests of a worker;
service times by Amdahl's law with noise; measurements with an error; a slow first request on every width of a worker;
owners that lose patience and take their slice back.
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
from pathlib import Path

from ts_plugin.planning.width import (
    Decision,
    Record,
    arrived,
    decide,
    ended,
    fit,
    new_record,
    offers,
    patience,
    served,
)

__all__ = ["Model", "Outcome", "Result", "Scenario", "main", "run", "simulate"]

ROUND_TRIP = 0.001  # seconds between an answer and the worker's next request
COLD = 2.0  # times as long: the first request of a worker on a width
TAKEN_BACK = 2.0  # times as slow: threads that lost their cores (measured: p99 twice as bad)
WARM_UP = 0.1  # part of the requests that counts for nothing


@dataclass(frozen=True, slots=True)
class Model:
    """``seconds`` on one core, of which the part ``serial`` gains nothing by more; one slice size for each worker."""

    seconds: float
    serial: float
    slices: tuple[int, ...]
    rate: float = 0.0  # requests/s, open loop
    clients: int = 0  # each sends its next request when it has its answer, closed loop
    noise: float = 0.1  # standard deviation of a service time as part of it
    bursts: tuple[float, float] | None = None  # (part of the time with traffic, mean seconds of a burst)
    change: tuple[float, float] | None = None  # (time in seconds, factor on service times from then on)

    def service(self, cores: float) -> float:
        return self.seconds * (self.serial + (1 - self.serial) / cores)

    @property
    def capacity(self) -> float:
        """Requests/s of all its slices alone."""
        return sum(1 / (self.service(cores) + ROUND_TRIP) for cores in self.slices)


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    models: tuple[Model, ...]
    requests: int = 20_000  # of all models together
    error: float = 0.02  # standard deviation of a measurement
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds; requests per second."""

    mean: float
    p99: float
    throughput: float


@dataclass(frozen=True, slots=True)
class Result:
    models: tuple[Outcome, ...]
    all: Outcome
    widths: tuple[float, ...]  # mean cores that a request of each model computed on
    taken_back: int


@dataclass(slots=True)
class _Job:
    model: int
    arrival: float
    luck: float
    number: int


@dataclass(slots=True)
class _Worker:
    slot: int
    model: int
    cores: int
    near: tuple[int, ...]
    holder: int | None = None  # who computes on its slice
    job: _Job | None = None
    running: bool = False
    held: list[int] = field(default_factory=list)  # slots whose slices it computes on
    width: int = 0
    began: float = 0.0
    end: float = 0.0
    version: int = 0
    disturbed: bool = False
    decision: Decision | None = None
    warm: set[int] = field(default_factory=set)


def run(scenario: Scenario, elastic: bool, cap: Callable[[Decision], Decision] | None = None) -> Result:
    """Simulate ``scenario``; ``cap`` may replace the product's decisions, for comparison."""
    return _Run(scenario, elastic, cap).go()


def simulate(scenario: Scenario) -> tuple[Result, Result]:
    """Return slices alone and elastic."""
    return run(scenario, elastic=False), run(scenario, elastic=True)


class _Run:
    def __init__(self, scenario: Scenario, elastic: bool, cap: Callable[[Decision], Decision] | None) -> None:
        self.scenario, self.elastic, self.cap = scenario, elastic, cap
        self.random = random.Random(scenario.seed)
        self.errors = random.Random(scenario.seed + 1)
        owners = [(m, cores) for m, model in enumerate(scenario.models) for cores in model.slices]
        slots = range(len(owners))
        self.workers = [
            _Worker(slot, model, cores, tuple(sorted(slots, key=lambda other, slot=slot: (abs(other - slot), other))))  # type: ignore[misc]
            for slot, (model, cores) in enumerate(owners)
        ]
        self.records: list[Record] = [new_record(worker.model, worker.cores, 0.0) for worker in self.workers]
        self.lines = [
            deque(worker.slot for worker in self.workers if worker.model == m) for m in range(len(scenario.models))
        ]
        self.queues: list[deque[_Job]] = [deque() for _ in scenario.models]
        self.events: list[tuple[float, int, str, int, int]] = []
        self.order = itertools.count()
        self.numbers = itertools.count()
        self.done: list[tuple[int, int, float, float, int]] = []  # number, model, arrival, end, width
        self.with_request = 0
        self.taken_back = 0
        self.now = 0.0

    def at(self, time: float, kind: str, who: int, version: int = 0) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, who, version))

    def go(self) -> Result:
        arrivals = [
            _arrivals(model, random.Random(self.scenario.seed * 1000 + m))
            for m, model in enumerate(self.scenario.models)
        ]
        for m, model in enumerate(self.scenario.models):
            if model.rate:
                self.at(next(arrivals[m]), "arrival", m)
            for _ in range(model.clients):
                self.at(self.random.random() * model.seconds, "client", m)
        while len(self.done) < self.scenario.requests:
            self.now, _, kind, who, version = heapq.heappop(self.events)
            if kind == "arrival":
                self.at(next(arrivals[who]), "arrival", who)
                self.arrive(who)
            elif kind == "client":
                self.arrive(who)
            elif kind == "end":
                if version == self.workers[who].version:
                    self.finish(self.workers[who])
            elif kind == "ready":
                self.ready(self.workers[who])
            elif kind == "patience":
                self.take_back(self.workers[who], version)
        return self.result()

    def arrive(self, m: int) -> None:
        model = self.scenario.models[m]
        spread = math.sqrt(math.log(1 + model.noise**2))
        luck = self.random.lognormvariate(-(spread**2) / 2, spread)
        job = _Job(m, self.now, luck, next(self.numbers))
        if self.lines[m]:
            self.begin(self.workers[self.lines[m].popleft()], job)
        else:
            self.queues[m].append(job)

    def begin(self, worker: _Worker, job: _Job) -> None:
        """The worker gets a request; it computes when it has its own slice."""
        worker.job = job
        if self.elastic:
            self.records[worker.slot] = arrived(self.records[worker.slot], self.now, self.with_request)
        self.with_request += 1
        if worker.holder is None:
            worker.holder = worker.slot
            self.compute(worker)
        else:
            self.at(self.now + patience(self.records[worker.slot]), "patience", worker.slot, job.number)

    def compute(self, worker: _Worker) -> None:
        job = worker.job
        if job is None:
            raise RuntimeError("a worker computes without a request")
        worker.held, worker.width = [worker.slot], worker.cores
        if self.elastic:
            self.borrow(worker)
        worker.running, worker.disturbed, worker.began = True, False, self.now
        worker.end = self.now + self.seconds(worker, worker.width) * job.luck
        if worker.width not in worker.warm:
            worker.warm.add(worker.width)
            worker.end += (COLD - 1) * (worker.end - self.now)
        worker.version += 1
        self.at(worker.end, "end", worker.slot, worker.version)

    def borrow(self, worker: _Worker) -> None:
        decision = worker.decision
        if decision is None or self.now >= decision.until:
            decision = decide({slot: self.records[slot] for slot in worker.near}, worker.slot, self.now)
            if self.cap:
                decision = self.cap(decision)
            worker.decision = decision
            self.records[worker.slot] = replace(self.records[worker.slot], width=decision.width)
        width, lenders = offers(decision, {slot: self.records[slot].idle_since for slot in worker.near})
        slices = [worker.cores]
        for lender in lenders:
            if sum(slices) >= width:
                break
            if self.workers[lender.slot].holder is None:
                worker.held.append(lender.slot)
                slices.append(lender.cores)
        keep, worker.width = fit(slices, width, decision)
        del worker.held[keep:]
        for slot in worker.held:
            self.workers[slot].holder = worker.slot

    def seconds(self, worker: _Worker, cores: int) -> float:
        model = self.scenario.models[worker.model]
        factor = model.change[1] if model.change and self.now >= model.change[0] else 1.0
        return model.service(cores) * factor

    def finish(self, worker: _Worker) -> None:
        job = worker.job
        if job is None:
            raise RuntimeError("a worker ends without a request")
        self.done.append((job.number, job.model, job.arrival, self.now, worker.width))
        if self.elastic:
            record = self.records[worker.slot]
            measured = (self.now - worker.began) * max(0.5, self.errors.gauss(1, self.scenario.error))
            self.records[worker.slot] = (
                ended(record, self.now) if worker.disturbed else served(record, worker.width, measured, self.now)
            )
        worker.job, worker.running = None, False
        self.with_request -= 1
        self.release(worker.held)
        worker.held = []
        self.at(self.now + ROUND_TRIP, "ready", worker.slot)
        if self.scenario.models[job.model].clients:
            self.at(self.now + ROUND_TRIP, "client", job.model)

    def release(self, slots: Sequence[int]) -> None:
        waiting = []
        for slot in slots:
            owner = self.workers[slot]
            owner.holder = None
            if owner.job is not None and not owner.running:
                owner.holder = slot
                waiting.append(owner)
        for owner in waiting:
            self.compute(owner)

    def ready(self, worker: _Worker) -> None:
        queue = self.queues[worker.model]
        if queue:
            self.begin(worker, queue.popleft())
        else:
            self.lines[worker.model].append(worker.slot)

    def take_back(self, owner: _Worker, number: int) -> None:
        """The owner takes its slice; the borrower goes on with what it has left, badly."""
        if owner.job is None or owner.job.number != number or owner.running or owner.holder is None:
            return
        self.taken_back += 1
        borrower = self.workers[owner.holder]
        left = sum(self.workers[slot].cores for slot in borrower.held if slot != owner.slot)
        slower = TAKEN_BACK * self.seconds(borrower, left) / self.seconds(borrower, borrower.width)
        borrower.held.remove(owner.slot)
        borrower.end = self.now + (borrower.end - self.now) * slower
        borrower.width, borrower.disturbed = left, True
        borrower.version += 1
        self.at(borrower.end, "end", borrower.slot, borrower.version)
        owner.holder = owner.slot
        self.compute(owner)

    def result(self) -> Result:
        counted = [one for one in self.done if one[0] >= WARM_UP * self.scenario.requests]
        models = range(len(self.scenario.models))
        widths = [[one[4] for one in counted if one[1] == m] for m in models]
        return Result(
            tuple(_outcome([one for one in counted if one[1] == m]) for m in models),
            _outcome(counted),
            tuple(sum(width) / max(1, len(width)) for width in widths),
            self.taken_back,
        )


def _outcome(done: Sequence[tuple[int, int, float, float, int]]) -> Outcome:
    if not done:
        return Outcome(0.0, 0.0, 0.0)
    times = sorted(end - arrival for _, _, arrival, end, _ in done)
    span = max(end for _, _, _, end, _ in done) - min(end for _, _, _, end, _ in done)
    return Outcome(sum(times) / len(times), times[int(0.99 * len(times))], len(times) / span if span else 0.0)


def _arrivals(model: Model, chance: random.Random) -> Iterator[float]:
    """Times of arrival: Poisson, or Poisson with exponential bursts and pauses, at the same mean rate."""
    now = 0.0
    if model.bursts is None:
        while True:
            now += chance.expovariate(model.rate)
            yield now
    part, length = model.bursts
    while True:
        end = now + chance.expovariate(1 / length)
        while (now := now + chance.expovariate(model.rate / part)) < end:
            yield now
        now = end + chance.expovariate(part / length / (1 - part))


def _loaded(model: Model, load: float) -> Model:
    return replace(model, rate=load * model.capacity)


def catalogue(requests: int = 10_000) -> Iterator[tuple[str, str, Scenario]]:
    """Yield group, load and scenario."""
    loads = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
    fewer = (0.1, 0.3, 0.5, 0.7, 0.9)

    def one(
        group: str, load: float, *models: Model, requests: int = requests, error: float = 0.02
    ) -> tuple[str, str, Scenario]:
        return group, f"{load:g}", Scenario(group, models, requests=requests, error=error)

    for slices, cores, serial in (
        (2, 1, 0.05),
        (4, 14, 0.05),
        (8, 4, 0.03),
        (14, 2, 0.01),
        (28, 1, 0.01),
        (64, 1, 0.02),
    ):
        for load in loads:
            yield one(f"{slices} x {cores}, f = {serial}", load, _loaded(Model(0.4, serial, (cores,) * slices), load))
    for serial in (0.0, 0.1, 0.3, 1.0):
        for load in fewer:
            yield one(f"8 x 4, f = {serial}", load, _loaded(Model(0.4, serial, (4,) * 8), load))
    for slices, cores, serial in ((2, 1, 0.05), (8, 4, 0.03), (28, 1, 0.01)):
        for load in fewer:
            half = Model(0.4, serial, (cores,) * (slices // 2))
            yield one(f"uneven 9 to 1, {slices} x {cores}", load, _loaded(half, load), _loaded(half, load / 9))
    for load in fewer:
        more = 3 * requests  # two models of different rates
        yield one("unequal slices 7 5 4 4 2 2", load, _loaded(Model(0.4, 0.03, (7, 5, 4, 4, 2, 2)), load))
        yield one("bursts, 8 x 4", load, _loaded(Model(0.4, 0.03, (4,) * 8, bursts=(0.5, 5.0)), load))
        yield one("noise 0.5, 8 x 4", load, _loaded(Model(0.4, 0.03, (4,) * 8, noise=0.5), load))
        yield one("error 0.2, 8 x 4", load, _loaded(Model(0.4, 0.03, (4,) * 8), load), error=0.2)
        changing = _loaded(Model(0.2, 0.03, (4,) * 8), load)
        yield one(
            "half as fast midway",
            load,
            replace(changing, rate=changing.rate / 2, change=(requests / changing.rate, 2.0)),
        )
        resnet50, resnet18 = Model(0.11, 0.0, (1,)), Model(0.044, 0.05, (1,))
        yield one("ResNet-50 beside ResNet-18, 2 x 1", load, _loaded(resnet50, load), _loaded(resnet18, load))
        mixed = Model(0.11, 0.03, (1,) * 8), Model(0.005, 0.9, (1,) * 4)
        yield one(
            "ResNet-50 beside a flat one, 8 + 4 x 1",
            load,
            *(_loaded(model, load) for model in mixed),
            requests=more,
        )
        mixed = Model(0.05, 0.03, (1,) * 4), Model(2.0, 0.03, (1,) * 4)
        yield one("50 ms beside 2 s, 4 + 4 x 1", load, *(_loaded(model, load) for model in mixed), requests=more)
        mixed = Model(0.05, 0.03, (1,) * 1), Model(2.0, 0.03, (1,) * 1)
        yield one("50 ms beside 2 s, 1 + 1 x 1", load, *(_loaded(model, load) for model in mixed), requests=more)
    for name, slices, cores, serial in (("2 x 1", 2, 1, 0.02), ("8 x 4", 8, 4, 0.03), ("28 x 1", 28, 1, 0.0)):
        for clients in sorted({1, 2, slices, 4 * slices}):
            model = Model(0.11, serial, (cores,) * slices, clients=clients)
            yield f"closed loop, {name}, f = {serial}", f"{clients} clients", Scenario("", (model,), requests=requests)


def broken(alone: Result, elastic: Result, load: float) -> list[str]:
    """Return the promises that ``elastic`` breaks."""
    result = []
    pairs = (
        [("all", alone.all, elastic.all)]
        if len(alone.models) == 1
        else [(f"model {m}", *pair) for m, pair in enumerate(zip(alone.models, elastic.models, strict=True))]
    )
    for name, a, e in pairs:
        if e.mean > 1.02 * a.mean:
            result.append(f"{name} mean x {e.mean / a.mean:.2f}")
        if e.p99 - a.p99 > (0.1 * a.p99 if load >= 0.5 else max(0.0, a.mean - e.mean) + 0.02 * a.p99):
            result.append(f"{name} p99 x {e.p99 / a.p99:.2f}")
    if elastic.all.throughput < 0.98 * alone.all.throughput:
        result.append(f"throughput x {elastic.all.throughput / alone.all.throughput:.3f}")
    return result


def table(outcomes: Sequence[tuple[str, str, Result, Result]]) -> str:
    """Return Markdown: one line per scenario, and per model where there are several. Times in milliseconds."""
    lines = [
        "| scenario | load | alone: mean / p99 ms | elastic: mean / p99 | mean | p99 | requests/s | cores | promises |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group, load, alone, elastic in outcomes:
        verdict = ", ".join(broken(alone, elastic, _number(load))) or "kept"
        width = "" if len(elastic.widths) > 1 else elastic.widths[0]
        lines.append(_line(group, load, alone.all, elastic.all, width, verdict))
        if len(elastic.models) > 1:
            for m, (a, e) in enumerate(zip(alone.models, elastic.models, strict=True)):
                lines.append(_line(f"- model {m}", "", a, e, elastic.widths[m], ""))
    return "\n".join(lines) + "\n"


def _number(load: str) -> float:
    return 1.0 if "clients" in load else float(load)


def _line(name: str, load: str, alone: Outcome, elastic: Outcome, width: float | str, verdict: str) -> str:
    times = " | ".join(f"{one.mean * 1e3:.0f} / {one.p99 * 1e3:.0f}" for one in (alone, elastic))
    ratios = (elastic.mean / alone.mean, elastic.p99 / alone.p99, elastic.throughput / alone.throughput)
    cores = width if isinstance(width, str) else f"{width:.1f}"
    return f"| {name} | {load} | {times} | {' | '.join(f'x {ratio:.2f}' for ratio in ratios)} | {cores} | {verdict} |"


def draw(outcomes: Sequence[tuple[str, str, Result, Result]], out: Path) -> None:
    """Write a picture: mean and p99 against load, one panel for each group with several loads."""
    import matplotlib

    matplotlib.use("Agg")  # files only, whatever display there is
    from matplotlib import pyplot

    groups: dict[str, list[tuple[float, Result, Result]]] = {}
    for group, load, alone, elastic in outcomes:
        if "clients" not in load:
            groups.setdefault(group, []).append((float(load), alone, elastic))
    columns = 4
    rows = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns, 2.6 * rows), layout="constrained", squeeze=False, sharex=True
    )
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax, (group, points) in zip(axes.flat, groups.items(), strict=False):
        points.sort(key=lambda point: point[0])
        loads = [point[0] for point in points]
        for results, colour, label in (
            ([alone for _, alone, _ in points], "#999999", "slices alone"),
            ([elastic for _, _, elastic in points], "#009E73", "elastic"),
        ):
            ax.plot(loads, [one.all.mean * 1e3 for one in results], color=colour, marker="o", ms=3, label=label)
            ax.plot(loads, [one.all.p99 * 1e3 for one in results], color=colour, ls=":", marker=".", ms=3)
        ax.set_yscale("log")
        ax.set_title(group, fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.suptitle("Response time in ms against load: mean solid, p99 dotted")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev simulation", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for simulation.md and simulation.png")
    parser.add_argument("--requests", type=int, default=10_000, help="per scenario (default 10000)")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    options = parser.parse_args(arguments)
    outcomes = []
    for group, load, scenario in catalogue(options.requests):
        if options.only in group:
            outcomes.append((group, load, *simulate(scenario)))
            print(_line(group, load, outcomes[-1][2].all, outcomes[-1][3].all, "", ""), file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "simulation.md").write_text(table(outcomes))
    draw(outcomes, options.out / "simulation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
