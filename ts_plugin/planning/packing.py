"""Parts of given sizes, where they cross the fewest boundaries, and exchanges between parts. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice, permutations

from ts_plugin.planning.allotment import apportion
from ts_plugin.planning.core_groups import LEVELS, Claim, CoreGroup, Costs, Part, Parts, PlanError, by_level

_EXCHANGES = 1000  # looked at in one repair


def pack(groups: Sequence[CoreGroup], sizes: Sequence[int], *, within_nodes: bool = False) -> list[Part]:
    """Parts of exactly these sizes, in their order; the largest choose first, each where it crosses and leaves least.

    Raises:
        PlanError: ``within_nodes``, and a size fits into no node any more.
    """
    levels = sorted(LEVELS, key=lambda level: level != "node") if within_nodes else LEVELS
    room = [group.size for group in groups]
    parts: dict[int, Part] = {}
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        parts[place] = _take(groups, room, range(len(groups)), sizes[place], levels)[1]
        if within_nodes and len({groups[i].node for i, _ in parts[place]}) > 1:
            nodes = [sum(groups[i].size for i in node) for node in by_level(groups, range(len(groups)), "node")]
            raise PlanError(
                f"workers of {', '.join(map(str, sizes))} cores do not fit into NUMA nodes of "
                f"{', '.join(map(str, nodes))} cores; ask for fewer cores or drop --skip-cross-node-cores"
            )
        for i, count in parts[place]:
            room[i] -= count
    return [parts[i] for i in range(len(sizes))]


def _take(
    groups: Sequence[CoreGroup], room: Sequence[int], members: Sequence[int], size: int, levels: Sequence[str]
) -> tuple[tuple[int, ...], Part]:
    """Take ``size`` cores from ``members``; return the boundaries crossed, a number for each level, and the part."""
    if not levels:
        (member,) = members
        return (), ((member, size),)
    level, *inner = levels
    rooms = {child: sum(room[i] for i in child) for child in by_level(groups, (i for i in members if room[i]), level)}
    crossed = [0] * len(levels)
    part: list[tuple[int, int]] = []
    while size:
        fitting = [child for child in rooms if rooms[child] >= size]
        if fitting:
            found = [(*_take(groups, room, child, size, inner), rooms[child], child) for child in fitting]
            below, more, _, child = min(found, key=lambda f: (f[0], f[2], _splits(room, f[1]), f[3]))
            taken = size
        else:
            child = _largest(rooms, size)
            taken = rooms[child]
            below, more = _take(groups, room, child, taken, inner)
        crossed = [crossed[0] + bool(part), *(a + b for a, b in zip(crossed[1:], below, strict=True))]
        part += more
        size -= taken
        del rooms[child]
    return tuple(crossed), tuple(sorted(part))


def _splits(room: Sequence[int], part: Part) -> int:
    return sum(count < room[i] for i, count in part)


def _largest(rooms: Mapping[tuple[int, ...], int], size: int) -> tuple[int, ...]:
    """Where no child has room for ``size``, the one to begin with: of the fewest with just that, or the largest."""
    fewest: dict[int, tuple[tuple[int, ...], ...]] = {0: ()}  # the children that have so many cores in all
    for child, room in sorted(rooms.items(), key=lambda item: (-item[1], item[0])):
        for cores, some in list(fewest.items()):
            if cores + room <= size and len(fewest.get(cores + room, rooms)) > len(some) + 1:
                fewest[cores + room] = (*some, child)
    largest = sorted(rooms, key=lambda child: (-rooms[child], child))
    needed = sum(before < size for before in accumulate((rooms[child] for child in largest), initial=0))
    return fewest[size][0] if len(fewest.get(size, rooms)) <= needed and size in fewest else largest[0]


def pack_within_nodes(groups: Sequence[CoreGroup], claims: Sequence[Claim]) -> Parts:
    """Pack the fixed sizes, and others as large as NUMA nodes have room for, in proportion to their weights."""
    owners = [c for c, claim in enumerate(claims) for _ in range(claim.workers)]
    weights = [claims[c].weight for c in owners if claims[c].weight]
    members = by_level(groups, range(len(groups)), "node")
    nodes = [CoreGroup(0, groups[node[0]].node, 0, 0, sum(groups[i].size for i in node)) for node in members]

    def sizes(more: int) -> list[int]:
        fair = iter(apportion(len(weights) + more, weights))
        return [next(fair) if claims[c].weight else claims[c].least for c in owners]

    def fits(more: int) -> bool:
        try:
            return bool(pack(nodes, sizes(more), within_nodes=True))
        except PlanError:
            return False

    free = sum(node.size for node in nodes) - sum(sizes(0)) if weights else 0
    chosen = sizes(bisect_left(range(1, free + 1), True, key=lambda more: not fits(more)))
    packed = [part[0][0] for part in pack(nodes, chosen, within_nodes=True)]
    parts: dict[int, Part] = {}
    for n, node in enumerate(members):
        mine = [w for w, where in enumerate(packed) if where == n]
        for w, part in zip(mine, pack([groups[i] for i in node], [chosen[w] for w in mine]), strict=True):
            parts[w] = tuple((node[i], count) for i, count in part)
    return [(claim, parts[w]) for w, claim in enumerate(owners)]


def repair(groups: Sequence[CoreGroup], parts: Parts, claims: Sequence[Claim], costs: Costs) -> Parts:
    """Let parts exchange cores, or give some away, as long as that makes the division cheaper."""
    owners = [claim for claim, _ in parts]
    mine = [dict(part) for _, part in parts]
    cost = [costs.part(*own) for own in parts]
    sizes = [sum(part.values()) for part in mine]
    tried = 0
    improved = True
    while improved:
        improved = False
        for a, b in permutations(range(len(mine)), 2):
            if len(mine[a]) == 1 and mine[a].keys().isdisjoint(mine[b]):
                continue
            least_a, most_a = claims[owners[a]].least, claims[owners[a]].most
            least_b, most_b = claims[owners[b]].least, claims[owners[b]].most
            room = range(max(least_b - sizes[b], sizes[a] - most_a), min(sizes[a] - least_a, most_b - sizes[b]) + 1)
            units = costs.units[owners[a]], costs.units[owners[b]]
            level, outer = _levelling(sizes[a], sizes[b], *units), bool((cost[a] | cost[b]) >> Costs.outer)
            worthwhile = _exchanges(mine[a], mine[b], room, level, outer=outer)
            for give, given, take, taken in islice(worthwhile, _EXCHANGES - tried):
                tried += 1
                new_a, new_b = dict(mine[a]), dict(mine[b])
                _move(new_a, new_b, give, given)
                _move(new_b, new_a, take, taken)
                new = costs.part(owners[a], tuple(new_a.items())), costs.part(owners[b], tuple(new_b.items()))
                if sum(new) < cost[a] + cost[b]:
                    mine[a], mine[b], (cost[a], cost[b]) = new_a, new_b, new
                    sizes[a], sizes[b] = sizes[a] - given + taken, sizes[b] + given - taken
                    improved = True
                    break
    return [(owner, tuple(sorted(part.items()))) for owner, part in zip(owners, mine, strict=True)]


def _levelling(a: int, b: int, unit_a: int, unit_b: int) -> float:
    """How many cores the first part would have to give to the second so that the sum of their squares is least."""
    return (unit_a * a - unit_b * b) / (unit_a + unit_b) if unit_a + unit_b else 0.0


def _exchanges(
    mine: dict[int, int], other: dict[int, int], room: range, level: float, *, outer: bool
) -> Iterator[tuple[int, int, int, int]]:
    """What one part could give of a core group, and take of another for that: exchanges that may be worth it.

    More cores may be given than taken, within ``room``. That is worth it where it brings the sizes nearer to each
    other, ``level`` cores being best, where a part has cores of the group already, or where ``outer`` boundaries are
    crossed, between NUMA nodes for example.
    """
    for give, count in sorted(mine.items(), key=lambda own: own[1]):
        if give in other and (shift := min(round(level), count - 1, room.stop - 1)) > 0:
            yield give, shift, give, 0
        if count in room and (outer or give in other or 0 < count < 2 * level):
            yield give, count, give, 0
        for take, offered in other.items():
            if take == give:
                continue
            near, net = outer or give in other or take in mine, count - offered
            if near:
                yield give, min(count, offered), take, min(count, offered)
            if net and net in room and (near or 0 < net < 2 * level):
                yield give, count, take, offered


def _move(giver: dict[int, int], taker: dict[int, int], group: int, count: int) -> None:
    if not count:
        return
    giver[group] -= count
    taker[group] = taker.get(group, 0) + count
    if not giver[group]:
        del giver[group]
