"""One pool: workers that may all use the same cores, each gets some of them. Pure.

A core is its position in ``topology.cores`` here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, combinations
from math import ceil, floor

from ts_plugin.machine.topology import Topology
from ts_plugin.planning import packing
from ts_plugin.planning.allotment import apportion, choose_types
from ts_plugin.planning.core_groups import Claim, CoreGroup, Costs, Part, by_level, size_of
from ts_plugin.planning.eligibility import capacity_of_types
from ts_plugin.planning.partition import cut

_SWAPS = 64  # up to so many workers it is tried whether two that swap their parts move less
_FAR = 20  # the kernel's distance to a remote node where the firmware gives none


@dataclass(frozen=True, slots=True)
class Worker:
    """``fixed`` is the number of cores it insists on, 0 for a share by ``weight``; ``held`` the cores it has now."""

    fixed: int = 0
    weight: float = 1.0
    held: frozenset[int] = frozenset()


class _GroupedCores:
    """The pool's cores in groups."""

    def __init__(self, topology: Topology, cores: Iterable[int]) -> None:
        cores = sorted(cores)
        domains = Counter((topology.cores[i].kind, topology.cores[i].l3) for i in cores)
        shared = {kind for (kind, _), count in domains.items() if count > 1}
        contents: dict[tuple[int, int, int, int], list[int]] = {}
        for i in cores:
            core = topology.cores[i]
            l3 = core.l3 if core.kind in shared else -1  # A domain per core tells nothing.
            contents.setdefault((core.kind, core.node, core.package, l3), []).append(i)
        order = sorted(contents)
        self.contents = [contents[key] for key in order]
        self.groups = [CoreGroup(*key, len(contents[key])) for key in order]
        self.home = {core: i for i, content in enumerate(self.contents) for core in content}
        self._distances = {node.number: dict(node.distances) for node in topology.nodes}
        self._capacities = capacity_of_types(topology)

    def distance(self, a: int, b: int) -> int:
        return self._distances.get(a, {}).get(b, _FAR)

    def counts(self, cores: Iterable[int]) -> Counter[int]:
        """How many of ``cores`` lie in which group."""
        return Counter(self.home[core] for core in cores if core in self.home)

    def by_type(self, workers: Sequence[Worker]) -> tuple[list[tuple[list[int], list[int]]], dict[int, Part]]:
        """Return the areas of one type, as sizes of all groups, and their workers; and parts that have to mix types."""
        packed = packing.pack(self.groups, [worker.fixed for worker in workers if worker.fixed])
        parts = dict(zip((w for w, worker in enumerate(workers) if worker.fixed), packed, strict=True))
        mixed = {w: part for w, part in parts.items() if len({self.groups[i].kind for i, _ in part}) > 1}
        room = [group.size for group in self.groups]
        for i, count in chain(*mixed.values()):
            room[i] -= count
        types = by_level(self.groups, range(len(room)), "kind")  # the fastest first
        mine = [[w for w, part in parts.items() if w not in mixed and part[0][0] in members] for members in types]
        sizes = [
            sum(room[i] for i in members) - sum(workers[w].fixed for w in ws)
            for members, ws in zip(types, mine, strict=True)
        ]
        busy = {t for t, members in enumerate(types) if sizes[t] < sum(self.groups[i].size for i in members)}
        capacities = [self._capacities[self.groups[members[0]].kind] for members in types]
        fair = sorted((w for w, worker in enumerate(workers) if not worker.fixed), key=lambda w: -workers[w].weight)
        chosen = choose_types(sizes, capacities, [workers[w].weight for w in fair], busy)
        if len({workers[w].weight for w in fair}) == 1:
            chosen.sort()
        for w, t in zip(fair, chosen, strict=True):
            mine[t].append(w)
        areas = [[room[i] if i in members else 0 for i in range(len(room))] for members in types]
        return [(area, sorted(ws)) for area, ws in zip(areas, mine, strict=True) if ws], mixed


def pack(topology: Topology, cores: Iterable[int], sizes: Sequence[int]) -> list[frozenset[int]]:
    """Take disjoint sets of ``sizes`` cores, each as close together as possible, the lowest of equal ones."""
    grouped = _GroupedCores(topology, cores)
    return _choose_cores(grouped, packing.pack(grouped.groups, sizes), [frozenset()] * len(sizes))


