"""How many workers, how many cores each, which batch size: chosen from what was measured. Pure arithmetic.

Every division is looked at: workers x threads within the cores, threads within a NUMA node, workers within memory, and
the batches up to the largest measured. With w workers, batches of b and S seconds for one batch:

- Throughput at full load is w b / S.
- The 99th percentile at a rate is the sum of three things, and so rather high than low. The first request of a batch
  waits for the others: TorchServe's frontend waits until the batch is full or maxBatchDelay is over. The batch waits
  for a worker (``_wait``, the queue M/G/n of batches). It is computed, as one of the larger ones.
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

from ts_plugin.errors import CommandError
from ts_plugin.tune.values import LOAD, Cell, Choice, Profile, Target

TIE = 0.02  # differences up to this part are none
NORMAL_99 = 2.33  # standard deviations above the mean, of one in a hundred
SATURATED = 0.97  # utilisation from which a queue counts as endless
DIVISIONS = 4000  # of the cores among models that are compared at most


def choose(profile: Profile, target: Target) -> list[Choice]:
    """Return every sensible choice, best first; at least one.

    First come those that meet the target: with a rate alone the lowest 99th percentile, otherwise the most throughput.
    Then those that serve the rate, the nearest 99th percentile first; then the rest, most throughput first. What
    differs by 2 % at most is a tie: the smaller batch first, then fewer workers, then more cores each.
    """
    return _rank(list(_choices(profile, target, profile.cores)), target)


def share(profiles: Sequence[Profile], targets: Sequence[Target]) -> list[list[Choice]]:
    """Return divisions of the cores among models, one choice each, best first.

    Most targets met; of these the least of the highest load; of these the least sum of 99th percentiles, each as part
    of its target or, without one, of what the model could have on all cores. A model without a rate counts as loaded
    with 0.7. Memory is divided as the cores are. Times are those with all cores busy, whoever keeps them so.

    Raises:
        CommandError: fewer cores than models.
    """
    cores, free = min(profile.cores for profile in profiles), min(profile.free_memory for profile in profiles)
    if cores < len(profiles):
        raise CommandError(f"{len(profiles)} models share {cores} cores and each needs one; tune fewer models at once")
    spare = max(0, free - sum(profile.first_memory for profile in profiles))
    best: list[dict[int, Choice]] = [{} for _ in profiles]
    at_best = []
    for profile, target in zip(profiles, targets, strict=True):
        at_best.append(target.p99 or choose(profile, target)[0].p99)

    def part(model: int, given: int) -> Choice:
        if given not in best[model]:
            part_of = replace(
                profiles[model],
                cores=given,
                node_cores=min(given, profiles[model].node_cores),
                free_memory=profiles[model].first_memory + spare * given // cores,
            )
            best[model][given] = _rank(list(_choices(part_of, targets[model], cores)), targets[model])[0]
        return best[model][given]

    def cost(division: Sequence[Choice]) -> tuple[int, int, float, float]:
        pairs = list(zip(division, targets, strict=True))
        missed = sum(not target.met(choice.throughput, choice.p99) for choice, target in pairs)
        load = max(choice.rate / choice.throughput for choice in division)
        p99 = sum(choice.p99 / least for choice, least in zip(division, at_best, strict=True))
        return missed, round(load / TIE), p99, -sum(math.log(choice.throughput) for choice in division)

    step = 1
    while math.comb(cores // step - 1, len(profiles) - 1) > DIVISIONS:
        step += 1
    divisions = [
        [part(model, given) for model, given in enumerate(shares)] for shares in _shares(cores, len(profiles), step)
    ]
    return sorted(divisions, key=cost)


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
        wait = _wait(rate / mean, _line(points, mean), variation + 1 / mean - 1, workers)
        least = min(least, gather + wait + _line(points, big) * (1 + NORMAL_99 * math.sqrt(variation)))
    return least


def _wait(rate: float, seconds: float, variation: float, servers: int) -> float:
    """Return how long one customer in a hundred waits for a server in the queue M/G/n, in seconds.

    ``variation`` is the squared coefficient of variation of the service time, whose mean is ``seconds``.
    Source: Sakasegawa (1977), "An approximation formula Lq = a rho^b / (1 - rho)".
    """
    used = rate * seconds / servers
    if used >= SATURATED:
        return math.inf
    late: float = used ** (math.sqrt(2 * (servers + 1)) - 1)  # the part of the customers that wait at all
    return _tail(used, variation) * seconds / servers * math.log(100 * late) if late > 0.01 else 0.0


def _tail(used: float, variation: float) -> float:
    """Return after how long a wait is e times as rare, in service times per server.

    Exact for M/M/n (variation 1): 1 / (1 - used), and for M/D/n (0): 1 / x with exp(x) = 1 + x / used. Between them it
    is interpolated.
    Source: the root of Lundberg's equation, Asmussen (2003), "Applied Probability and Queues", XIII.5.
    """
    root = -2 * math.log(used)  # never less than the root, from where Newton's steps do not overshoot
    for _ in range(4):
        power = math.exp(root)
        root -= (power - 1 - root / used) / (power - 1 / used)
    part = min(1.0, variation)
    return (1 - part) / root + part / (1 - used)


def _rank(choices: list[Choice], target: Target) -> list[Choice]:
    held = [choice for choice in choices if target.met(choice.throughput, choice.p99)]
    served = [choice for choice in choices if target.serves(choice.throughput)]
    near = [choice for choice in served if not target.met(choice.throughput, choice.p99)]
    rest = [choice for choice in choices if not target.serves(choice.throughput)]
    if target.p99 is None and target.rate is not None:
        held = _sorted(held, lambda choice: choice.p99)
    else:
        held = _sorted(held, lambda choice: 1 / choice.throughput)
    return held + _sorted(near, lambda choice: choice.p99) + _sorted(rest, lambda choice: 1 / choice.throughput)


def _sorted(choices: list[Choice], cost: Callable[[Choice], float]) -> list[Choice]:
    """Return ``choices`` by ``cost``; those that cost up to 2 % more than the first of them are equals."""
    result: list[Choice] = []
    left = sorted(choices, key=cost)
    while left:
        limit = cost(left[0]) * (1 + TIE)
        ties = [choice for choice in left if cost(choice) <= limit]
        result += sorted(ties, key=lambda choice: (choice.batch, choice.workers, -choice.threads, cost(choice)))
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
        for cell in sorted(profile.cells, key=lambda cell: (cell.threads, cell.batch, cell.instances)):
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
        nearest = min(self._cells, key=lambda key: (abs(key[0] - threads), key[1]))
        return min(self._cells[nearest], key=lambda cell: abs(cell.instances - instances)).variation

    def _among(self, threads: int, batch: int, others: float) -> float:
        """Return seconds while others keep so many cores busy. If fewer were, the nearest cells tell how that slows."""
        points = self._points[threads, batch]
        here, seconds = points[-1]
        fuller = [(key, item) for key, item in self._points.items() if item[-1][0] > here]
        if others <= here or not fuller:
            return _line(points, others)
        _, like = min(
            fuller, key=lambda item: (item[1][-1][0] < others, abs(item[0][0] - threads), abs(item[0][1] - batch))
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
