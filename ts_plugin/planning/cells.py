"""Cores as cells, parts of them, and what a part costs in crossed boundaries. Pure arithmetic.

A cell is a set of interchangeable cores: same type, NUMA node, package and L3 domain. Levels need not nest: an L3
domain may span NUMA nodes (sub-NUMA clustering), and a NUMA node packages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

__all__ = [
    "LEVELS",
    "SCORE",
    "Cell",
    "Costs",
    "Distance",
    "Part",
    "PlanError",
    "Score",
    "group",
    "least",
    "score",
    "size",
]

LEVELS = ("kind", "node", "package", "l3")  # the most expensive to cross comes first
FIELDS = ("move", "distance", "square", "l3", "package", "l3_parts", "node", "node_parts", "kind", "idle")
BITS = 32
SCORE = ("idle", "kind", "node_avoidable", "node", "l3_avoidable", "package", "l3", "square", "distance")

Part = tuple[tuple[int, int], ...]  # (index of the cell, cores taken from it), ascending
Distance = Callable[[int, int], int]  # between two NUMA nodes, as the firmware says
Score = tuple[int, ...]


class PlanError(ValueError):
    """No plan exists; the message has both numbers and the remedy."""


@dataclass(frozen=True, slots=True)
class Cell:
    """``size`` interchangeable cores."""

    kind: int
    node: int
    package: int
    l3: int
    size: int


def size(part: Part) -> int:
    return sum(count for _, count in part)


def group(cells: Sequence[Cell], members: Sequence[int], level: str) -> dict[int, list[int]]:
    """Return ``members``, indices of cells, by their value of ``level``, in order of appearance."""
    groups: dict[int, list[int]] = {}
    for i in members:
        groups.setdefault(getattr(cells[i], level), []).append(i)
    return groups


def least(total: int, workers: int) -> int:
    """The fewest cores that a worker may get: half of the equal share, rounded up."""
    return max(1, -(-total // (2 * workers)))


class Costs:
    """The cost of a part as one integer that adds up over parts: the more a field matters, the higher its bits.

    A level in ``strict`` counts parts that cross before it counts boundaries.
    """

    weight: ClassVar = {name: 1 << (BITS * place) for place, name in enumerate(FIELDS)}
    crossing = BITS * FIELDS.index("l3")  # shift that leaves the boundaries only

    def __init__(self, cells: Sequence[Cell], distance: Distance, strict: frozenset[str] = frozenset()) -> None:
        self.groups = [tuple(getattr(cell, level) for level in LEVELS) for cell in cells]
        self.distance = distance
        self.strict = strict

    def part(self, part: Part) -> int:
        cost = size(part) ** 2 * self.weight["square"]
        if len(part) == 1:
            return cost
        for level, groups in zip(LEVELS, zip(*(self.groups[i] for i, _ in part), strict=True), strict=True):
            touched = set(groups)
            if len(touched) == 1:
                continue
            cost += (len(touched) - 1) * self.weight[level]
            if level in self.strict:
                cost += self.weight[f"{level}_parts"]
            if level == "node":
                cost += sum(self.distance(a, b) for a, b in combinations(sorted(touched), 2)) * self.weight["distance"]
        return cost

    def even(self, cores: int, parts: int) -> int:
        """The cost of so many parts of one cell."""
        quotient, larger = divmod(cores, parts)
        return (quotient * quotient * parts + (2 * quotient + 1) * larger) * self.weight["square"]

    def idle(self, cores: int) -> int:
        return cores * self.weight["idle"]


def score(cells: Sequence[Cell], parts: Sequence[Part], distance: Distance) -> Score:
    """How good a division is; smaller is better, and the first entries count most.

    ``SCORE`` names the entries: cores left idle; boundaries crossed (groups touched minus one, over all parts) on every
    level; avoidable crossings: how many more parts cross than with equal shares, where all parts cross that do not fit
    whole into the groups; the sum of squared sizes; distances between joined nodes.
    """
    sizes = list(map(size, parts))
    share = max(1, sum(sizes) // len(parts))
    found = {"idle": sum(cell.size for cell in cells) - sum(sizes), "square": sum(size**2 for size in sizes)}
    for level in LEVELS:
        crossed = [len({getattr(cells[i], level) for i, _ in part}) - 1 for part in parts]
        groups = group(cells, range(len(cells)), level).values()
        fitting = sum(sum(cells[i].size for i in members) // share for members in groups)
        found[level] = sum(crossed)
        found[f"{level}_avoidable"] = max(0, sum(map(bool, crossed)) - max(0, len(parts) - fitting))
    pairs = (pair for part in parts for pair in combinations(sorted({cells[i].node for i, _ in part}), 2))
    found["distance"] = sum(distance(a, b) for a, b in pairs)
    return tuple(found[name] for name in SCORE)
