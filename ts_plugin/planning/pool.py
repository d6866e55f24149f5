"""One pool: workers that may all use the same cores, each gets some of them. Pure.

A core is its position in ``topology.cores`` here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ts_plugin.machine.topology import Topology
from ts_plugin.planning import partition
from ts_plugin.planning.allotment import apportion
from ts_plugin.planning.cells import Cell, Part, Score, least, score
from ts_plugin.planning.cells import size as size_of

__all__ = ["Worker", "compact", "crowd", "divide"]

_SWAPS = 64  # up to so many workers it is tried whether two that swap their parts move less
_FAR = 20  # the kernel's distance to a remote node where the firmware gives none


@dataclass(frozen=True, slots=True)
class Worker:
    """``fixed`` is the number of cores it insists on, 0 for a share by ``weight``; ``held`` the cores it has now."""

    fixed: int = 0
    weight: float = 1.0
    held: frozenset[int] = frozenset()


class _Ground:
    """The pool's cores as cells."""

    def __init__(self, topology: Topology, cores: Iterable[int]) -> None:
        contents: dict[tuple[int, int, int, int], list[int]] = {}
        for i in sorted(cores):
            core = topology.cores[i]
            contents.setdefault((core.kind, core.node, core.package, core.l3), []).append(i)
        order = sorted(contents)
        self.contents = [contents[key] for key in order]
        self.cells = [Cell(*key, len(contents[key])) for key in order]
        self.home = {core: i for i, content in enumerate(self.contents) for core in content}
        self._distances = {node.number: dict(node.distances) for node in topology.nodes}

    def distance(self, a: int, b: int) -> int:
        return self._distances.get(a, {}).get(b, _FAR)

    def counts(self, cores: Iterable[int]) -> Counter[int]:
        """How many of ``cores`` lie in which cell."""
        return Counter(self.home[core] for core in cores if core in self.home)

    def score(self, parts: Sequence[Part]) -> Score:
        return score(self.cells, parts, self.distance)


def compact(topology: Topology, cores: Iterable[int], sizes: Sequence[int]) -> list[frozenset[int]]:
    """Take disjoint sets of ``sizes`` cores, each as close together as possible, the lowest of equal ones."""
    ground = _Ground(topology, cores)
    return _fill(ground, partition.pack(ground.cells, sizes), [frozenset()] * len(sizes))


def crowd(cores: Iterable[int], workers: Sequence[Worker], loads: Counter[int]) -> list[frozenset[int]]:
    """One core for each of more workers than cores, all cores carrying about equally many; who has one keeps it.

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
    topology: Topology, cores: Iterable[int], workers: Sequence[Worker], *, equal: bool, within_nodes: bool
) -> list[frozenset[int]]:
    """Give every worker its own cores; there are at least as many cores as workers.

    Fixed sizes are met in order of arrival as long as everybody else gets a core; the others share by weight.

    Raises:
        PlanError: ``within_nodes``, and the fixed sizes fit into no node.
    """
    ground = _Ground(topology, cores)
    sizes = _grant(workers, sum(cell.size for cell in ground.cells))
    held = [worker.held & ground.home.keys() for worker in workers]
    homes = [ground.counts(mine) for mine in held]
    parts = _cut(ground, workers, sizes, homes, equal=equal, within_nodes=within_nodes)
    # Workers with the same right to cores may swap their parts.
    classes: dict[tuple[int, float], list[int]] = {}
    for w, worker in enumerate(workers):
        classes.setdefault((sizes[w], worker.weight), []).append(w)
    if _may_stay(ground, parts, held, classes.values(), equal=equal):
        return held
    if any(held):
        for swappable in classes.values():
            matched = _match(ground, [parts[w] for w in swappable], [homes[w] for w in swappable])
            for w, part in zip(swappable, matched, strict=True):
                parts[w] = part
    return _fill(ground, parts, held)


def _grant(workers: Sequence[Worker], total: int) -> list[int]:
    room = total - len(workers)
    sizes = []
    for worker in workers:
        sizes.append(worker.fixed if worker.fixed - 1 <= room else 0)
        room -= max(0, sizes[-1] - 1)
    return sizes


def _cut(
    ground: _Ground,
    workers: Sequence[Worker],
    sizes: Sequence[int],
    homes: Sequence[Counter[int]],
    *,
    equal: bool,
    within_nodes: bool,
) -> list[Part]:
    """One part per worker: fixed sizes first, then the others divide what is left."""
    fixed = [w for w, size in enumerate(sizes) if size]
    packed = partition.pack(ground.cells, [sizes[w] for w in fixed], within_nodes=within_nodes)
    parts = dict(zip(fixed, packed, strict=True))
    room = [cell.size for cell in ground.cells]
    for part in packed:
        for i, count in part:
            room[i] -= count
    left = [i for i, size in enumerate(room) if size]
    rest = [replace(ground.cells[i], size=room[i]) for i in left]
    fair = sorted((w for w, size in enumerate(sizes) if not size), key=lambda w: -workers[w].weight)
    weights = [workers[w].weight for w in fair]
    if len(set(weights)) == 1 or (fair and within_nodes):
        at_home = Counter(homes[w].most_common(1)[0][0] for w in fair if homes[w])
        cut = partition.cut(
            rest,
            len(fair),
            equal=equal,
            within_nodes=within_nodes,
            distance=ground.distance,
            homes=[at_home[i] for i in left],
        )
        if len(set(weights)) > 1:
            cut.sort(key=size_of, reverse=True)
    else:
        due = apportion(sum(room), weights) if fair else []
        lows = [-(-size // 2) for size in due]
        cut = partition.repair(rest, partition.pack(rest, due), lows, sum(room), ground.distance)
    for w, part in zip(fair, cut, strict=True):
        parts[w] = tuple((left[i], count) for i, count in part)
    return [parts[w] for w in range(len(workers))]


def _may_stay(
    ground: _Ground,
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
    for workers in classes:
        has, gets = sorted(len(held[w]) for w in workers), sorted(new[w] for w in workers)
        free = not equal and len(workers) == len(held) and has[0] >= least(sum(new), len(workers))
        if has != gets and not free:
            return False
    stays = [tuple(sorted(ground.counts(mine).items())) for mine in held]
    return ground.score(stays) <= ground.score(parts)


def _match(ground: _Ground, parts: Sequence[Part], homes: Sequence[Counter[int]]) -> list[Part]:
    """Hand out the parts so that few workers come to a new NUMA node and, after that, to few new cores."""
    nodes = [frozenset(ground.cells[i].node for i, _ in part) for part in parts]
    old_nodes = [frozenset(ground.cells[i].node for i in home) for home in homes]

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


def _fill(ground: _Ground, parts: Sequence[Part], held: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Choose the cores of the parts: those that a worker has already, then the lowest."""
    taken: set[int] = set()
    chosen: list[set[int]] = []
    for part, mine in zip(parts, held, strict=True):
        keeps: set[int] = set()
        for i, count in part:
            keeps.update([core for core in ground.contents[i] if core in mine and core not in taken][:count])
        taken |= keeps
        chosen.append(keeps)
    for part, mine_now in zip(parts, chosen, strict=True):
        for i, count in part:
            missing = count - sum(core in mine_now for core in ground.contents[i])
            more = [core for core in ground.contents[i] if core not in taken][:missing]
            mine_now.update(more)
            taken.update(more)
    return [frozenset(cores) for cores in chosen]
