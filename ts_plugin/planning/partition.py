"""Cutting one pool of cores into parts of about equal size that cross the fewest boundaries. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapreplace
from itertools import chain, combinations

from ts_plugin.planning.core_groups import CoreGroup, Costs, Distance, Limits, Part, by_level
from ts_plugin.planning.packing import pack, repair

__all__ = ["cut"]

# Levels from the outside in: right where packages hold NUMA nodes; where nodes hold packages; where neither holds.
_ORDERS = (("kind", "package", "node", "l3"), ("kind", "node", "package", "l3"), ("kind", "node", "l3", "package"))
_NODES_FIRST = ("node", "kind", "package", "l3")
_MANY = 32  # for more workers a group gets about its proportional number of parts, and one order of levels is tried
_FEW = 6  # up to so many groups every way of joining them is tried
_SPAN = 3  # a longer run of core groups is one part

_Parts = list[Part] | tuple["_Parts", "_Parts"]  # a tree, because most of them are thrown away
_Table = dict[int, tuple[int, _Parts]]  # by their number: the cheapest parts, and their cost


def cut(
    groups: Sequence[CoreGroup],
    workers: int,
    *,
    distance: Distance,
    equal: bool = False,
    within_nodes: bool = False,
    homes: Sequence[int] | None = None,
) -> list[Part]:
    """Divide all cores of ``groups`` into parts, one per worker, with the least cost (``Costs``).

    An example: two NUMA nodes, each with three L3 domains of 4 cores, and five workers.

    1. The equal share is 24 / 5 = 4.8 cores. A part has half to twice of it: 3 to 9 cores.
    2. From the inside out, each group says what its cheapest division into 1, 2, 3 ... parts is. An L3 domain of 4
       cores is one part; two would have 2 cores each.
    3. A NUMA node takes one division of each of its domains: 4 4 4, three parts without a boundary. For two parts it
       must join domains. Joining k groups costs k - 1 boundaries, so it joins as few as possible: 8 4, one boundary.
       One part would have 12 cores.
    4. The machine takes three parts of one node and two of the other: 4 4 4 and 8 4. No part leaves its node.
    5. If nodes must be joined, for two or three workers on eight of them, their cores form a row, which is cut where
       core groups end. What that misses, ``repair`` finds by exchanges.

    ``equal`` wants sizes within one core of each other, whatever they cross. ``within_nodes`` leaves cores idle rather
    than have a part span two NUMA nodes. ``homes`` is the number of workers at home in each core group: among equals
    the division in which most of them can stay is taken.
    """
    total = sum(group.size for group in groups)
    if within_nodes and equal:
        return _cut_nodes_equally(groups, workers)
    costs = Costs(groups, distance)
    limits = Limits.around(total, workers, equal=equal)
    if within_nodes:
        limits = Limits(limits.least, total)
        while not (found := _Search(groups, workers, limits, costs, homes, spare_nodes=True).run(_NODES_FIRST)):
            # So many nodes stay idle that somebody gets less than half of the equal share.
            limits = Limits(max(1, limits.least // 2), total)
        return found
    parts = _cut_evenly(groups, range(len(groups)), workers)
    for levels in _ORDERS if workers <= _MANY else _ORDERS[:1]:
        found = _Search(groups, workers, limits, costs, homes).run(levels)
        parts = min(parts, found or parts, key=costs.parts)
        if costs.parts(parts) < costs.weight["package"]:
            break  # Only L3 domains are crossed.
    parts = min(parts, repair(groups, parts, [limits.least] * workers, limits.most, distance), key=costs.parts)
    return sorted(parts, key=lambda part: (part[0][0], len(part), -part[0][1]))


class _Search:
    """Tables of "so many parts out of this group" for one order of the levels, the outermost first.

    ``spare_nodes``: a NUMA node may stay idle, and nothing joins two.
    """

    def __init__(
        self,
        groups: Sequence[CoreGroup],
        workers: int,
        limits: Limits,
        costs: Costs,
        homes: Sequence[int] | None,
        *,
        spare_nodes: bool = False,
    ) -> None:
        self.groups = groups
        self.workers = workers
        self.limits = limits
        self.costs = costs
        self.homes = homes or [0] * len(groups)
        self.spare_nodes = spare_nodes
        self.rows: dict[tuple[tuple[int, ...], ...], _Table] = {}
        self.near = workers if len(groups) <= _MANY or spare_nodes else 1

    def run(self, levels: Sequence[str]) -> list[Part] | None:
        order = sorted(range(len(self.groups)), key=lambda i: ([getattr(self.groups[i], name) for name in levels], i))
        found = self._table(tuple(order), levels, range(self.workers, self.workers + 1)).get(self.workers)
        return found and _flat(found[1])

    def _size(self, members: Iterable[int]) -> int:
        return sum(self.groups[i].size for i in members)

    def _numbers(self, size: int) -> range:
        """Numbers of parts worth trying for so many cores."""
        possible, share = self.limits.parts(size), size * self.workers // self.costs.total
        return range(
            max(possible.start, share - self.near), min(possible.stop, self.workers + 1, share + 2 + self.near)
        )

    def _table(self, members: tuple[int, ...], levels: Sequence[str], wanted: range) -> _Table:
        """The cheapest divisions of ``members`` into ``wanted`` numbers of parts; a number may be impossible."""
        if not levels:
            return {p: self._evenly(members, p) for p in wanted if p in self.limits.parts(self._size(members))}
        level, *inner = levels
        children = by_level(self.groups, members, level)
        if len(children) == 1:
            return self._table(members, inner, wanted)
        spare = self.spare_nodes and level == "node"
        tables = []
        for child in children:
            size = self._size(child)
            table = self._table(child, inner, self._numbers(size))
            if spare:
                table[0] = self.costs.idle(size), []
            tables.append(self._with_moves(table, child, level))
        result = self._combine(tables, wanted)
        # Joining k groups costs k - 1 boundaries, so join as few as possible: into as many blocks as possible.
        for count in range(len(children) - 1, 0, -1):
            missing = [p for p in wanted if p not in result and p >= count]
            if missing and not spare:
                result |= self._join(children, tables, level, count, missing)
        return dict(sorted(result.items()))  # among equals, the first groups get the fewest parts

    def _join(
        self,
        children: Sequence[tuple[int, ...]],
        tables: Sequence[_Table],
        level: str,
        count: int,
        wanted: Sequence[int],
    ) -> _Table:
        """The cheapest divisions into ``wanted`` numbers of parts that join ``children`` to ``count`` blocks."""
        sizes = [self._size(child) for child in children]
        homes = [sum(self.homes[i] for i in child) for child in children]
        found: _Table = {}
        for blocks in _joins(sizes, homes, count):
            options = []
            for block in blocks:
                if len(block) == 1:
                    options.append(tables[block[0]])
                    continue
                spans = tuple(children[child] for child in block)
                joined = tuple(chain(*spans))
                table = self._row(spans) if wanted[-1] > count else self._whole(joined)  # else every block is one part
                options.append(self._with_moves(table, joined, level))
            for p, (cost, parts) in self._combine(options, range(wanted[0], wanted[-1] + 1)).items():
                if p in wanted:
                    _improve(found, p, cost, parts)
        return found

    def _with_moves(self, table: _Table, members: Iterable[int], level: str) -> _Table:
        """Add the moves that follow where fewer parts than are at home in a group stay there; far ones count more."""
        here = sum(self.homes[i] for i in members)
        unit = self.costs.weight["move"] << (0 if level == "l3" else 12)
        return {p: (cost + max(0, here - p) * unit, parts) for p, (cost, parts) in table.items()}

    @staticmethod
    def _combine(tables: Sequence[_Table], wanted: range) -> _Table:
        """The cheapest way to get every wanted number of parts, so many of each table."""
        if not all(tables):
            return {}
        low, high = sum(map(min, tables)), sum(map(max, tables))  # of the tables still to come
        reached: _Table = {0: (0, [])}
        for table in tables:
            low, high = low - min(table), high - max(table)
            longer: _Table = {}
            for p, (cost, parts) in reached.items():
                for q, (more, others) in table.items():
                    if p + q + low < wanted.stop and p + q + high >= wanted.start:
                        _improve(longer, p + q, cost + more, (parts, others))
            reached = longer
        return reached

    def _whole(self, members: Sequence[int]) -> _Table:
        return {1: self._evenly(members, 1)} if 1 in self.limits.parts(self._size(members)) else {}

    def _row(self, spans: tuple[tuple[int, ...], ...]) -> _Table:
        """Divide joined groups as one row of cores: in their order, or so that small core groups meet."""
        if spans not in self.rows:
            first, *others = (sorted(span, key=lambda i: self.groups[i].size) for span in spans)
            found = self._cut_row(list(chain(*spans)))
            for number, (cost, parts) in self._cut_row([*reversed(first), *chain(*others)]).items():
                _improve(found, number, cost, parts)
            self.rows[spans] = found
        return self.rows[spans]

    def _cut_row(self, row: Sequence[int]) -> _Table:
        """Cut at the ends of core groups, and evenly in short runs."""
        reached: list[_Table] = [{0: (0, [])}, *({} for _ in row)]
        most = self._numbers(self._size(row)).stop
        for start, here in enumerate(reached[:-1]):
            for stop in range(start + 1, len(row) + 1) if here else ():
                run = row[start:stop]
                for q in self._numbers(self._size(run)):
                    if q > 1 and stop - start > _SPAN:
                        break
                    cost, parts = self._evenly(run, q)
                    for p, (before, others) in here.items():
                        if p + q < most:
                            _improve(reached[stop], p + q, before + cost, (others, parts))
        return reached[-1]

    def _evenly(self, members: Sequence[int], parts: int) -> tuple[int, list[Part]]:
        made = _cut_evenly(self.groups, members, parts)
        return sum(map(self.costs.part, made)), made


def _improve(table: _Table, number: int, cost: int, parts: _Parts) -> None:
    if number not in table or cost < table[number][0]:
        table[number] = cost, parts


def _flat(parts: _Parts) -> list[Part]:
    found: list[Part] = []
    rest = [parts]
    while rest:
        first = rest.pop()
        if isinstance(first, tuple):
            rest += reversed(first)
        else:
            found += first
    return found


def _cut_evenly(groups: Sequence[CoreGroup], row: Sequence[int], parts: int) -> list[Part]:
    """Cut core groups in this order into parts that differ by one core at most."""
    quotient, larger = divmod(sum(groups[i].size for i in row), parts)
    made: list[Part] = []
    rest = iter(row)
    left = 0
    for number in range(parts):
        size = quotient + (number < larger)
        part: list[tuple[int, int]] = []
        while size:
            if not left:
                i = next(rest)
                left = groups[i].size
            take = min(size, left)
            part.append((i, take))
            size, left = size - take, left - take
        made.append(tuple(sorted(part)))
    return made


def _joins(sizes: Sequence[int], homes: Sequence[int], count: int) -> Iterator[list[list[int]]]:
    """Ways to join groups into ``count`` blocks: all of them for few groups, else those that promise most."""
    if len(sizes) <= _FEW:
        yield from _set_partitions(len(sizes), count)
        return
    looks = list(zip(sizes, homes, strict=True))
    if len(sizes) - count == 1:  # two groups are joined: the first pair of every two sizes
        for a, b in {(looks[a], looks[b]): (a, b) for a, b in combinations(reversed(range(len(sizes))), 2)}.values():
            yield [[a, b], *([i] for i in range(len(sizes)) if i not in (a, b))]
    # Blocks of about one size: the largest group first into the lightest block, which keeps groups with workers apart.
    blocks: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    lightest = [(0, block) for block in range(count)]
    for look in sorted(looks, reverse=True):
        size, block = lightest[0]
        blocks[block].append(look)
        heapreplace(lightest, (size + look[0], block))
    # Of groups that look alike, neighbours stay together.
    alike = {look: [i for i, other in enumerate(looks) if other == look] for look in looks}
    yield sorted(sorted(alike[look].pop(0) for look in block) for block in blocks)


def _set_partitions(count: int, blocks: int) -> Iterator[list[list[int]]]:
    """All ways to put ``count`` things into so many blocks."""
    if count < blocks or not blocks:
        if count == blocks:
            yield []
        return
    for partition in _set_partitions(count - 1, blocks - 1):
        yield [*partition, [count - 1]]
    for partition in _set_partitions(count - 1, blocks):
        for i, block in enumerate(partition):
            yield [*partition[:i], [*block, count - 1], *partition[i + 1 :]]


def _cut_nodes_equally(groups: Sequence[CoreGroup], workers: int) -> list[Part]:
    nodes = [sum(groups[i].size for i in node) for node in by_level(groups, range(len(groups)), "node")]
    size = sum(nodes) // workers
    while sum(cores // size for cores in nodes) < workers:
        size -= 1
    return pack(groups, [size] * workers, within_nodes=True)
