"""Groups of interchangeable cores, parts of them, and what a part costs in crossed boundaries. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

LEVELS = ("kind", "node", "package", "l3")  # the most expensive to cross comes first
FIELDS = ("move", "distance", "square", "l3", "package", "node", "kind", "idle")  # of a cost, the cheapest first
BITS = 64  # of every field
_UNIT = 1 << 10  # of a squared size, for the largest weight

Part = tuple[tuple[int, int], ...]  # (index of the core group, cores taken from it), ascending
Parts = list[tuple[int, Part]]  # each with the index of its claim
Distance = Callable[[int, int], int]  # between two NUMA nodes, as the firmware says


class PlanError(ValueError):
    """No plan exists; the message has both numbers and the remedy."""


@dataclass(frozen=True, slots=True)
class CoreGroup:
    """``size`` cores of the same type, NUMA node, package and L3 domain.

    Levels need not nest: an L3 domain may span NUMA nodes (sub-NUMA clustering), and a NUMA node packages.
    """

    kind: int
    node: int
    package: int
    l3: int
    size: int


@dataclass(frozen=True, slots=True)
class Claim:
    """``workers`` that ask for the same: ``least`` to ``most`` cores each, in proportion to ``weight``.

    Of a fixed size least and most are the same, and there is no weight: it is 0.
    """

    workers: int
    least: int
    most: int
    weight: float = 1.0


def size_of(part: Part) -> int:
    return sum(count for _, count in part)


def by_level(groups: Sequence[CoreGroup], members: Iterable[int], level: str) -> list[tuple[int, ...]]:
    """Return ``members``, indices of core groups, sorted by their value of ``level``, in order of appearance."""
    found: dict[int, list[int]] = {}
    for i in members:
        found.setdefault(getattr(groups[i], level), []).append(i)
    return list(map(tuple, found.values()))


class Costs:
    """The cost of parts as one integer, which adds up over parts: the more a field matters, the higher its bits.

    Counted are boundaries (groups touched minus one) on each level, then squared sizes, then distances between nodes.
    Squares are divided by the weight: their sum is least where sizes are equal, or in proportion to the weights.
    """

    weight: ClassVar = {name: 1 << (BITS * place) for place, name in enumerate(FIELDS)}
    boundaries: ClassVar = BITS * FIELDS.index("l3")  # shift that leaves the boundaries only
    outer: ClassVar = BITS * FIELDS.index("package")  # shift that leaves those that are more than L3 domains'

    def __init__(self, groups: Sequence[CoreGroup], distance: Distance, weights: Sequence[float]) -> None:
        """``weights`` are those of the claims."""
        self.total = sum(group.size for group in groups)
        self.places = [tuple(getattr(group, level) for level in LEVELS) for group in groups]
        self.distance = distance
        most = max(weights, default=0)
        self.units = [min(_UNIT**2, round(_UNIT * most / weight)) if weight else 0 for weight in weights]

    def part(self, claim: int, part: Part) -> int:
        cost = size_of(part) ** 2 * self.units[claim] * self.weight["square"]
        if len(part) == 1:
            return cost
        for level, places in zip(LEVELS, zip(*(self.places[i] for i, _ in part), strict=True), strict=True):
            touched = set(places)
            cost += (len(touched) - 1) * self.weight[level]
            if level == "node":
                cost += sum(self.distance(a, b) for a, b in combinations(sorted(touched), 2)) * self.weight["distance"]
        return cost

    def parts(self, parts: Parts) -> int:
        """The cost of a whole division, idle cores included."""
        idle = self.total - sum(size_of(part) for _, part in parts)
        return idle * self.weight["idle"] + sum(self.part(*part) for part in parts)

    def crossed(self, parts: Parts) -> int:
        """What the boundaries alone cost."""
        return sum(self.part(*own) >> self.boundaries for own in parts) << self.boundaries