def share_cores(cores: Iterable[int], workers: Sequence[Worker], loads: Counter[int]) -> list[frozenset[int]]:
    """One core for each of more workers than cores, all carrying about equally many; who has one keeps it.

    ``loads`` are the workers that the cores carry already; it is brought up to date.
    """
    ordered = sorted(cores)
    level, above = divmod(sum(loads[core] for core in ordered) + len(workers), len(ordered))
    chosen: list[int | None] = [None] * len(workers)
    for w, worker in enumerate(workers):
        if len(worker.held) == 1:
            (core,) = worker.held
            if core in ordered and (loads[core] < level or (loads[core] == level and above)):
                above -= loads[core] == level
                loads[core] += 1
                chosen[w] = core
    for w, kept in enumerate(chosen):
        if kept is None:
            lightest = min(ordered, key=lambda core: (loads[core], core))
            loads[lightest] += 1
            chosen[w] = lightest
    return [frozenset({core}) for core in chosen if core is not None]


def divide(
    topology: Topology,
    cores: Iterable[int],
    workers: Sequence[Worker],
    *,
    equal: bool = False,
    within_nodes: bool = False,
    mixes_types: bool = False,
) -> list[frozenset[int]]:
    """Give every worker its own cores; there are at least as many cores as workers.

    Fixed sizes are met in order of arrival as long as everybody else gets a core; the others share by weight. Each is
    on one core type, which may leave cores idle, unless slices may mix types.

    Raises:
        PlanError: ``within_nodes``, and the fixed sizes fit into no node.
    """
    grouped = _GroupedCores(topology, cores)
    workers = _possible(workers, grouped.home.keys())
    areas, parts = [([group.size for group in grouped.groups], list(range(len(workers))))], dict[int, Part]()
    if not mixes_types and len({group.kind for group in grouped.groups}) > 1:
        areas, parts = grouped.by_type(workers)
    limits = {w: (workers[w].fixed, workers[w].fixed) for w in parts}
    for room, mine in areas if workers else ():
        members = [i for i, size in enumerate(room) if size]
        classes = _classes([workers[w] for w in mine])
        claims = _claims(sum(room), [workers[w] for w in mine], classes, equal=equal)
        at_home = [[0] * len(claims) for _ in room]
        for c, places in enumerate(classes):
            for place in places:
                limits[mine[place]] = claims[c].least, claims[c].most
                if home := grouped.counts(workers[mine[place]].held):
                    at_home[home.most_common(1)[0][0]][c] += 1
        made = cut(
            [replace(grouped.groups[i], size=room[i]) for i in members],
            claims,
            distance=grouped.distance,
            equal=equal,
            within_nodes=within_nodes,
            homes=[at_home[i] for i in members],
        )
        for place, part in zip(chain(*classes), made, strict=True):
            parts[mine[place]] = tuple((members[i], count) for i, count in part)
    ordered = [parts[w] for w in range(len(workers))]
    return _hand_out(grouped, workers, ordered, [limits[w] for w in range(len(workers))])


def _possible(workers: Sequence[Worker], cores: Set[int]) -> list[Worker]:
    """The workers: holding only cores that are there, and no fixed size that leaves somebody else without a core."""
    room = len(cores) - len(workers)
    possible = []
    for worker in workers:
        fixed = worker.fixed if worker.fixed - 1 <= room else 0
        room -= max(0, fixed - 1)
        possible.append(replace(worker, fixed=fixed, held=worker.held & cores))
    return possible


def _classes(workers: Sequence[Worker]) -> list[list[int]]:
    """Positions of the workers that have the same right to cores."""
    found: dict[tuple[int, float], list[int]] = {}
    for w, worker in enumerate(workers):
        found.setdefault((worker.fixed, 0 if worker.fixed else worker.weight), []).append(w)
    return list(found.values())


def _claims(cores: int, workers: Sequence[Worker], classes: Sequence[Sequence[int]], *, equal: bool) -> list[Claim]:
    """What each class may get of what fixed sizes leave: with ``equal`` its share, else half of it to twice.

    No weight is so low that a worker could not have twice of the equal share, rather than others cross a boundary.
    """
    fair = [w for w, worker in enumerate(workers) if not worker.fixed]
    free = cores - sum(worker.fixed for worker in workers)
    weights = [workers[w].weight for w in fair]
    whole = dict(zip(fair, apportion(free, weights), strict=True))
    claims = []
    for members in classes:
        number, worker = len(members), workers[members[0]]
        if worker.fixed:
            claims.append(Claim(number, worker.fixed, worker.fixed, weight=0))
            continue
        share = Fraction(sum(whole[w] for w in members), number)  # of whole cores, at least one for everybody
        exact = free * Fraction(worker.weight) / sum(map(Fraction, weights))
        if equal:
            claims.append(Claim(number, max(1, floor(min(share, exact))), ceil(max(share, exact)), worker.weight))
        else:
            least, most = ceil(min(share, exact) / 2), floor(2 * max(share, exact, Fraction(free, len(fair))))
            claims.append(Claim(number, least, most, worker.weight))
    return claims


