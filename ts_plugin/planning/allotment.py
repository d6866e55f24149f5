"""Dividing cores among groups of workers that may use different, overlapping sets of them. Pure arithmetic."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Taker", "allot", "apportion"]


@dataclass(frozen=True, slots=True)
class Taker:
    """A group of workers: the ``cores`` it may use, how many it ``need``s for fixed sizes, and the most it can use."""

    cores: frozenset[int]
    workers: int
    need: int
    limit: int
    weight: float


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide ``total`` whole cores by weight, at least one each; ``total`` is at least the number of weights.

    Core by core to whoever is furthest below its due (Webster's method): one core more never takes one from anybody.
    """
    sizes = [1] * len(weights)
    heap = [((2 * size + 1) / weight, i) for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))]
    heapq.heapify(heap)
    for _ in range(total - len(sizes)):
        i = heap[0][1]
        sizes[i] += 1
        heapq.heapreplace(heap, ((2 * sizes[i] + 1) / weights[i], i))
    return sizes


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
