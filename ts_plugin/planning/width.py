"""How wide a worker computes: on its own slice alone, or on slices of idle neighbours too. Pure arithmetic.

Slices that lend to each other (those of one NUMA node) are a domain. For the length of one request a worker computes
on its own slice, for which it waits, and on idle neighbours' slices, for which it does not. ``decide`` chooses the
cap: the cores that a request may take.

The estimate. Requests of a model arrive at rate l and take S(g) seconds on g cores. Two things can be short:

- Slices. Requests that are g cores wide leave room for n = cores of the domain / g at once: M/G/n. A request that
  finds no room waits for its own slice and gets few others: it takes up to half-way from S(g) to S(own slice).
- Workers. The model's k workers take requests from one queue: M/G/k.

The longer of the two waits counts. R(g) = service + wait; W99(g) is the wait of one request in a hundred. The cap is
the g for which R(g) + heed W99(g) is least, as part of S(own slice) and averaged over all requests of the domain: it
counts what a wide request costs the neighbours, and a short request's time as much as a long one's. ``heed`` grows with
load from 0.2 to 0.8: so the 99th percentile grows by no more than the mean falls.

A wait is Sakasegawa's approximation, (1 + v) / 2 S u^(sqrt(2 (n + 1)) - 1) / (n (1 - u)), with utilisation u = l S / n
and v the squared coefficient of variation of the service times: exact for one server. ``queueing`` says how much rarer
longer waits are. If every width saturates (u >= 0.97, and so many requests at once that some may queue), the cap is the
width with the least utilisation.

Example. 8 slices of 4 cores, S(g) = 0.4 s (0.03 + 0.97 / g), 22 requests/s (0.3 of what slices alone can serve):

    g                    4      8     16     32
    S(g), ms           109     60     36     24
    n                    8      4      2      1
    u                 0.30   0.33   0.40   0.53
    R(g), ms           109     63     47     55
    cost              1.02   0.64   0.56   0.79   <- with 16 cores, 4 slices, it is least

At twice the rate u is 1.06 with 32 cores, more than there is, and 8 cores cost least.

Assumptions: Poisson arrivals; service times that depend on the width only; idle workers of a model get requests in the
order in which they became idle (so ``offers`` borrows from those that are last in that line); workers of a model decide
alike. Clients that wait for their answer are not Poisson: if fewer requests were ever seen at once than there are
workers, nothing queues, and the wait is bounded by what those requests can cause. A burst is over before a rate shows
it: so no request takes much more than its share while others have requests too (``offers``).

Service times are learned by each worker on its own requests and pooled by model. What is known little counts as
optimistically guessed, and so gets tried; what is not tried is forgotten slowly, and so gets tried again. A model that
gains nothing by the second width is guessed to gain nothing by the third, and never tries it.

One request of a worker: ``arrived``; wait for the own slice, for ``patience`` at most; ``decide`` if the last decision
is past ``until``, and publish its width; ``offers``, take what is idle, ``fit``, give the rest back; compute;
``served``, or ``ended`` if the time says nothing. ``new_record`` starts it all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ts_plugin.planning.queueing import waits

__all__ = [
    "Decision",
    "Estimate",
    "Lender",
    "Measured",
    "Record",
    "Traffic",
    "arrived",
    "decide",
    "ended",
    "fit",
    "new_record",
    "offers",
    "patience",
    "primed",
    "served",
    "traffic",
    "widths",
]

WORTH = 0.08  # what borrowing must gain at least, as part of the cost
STAY = 0.04  # what a change from one borrowing width to another must gain
MEMORY = 32.0  # requests over which a service time is averaged
FORGET = 1 / 1000  # of the weight of every other width, per request
GUESS = 0.5  # requests that the guess of a service time counts for
SERIAL = 0.05  # serial part of the work that is guessed for widths beyond the only one known
HOPE = 0.9  # guessed time, as part of what the two widths below predict
KNOWN = 2.0  # requests from which a measured time may serve to guess others
PRIMED = 4.0  # requests that a time of a profile counts for
LONGER = 1.5  # a request may borrow from a worker whose own take at least 1 / LONGER as long
CROWDED = 0.85  # load, as part of what slices alone can serve, from which nobody borrows
SHARE = 1.7  # times its share of the domain that a request takes while others have requests
TRAFFIC = 0.01  # a model has traffic from this utilisation of its workers together
RATE_MEMORY = 40.0  # service times over which the rate of requests is averaged
RATE_SECONDS = 2.0, 60.0  # and its limits
# Seconds of the mean that a second of the 99th percentile of waiting counts for: idle, and how much more at load.
TAIL = 0.2, 0.6
SEEN_MEMORY = 5.0  # times that long the most requests at once are remembered
CHANCE = 1e-3  # of a run of arrivals that find no neighbour at work, from which it is none: their client waits
MOST_BUSY = 0.9  # part of its time that a worker is taken to compute at most
HOLD_SECONDS = 2.0  # that a decision holds at most
PATIENCE = 4.0  # own service times that an owner waits before it takes its slice back
PATIENCE_SECONDS = 0.1  # and at least so long


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean service time of the requests that computed on ``cores`` cores.

    ``weight`` is the number of requests that it rests on, fading. 0: only the first was seen, which is slow on every
    new width (oneDNN prepares its primitives), and the next replaces it.
    """

    cores: int
    seconds: float
    weight: float


