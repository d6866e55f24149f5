"""One pool: workers that may all use the same cores, each gets some of them. Pure.

A core is its position in ``topology.cores`` here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ts_plugin.machine.topology import Topology
from ts_plugin.planning import packing
from ts_plugin.planning.allotment import apportion, choose_types
from ts_plugin.planning.core_groups import CoreGroup, Costs, Limits, Part, by_level, size_of
from ts_plugin.planning.eligibility import capacity_of_types
from ts_plugin.planning.partition import cut

__all__ = ["Worker", "divide", "pack", "share_cores"]

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
        self.costs = Costs(self.groups, self.distance)
        self._distances = {node.number: dict(node.distances) for node in topology.nodes}
        self._capacities = capacity_of_types(topology)

    def distance(self, a: int, b: int) -> int:
        return self._distances.get(a, {}).get(b, _FAR)

    def counts(self, cores: Iterable[int]) -> Counter[int]:
        """How many of ``cores`` lie in which group."""
        return Counter(self.home[core] for core in cores if core in self.home)

    def by_type(self, room: Sequence[int], weights: Sequence[float]) -> list[tuple[list[int], list[int]]]:
        """Return groups with cores of one type, by their place, and positions of the workers that divide them.

        ``room`` are the cores of every group that are still free.
        """
        types = by_level(self.groups, range(len(room)), "kind")  # the fastest first
        sizes = [sum(room[i] for i in members) for members in types]
        busy = {t for t, members in enumerate(types) if sizes[t] < sum(self.groups[i].size for i in members)}
        capacities = [self._capacities[self.groups[members[0]].kind] for members in types]
        chosen = choose_types(sizes, capacities, weights, busy)
        if len(set(weights)) == 1:
            chosen.sort()
        return [
            ([i for i in members if room[i]], [w for w, kind in enumerate(chosen) if kind == t])
            for t, members in enumerate(types)
            if t in chosen
        ]


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

    Fixed sizes are met in order of arrival as long as everybody else gets a core; the others share by weight, each
    of them on one core type, which may leave cores idle, unless slices may mix types.

    Raises:
        PlanError: ``within_nodes``, and the fixed sizes fit into no node.
    """
    grouped = _GroupedCores(topology, cores)
    sizes = _possible_sizes(workers, len(grouped.home))
    held = [worker.held & grouped.home.keys() for worker in workers]
    homes = [grouped.counts(mine) for mine in held]
    fixed = [w for w, size in enumerate(sizes) if size]
    packed = packing.pack(grouped.groups, [sizes[w] for w in fixed], within_nodes=within_nodes)
    parts = dict(zip(fixed, packed, strict=True))
    room = [group.size for group in grouped.groups]
    for i, count in (piece for part in packed for piece in part):
        room[i] -= count
    fair = sorted((w for w, size in enumerate(sizes) if not size), key=lambda w: -workers[w].weight)
    weights = [workers[w].weight for w in fair]
    free = [i for i, count in enumerate(room) if count]
    for members, positions in [(free, list(range(len(fair))))] if mixes_types else grouped.by_type(room, weights):
        rest = [replace(grouped.groups[i], size=room[i]) for i in members]
        mine = [fair[position] for position in positions]
        at_home = Counter(homes[w].most_common(1)[0][0] for w in mine if homes[w])
        made = _cut_by_weight(
            rest,
            [workers[w].weight for w in mine],
            grouped,
            equal=equal,
            within_nodes=within_nodes,
            homes=[at_home[i] for i in members],
        )
        for w, part in zip(mine, made, strict=True):
            parts[w] = tuple((members[i], count) for i, count in part)
    return _hand_out(grouped, workers, sizes, [parts[w] for w in range(len(workers))], held, equal=equal)


def _possible_sizes(workers: Sequence[Worker], total: int) -> list[int]:
    """The fixed sizes; 0 for a worker whose size would leave somebody else without a core."""
    room = total - len(workers)
    sizes = []
    for worker in workers:
        sizes.append(worker.fixed if worker.fixed - 1 <= room else 0)
        room -= max(0, sizes[-1] - 1)
    return sizes


def _cut_by_weight(
    groups: Sequence[CoreGroup],
    weights: Sequence[float],
    grouped: _GroupedCores,
    *,
    equal: bool,
    within_nodes: bool,
    homes: Sequence[int],
) -> list[Part]:
    """A part for each of ``weights``, which descend; all cores are used unless ``within_nodes``."""
    if not weights:
        return []
    if len(set(weights)) == 1 or within_nodes:
        parts = cut(
            groups, len(weights), equal=equal, within_nodes=within_nodes, distance=grouped.distance, homes=homes
        )
        return parts if len(set(weights)) == 1 else sorted(parts, key=size_of, reverse=True)
    total = sum(group.size for group in groups)
    due = apportion(total, weights)
    lows = [-(-size // 2) for size in due]
    return packing.repair(groups, packing.pack(groups, due), lows, total, grouped.distance)


def _hand_out(
    grouped: _GroupedCores,
    workers: Sequence[Worker],
    sizes: Sequence[int],
    parts: list[Part],
    held: Sequence[frozenset[int]],
    *,
    equal: bool,
) -> list[frozenset[int]]:
    """Choose the worker of each part, and its cores: what is held is kept if it is as good, else few move."""
    # Workers with the same right to cores may swap their parts.
    classes: dict[tuple[int, float], list[int]] = {}
    for w, worker in enumerate(workers):
        classes.setdefault((sizes[w], worker.weight), []).append(w)
    if _may_stay(grouped, parts, held, classes.values(), equal=equal):
        return list(held)
    if any(held):
        homes = [grouped.counts(mine) for mine in held]
        for swappable in classes.values():
            matched = _match(grouped, [parts[w] for w in swappable], [homes[w] for w in swappable])
            for w, part in zip(swappable, matched, strict=True):
                parts[w] = part
    return _choose_cores(grouped, parts, held)


def _may_stay(
    grouped: _GroupedCores,
    parts: Sequence[Part],
    held: Sequence[frozenset[int]],
    classes: Iterable[Sequence[int]],
    *,
    equal: bool,
) -> bool:
    """Whether what the workers hold is as good as the new parts."""
    if not all(held) or len(frozenset().union(*held)) != sum(map(len, held)):
        return False
    new = list(map(size_of, parts))
    if sum(map(len, held)) != sum(new):
        return False
    limits = Limits.around(sum(new), len(new))
    for workers in classes:
        has, gets = sorted(len(held[w]) for w in workers), sorted(new[w] for w in workers)
        free = not equal and len(workers) == len(held) and limits.least <= has[0] and has[-1] <= limits.most
        if has != gets and not free:
            return False
    stays = [tuple(sorted(grouped.counts(mine).items())) for mine in held]
    return grouped.costs.parts(stays) <= grouped.costs.parts(parts)


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
