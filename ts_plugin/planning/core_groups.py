"""Groups of interchangeable cores, parts of them, and what a part costs in crossed boundaries. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

__all__ = ["LEVELS", "CoreGroup", "Costs", "Distance", "Limits", "Part", "PlanError", "by_level", "size_of"]

LEVELS = ("kind", "node", "package", "l3")  # the most expensive to cross comes first
FIELDS = ("move", "distance", "square", "l3", "package", "node", "kind", "idle")  # of a cost, the cheapest first
BITS = 32  # of every field

Part = tuple[tuple[int, int], ...]  # (index of the core group, cores taken from it), ascending
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
class Limits:
    """The fewest and the most cores that a part may have."""

    least: int
    most: int

    @classmethod
    def around(cls, total: int, parts: int, *, equal: bool = False) -> Limits:
        """Half to twice of the equal share; with ``equal`` the share, rounded down and up."""
        if equal:
            return cls(total // parts, -(-total // parts))
        return cls(-(-total // (2 * parts)), 2 * total // parts)

    def parts(self, cores: int) -> range:
        """The numbers of parts that so many cores can be cut into."""
        return range(max(1, -(-cores // self.most)), cores // self.least + 1)


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
    """

    weight: ClassVar = {name: 1 << (BITS * place) for place, name in enumerate(FIELDS)}
    boundaries: ClassVar = BITS * FIELDS.index("l3")  # shift that leaves the boundaries only

    def __init__(self, groups: Sequence[CoreGroup], distance: Distance) -> None:
        self.total = sum(group.size for group in groups)
        self.places = [tuple(getattr(group, level) for level in LEVELS) for group in groups]
        self.distance = distance

    def part(self, part: Part) -> int:
        cost = size_of(part) ** 2 * self.weight["square"]
        if len(part) == 1:
            return cost
        for level, places in zip(LEVELS, zip(*(self.places[i] for i, _ in part), strict=True), strict=True):
            touched = set(places)
            cost += (len(touched) - 1) * self.weight[level]
            if level == "node":
                cost += sum(self.distance(a, b) for a, b in combinations(sorted(touched), 2)) * self.weight["distance"]
        return cost

    def parts(self, parts: Sequence[Part]) -> int:
        """The cost of a whole division, idle cores included."""
        return self.idle(self.total - sum(map(size_of, parts))) + sum(map(self.part, parts))

    def idle(self, cores: int) -> int:
        return cores * self.weight["idle"]