@dataclass(frozen=True, slots=True)
class Record:
    """What one worker publishes to its domain. Times are CLOCK_MONOTONIC, in seconds."""

    model: int  # the same number for all workers that take requests from one queue
    cores: int  # of its own slice
    width: int  # cores of its present cap
    measured: tuple[Measured, ...] = ()  # ascending by cores
    rate: float = 0.0  # requests/s at the time ``at``
    seen: float = 0.0  # most requests of the domain at once, seen at its own arrivals, fading; as of ``at``
    at: float = 0.0  # its latest request arrived
    born: float = 0.0  # it was made
    idle_since: float | None = 0.0  # its latest request ended; None while it has one, waiting for its slice included
    lone: int = 0  # its latest arrivals that found no neighbour with a request; not published


@dataclass(frozen=True, slots=True)
class Estimate:
    """What ``decide`` expects of one width, for people to read."""

    cores: int
    seconds: float  # service time, guessed where little is known
    weight: float  # requests that it rests on
    response: float  # seconds; inf: saturated
    cost: float  # what is minimised, less the bonus of the own slice or of the present width


@dataclass(frozen=True, slots=True)
class Lender:
    """A neighbour whose slice may be borrowed; ``rate`` is that of all requests of its model, per second."""

    slot: int
    cores: int
    model: int
    rate: float


