"""Cutting one pool of cores into local parts: how many cores of which cell each part gets. Pure arithmetic.

A cell is a set of interchangeable cores: one type, NUMA node, package and L3 domain. A part that spans several groups
of a level (say, NUMA nodes) crosses boundaries: groups touched minus one. Parts and groups that touch each other form
components, and a component of k groups crosses k - 1 boundaries however it is cut. So ``cut`` looks for the most
components; tables of "p parts out of this group" then choose, among those, what is best on the levels below and most
equal in size. Levels need not nest: an L3 domain may span NUMA nodes (sub-NUMA clustering), and a node packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

__all__ = ["Cell", "Part", "PlanError", "cut", "least", "pack", "score"]

Part = tuple[tuple[int, int], ...]  # (index of the cell, cores taken from it), ascending
Distance = Callable[[int, int], int]

# How the levels are searched, outermost first. The first order is right where packages hold whole NUMA nodes.
_ORDERS = (("kind", "package", "node", "l3"), ("kind", "node", "package", "l3"))
_WIDE = 32  # up to so many parts every count is tried for every group, above only counts near the proportional one
_NEAR = 4
_FEW = 5  # up to so many groups all ways of joining them are tried


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


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a group becomes parts: by its ``children`` (positions of cells, recipe), as ``drawn``, or evenly."""

    parts: int
    children: tuple[tuple[tuple[int, ...], _Recipe], ...] = ()
    drawn: tuple[Part, ...] = ()

    def build(self, members: Sequence[int], cells: Sequence[Cell]) -> list[Part]:
        if self.children:
            return [
                part
                for positions, recipe in self.children
                for part in recipe.build([members[i] for i in positions], cells)
            ]
        if self.drawn:
            return [tuple(sorted((members[i], count) for i, count in part)) for part in self.drawn]
        if self.parts == 1:
            return [tuple((i, cells[i].size) for i in sorted(members))]
        (member,) = members
        return [((member, size),) for size in _even(cells[member].size, self.parts)]


_Table = dict[int, tuple[int, _Recipe]]  # number of parts: least cost, how


def _even(size: int, parts: int) -> list[int]:
    quotient, larger = divmod(size, parts)
    return [quotient + 1] * larger + [quotient] * (parts - larger)


class _Costs:
    """The cost of a part as one integer that adds up over parts: what matters more has the higher bits."""

    FIELDS = ("move", "distance", "square", "l3", "l3_parts", "package", "node", "node_parts", "kind", "idle")
    BITS = 32

    def __init__(self, cells: Sequence[Cell], distance: Distance, strict: frozenset[str] = frozenset()) -> None:
        self.weight = {name: 1 << (self.BITS * place) for place, name in enumerate(self.FIELDS)}
        self.strict = strict
        self.cells = cells
        self.distance = distance
        self.square = self.weight["square"]

    def part(self, part: Part) -> int:
        size = sum(count for _, count in part)
        cost = size * size * self.square
        if len(part) == 1:
            return cost
        cells = self.cells
        for level in ("kind", "package", "l3"):
            touched = len({getattr(cells[i], level) for i, _ in part})
            if touched > 1:
                cost += (touched - 1) * self.weight[level]
                if level in self.strict:
                    cost += self.weight[level + "_parts"]
        nodes = sorted({cells[i].node for i, _ in part})
        if len(nodes) > 1:
            cost += (len(nodes) - 1) * self.weight["node"]
            cost += sum(self.distance(a, b) for a, b in combinations(nodes, 2)) * self.weight["distance"]
            if "node" in self.strict:
                cost += self.weight["node_parts"]
        return cost

    def even(self, size: int, parts: int) -> int:
        quotient, larger = divmod(size, parts)
        return (quotient * quotient * parts + (2 * quotient + 1) * larger) * self.square


