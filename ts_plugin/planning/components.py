"""The search behind ``partition.cut``: how many parts out of which group of cells. Pure arithmetic.

Parts and groups (say, NUMA nodes) that touch each other form components, and a component of k groups crosses k - 1
boundaries however it is cut. So the search wants the most components: it joins groups only where it must, and few.
Tables of "p parts out of this group" then choose, among equally many boundaries, what is best on the levels below and
most equal in size. Groups that look alike share a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace

from ts_plugin.planning.cells import Cell, Costs, Part, group

__all__ = ["Limits", "Search"]

_FEW = 6  # up to so many groups every way of joining them is tried
_SPAN = 3  # a run of more cells is cut at the cells' boundaries only
_CLOSINGS = 3  # runs tried from one cell on where sizes are bounded from above

_Partition = list[list[int]]


@dataclass(frozen=True, slots=True)
class Limits:
    """The size of a part, in cores; ``bounded`` says that ``most`` is a limit that matters."""

    least: int
    most: int
    bounded: bool = False

    def fits(self, sizes: Sequence[int], parts: int) -> bool:
        """Whether components of these sizes can be cut into so many parts."""
        return (
            len(sizes) <= parts <= sum(size // self.least for size in sizes)
            and min(sizes) >= self.least
            and sum(-(-size // self.most) for size in sizes) <= parts
        )


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How cells become parts: by ``children`` (positions of their cells, recipe), as ``drawn``, whole, or evenly."""

    parts: int
    children: tuple[tuple[tuple[int, ...], _Recipe], ...] = ()
    drawn: tuple[Part, ...] = ()

    def build(self, members: Sequence[int], cells: Sequence[Cell]) -> list[Part]:
        if self.children:
            made = [recipe.build([members[i] for i in positions], cells) for positions, recipe in self.children]
            return [part for parts in made for part in parts]
        if self.drawn:
            return [tuple(sorted((members[i], count) for i, count in part)) for part in self.drawn]
        if self.parts == 1:
            return [tuple((i, cells[i].size) for i in sorted(members))]
        (member,) = members
        return [((member, size),) for size in even(cells[member].size, self.parts)]


_Entry = tuple[int, _Recipe]  # the least cost, and how
_Table = dict[int, _Entry]  # by the number of parts
_Picks = tuple["_Picks", int] | None  # a chain of choices, the last one first
_Run = tuple["_Run", tuple[Part, ...]] | None


