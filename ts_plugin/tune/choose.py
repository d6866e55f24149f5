"""How many workers, how many cores each, which batch size: chosen from what was measured. Pure arithmetic.

Every division is looked at: workers x threads within the cores, threads within a NUMA node, workers within memory, and
the batches up to the largest measured. With w workers, batches of b and S seconds for one batch:

- Throughput at full load is w b / S.
- The 99th percentile at a rate is the sum of three things, and so rather high than low. The first request of a batch
  waits for the others: TorchServe's frontend waits until the batch is full or maxBatchDelay is over. The batch waits
  for a worker (`planning.queueing.waits`, whose customers are batches). It is computed, as one of the larger ones.
  Batches grow under load until the queue does not: the mean batch counts with which the sum is least.

S is measured at few points. Between them it is linear in 1 / threads (a part that cores divide and one that they do
not), in the batch, and in how many cores others keep busy. A batch larger than any measured gains nothing more.

Example. A machine of 4 cores, S(threads) = 100 ms (0.2 + 0.8 / threads), a batch of 4 takes three times as long as one
request: 4 workers x 1 core, batch 4 answer 4 x 4 / 0.3 = 53 requests/s, 1 worker x 4 cores, batch 4 answers
4 / 0.12 = 33. At 10 requests/s the second has the lower 99th percentile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from ts_plugin.planning.queueing import waits
from ts_plugin.tune.profile import LOAD, Cell, Choice, Profile, Target

__all__ = ["choose", "met", "partition", "share"]

TIE = 0.02  # differences up to this part are none
NORMAL_99 = 2.33  # standard deviations above the mean, of one in a hundred
DIVISIONS = 4000  # of the cores among models that are compared at most


def choose(profile: Profile, target: Target) -> list[Choice]:
    """Return every sensible choice, best first; at least one.

    First come those that meet the target: with a rate alone the lowest 99th percentile, otherwise the most throughput.
    Then those that serve the rate, the nearest 99th percentile first; then the rest, most throughput first. What
    differs by 2 % at most is a tie: the smaller batch first, then fewer workers, then more cores each.
    """
    return _rank(list(_choices(profile, target, profile.cores)), target)


def met(choice: Choice, target: Target) -> bool:
    """Tell whether the rate is served at a load of 0.7 at most, and the 99th percentile holds at the rate."""
    return target.met(choice.throughput, choice.p99)


def share(profiles: Sequence[Profile], targets: Sequence[Target]) -> list[list[Choice]]:
    """Return divisions of the cores among models, one choice each, best first.

    Most targets met; of these the least of the highest load; of these the least sum of 99th percentiles, each as part
    of its target or, without one, of what the model could have on all cores. A model without a rate counts as loaded
    with 0.7. Memory is divided as the cores are. Times are those with all cores busy, whoever keeps them so.

    Raises:
        ValueError: fewer cores than models.
    """
    cores, free = min(one.cores for one in profiles), min(one.free_memory for one in profiles)
    if cores < len(profiles):
        raise ValueError(f"{len(profiles)} models share {cores} cores and each needs one; tune fewer models at once")
    spare = max(0, free - sum(one.first_memory for one in profiles))
    best: list[dict[int, Choice]] = [{} for _ in profiles]
    at_best = []
    for profile, target in zip(profiles, targets, strict=True):
        at_best.append(target.p99 or choose(profile, target)[0].p99)

    def part(model: int, own: int) -> Choice:
        if own not in best[model]:
            one = replace(
                profiles[model],
                cores=own,
                node_cores=min(own, profiles[model].node_cores),
                free_memory=profiles[model].first_memory + spare * own // cores,
            )
            best[model][own] = _rank(list(_choices(one, targets[model], cores)), targets[model])[0]
        return best[model][own]

    def cost(division: Sequence[Choice]) -> tuple[int, int, float, float]:
        pairs = list(zip(division, targets, strict=True))
        missed = sum(not met(choice, target) for choice, target in pairs)
        load = max(choice.rate / choice.throughput for choice in division)
        p99 = sum(choice.p99 / least for choice, least in zip(division, at_best, strict=True))
        return missed, round(load / TIE), p99, -sum(math.log(choice.throughput) for choice in division)

    step = 1
    while math.comb(cores // step - 1, len(profiles) - 1) > DIVISIONS:
        step += 1
    divisions = [
        [part(model, own) for model, own in enumerate(shares)] for shares in _shares(cores, len(profiles), step)
    ]
    return sorted(divisions, key=cost)


def partition(profile: Profile, batch: int) -> list[tuple[int, int, int]]:
    """Return (instances, threads, batch of each) that together compute ``batch`` requests at once in the least time.

    Instances may differ from each other. Their times are those with as many at once as there are.
    Source: Packrat (Bhardwaj and others, ICML 2025), which solves it as a two-dimensional knapsack of threads and
        requests. Here: for each number of instances, the least time within which the cores can do it.
    """
    curves, least = _Curves(profile), math.inf
    result: list[tuple[int, int]] = []
    for instances in range(1, min(profile.fits, profile.cores, batch) + 1):
        spare = profile.cores - instances
        times = {}
        for threads in range(1, min(profile.node_cores, spare + 1) + 1):
            row = [curves.seconds(threads, size, instances) for size in range(1, batch - instances + 2)]
            times[threads] = list(accumulate(row, max))  # noise aside, more requests never take less time
        limits = sorted({time for row in times.values() for time in row if time < least})
        low, high = 0, len(limits)
        while low < high:
            middle = (low + high) // 2
            found = _pack(times, instances, spare, limits[middle])
            if sum(size for _, size in found) >= batch:
                high, least, result = middle, limits[middle], _trim(found, times, batch)
            else:
                low = middle + 1
    return [(result.count(one), *one) for one in sorted(set(result), reverse=True)]


def _pack(times: dict[int, list[float]], instances: int, spare: int, limit: float) -> list[tuple[int, int]]:
    """Return (threads, batch) of ``instances`` that compute the most requests within ``limit`` seconds.

    Each has one thread, and ``spare`` more are divided among them. ``times`` are by threads and batch - 1.
    """
    most = {threads: sum(time <= limit for time in row) for threads, row in times.items()}
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] * (spare + 1)  # requests and threads, by spare threads
    for _ in range(instances):
        best = [
            max(
                (best[room - threads + 1][0] + size, (*best[room - threads + 1][1], threads))
                for threads, size in most.items()
                if threads <= room + 1
            )
            for room in range(spare + 1)
        ]
    return [(threads, most[threads]) for threads in best[spare][1]]


def _trim(found: list[tuple[int, int]], times: dict[int, list[float]], batch: int) -> list[tuple[int, int]]:
    """Return ``found`` with requests taken from whoever needs longest until ``batch`` are left."""
    found = [one for one in found if one[1]]
    for _ in range(sum(size for _, size in found) - batch):
        slowest = max(range(len(found)), key=lambda at: times[found[at][0]][found[at][1] - 1])
        threads, size = found.pop(slowest)
        if size > 1:
            found.append((threads, size - 1))
    return found


def _choices(profile: Profile, target: Target, busy: int) -> Iterator[Choice]:
    """Make all choices for the cores of ``profile``; ``busy`` cores of the machine compute, other models' included."""
    curves = _Curves(profile)
    delay = max(1, round(curves.seconds(1, 1, 1) * 500))
    for threads in range(1, min(profile.node_cores, profile.cores, max(1, *curves.threads)) + 1):
        for workers in range(1, min(profile.cores // threads, profile.fits) + 1):
            times = {b: curves.seconds(threads, b, workers * busy / profile.cores) for b in curves.batches}
            variation = curves.variation(threads, workers)
            for batch in curves.batches:
                throughput = workers * batch / times[batch]
                rate = LOAD * throughput if target.rate is None else target.rate
                wait = delay if batch > 1 else 0
                usable = {size: seconds for size, seconds in times.items() if size <= batch}
                p99 = _p99(workers, rate, usable, variation, wait / 1000)
                yield Choice(workers, threads, batch, wait, throughput, rate, p99, profile.memory(workers))


def _p99(workers: int, rate: float, times: dict[int, float], variation: float, delay: float) -> float:
    """Return the 99th percentile in seconds; ``times`` are seconds by batch. Infinite if ``rate`` saturates.

    Against a simulation of the frontend on 2 and 8 cores it was 0.8 to 1.7 times the true one, mostly 1.1 to 1.3 times.
    """
    largest = max(times)
    forming = min(delay, (largest - 1) / rate)
    formed = min(largest, 1 + rate * forming)
    points = [(float(size), seconds) for size, seconds in times.items()]
    least = math.inf
    for mean in (formed, *(size for size in times if size > formed)):
        big = min(largest, mean + NORMAL_99 * math.sqrt(mean - 1))
        gather = max(forming, (mean - 1) / rate)
        _, _, wait = waits(rate / mean, _line(points, mean), variation + 1 / mean - 1, workers, math.inf)
        least = min(least, gather + wait + _line(points, big) * (1 + NORMAL_99 * math.sqrt(variation)))
    return least


def _rank(choices: list[Choice], target: Target) -> list[Choice]:
    held = [one for one in choices if met(one, target)]
    near = [one for one in choices if target.serves(one.throughput) and not met(one, target)]
    rest = [one for one in choices if not target.serves(one.throughput)]
    if target.p99 is None and target.rate is not None:
        held = _sorted(held, lambda one: one.p99)
    else:
        held = _sorted(held, lambda one: 1 / one.throughput)
    return held + _sorted(near, lambda one: one.p99) + _sorted(rest, lambda one: 1 / one.throughput)


def _sorted(choices: list[Choice], cost: Callable[[Choice], float]) -> list[Choice]:
    """Return ``choices`` by ``cost``; those that cost up to 2 % more than the first of them are equals."""
    result: list[Choice] = []
    left = sorted(choices, key=cost)
    while left:
        limit = cost(left[0]) * (1 + TIE)
        ties = [one for one in left if cost(one) <= limit]
        result += sorted(ties, key=lambda one: (one.batch, one.workers, -one.threads, cost(one)))
        left = left[len(ties) :]
    return result


def _shares(cores: int, models: int, step: int) -> Iterator[tuple[int, ...]]:
    """Make all divisions of ``cores`` among ``models`` in steps; what is left over goes to the last."""
    if models == 1:
        yield (cores,)
        return
    for first in range(step, cores - step * (models - 1) + 1, step):
        for others in _shares(cores - first, models - 1, step):
            yield (first, *others)


class _Curves:
    """Seconds of a batch for any number of threads, requests and instances, between those that were measured."""

    def __init__(self, profile: Profile) -> None:
        self._cells: dict[tuple[int, int], list[Cell]] = {}
        self._points: dict[tuple[int, int], list[tuple[float, float]]] = {}  # cores that others keep busy, seconds
        for cell in sorted(profile.cells, key=lambda one: (one.threads, one.batch, one.instances)):
            if profile.batches or cell.batch == 1:
                key = cell.threads, cell.batch
                self._cells.setdefault(key, []).append(cell)
                self._points.setdefault(key, []).append(((cell.instances - 1.0) * cell.threads, cell.seconds))
        self.threads = tuple(dict.fromkeys(threads for threads, _ in self._cells))
        measured = {batch for _, batch in self._cells}
        self.batches = tuple(sorted(measured | {1 << power for power in range(max(measured).bit_length())}))

    def seconds(self, threads: int, batch: int, instances: float) -> float:
        others = (instances - 1) * threads
        by_threads = []
        for measured in self.threads:
            points = [(float(b), self._among(t, b, others)) for t, b in self._points if t == measured]
            by_threads.append((-1 / measured, _line(points, batch) * max(1.0, batch / points[-1][0])))
        slower = max(1.0, self.threads[0] / threads)  # fewer threads than measured
        return _line(by_threads, -1 / threads) * slower

    def variation(self, threads: int, instances: int) -> float:
        """Return the squared coefficient of variation that was measured nearest to this, with the smallest batch."""
        nearest = min(self._cells, key=lambda one: (abs(one[0] - threads), one[1]))
        return min(self._cells[nearest], key=lambda one: abs(one.instances - instances)).variation

    def _among(self, threads: int, batch: int, others: float) -> float:
        """Return seconds while others keep so many cores busy. If fewer were, the nearest cells tell how that slows."""
        points = self._points[threads, batch]
        here, seconds = points[-1]
        fuller = [(key, one) for key, one in self._points.items() if one[-1][0] > here]
        if others <= here or not fuller:
            return _line(points, others)
        _, like = min(
            fuller, key=lambda one: (one[1][-1][0] < others, abs(one[0][0] - threads), abs(one[0][1] - batch))
        )
        return seconds * _line(like, others) / _line(like, here)


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return y at ``x`` on the line through ``points``, ascending in x; beyond their ends it stays as it is there."""
    (before, y), *others = points
    if x <= before:
        return y
    for after, next_y in others:
        if x <= after:
            return y + (next_y - y) * (x - before) / (after - before)
        before, y = after, next_y
    return y