class _Cutter:
    """One search: cells, limits of a part's size, and one order of the levels."""

    def __init__(
        self,
        cells: Sequence[Cell],
        workers: int,
        *,
        limits: tuple[int, int],
        levels: tuple[str, ...],
        costs: _Costs,
        spare_nodes: bool = False,
        homes: Sequence[int] = (),
    ) -> None:
        self.cells = cells
        self.workers = workers
        self.total = sum(cell.size for cell in cells)
        self.least, self.most = limits
        self.levels = levels
        self.costs = costs
        self.spare_nodes = spare_nodes
        self.homes = homes
        self.tables: dict[object, _Table] = {}

    def run(self) -> list[Part] | None:
        members = tuple(range(len(self.cells)))
        found = self.table(members, 0, range(self.workers, self.workers + 1)).get(self.workers)
        return found and found[1].build(members, self.cells)

    def size(self, members: Sequence[int]) -> int:
        return sum(self.cells[i].size for i in members)

    def window(self, size: int) -> range:
        """Numbers of parts worth trying for a group of so many cores."""
        low, high = max(1, -(-size // self.most)), min(size // self.least, self.workers)
        if self.workers > _WIDE:
            near = size * self.workers // self.total
            low, high = max(low, near - _NEAR), min(high, near + 1 + _NEAR)
        return range(low, high + 1)

    def groups(self, members: Sequence[int], level: str) -> list[tuple[int, ...]]:
        """Positions in ``members`` by the value of ``level``."""
        found: dict[int, list[int]] = {}
        for position, i in enumerate(members):
            found.setdefault(getattr(self.cells[i], level), []).append(position)
        return [tuple(positions) for positions in found.values()]

    def signature(self, members: Sequence[int]) -> object:
        """Equal for groups that look the same from inside, so that eight equal nodes are searched once."""
        names: tuple[dict[int, int], ...] = ({}, {}, {}, {})
        shape = []
        for i in members:
            cell = self.cells[i]
            shape.append(
                (
                    *(
                        known.setdefault(value, len(known))
                        for known, value in zip(names, (cell.kind, cell.node, cell.package, cell.l3), strict=True)
                    ),
                    cell.size,
                    self.homes[i] if self.homes else 0,
                )
            )
        return tuple(shape), tuple(names[1]) if len(names[1]) > 1 else ()

    def table(self, members: tuple[int, ...], depth: int, wanted: range) -> _Table:
        key = (depth, wanted, self.signature(members))
        if key not in self.tables:
            self.tables[key] = self._table(members, depth, wanted)
        return self.tables[key]

    def _table(self, members: tuple[int, ...], depth: int, wanted: range) -> _Table:
        size = self.size(members)
        if len(members) == 1:
            return {
                p: (self.costs.even(size, p), _Recipe(p)) for p in wanted if p * self.least <= size <= p * self.most
            }
        level = self.levels[depth]
        groups = self.groups(members, level)
        if len(groups) == 1 and not (level == "node" and self.spare_nodes):
            return self._table(members, depth + 1, wanted)
        tables = []
        for positions in groups:
            group = tuple(members[i] for i in positions)
            table = self.table(group, depth + 1, self.window(self.size(group))) if len(groups) > 1 or True else {}
            if level == "node" and self.spare_nodes:
                table = table | {0: (self.size(group) * self.costs.weight["idle"], _Recipe(0))}
            tables.append(self.settled(table, group, level))
        result = self.combine(groups, tables, wanted)
        if self.spare_nodes and level != "l3" and (level != "package" or depth < self.levels.index("node")):
            return result
        for p in wanted:
            if p not in result:
                joined = self.joined(members, groups, tables, p)
                if joined:
                    result[p] = joined
        return result

    def settled(self, table: _Table, group: tuple[int, ...], level: str) -> _Table:
        """Add the moves that follow if fewer parts than now stay in this group."""
        if not self.homes or level not in ("node", "l3"):
            return table
        here = sum(self.homes[i] for i in group)
        unit = self.costs.weight["move"] * (1 << 12 if level == "node" else 1)
        return {p: (cost + max(0, here - p) * unit, recipe) for p, (cost, recipe) in table.items()}

    def combine(self, groups: Sequence[tuple[int, ...]], tables: Sequence[_Table], wanted: range) -> _Table:
        """The least cost of every wanted number of parts, each group keeping its parts for itself."""
        if not all(tables):
            return {}
        low, high = sum(map(min, tables)), sum(map(max, tables))
        reached: dict[int, tuple[int, object]] = {0: (0, None)}
        for table in tables:
            low, high = low - min(table), high - max(table)
            longer: dict[int, tuple[int, object]] = {}
            for p, (cost, picks) in reached.items():
                for q, (more, _) in table.items():
                    if p + q + low >= wanted.stop or p + q + high < wanted.start:
                        continue
                    known = longer.get(p + q)
                    if known is None or cost + more < known[0]:
                        longer[p + q] = (cost + more, (picks, q))
            reached = longer
        result: _Table = {}
        for p, (cost, picks) in reached.items():
            if p in wanted and p:
                chosen: list[int] = []
                while picks is not None:
                    picks, q = picks
                    chosen.append(q)
                result[p] = (
                    cost,
                    _Recipe(
                        p,
                        tuple(
                            (positions, table[q][1])
                            for positions, table, q in zip(groups, tables, reversed(chosen), strict=True)
                            if q
                        ),
                    ),
                )
        return result

    def joined(
        self, members: tuple[int, ...], groups: list[tuple[int, ...]], tables: list[_Table], parts: int
    ) -> tuple[int, _Recipe] | None:
        """``parts`` parts although some of the groups must be joined: joining the fewest."""
        sizes = [self.size([members[i] for i in positions]) for positions in groups]
        best: tuple[int, _Recipe] | None = None
        for batch in self.joins(sizes, parts):
            for partition in batch:
                found = self.try_join(members, groups, tables, partition, parts)
                if found and (best is None or found[0] < best[0]):
                    best = found
            if best:
                break
        return best

    def try_join(
        self,
        members: tuple[int, ...],
        groups: list[tuple[int, ...]],
        tables: list[_Table],
        partition: Sequence[Sequence[int]],
        parts: int,
    ) -> tuple[int, _Recipe] | None:
        blocks: list[tuple[int, ...]] = []
        options: list[_Table] = []
        for block in partition:
            if len(block) == 1:
                blocks.append(groups[block[0]])
                options.append(tables[block[0]])
                continue
            positions = tuple(i for group in block for i in groups[group])
            cells = [members[i] for i in positions]
            size = self.size(cells)
            table: _Table = {}
            if self.least <= size <= self.most:
                table[1] = (self.costs.part(tuple((i, self.cells[i].size) for i in cells)), _Recipe(1))
            if parts > len(partition) and size >= 2 * self.least:
                table |= self.line(tuple(cells), [len(groups[group]) for group in block], parts - len(partition) + 1)
            blocks.append(positions)
            options.append(table)
        return self.combine(blocks, options, range(parts, parts + 1)).get(parts)

    def fits(self, sizes: Sequence[int], parts: int) -> bool:
        """Whether components of these sizes can be cut into so many parts."""
        return (
            len(sizes) <= parts
            and min(sizes) >= self.least
            and sum(max(1, -(-size // self.most)) for size in sizes) <= parts <= sum(s // self.least for s in sizes)
        )

    def joins(self, sizes: Sequence[int], parts: int) -> Iterator[list[list[list[int]]]]:
        """Partitions of the groups, those that join the fewest groups first."""
        count = len(sizes)
        everything: list[list[list[int]]] = []
        for joined in range(max(1, count - parts), count):
            batch = [
                partition
                for partition in (_set_partitions(count, count - joined) if count <= _FEW else _heaps(sizes, joined))
                if self.fits([sum(sizes[i] for i in block) for block in partition], parts)
            ]
            if self.costs.strict:
                everything += batch
            elif batch:
                yield batch
        if everything:
            yield everything

    def line(self, members: tuple[int, ...], lengths: list[int], most_parts: int) -> _Table:
        """Cut joined groups as one line of cells; positions are those of ``members``."""
        key = ("line", most_parts, tuple(lengths), self.signature(members))
        if key not in self.tables:
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            spans = [list(range(a, a + n)) for a, n in zip(starts, lengths, strict=True)]
            natural = [i for span in spans for i in span]
            by_size = sorted(spans, key=lambda span: self.size([members[i] for i in span]))
            rising = [i for span in by_size for i in sorted(span, key=lambda i: self.cells[members[i]].size)]
            mixed = [i for span in by_size for i in sorted(span, key=lambda i: -self.cells[members[i]].size)]
            result: _Table = {}
            for order in (natural, rising, mixed):
                for p, found in self._line(members, order, most_parts).items():
                    if p not in result or found[0] < result[p][0]:
                        result[p] = found
            self.tables[key] = result
        return self.tables[key]

    def _line(self, members: tuple[int, ...], order: list[int], most_parts: int) -> _Table:
        sizes = [self.cells[members[i]].size for i in order]
        bounded = self.most < self.total
        reached: list[dict[int, tuple[int, object]]] = [{} for _ in range(len(order) + 1)]
        reached[0][0] = (0, None)
        for start in range(len(order)):
            if not reached[start]:
                continue
            size, closings = 0, 0
            for stop in range(start + 1, len(order) + 1):
                size += sizes[stop - 1]
                span = stop - start
                low = max(1, -(-size // self.most))
                high = min(size // self.least, most_parts)
                if not bounded and span > 3:
                    high = min(high, 1)
                if low <= high:
                    closings += 1
                for p in range(low, high + 1):
                    drawn = self.draw(order[start:stop], sizes[start:stop], p)
                    cost = sum(self.costs.part(tuple((members[i], c) for i, c in part)) for part in drawn)
                    for q, (before, picks) in reached[start].items():
                        if p + q > most_parts:
                            continue
                        known = reached[stop].get(p + q)
                        if known is None or before + cost < known[0]:
                            reached[stop][p + q] = (before + cost, (picks, drawn))
                if bounded and closings >= 4:
                    break
        result: _Table = {}
        for p, (cost, picks) in reached[-1].items():
            parts: list[Part] = []
            while picks is not None:
                picks, drawn = picks
                parts = [*drawn, *parts]
            result[p] = (cost, _Recipe(p, drawn=tuple(parts)))
        return result

    @staticmethod
    def draw(order: Sequence[int], sizes: Sequence[int], parts: int) -> list[Part]:
        """Cut a run of cells into parts of equal size, in their order."""
        drawn: list[Part] = []
        cell, left = 0, sizes[0]
        for size in _even(sum(sizes), parts):
            part: list[tuple[int, int]] = []
            while size:
                take = min(size, left)
                part.append((order[cell], take))
                size, left = size - take, left - take
                if not left and cell + 1 < len(sizes):
                    cell, left = cell + 1, sizes[cell + 1]
            drawn.append(tuple(part))
        return drawn


def _set_partitions(count: int, blocks: int) -> Iterator[list[list[int]]]:
    """All ways to put ``count`` things into ``blocks`` non-empty blocks."""

    def extend(thing: int, partition: list[list[int]]) -> Iterator[list[list[int]]]:
        if thing == count:
            if len(partition) == blocks:
                yield [list(block) for block in partition]
            return
        if len(partition) + count - thing < blocks:
            return
        for block in partition:
            block.append(thing)
            yield from extend(thing + 1, partition)
            block.pop()
        if len(partition) < blocks:
            partition.append([thing])
            yield from extend(thing + 1, partition)
            partition.pop()

    return extend(0, [])


def _heaps(sizes: Sequence[int], joined: int) -> Iterator[list[list[int]]]:
    """Join the smallest groups, ``joined`` fewer components than groups, into 1, 2, ... heaps of about equal size."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    for heaps in range(1, len(sizes) - joined + 1):
        taken, alone = order[: joined + heaps], order[joined + heaps :]
        blocks: list[list[int]] = [[] for _ in range(heaps)]
        loads = [0] * heaps
        for i in sorted(taken, key=lambda i: (-sizes[i], i)):
            lightest = loads.index(min(loads))
            blocks[lightest].append(i)
            loads[lightest] += sizes[i]
        if all(len(block) > 1 for block in blocks):
            yield sorted([sorted(block) for block in blocks] + [[i] for i in alone])
    if joined == 1:
        for a, b in combinations(range(len(sizes)), 2):
            yield [[a, b]] + [[i] for i in range(len(sizes)) if i not in (a, b)]


def far(a: int, b: int) -> int:
    return 20


def score(cells: Sequence[Cell], parts: Sequence[Part], distance: Distance = far) -> tuple[int, ...]:
    n = sum(c for p in parts for _, c in p)
    each = max(1, n // len(parts))
    out: dict[str, int] = {}
    excess = {}
    for level in ("kind", "node", "package", "l3"):
        touched = [len({getattr(cells[i], level) for i, _ in part}) for part in parts]
        room: dict[int, int] = {}
        for cell in cells:
            room[getattr(cell, level)] = room.get(getattr(cell, level), 0) + cell.size
        bound = max(0, len(parts) - sum(size // each for size in room.values()))
        out[level] = sum(touched) - len(touched)
        excess[level] = max(0, sum(t > 1 for t in touched) - bound)
    squares = sum(sum(c for _, c in part) ** 2 for part in parts)
    dist = 0
    for part in parts:
        nodes = sorted({cells[i].node for i, _ in part})
        dist += sum(distance(a, b) for a, b in combinations(nodes, 2))
    idle = sum(c.size for c in cells) - n
    return (
        idle,
        out["kind"],
        bool(excess["node"]),
        out["node"],
        excess["node"],
        out["package"],
        bool(excess["l3"]),
        out["l3"],
        excess["l3"],
        squares,
        dist,
    )


STRUCT = 8


def cut(
    cells: Sequence[Cell],
    workers: int,
    *,
    equal: bool = False,
    within_nodes: bool = False,
    distance: Distance = far,
    homes: Sequence[int] = (),
) -> list[Part]:
    total = sum(cell.size for cell in cells)
    wished = (total // workers, -(-total // workers)) if equal else (least(total, workers), total)
    best: tuple[tuple[int, ...], list[Part]] | None = None
    for limits in (wished, (1, total)):
        for strict in (frozenset[str](), frozenset({"node"}), frozenset({"l3"}), frozenset({"node", "l3"})):
            if (
                strict
                and best
                and not (("node" in strict) <= bool(best[0][4]) and ("l3" in strict) <= bool(best[0][8]))
            ):
                continue
            for levels in _ORDERS:
                costs = _Costs(cells, distance, strict)
                parts = _Cutter(
                    cells, workers, limits=limits, levels=levels, costs=costs, spare_nodes=within_nodes, homes=homes
                ).run()
                if parts:
                    k = score(cells, parts, distance)
                    if best is None or k < best[0]:
                        best = (k, parts)
                    if not k[1] and not k[3] and not k[5]:
                        break
        if best:
            break
    if not best:
        raise AssertionError((cells, workers))
    return best[1]


def least(total: int, workers: int) -> int:
    """The fewest cores a worker may get: half of the equal share, rounded up."""
    return max(1, -(-total // (2 * workers)))


def pack(cells: Sequence[Cell], sizes: Sequence[int], *, within_nodes: bool = False) -> list[Part]:
    """Parts of exactly these sizes, in their order; the largest choose first, each where it crosses and leaves least.

    Raises:
        PlanError: ``within_nodes``, and a size fits into no node any more.
    """
    room = [cell.size for cell in cells]
    parts: dict[int, Part] = {}
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        parts[place] = _gather(cells, room, range(len(cells)), sizes[place], ("kind", "node", "package", "l3"))[1]
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