class Search:
    """One search over one order of the levels, outermost first.

    ``near`` narrows the numbers of parts tried for a group to those around its proportional share. ``spare_nodes``:
    a NUMA node may stay idle, and nothing joins two; that level comes first then. ``homes`` is the number of workers
    at home in each cell.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        workers: int,
        *,
        limits: Limits,
        levels: tuple[str, ...],
        costs: Costs,
        near: int,
        spare_nodes: bool,
        homes: Sequence[int],
    ) -> None:
        self.cells = cells
        self.workers = workers
        self.total = sum(cell.size for cell in cells)
        self.limits = limits
        self.levels = levels
        self.costs = costs
        self.near = near
        self.spare_nodes = spare_nodes
        self.homes = homes
        self.tables: dict[object, _Table] = {}

    def run(self) -> list[Part] | None:
        order = sorted((cell.kind, cell.package, cell.node, cell.l3, i) for i, cell in enumerate(self.cells))
        members = tuple(i for *_, i in order)  # neighbours in a package follow each other
        found = self._table(members, 0, range(self.workers, self.workers + 1)).get(self.workers)
        return found and found[1].build(members, self.cells)

    def _size(self, members: Sequence[int]) -> int:
        return sum(self.cells[i].size for i in members)

    def _window(self, size: int) -> range:
        """Numbers of parts worth trying for a group of so many cores."""
        share = size * self.workers // self.total
        low = max(1, -(-size // self.limits.most), share - self.near)
        high = min(size // self.limits.least, self.workers, share + 1 + self.near)
        return range(low, high + 1)

    def _look(self, members: Sequence[int]) -> object:
        """Equal for groups that look the same from inside."""
        names: tuple[dict[int, int], ...] = ({}, {}, {}, {})
        shape = []
        for i in members:
            cell = self.cells[i]
            values = (cell.kind, cell.node, cell.package, cell.l3)
            shape.append([known.setdefault(value, len(known)) for known, value in zip(names, values, strict=True)])
            shape[-1] += [cell.size, self.homes[i]]
        nodes = tuple(names[1]) if len(names[1]) > 1 else ()  # distances differ between pairs of nodes
        return tuple(map(tuple, shape)), nodes

    def _table(self, members: tuple[int, ...], depth: int, wanted: range) -> _Table:
        key = depth, wanted, self._look(members)
        if key not in self.tables:
            self.tables[key] = self._make_table(members, depth, wanted)
        return self.tables[key]

    def _make_table(self, members: tuple[int, ...], depth: int, wanted: range) -> _Table:
        if len(members) == 1:
            size = self._size(members)
            low, high = self.limits.least, self.limits.most
            return {p: (self.costs.even(size, p), _Recipe(p)) for p in wanted if p * low <= size <= p * high}
        level = self.levels[depth]
        spare = self.spare_nodes and level == "node"
        where = {member: position for position, member in enumerate(members)}
        groups = [tuple(found) for found in group(self.cells, members, level).values()]
        if len(groups) == 1:
            return self._make_table(members, depth + 1, wanted)
        tables = []
        for found in groups:
            table = self._table(found, depth + 1, self._window(self._size(found)))
            if spare:
                table = table | {0: (self.costs.idle(self._size(found)), _Recipe(0))}
            tables.append(self._with_moves(table, found, level))
        positions = [tuple(where[i] for i in found) for found in groups]
        result = self._combine(positions, tables, wanted)
        for p in wanted:
            if p not in result and not spare and (entry := self._join(members, level, positions, tables, p)):
                result[p] = entry
        return result

    def _with_moves(self, table: _Table, members: Sequence[int], level: str) -> _Table:
        """Add the moves that follow where fewer parts than are at home in a group stay there; far ones count more."""
        here = sum(self.homes[i] for i in members)
        if not here:
            return table
        unit = self.costs.weight["move"] << (0 if level == "l3" else 12)
        return {p: (cost + max(0, here - p) * unit, recipe) for p, (cost, recipe) in table.items()}

    @staticmethod
    def _combine(groups: Sequence[tuple[int, ...]], tables: Sequence[_Table], wanted: range) -> _Table:
        """The least cost of every wanted number of parts where no part crosses from one group to another."""
        if not all(tables):
            return {}
        low, high = sum(map(min, tables)), sum(map(max, tables))
        reached: dict[int, tuple[int, _Picks]] = {0: (0, None)}
        for table in tables:
            low, high = low - min(table), high - max(table)  # of the tables still to come
            longer: dict[int, tuple[int, _Picks]] = {}
            for p, (cost, picks) in reached.items():
                for q, (more, _) in table.items():
                    if p + q + low >= wanted.stop or p + q + high < wanted.start:
                        continue
                    known = longer.get(p + q)
                    if known is None or cost + more < known[0]:
                        longer[p + q] = cost + more, (picks, q)
            reached = longer
        result: _Table = {}
        for p, (cost, picks) in reached.items():
            children = []
            for positions, table in zip(reversed(groups), reversed(tables), strict=True):
                if picks is not None:
                    picks, q = picks
                    if q:
                        children.append((positions, table[q][1]))
            if children:
                result[p] = cost, _Recipe(p, tuple(reversed(children)))
        return result

    def _join(
        self,
        members: tuple[int, ...],
        level: str,
        groups: Sequence[tuple[int, ...]],
        tables: Sequence[_Table],
        parts: int,
    ) -> _Entry | None:
        """So many parts although some groups must be joined: join the fewest."""
        sizes = [self._size([members[i] for i in positions]) for positions in groups]
        homes = [sum(self.homes[members[i]] for i in positions) for positions in groups]
        best: _Entry | None = None
        for batch in self._ways(sizes, homes, parts):
            for partition in batch:
                entry = self._try(members, level, groups, tables, partition, parts)
                if entry and (best is None or entry[0] < best[0]):
                    best = entry
            if best:
                break
        return best

    def _ways(self, sizes: Sequence[int], homes: Sequence[int], parts: int) -> Iterator[list[_Partition]]:
        """Partitions of the groups in batches, those that join the fewest first.

        Where fewer crossing parts go before fewer boundaries it is one batch: the fewest joined into 1, 2, ... heaps.
        """
        count = len(sizes)
        by_heaps: dict[int, list[_Partition]] = {}
        for joined in range(max(1, count - parts), count):
            if count <= _FEW:
                ways = _set_partitions(count, count - joined)
            elif self.limits.bounded:
                ways = iter([[list(range(count))]] if joined == count - 1 else [])
            else:
                ways = _heaps(sizes, homes, joined)
            batch = [way for way in ways if self.limits.fits([sum(sizes[i] for i in block) for block in way], parts)]
            if not self.costs.strict:
                if batch:
                    yield batch
                continue
            found: dict[int, list[_Partition]] = {}
            for way in batch:
                found.setdefault(sum(len(block) > 1 for block in way), []).append(way)
            by_heaps = found | by_heaps
        if by_heaps:
            yield [way for ways in by_heaps.values() for way in ways]

    def _try(
        self,
        members: tuple[int, ...],
        level: str,
        groups: Sequence[tuple[int, ...]],
        tables: Sequence[_Table],
        partition: _Partition,
        parts: int,
    ) -> _Entry | None:
        blocks: list[tuple[int, ...]] = []
        options: list[_Table] = []
        for block in partition:
            if len(block) == 1:
                blocks.append(groups[block[0]])
                options.append(tables[block[0]])
                continue
            positions = tuple(i for g in block for i in groups[g])
            joined = tuple(members[i] for i in positions)
            size = self._size(joined)
            table: _Table = {}
            if self.limits.least <= size <= self.limits.most:
                table[1] = self.costs.part(tuple((i, self.cells[i].size) for i in joined)), _Recipe(1)
            if parts > len(partition):
                spans = [[members[i] for i in groups[g]] for g in block]
                table |= {p: entry for p, entry in self._line(joined, spans).items() if p > 1}
            blocks.append(positions)
            options.append(self._with_moves(table, joined, level))
        return self._combine(blocks, options, range(parts, parts + 1)).get(parts)

    def _line(self, members: tuple[int, ...], spans: Sequence[Sequence[int]]) -> _Table:
        """Cut joined groups as one line of cells, in whichever of a few orders is best."""
        key = "line", tuple(map(len, spans)), self._look(members)
        if key not in self.tables:
            rising = [sorted(span, key=lambda i: self.cells[i].size) for span in sorted(spans, key=self._size)]
            orders = [
                [i for span in spans for i in span],
                [i for span in rising for i in span],
                [*rising[0][::-1], *(i for span in rising[1:] for i in span)],  # small cells meet in the middle
                [*rising[0], *(i for span in rising[1:] for i in span[::-1])],  # a small one meets a large one
            ]
            result: _Table = {}
            for order in dict.fromkeys(map(tuple, orders)):
                for p, entry in self._cut_line(members, order).items():
                    if p not in result or entry[0] < result[p][0]:
                        result[p] = entry
            self.tables[key] = result
        return self.tables[key]

    def _cut_line(self, members: Sequence[int], order: Sequence[int]) -> _Table:
        """The least cost of every number of parts that follow each other along ``order``."""
        where = {member: position for position, member in enumerate(members)}
        sizes = [self.cells[i].size for i in order]
        top = self._window(sum(sizes)).stop
        reached: list[dict[int, tuple[int, _Run]]] = [{} for _ in range(len(order) + 1)]
        reached[0][0] = 0, None
        for start, here in enumerate(reached[:-1]):
            closings = 0
            for stop in range(start + 1, len(order) + 1) if here else ():
                size = sum(sizes[start:stop])
                high = size // self.limits.least
                if not self.limits.bounded and stop - start > _SPAN:
                    high = min(high, 1)
                low = max(1, -(-size // self.limits.most))
                for p in range(low, min(high, top) + 1):
                    drawn = draw(order[start:stop], sizes[start:stop], p)
                    cost = sum(map(self.costs.part, drawn))
                    for q, (before, runs) in here.items():
                        known = reached[stop].get(p + q)
                        if p + q < top and (known is None or before + cost < known[0]):
                            reached[stop][p + q] = before + cost, (runs, drawn)
                closings += low <= high
                if self.limits.bounded and closings == _CLOSINGS:
                    break
        result: _Table = {}
        for p, (cost, runs) in reached[-1].items():
            parts: list[Part] = []
            while runs is not None:
                runs, drawn = runs
                parts += drawn
            result[p] = cost, _Recipe(p, drawn=tuple(tuple((where[i], c) for i, c in part) for part in parts))
        return result


def even(size: int, parts: int) -> list[int]:
    """Divide ``size`` into parts that differ by one at most."""
    quotient, larger = divmod(size, parts)
    return [quotient + 1] * larger + [quotient] * (parts - larger)


def draw(order: Sequence[int], sizes: Sequence[int], parts: int) -> tuple[Part, ...]:
    """Cut a run of cells into equal parts, in the order of the cells."""
    drawn: list[Part] = []
    cell, left = 0, sizes[0]
    for size in even(sum(sizes), parts):
        part: list[tuple[int, int]] = []
        while size:
            take = min(size, left)
            part.append((order[cell], take))
            size, left = size - take, left - take
            if not left and cell + 1 < len(sizes):
                cell, left = cell + 1, sizes[cell + 1]
        drawn.append(tuple(part))
    return tuple(drawn)


def _set_partitions(count: int, blocks: int) -> Iterator[_Partition]:
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


def _heaps(sizes: Sequence[int], homes: Sequence[int], joined: int) -> Iterator[_Partition]:
    """Ways to get ``joined`` components fewer than groups: the smallest groups in 1, 2, ... heaps of about one size.

    Of equal groups those with the fewest workers at home are joined, and not two with workers if it can be helped.
    Neighbours stay together.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], homes[i], i))
    for heaps in range(1, len(sizes) - joined + 1):
        taken, alone = order[: joined + heaps], order[joined + heaps :]
        blocks: list[list[tuple[int, int]]] = [[] for _ in range(heaps)]
        lightest = [(0, block) for block in range(heaps)]
        alike: dict[tuple[int, int], list[int]] = {}
        for i in sorted(taken, key=lambda i: (-sizes[i], -homes[i], i)):
            size, block = lightest[0]
            blocks[block].append((sizes[i], homes[i]))
            alike.setdefault((sizes[i], homes[i]), []).append(i)
            heapreplace(lightest, (size + sizes[i], block))
        if all(len(block) > 1 for block in blocks):
            named = [sorted(alike[look].pop(0) for look in block) for block in blocks]
            yield sorted([*named, *([i] for i in alone)])
