"""Dividing numbers of cores: by weight, by core type, among groups of workers with overlapping cpusets. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Taker:
    """A group of workers: the ``cores`` it may use, how many it ``need``s for fixed sizes, and the most it can use."""

    cores: frozenset[int]
    workers: int
    need: int
    limit: int
    weight: float


def apportion(
    total: int, weights: Sequence[float], least: Sequence[int] | None = None, most: Sequence[int] | None = None
) -> list[int]:
    """Divide ``total`` whole cores by weight, from ``least`` (one) to ``most`` (all) each; such a division exists.

    Each core goes to the one furthest below its due (Webster's method): one core more never takes one from anybody,
    and the sum of squared sizes, each divided by its weight, is the least there is.
    """
    sizes = list(least or [1] * len(weights))
    heap = [
        ((2 * size + 1) / weight, i)
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
        if not most or size < most[i]
    ]
    heapq.heapify(heap)
    for _ in range(total - sum(sizes) if sizes else 0):
        i = heap[0][1]
        sizes[i] += 1
        if most and sizes[i] == most[i]:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, ((2 * sizes[i] + 1) / weights[i], i))
    return sizes


def choose_types(
    cores: Sequence[int], capacities: Sequence[float], weights: Sequence[float], busy: Container[int] = ()
) -> list[int]:
    """Return the core type of each worker, so that no slice has to mix types.

    One worker after the other takes the type in which its slice gets the most capacity: this makes the weakest slice
    as strong as it can be (D'Hondt's method). Of equals it takes the slower one, whose slices have more cores. The
    slowest type is used only when every faster one is. For example, with 4 fast cores and 8 of half their capacity, the
    first worker takes the fast ones, the second the slow ones (8 x 0.5 against 4 / 2), which the third shares.

    ``cores`` and ``capacities`` go from the fastest type to the slowest; types in ``busy`` have workers already. There
    are at least as many cores as workers.
    """
    chosen: list[int] = []
    loads = [0.0] * len(cores)
    slowest = len(cores) - 1
    for weight in weights:
        usable = [t for t, count in enumerate(cores) if chosen.count(t) < count]
        if any(t not in busy and t not in chosen for t in range(slowest)):
            usable = [t for t in usable if t != slowest] or usable
        best = max(usable, key=lambda t: (capacities[t] * cores[t] / (loads[t] + weight), t))
        loads[best] += weight
        chosen.append(best)
    return chosen


def allot(takers: Sequence[Taker]) -> list[tuple[list[int], dict[int, int]]]:
    """Return every set of cores that the same takers may use, and how many of them each of these takers gets.

    Max-min fair, and nothing is left that somebody could use: cores go one by one to the taker that is poorest for its
    weight and can still get one, if need be by way of others that take a different core instead (an augmenting path).
    First every worker gets a core, then fixed sizes are met, then the rest is divided. Cores that the fewest takers
    may use go first.
    """
    regions: dict[tuple[int, ...], list[int]] = {}
    for core in sorted(frozenset().union(*(taker.cores for taker in takers))):
        owners = tuple(t for t, taker in enumerate(takers) if core in taker.cores)
        regions.setdefault(owners, []).append(core)
    order = sorted(regions, key=lambda owners: (len(owners), owners))
    free = [len(regions[owners]) for owners in order]
    taken = [[0] * len(order) for _ in takers]
    got = [0] * len(takers)

    def poverty(t: int) -> tuple[int, float, int]:
        stage = 0 if got[t] < takers[t].workers else 1 if got[t] < takers[t].need else 2
        return stage, got[t] / (takers[t].workers if stage == 0 else takers[t].weight), t

    heap = [poverty(t) for t in range(len(takers))]
    heapq.heapify(heap)
    while heap:
        t = heapq.heappop(heap)[2]
        if got[t] < takers[t].limit and _augment(t, order, free, taken):
            got[t] += 1
            heapq.heappush(heap, poverty(t))
    return [(regions[owners], {t: taken[t][r] for t in owners if taken[t][r]}) for r, owners in enumerate(order)]


def _augment(taker: int, regions: Sequence[tuple[int, ...]], free: list[int], taken: list[list[int]]) -> bool:
    """Get ``taker`` one core more without anybody losing one, along the shortest path to a free core."""
    reached: dict[int, tuple[int, int | None]] = {}  # region: who would take from it, the region that it leaves
    queue: list[tuple[int, int | None]] = [(taker, None)]
    for who, leaves in queue:  # grows while it is walked
        for r, owners in enumerate(regions):
            if who not in owners or r in reached:
                continue
            reached[r] = who, leaves
            if free[r]:
                free[r] -= 1
                step: int | None = r
                while step is not None:
                    who, leaves = reached[step]
                    taken[who][step] += 1
                    if leaves is not None:
                        taken[who][leaves] -= 1
                    step = leaves
                return True
            queue += [(other, r) for other in owners if taken[other][r]]
    return False