@dataclass(frozen=True, slots=True)
class Decision:
    """``width`` cores at most, borrowed from ``lenders`` only. Holds for requests that start before ``until``."""

    width: int
    cores: int  # of the domain
    widths: tuple[int, ...]  # numbers of cores worth computing on, own slice first: few, each is warmed on its own
    lenders: tuple[Lender, ...]
    until: float
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What ``decide`` knows of the requests, for people to read.

    ``rate`` is the model's, in requests/s. ``load`` is that of all models of the domain, as part of what slices alone
    can serve, and ``crowded`` that it is too high to borrow. ``at_once`` are the most requests of the domain at once.
    """

    rate: float
    load: float
    crowded: bool
    at_once: float


def new_record(model: int, cores: int, now: float) -> Record:
    """Return the record of a worker that has served nothing."""
    return Record(model, cores, cores, at=now, born=now, idle_since=now)


def primed(record: Record, profile: Mapping[int, float]) -> Record:
    """Return ``record``, which has served nothing, with the service times of a profile: cores -> seconds."""
    times = (Measured(cores, seconds, PRIMED) for cores, seconds in sorted(profile.items()) if cores >= record.cores)
    return record if record.measured else replace(record, measured=tuple(times))


def arrived(record: Record, now: float, others: int) -> Record:
    """Return ``record`` after a request arrived, while ``others`` neighbours have one (``idle_since`` is None).

    If neighbours compute as much as this worker does, a long run of arrivals that find none of them at work is no
    chance: there is one client now that waits for its answers, whatever was seen before.
    """
    memory = _rate_memory(record)
    past = min(0.0, record.at - now) / memory
    rate = record.rate * math.exp(past) + 1 / memory
    lone = 0 if others else record.lone + 1
    busy = min(MOST_BUSY, rate * _own_seconds(record))
    seen = 1.0 if (1 - busy) ** lone < CHANCE else record.seen * math.exp(past / SEEN_MEMORY)
    return replace(record, rate=rate, seen=max(seen, 1.0 + others), at=now, lone=lone, idle_since=None)


def served(record: Record, cores: int, seconds: float, now: float) -> Record:
    """Return ``record`` after a request that computed on ``cores`` cores for ``seconds``, waiting not counted."""
    measured = []
    found = False
    for one in record.measured:
        if one.cores == cores:
            found = True
            weight = min(one.weight + 1, MEMORY)
            measured.append(Measured(cores, one.seconds + (seconds - one.seconds) / weight, weight))
        else:
            measured.append(Measured(one.cores, one.seconds, one.weight * (1 - FORGET)))
    if not found:
        measured.append(Measured(cores, seconds, 0.0))
        measured.sort(key=lambda one: one.cores)
    return replace(record, measured=tuple(measured), idle_since=now)


def ended(record: Record, now: float) -> Record:
    """Return ``record`` after a request that says nothing about service times: it failed, or lost cores half-way."""
    return replace(record, idle_since=now)


def patience(record: Record) -> float:
    """Seconds that a worker waits for its own slice before it takes it back and computes."""
    return max(PATIENCE_SECONDS, PATIENCE * _own_seconds(record))


def widths(own: int, domain: int) -> tuple[int, ...]:
    """Return the numbers of cores to compute on with a slice of ``own`` in a domain of ``domain``: 4, 8, 16, 28."""
    result = [own]
    while result[-1] * 2 < domain:
        result.append(result[-1] * 2)
    if result[-1] < domain:
        result.append(domain)
    return tuple(result)


def offers(decision: Decision, idle_since: Mapping[int, float | None]) -> tuple[int, list[Lender]]:
    """Return the cap of one request, and the idle lenders in the order in which to try them.

    ``idle_since`` is the domain's, slot -> as in ``Record``; the request's own worker counts as having one. When many
    have a request at once, each takes little more than its share: this tells a burst before any rate does.
    Lenders whose next request is furthest away come first, equals in the domain's order. TorchServe hands a request to
    the worker of its model that waits longest, so the k-th in that line waits for k requests.
    """
    requests = max(1, sum(since is None for since in idle_since.values()))
    share = max(decision.widths[0], SHARE * decision.cores / requests)
    width = max(width for width in decision.widths if width <= min(share, decision.width))
    if width == decision.widths[0]:
        return width, []
    lines: dict[int, list[tuple[float, int, Lender]]] = {}
    for place, lender in enumerate(decision.lenders):
        since = idle_since.get(lender.slot)
        if since is not None:
            lines.setdefault(lender.model, []).append((since, place, lender))
    ranked = []
    for line in lines.values():
        line.sort()
        for position, (_, place, lender) in enumerate(line, start=1):
            ranked.append((-position / lender.rate if lender.rate else -math.inf, place, lender))
    ranked.sort()
    return width, [lender for _, _, lender in ranked]


def fit(slices: Sequence[int], width: int, decision: Decision) -> tuple[int, int]:
    """Return how many of ``slices`` to keep, and on how many cores to compute.

    ``slices`` are the cores of own and borrowed ones in the order in which they were got, ``width`` is what ``offers``
    said. A request computes on one of the few widths that there are; what it does not need goes back at once.
    """
    cores = max((one for one in decision.widths if one <= min(sum(slices), width)), default=slices[0])
    keep = covered = 0
    while covered < cores:
        covered += slices[keep]
        keep += 1
    return keep, cores


def decide(domain: Mapping[int, Record], me: int, now: float) -> Decision:
    """Return the cap of the worker in slot ``me`` of ``domain``: slot -> record, nearest to it first, itself included.

    Costs tens of microseconds to a few hundred (64 workers): keep the result until ``until``.
    """
    own = domain[me]
    models = _models(domain, now)
    mine = models[own.model]
    total = sum(model.cores for model in models.values())
    seen = max(model.seen for model in models.values())
    busy = [model for model in models.values() if model is mine or model.busy]
    crowded = _crowded(models, busy, seen)
    estimates: list[Estimate] = []
    lenders_at: dict[int, list[_Model]] = {}
    for width in widths(own.cores, total):
        seconds, weight = mine.seconds(width)
        # Whoever runs long does not borrow from whoever runs short.
        lending = [one for one in models.values() if one is mine or not one.busy or seconds <= LONGER * one.alone]
        pool = _Pool(lending + [one for one in models.values() if one.wide and one not in lending])
        if estimates and (
            crowded
            or width > sum(one.cores for one in lending)
            or max(mine.known, default=0) < estimates[-1].cores  # one step beyond what is known
        ):
            break
        scale = width / own.cores * mine.cores / mine.workers  # others of the model widen likewise
        response, cost, part = _cost(busy, mine, scale, pool=pool, seen=seen)
        if width == own.cores:
            cost -= WORTH * part
        elif width == own.width:
            cost -= STAY * part
        estimates.append(Estimate(width, seconds, weight, response, cost))
        lenders_at[width] = lending
    best = min(estimates, key=lambda one: one.cost)
    lenders = tuple(
        Lender(slot, record.cores, record.model, models[record.model].rate if models[record.model].busy else 0.0)
        for slot, record in domain.items()
        if slot != me and models[record.model] in lenders_at[best.cores] and best.cores > own.cores
    )
    hold = (20 if best.weight > 2 * KNOWN else 4) * best.seconds
    return Decision(
        best.cores,
        total,
        tuple(one.cores for one in estimates),
        lenders,
        now + min(hold, HOLD_SECONDS),
        tuple(estimates),
    )


def traffic(domain: Mapping[int, Record], me: int, now: float) -> Traffic:
    """Return what ``decide`` knows of the requests of ``domain``."""
    models = _models(domain, now)
    mine = models[domain[me].model]
    busy = [model for model in models.values() if model is mine or model.busy]
    seen = max(model.seen for model in models.values())
    return Traffic(mine.rate, _load(models), _crowded(models, busy, seen), seen)


class _Model:
    """The workers of one model together."""

    def __init__(self) -> None:
        self.workers = 0
        self.cores = 0
        self.width = 0.0
        self.rate = 0.0
        self.seen = 0.0
        self.sums: dict[int, tuple[float, float]] = {}  # cores -> (seconds x weight, weight)
        self.known: dict[int, float] = {}

    def add(self, record: Record, now: float) -> None:
        self.workers += 1
        self.cores += record.cores
        self.width += record.width
        memory = _rate_memory(record)
        past = min(0.0, record.at - now) / memory
        full = 1 - math.exp(min(-0.1, (record.born - now) / memory))  # what a young record has not seen yet
        self.rate += record.rate * math.exp(past) / full
        self.seen = max(self.seen, record.seen * math.exp(past / SEEN_MEMORY))
        for one in record.measured:
            seconds, weight = self.sums.get(one.cores, (0.0, 0.0))
            self.sums[one.cores] = seconds + one.seconds * one.weight, weight + one.weight

    def close(self) -> None:
        self.width /= self.workers
        self.wide = self.width > self.cores / self.workers
        self.known = {cores: total / weight for cores, (total, weight) in sorted(self.sums.items()) if weight >= KNOWN}
        self.alone = self.seconds(self.cores / self.workers)[0]
        self.load = self.rate * self.alone
        self.busy = self.load > TRAFFIC or (self.rate > 0 and not self.known)

    def seconds(self, cores: float) -> tuple[float, float]:
        """Return the service time on ``cores`` cores, half guessed where little is known, and its weight."""
        total, weight = self.sums.get(cores, (0.0, 0.0))  # type: ignore[call-overload]
        if not self.known:
            return (total / weight, weight) if weight else (0.0, 0.0)
        guess = self._guess(cores)
        return (total + GUESS * guess) / (weight + GUESS), weight

    def _guess(self, cores: float) -> float:
        """Return an optimistic service time from those of other widths."""
        below = [one for one in self.known if one < cores]
        if not below:
            return next(seconds for one, seconds in self.known.items() if one >= cores)
        near = below[-1]
        above = next((one for one in self.known if one > cores), None)
        if above is not None and cores not in self.sums:
            part = (1 / cores - 1 / above) / (1 / near - 1 / above)  # a + b / cores
            return part * self.known[near] + (1 - part) * self.known[above]
        if len(below) == 1:
            return self.known[near] * (SERIAL + (1 - SERIAL) * near / cores)
        far = below[-2]
        serial = (self.known[near] * near - self.known[far] * far) / (near - far)  # Amdahl: a + b / cores
        serial = min(max(serial, 0.0), self.known[near])
        return HOPE * (serial + (self.known[near] - serial) * near / cores)


class _Pool:
    """The models whose requests wait for each other's slices."""

    def __init__(self, models: list[_Model]) -> None:
        self.models = models
        self.cores = sum(model.cores for model in models)