def _hand_out(
    grouped: _GroupedCores, workers: Sequence[Worker], parts: list[Part], limits: Sequence[tuple[int, int]]
) -> list[frozenset[int]]:
    """Choose the worker of each part, and its cores: what is held is kept if it is as good, else few move."""
    held = [worker.held for worker in workers]
    homes = [grouped.counts(mine) for mine in held]
    classes = _classes(workers)
    if _may_stay(grouped, workers, classes, parts, limits):
        return held
    if any(held):
        for swappable in classes:
            matched = _match(grouped, [parts[w] for w in swappable], [homes[w] for w in swappable])
            for w, part in zip(swappable, matched, strict=True):
                parts[w] = part
    return _choose_cores(grouped, parts, held)


def _may_stay(
    grouped: _GroupedCores,
    workers: Sequence[Worker],
    classes: Sequence[Sequence[int]],
    parts: Sequence[Part],
    limits: Sequence[tuple[int, int]],
) -> bool:
    """Whether what the workers hold is as good as the new parts."""
    held = [worker.held for worker in workers]
    sizes = list(map(len, held))
    if len(frozenset().union(*held)) != sum(sizes) or sum(sizes) != sum(map(size_of, parts)):
        return False
    if not all(least <= size <= most for size, (least, most) in zip(sizes, limits, strict=True)):
        return False
    weights = [0 if workers[members[0]].fixed else workers[members[0]].weight for members in classes]
    costs = Costs(grouped.groups, grouped.distance, weights)
    stays = [tuple(sorted(grouped.counts(mine).items())) for mine in held]
    owners = [(c, w) for c, members in enumerate(classes) for w in members]
    return costs.parts([(c, stays[w]) for c, w in owners]) <= costs.parts([(c, parts[w]) for c, w in owners])


def _match(grouped: _GroupedCores, parts: Sequence[Part], homes: Sequence[Counter[int]]) -> list[Part]:
    """Hand out the parts so that few workers come to a new NUMA node and, after that, to few new cores."""
    nodes = [frozenset(grouped.groups[i].node for i, _ in part) for part in parts]
    old_nodes = [frozenset(grouped.groups[i].node for i in home) for home in homes]

    def moves(w: int, p: int) -> tuple[int, int]:
        if not homes[w]:
            return 0, 0
        return len(nodes[p] - old_nodes[w]), -sum(min(count, homes[w][i]) for i, count in parts[p])

    owner_of: dict[int, list[int]] = {}
    for p, part in enumerate(parts):
        for i, _ in part:
            owner_of.setdefault(i, []).append(p)
    near = {(w, p) for w, home in enumerate(homes) for i in home for p in owner_of.get(i, ())}
    chosen: dict[int, int] = {}
    free = dict.fromkeys(range(len(parts)))
    for (new, _), w, p in sorted((moves(w, p), w, p) for w, p in near):
        if not new and w not in chosen and p in free:
            chosen[w] = p
            del free[p]
    for w in sorted(range(len(parts)), key=lambda w: (not homes[w], w)):  # newcomers take what is left
        if w not in chosen:
            chosen[w] = min(free, key=lambda p: (moves(w, p), p))
            del free[chosen[w]]
    improved = len(parts) <= _SWAPS
    while improved:
        improved = False
        for a, b in combinations(range(len(parts)), 2):
            now = zip(moves(a, chosen[a]), moves(b, chosen[b]), strict=True)
            then = zip(moves(a, chosen[b]), moves(b, chosen[a]), strict=True)
            if [*map(sum, then)] < [*map(sum, now)]:
                chosen[a], chosen[b] = chosen[b], chosen[a]
                improved = True
    return [parts[chosen[w]] for w in range(len(parts))]


def _choose_cores(
    grouped: _GroupedCores, parts: Sequence[Part], held: Sequence[frozenset[int]]
) -> list[frozenset[int]]:
    """Choose the cores of the parts: those that a worker has already, then the lowest."""
    taken: set[int] = set()
    chosen: list[set[int]] = []
    for part, mine in zip(parts, held, strict=True):
        keeps: set[int] = set()
        for i, count in part:
            keeps.update([core for core in grouped.contents[i] if core in mine and core not in taken][:count])
        taken |= keeps
        chosen.append(keeps)
    for part, mine_now in zip(parts, chosen, strict=True):
        for i, count in part:
            missing = count - sum(core in mine_now for core in grouped.contents[i])
            more = [core for core in grouped.contents[i] if core not in taken][:missing]
            mine_now.update(more)
            taken.update(more)
    return [frozenset(cores) for cores in chosen]
