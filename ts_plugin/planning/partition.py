"""Cutting one pool of cores into local parts. Pure arithmetic.

Two named ways: ``cut`` divides everything, about equally, with sizes that cross the fewest boundaries; ``pack`` makes
parts of given sizes and puts them where they cross the fewest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

from ts_plugin.planning.cells import LEVELS, SCORE, Cell, Costs, Distance, Part, PlanError, Score, group, least, score
from ts_plugin.planning.components import Limits, Search, draw

__all__ = ["cut", "pack", "repair"]

# Orders of search: right where packages hold whole NUMA nodes; where nodes hold whole packages; where neither holds.
_ORDERS = (("kind", "package", "node", "l3"), ("kind", "node", "package", "l3"), ("kind", "node", "l3", "package"))
_NODES_FIRST = ("node", "kind", "package", "l3")
_NEAR, _WIDE = 1, 32
_EXCHANGES = 1000  # looked at to repair what the search missed


def cut(
    cells: Sequence[Cell],
    workers: int,
    *,
    distance: Distance,
    equal: bool = False,
    within_nodes: bool = False,
    homes: Sequence[int] | None = None,
) -> list[Part]:
    """Divide all cores of ``cells`` into parts, one per worker, with the smallest ``score``.

    No part has less than half of the equal share; with ``equal`` all sizes are within one core of each other.
    ``within_nodes`` leaves cores idle rather than have a part span two NUMA nodes. ``homes`` is the number of workers
    at home in each cell: among equals the division in which most of them can stay is taken.
    """
    total = sum(cell.size for cell in cells)
    share = total // workers
    if within_nodes and equal:
        return _cut_nodes_equally(cells, workers)
    limits = Limits(share, -(-total // workers), bounded=True) if equal else Limits(least(total, workers), total)

    def search(near: int, strict: frozenset[str] = frozenset()) -> list[Part] | None:
        best: list[Part] | None = None
        for levels in (_NODES_FIRST,) if within_nodes else _ORDERS:
            costs = Costs(cells, distance, strict)
            one = Search(
                cells,
                workers,
                limits=limits,
                levels=levels,
                costs=costs,
                near=near,
                spare_nodes=within_nodes,
                homes=homes or [0] * len(cells),
            )
            best = better(best, one.run())
            if best and (workers > _WIDE or not any(score(cells, best, distance)[: SCORE.index("l3")])):
                break
        return best

    def better(one: list[Part] | None, other: list[Part] | None) -> list[Part] | None:
        if one and other:
            return min(one, other, key=lambda parts: score(cells, parts, distance))
        return one or other

    found = search(_NEAR)
    if within_nodes:
        while not found:  # so many nodes stay idle that somebody gets less than half of the equal share
            limits = Limits(max(1, limits.least // 2), total)
            found = search(_WIDE)
        return found
    if found and _perfect(score(cells, found, distance), cells, workers):
        return found
    if found and (strict := _avoidable(score(cells, found, distance))):
        found = better(found, search(_WIDE, strict))
    parts = found or list(draw(range(len(cells)), [cell.size for cell in cells], workers))
    return better(parts, repair(cells, parts, [limits.least] * workers, limits.most, distance)) or parts


def _avoidable(found: Score) -> frozenset[str]:
    return frozenset(level for level in ("node", "l3") if found[SCORE.index(f"{level}_avoidable")])


def _perfect(found: Score, cells: Sequence[Cell], workers: int) -> bool:
    """Whether no level is crossed more often than ``workers`` parts of so many groups must."""
    groups = {level: len(group(cells, range(len(cells)), level)) for level in LEVELS}
    return not _avoidable(found) and all(
        found[SCORE.index(level)] <= max(0, groups[level] - workers) for level in LEVELS
    )


def _cut_nodes_equally(cells: Sequence[Cell], workers: int) -> list[Part]:
    nodes = [sum(cells[i].size for i in members) for members in group(cells, range(len(cells)), "node").values()]
    size = sum(nodes) // workers
    while sum(cores // size for cores in nodes) < workers:
        size -= 1
    return pack(cells, [size] * workers, within_nodes=True)


def repair(
    cells: Sequence[Cell], parts: Sequence[Part], lows: Sequence[int], high: int, distance: Distance
) -> list[Part]:
    """Let parts exchange cores, or give some away, as long as fewer boundaries are crossed.

    ``lows`` are the fewest cores each part may have, ``high`` the most.
    """
    costs = Costs(cells, distance)
    mine = [dict(part) for part in parts]
    cost = [costs.part(part) for part in parts]
    tried = 0
    improved = True
    while improved:
        improved = False
        for a, b in permutations(range(len(mine)), 2):
            if len(mine[a]) == 1:
                continue
            spare = min(sum(mine[a].values()) - lows[a], high - sum(mine[b].values()))
            for give, take, count in _exchanges(mine[a], mine[b], spare):
                tried += 1
                if tried > _EXCHANGES:
                    return [tuple(sorted(part.items())) for part in mine]
                new_a, new_b = dict(mine[a]), dict(mine[b])
                _move(new_a, new_b, give, count)
                if take is not None:
                    _move(new_b, new_a, take, count)
                cost_a, cost_b = costs.part(tuple(new_a.items())), costs.part(tuple(new_b.items()))
                if (cost_a + cost_b) >> Costs.crossing < (cost[a] + cost[b]) >> Costs.crossing:
                    mine[a], mine[b], cost[a], cost[b] = new_a, new_b, cost_a, cost_b
                    improved = True
                    break
    return [tuple(sorted(part.items())) for part in mine]


def _exchanges(mine: dict[int, int], other: dict[int, int], spare: int) -> Iterator[tuple[int, int | None, int]]:
    """The cell one part could give of, the one it would take of for that, and how many cores."""
    for give, count in mine.items():
        if count <= spare:
            yield give, None, count
        for take, offered in other.items():
            if take != give:
                yield give, take, min(count, offered)


def _move(giver: dict[int, int], taker: dict[int, int], cell: int, count: int) -> None:
    giver[cell] -= count
    taker[cell] = taker.get(cell, 0) + count
    if not giver[cell]:
        del giver[cell]


def pack(cells: Sequence[Cell], sizes: Sequence[int], *, within_nodes: bool = False) -> list[Part]:
    """Parts of exactly these sizes, in their order; the largest choose first, each where it crosses and leaves least.

    Raises:
        PlanError: ``within_nodes``, and a size fits into no node any more.
    """
    levels = _NODES_FIRST if within_nodes else LEVELS
    room = [cell.size for cell in cells]
    parts: dict[int, Part] = {}
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        parts[place] = _gather(cells, room, range(len(cells)), sizes[place], levels)[1]
        if within_nodes and len({cells[i].node for i, _ in parts[place]}) > 1:
            nodes: dict[int, int] = {}
            for cell in cells:
                nodes[cell.node] = nodes.get(cell.node, 0) + cell.size
            raise PlanError(
                f"workers of {', '.join(map(str, sizes))} cores do not fit into NUMA nodes of "
                f"{', '.join(map(str, nodes.values()))} cores; ask for fewer cores or drop --skip-cross-node-cores"
            )
        for i, count in parts[place]:
            room[i] -= count
    return [parts[i] for i in range(len(sizes))]


def _gather(
    cells: Sequence[Cell], room: Sequence[int], members: Sequence[int], size: int, levels: tuple[str, ...]
) -> tuple[tuple[int, ...], Part]:
    """Take ``size`` cores from ``members``; return the boundaries crossed, a number for each level, and the part."""
    if not levels:
        (member,) = members
        return (), ((member, size),)
    groups: dict[int, list[int]] = {}
    for i in members:
        if room[i]:
            groups.setdefault(getattr(cells[i], levels[0]), []).append(i)
    rooms = {name: sum(room[i] for i in group) for name, group in groups.items()}
    crossed = [0] * len(levels)
    part: list[tuple[int, int]] = []
    while size:
        fitting = [name for name in groups if rooms[name] >= size]
        if fitting:
            found = [(*_gather(cells, room, groups[name], size, levels[1:]), rooms[name], name) for name in fitting]
            below, more, _, name = min(found, key=lambda f: (f[0], f[2], f[3]))
            taken = size
        else:
            name = max(groups, key=lambda name: (rooms[name], -name))
            taken = rooms[name]
            below, more = _gather(cells, room, groups[name], taken, levels[1:])
        crossed[0] += bool(part)
        crossed[1:] = [a + b for a, b in zip(crossed[1:], below, strict=True)]
        part += more
        size -= taken
        del groups[name]
    return tuple(crossed), tuple(sorted(part))