def _models(domain: Mapping[int, Record], now: float) -> dict[int, _Model]:
    models: dict[int, _Model] = {}
    for record in domain.values():
        models.setdefault(record.model, _Model()).add(record, now)
    for model in models.values():
        model.close()
    return models


def _load(models: Mapping[int, _Model]) -> float:
    """Return the load of all models, as part of what slices alone can serve."""
    workers = sum(model.workers for model in models.values())
    return sum(min(model.load, model.workers) for model in models.values()) / workers


def _crowded(models: Mapping[int, _Model], busy: Sequence[_Model], seen: float) -> bool:
    """Whether the load is too high to borrow; a client that sends one request after the other is not many clients."""
    return seen >= sum(model.workers for model in busy) - 0.5 and _load(models) > CROWDED


def _cost(
    busy: Sequence[_Model], mine: _Model, width: float, *, pool: _Pool, seen: float
) -> tuple[float, float, float]:
    """Return the response time of ``mine`` on ``width`` cores, the cost to all, and its own part of that.

    Where a queue is endless the cost is the utilisation times 1e9.
    """
    times = [mine.seconds(width)[0] if model is mine else model.seconds(model.width)[0] for model in busy]
    flow = squares = wide = rate = 0.0
    workers = 0
    for model, seconds in zip(busy, times, strict=True):
        if model in pool.models:
            rate += model.rate
            flow += model.rate * seconds
            squares += model.rate * seconds**2
            wide += model.rate * seconds * (width if model is mine else model.width)
            workers += model.workers
    if not flow:
        alone = times[busy.index(mine)]
        return alone, alone / (mine.alone or 1.0), 0.0
    variation = max(0.0, squares / flow * (rate / flow) - 1)
    slices = max(1.0, pool.cores * flow / wide)
    late, wait, tail = waits(rate, flow / rate, variation, slices, _ahead(seen, workers))
    narrow = late * max(0.0, 1 - 2 / workers) / 2
    heed = TAIL[0] + TAIL[1] * min(1.0, sum(model.load for model in pool.models) / workers)
    arrivals = sum(model.rate for model in busy)
    cost = own = response = worst = 0.0
    for model, seconds in zip(busy, times, strict=True):
        _, queue, longest = waits(model.rate, seconds, 0.0, model.workers, _ahead(seen, model.workers))
        inside = model in pool.models
        wait_here = max(wait, queue) if inside else queue
        if wait_here == math.inf:
            worst = max(worst, flow / slices if inside else 0.0, model.rate * seconds / model.workers)
        held = seconds + (narrow * max(0.0, model.alone - seconds) if inside else 0.0)
        rare = max(tail, longest) if inside else longest
        part = model.rate / arrivals * (held + wait_here + heed * rare) / (model.alone or 1.0)
        cost += part
        if model is mine:
            response, own = held + wait_here, part
    return (response, 1e9 * worst, 1e9 * worst) if worst else (response, cost, own)


def _ahead(seen: float, workers: int) -> float:
    """Return how many requests there may be at once: any number if all workers are busy, for some may queue."""
    return math.inf if seen >= workers - 0.5 else seen


def _rate_memory(record: Record) -> float:
    least, most = RATE_SECONDS
    return min(most, max(least, RATE_MEMORY * _own_seconds(record)))


def _own_seconds(record: Record) -> float:
    """Service time on the narrowest width measured."""
    return next((one.seconds for one in record.measured if one.weight), 0.0)
