"""Cutting one pool of cores into parts, one per worker, that cross the fewest boundaries. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from heapq import heapreplace
from itertools import accumulate, chain, combinations
from operator import itemgetter

from ts_plugin.planning.allotment import apportion
from ts_plugin.planning.core_groups import Claim, CoreGroup, Costs, Distance, Part, Parts, by_level
from ts_plugin.planning.packing import pack, pack_within_nodes, repair

# Levels from the outside in: right where packages hold NUMA nodes; where nodes hold packages; where neither holds.
_ORDERS = (("kind", "package", "node", "l3"), ("kind", "node", "package", "l3"), ("kind", "node", "l3", "package"))
_NODES_FIRST = ("node", "kind", "package", "l3")
_MANY = 32  # for more workers one order of levels is tried; of more core groups each gets about its share of the parts
_FEW = 6  # up to so many groups every way of joining them is tried
_SPAN = 3  # a longer run of core groups is one part, or the whole row
_MIXES = 400_000  # so many pairs of mixes may be put together; with more claims each group is tried with fewer
_BITS = 16  # of the number of each claim's parts in a mix

Mix = int  # how many parts of each claim: of the first in the lowest 16 bits, of the second in the next, and so on
_Tree = Parts | tuple["_Tree", "_Tree"]  # because most of them are thrown away
_Table = dict[Mix, tuple[int, _Tree]]  # of every mix the cheapest parts, and their cost


def cut(
    groups: Sequence[CoreGroup],
    claims: Sequence[Claim],
    *,
    distance: Distance,
    equal: bool = False,
    within_nodes: bool = False,
    homes: Sequence[Sequence[int]] | None = None,
) -> list[Part]:
    """Divide the cores of ``groups`` into parts with the least cost (``Costs``), for the workers of each claim in turn.

    All cores are used, unless every size is fixed. An example: two NUMA nodes, each with three L3 domains of 4 cores,
    and one claim of five workers.

    1. The equal share is 24 / 5 = 4.8 cores. A part has half to twice of it: 3 to 9 cores.
    2. From the inside out, each group says what its cheapest division into 1, 2, 3 ... parts is. An L3 domain of 4
       cores is one part; two would have 2 cores each.
    3. A NUMA node takes one division of each of its domains: 4 4 4, three parts without a boundary. For two parts it
       must join domains. Joining k groups costs k - 1 boundaries, so it joins as few as possible: 8 4, one boundary.
       One part would have 12 cores.
    4. The machine takes three parts of one node and two of the other: 4 4 4 and 8 4. No part leaves its node.
    5. If nodes must be joined, for two or three workers on eight of them, their cores form a row, which is cut where
       core groups end. What that misses, ``repair`` finds by exchanges: fewer boundaries, or sizes that are more equal.

    Of several claims a group says the same for each mix of them: one part of the first with two of the second, ... It
    is also tried to place the fixed sizes before all others, where whole core groups have just these.

    ``within_nodes`` leaves cores idle rather than have a part span two NUMA nodes; with ``equal`` too rather than have
    sizes differ. ``homes`` is the number of workers of each claim at home in each core group: among equals the division
    in which most of them can stay is taken.

    Raises:
        PlanError: ``within_nodes``, and the fixed sizes fit into no node.
    """
    costs = Costs(groups, distance, [claim.weight for claim in claims])
    homes = homes or [[0] * len(claims)] * len(groups)
    divide = _cut_within_nodes if within_nodes else _cut_anywhere
    parts = pack_within_nodes(groups, claims) if within_nodes and equal else divide(groups, claims, costs, homes)
    return [part for _, part in sorted(parts, key=lambda own: (own[0], own[1][0][0], len(own[1]), -own[1][0][1]))]


def _cut_anywhere(
    groups: Sequence[CoreGroup], claims: Sequence[Claim], costs: Costs, homes: Sequence[Sequence[int]]
) -> Parts:
    workers = sum(claim.workers for claim in claims)
    search = _Search(groups, claims, costs, homes)
    if not search.slack:
        parts = search.evenly(range(len(groups)), search.everybody)[1]
    else:
        owners = [c for c, claim in enumerate(claims) for _ in range(claim.workers)]
        parts = list(zip(owners, pack(groups, [claims[c].least for c in owners]), strict=True))
    even = costs.parts(parts) - costs.crossed(parts)  # what the most equal sizes cost where they cross nothing
    orders = _ORDERS if workers <= _MANY else _ORDERS[:1]
    for levels in orders if len(groups) <= _MANY or not search.slack else ():
        found = search.run(levels)
        parts = min(parts, found or parts, key=costs.parts)
        if costs.crossed(parts) < costs.weight["package"]:
            break  # Only L3 domains are crossed.
    if costs.parts(parts) <= even:
        return parts
    drafts = [parts, *_packed_first(groups, claims, costs, homes)]
    return min((repair(groups, draft, claims, costs) for draft in drafts), key=costs.parts)


def _packed_first(
    groups: Sequence[CoreGroup], claims: Sequence[Claim], costs: Costs, homes: Sequence[Sequence[int]]
) -> Iterator[Parts]:
    """The fixed sizes where whole core groups have just these, and the rest of the cores divided among the others."""
    fixed = [c for c, claim in enumerate(claims) if not claim.weight for _ in range(claim.workers)]
    fair = [c for c, claim in enumerate(claims) if claim.weight]
    if not fixed or not fair:
        return
    packed = pack(groups, [claims[c].least for c in fixed])
    room = [group.size for group in groups]
    for i, count in chain(*packed):
        room[i] -= count
    left = [i for i, cores in enumerate(room) if cores]
    rest, mine = [replace(groups[i], size=room[i]) for i in left], [claims[c] for c in fair]
    inner = Costs(rest, costs.distance, [claim.weight for claim in mine])
    others = _cut_anywhere(rest, mine, inner, [[homes[i][c] for c in fair] for i in left])
    yield [
        *zip(fixed, packed, strict=True),
        *((fair[c], tuple((left[i], count) for i, count in part)) for c, part in others),
    ]


def _cut_within_nodes(
    groups: Sequence[CoreGroup], claims: Sequence[Claim], costs: Costs, homes: Sequence[Sequence[int]]
) -> Parts:
    claims = [replace(claim, most=costs.total) if claim.weight else claim for claim in claims]
    while not (found := _Search(groups, claims, costs, homes, spare_nodes=True).run(_NODES_FIRST)):
        # So many nodes stay idle that somebody gets less than half of the equal share.
        lower = [replace(claim, least=max(1, claim.least // 2)) if claim.weight else claim for claim in claims]
        if lower == claims:
            return pack_within_nodes(groups, claims)
        claims = lower
    return found


class _Search:
    """Tables of "this mix of parts out of this group" for one order of the levels, the outermost first.

    ``spare_nodes``: a NUMA node may stay idle, and nothing joins two.
    """

    def __init__(
        self,
        groups: Sequence[CoreGroup],
        claims: Sequence[Claim],
        costs: Costs,
        homes: Sequence[Sequence[int]],
        *,
        spare_nodes: bool = False,
    ) -> None:
        self.groups = groups
        self.claims = claims
        self.costs = costs
        self.homes = homes
        self.spare_nodes = spare_nodes
        self.slack = not any(claim.weight for claim in claims)
        self.everybody = _mix(claim.workers for claim in claims)
        self.rows: dict[tuple[tuple[tuple[int, ...], ...], bool], _Table] = {}
        self.known: dict[tuple[int, int, bool | None], dict[Mix, int]] = {}
        self.sizes: dict[tuple[int, Mix], list[tuple[int, int]]] = {}
        alone = len(claims) == 1 and len(groups) > _MANY and not spare_nodes
        self.near = 1 if alone else max(claim.workers for claim in claims)
        while self.near and len(groups) * self._window(self.near) * self._window(self.near + 1) > _MIXES:
            self.near //= 2

    def run(self, levels: Sequence[str]) -> Parts | None:
        order = sorted(range(len(self.groups)), key=lambda i: ([getattr(self.groups[i], name) for name in levels], i))
        found = self._table(tuple(order), levels, [self.everybody], slack=self.slack)
        return _flat(found[self.everybody][1]) if found else None

    def _window(self, near: int) -> int:
        """How many mixes there may be for one number of cores."""
        return math.prod(min(claim.workers, 2 * near + 1) + 1 for claim in self.claims)

    def _size(self, members: Iterable[int]) -> int:
        return sum(self.groups[i].size for i in members)

    def _workers(self, mix: Mix) -> int:
        return sum(self._numbers(mix))

    def _numbers(self, mix: Mix) -> list[int]:
        return [mix >> _BITS * c & (1 << _BITS) - 1 for c in range(len(self.claims))]

    def _mixes(self, size: int, *, slack: bool | None, near: int | None = None) -> dict[Mix, int]:
        """Mixes worth trying for so many cores, ascending, and the number of parts in each.

        With ``slack`` fixed sizes that may leave a rest; where it is None, all mixes that are not too large.
        """
        near = self.near if near is None else near
        key = size, near, slack
        if key not in self.known:
            found = [(0, 0, 0, 0)]  # the mix, its parts, the fewest and the most cores that they can have
            for c, claim in enumerate(self.claims):
                share = size * claim.workers // self.costs.total
                numbers = range(0 if slack else max(0, share - near), min(claim.workers, share + 1 + near) + 1)
                if slack and claim.weight:
                    numbers = range(1)
                found = [
                    (mix + (n << _BITS * c), parts + n, least + n * claim.least, most + n * claim.most)
                    for mix, parts, least, most in found
                    for n in numbers
                    if least + n * claim.least <= size
                ]
            self.known[key] = {mix: n for mix, n, _, most in sorted(found) if slack is not False or size <= most}
        return self.known[key]

    def _table(
        self, members: tuple[int, ...], levels: Sequence[str], wanted: Collection[Mix], *, slack: bool
    ) -> _Table:
        """The cheapest divisions of ``members`` into ``wanted`` mixes; some may be impossible."""
        if not levels:
            possible = self._mixes(self._size(members), slack=slack)
            return {mix: self.evenly(members, mix) for mix in wanted if mix in possible}
        level, *inner = levels
        children = by_level(self.groups, members, level)
        if len(children) == 1:
            return self._table(members, inner, wanted, slack=slack)
        spare = self.spare_nodes and level == "node"
        tables = []
        for child in children:
            size = self._size(child)
            table = self._table(child, inner, self._mixes(size, slack=slack), slack=slack)
            if spare:
                table |= self._table(child, inner, self._mixes(size, slack=True), slack=True)
            tables.append(self._with_moves(table, child, level))
        result = self._combine(tables, list(map(self._size, children)), wanted)
        missing = [] if spare else [mix for mix in wanted if mix not in result]
        mixed = missing and len(self.claims) > 1 and len(members) <= _MANY
        row = self._row(tuple(children), slack=slack) if mixed else {}
        # Joining k groups costs k - 1 boundaries, so join as few as possible: into as many blocks as possible.
        for count in range(len(children) - 1, 0, -1):
            rest = [mix for mix in missing if mix not in result and (slack or self._workers(mix) >= count)]
            if rest:
                found = self._join(children, tables, level, count, rest, slack=slack)
                result |= {mix: min(found[mix], row.get(mix, found[mix]), key=itemgetter(0)) for mix in found}
        return dict(sorted(result.items()))  # among equals, the first groups get the fewest parts

    def _join(
        self,
        children: Sequence[tuple[int, ...]],
        tables: Sequence[_Table],
        level: str,
        count: int,
        wanted: Collection[Mix],
        *,
        slack: bool,
    ) -> _Table:
        """The cheapest divisions into ``wanted`` mixes that join ``children`` to ``count`` blocks."""
        sizes = [self._size(child) for child in children]
        homes = [sum(map(sum, (self.homes[i] for i in child))) for child in children]
        single = not slack and all(self._workers(mix) == count for mix in wanted)  # Every block is one part.
        found: _Table = {}
        for blocks in _joins(sizes, homes, count):
            options = []
            for block in blocks:
                if len(block) == 1:
                    options.append(tables[block[0]])
                    continue
                spans = tuple(children[child] for child in block)
                joined = tuple(chain(*spans))
                table = self._whole(joined) if single else self._row(spans, slack=slack)
                options.append(self._with_moves(table, joined, level))
            areas = [sum(sizes[child] for child in block) for block in blocks]
            for mix, (cost, parts) in self._combine(options, areas, wanted).items():
                _improve(found, mix, cost, parts)
        return found

    def _with_moves(self, table: _Table, members: Iterable[int], level: str) -> _Table:
        """Add the moves that follow where fewer parts than are at home in a group stay there; far ones count more."""
        here = [sum(numbers) for numbers in zip(*(self.homes[i] for i in members), strict=True)]
        if not any(here):
            return table
        unit = self.costs.weight["move"] << (0 if level == "l3" else 12)
        return {
            mix: (cost + unit * sum(max(0, a - b) for a, b in zip(here, self._numbers(mix), strict=True)), parts)
            for mix, (cost, parts) in table.items()
        }

    def _combine(self, tables: Sequence[_Table], sizes: Sequence[int], wanted: Collection[Mix]) -> _Table:
        """The cheapest way to get every wanted mix, some of each table."""
        if not all(tables):
            return {}
        reached: _Table = {0: (0, [])}
        for table, size in zip(tables, accumulate(sizes), strict=True):
            allowed = self._mixes(size, slack=None, near=self.near + 1)
            longer: _Table = {}
            for p, (cost, parts) in reached.items():
                for q, (more, others) in table.items():
                    if p + q in allowed:
                        _improve(longer, p + q, cost + more, (parts, others))
            reached = longer
        return {mix: reached[mix] for mix in wanted if mix in reached}

    def _whole(self, members: Sequence[int]) -> _Table:
        possible = self._mixes(self._size(members), slack=False)
        return {mix: self.evenly(members, mix) for mix, parts in possible.items() if parts == 1}

    def _row(self, spans: tuple[tuple[int, ...], ...], *, slack: bool) -> _Table:
        """Divide joined groups as one row of cores: in their order, or so that small or large core groups meet.

        With ``slack`` also the largest first, whatever they belong to: the cores at the end of a row may stay idle.
        """
        if (spans, slack) not in self.rows:
            found = self.rows[spans, slack] = dict[Mix, tuple[int, _Tree]]()
            first, *others = (sorted(span, key=lambda i: self.groups[i].size) for span in spans)
            rows = [[*chain(*spans)], [*reversed(first), *chain(*others)], [*first, *reversed([*chain(*others)])]]
            if slack:
                rows.append(sorted(chain(*spans), key=lambda i: -self.groups[i].size))
            for row in {tuple(self.groups[i].size for i in row): row for row in reversed(rows)}.values():
                for mix, (cost, parts) in self._cut_row(row, slack=slack).items():
                    _improve(found, mix, cost, parts)
        return self.rows[spans, slack]

    def _cut_row(self, row: Sequence[int], *, slack: bool) -> _Table:
        """Cut at the ends of core groups, and evenly in short runs."""
        reached: list[_Table] = [{0: (0, [])}, *({} for _ in row)]
        ends = [0, *accumulate(self.groups[i].size for i in row)]
        for start, here in enumerate(reached[:-1]):
            for stop in range(start + 1, len(row) + 1) if here else ():
                run = row[start:stop]
                allowed = self._mixes(ends[stop], slack=None, near=self.near + 1)
                for q, number in self._mixes(ends[stop] - ends[start], slack=slack).items():
                    if number > 1 and _SPAN < stop - start < len(row):
                        continue
                    cost, parts = self.evenly(run, q)
                    for p, (before, others) in here.items():
                        if p + q in allowed:
                            _improve(reached[stop], p + q, before + cost, (others, parts))
        return reached[-1]

    def evenly(self, members: Sequence[int], mix: Mix) -> tuple[int, Parts]:
        """Cut core groups in this order into parts of one claim that differ by one core at most; return their cost."""
        made: Parts = []
        rest = iter(members)
        left = 0
        for claim, size in self._sizes(self._size(members), mix):
            part: list[tuple[int, int]] = []
            while size:
                if not left:
                    i = next(rest)
                    left = self.groups[i].size
                take = min(size, left)
                part.append((i, take))
                size, left = size - take, left - take
            made.append((claim, tuple(sorted(part))))
        idle = left + self._size(rest)
        return idle * self.costs.weight["idle"] + sum(self.costs.part(*own) for own in made), made

    def _sizes(self, cores: int, mix: Mix) -> list[tuple[int, int]]:
        """The sizes of the parts of a mix, and their claims; the largest first."""
        if (cores, mix) not in self.sizes:
            owners = [c for c, number in enumerate(self._numbers(mix)) for _ in range(number)]
            fixed = [(c, self.claims[c].least) for c in owners if not self.claims[c].weight]
            fair = [c for c in owners if self.claims[c].weight]
            mine = [self.claims[c] for c in fair]
            sizes = (
                apportion(
                    cores - sum(size for _, size in fixed),
                    [claim.weight for claim in mine],
                    [claim.least for claim in mine],
                    [claim.most for claim in mine],
                )
                if fair
                else []
            )
            made = [*fixed, *zip(fair, sizes, strict=True)]
            self.sizes[cores, mix] = sorted(made, key=lambda own: -own[1])
        return self.sizes[cores, mix]


def _mix(numbers: Iterable[int]) -> Mix:
    return sum(number << _BITS * c for c, number in enumerate(numbers))


def _improve(table: _Table, mix: Mix, cost: int, parts: _Tree) -> None:
    if mix not in table or cost < table[mix][0]:
        table[mix] = cost, parts


def _flat(parts: _Tree) -> Parts:
    found: Parts = []
    rest = [parts]
    while rest:
        first = rest.pop()
        if isinstance(first, tuple):
            rest += reversed(first)
        else:
            found += first
    return found


def _joins(sizes: Sequence[int], homes: Sequence[int], count: int) -> Iterator[list[list[int]]]:
    """Ways to join groups into ``count`` blocks: all of them for few groups, else those that promise most."""
    if len(sizes) <= _FEW:
        yield from _set_partitions(len(sizes), count)
        return
    looks = list(zip(sizes, homes, strict=True))
    if len(sizes) - count == 1:  # two groups are joined: the first pair of every two sizes
        for a, b in {(looks[a], looks[b]): (a, b) for a, b in combinations(reversed(range(len(sizes))), 2)}.values():
            yield [[a, b], *([i] for i in range(len(sizes)) if i not in (a, b))]
    # One large block beside single groups of about one size, for a worker that is far larger than the others.
    order = sorted(range(len(sizes)), key=lambda i: looks[i])
    runs = [order[start : start + count - 1] for start in range(len(sizes) - count + 2)]
    for single in {tuple(looks[i] for i in run): run for run in runs}.values():
        yield [[i for i in range(len(sizes)) if i not in single], *([i] for i in single)]
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
