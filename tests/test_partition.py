"""Cutting: nothing crosses fewer boundaries. Compared with all divisions there are, on small machines."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ts_plugin.planning.core_groups import Claim, CoreGroup, Costs, Part
from ts_plugin.planning.packing import pack, repair
from ts_plugin.planning.partition import cut

Key = tuple[int, ...]


def far(a: int, b: int) -> int:
    return 20


def alike(total: int, workers: int, *, equal: bool = False) -> Claim:
    """Identical workers: half to twice of the equal share."""
    if equal:
        return Claim(workers, total // workers, -(-total // workers))
    return Claim(workers, -(-total // (2 * workers)), 2 * total // workers)


def cut_alike(groups: Sequence[CoreGroup], workers: int, *, equal: bool = False) -> list[Part]:
    return cut(groups, [alike(sum(group.size for group in groups), workers, equal=equal)], distance=far)


def integer_partitions(total: int, parts: int, largest: int | None = None) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as ``parts`` numbers from 0, in descending order."""
    if parts == 0:
        if total == 0:
            yield ()
        return
    for first in range(min(total, total if largest is None else largest), -1, -1):
        if first * parts < total:
            return
        for rest in integer_partitions(total - first, parts - 1, first):
            yield first, *rest


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as positive numbers, order apart."""
    for parts in range(1, total + 1):
        for numbers in integer_partitions(total - parts, parts):
            yield tuple(number + 1 for number in numbers)


def divisions(groups: Sequence[CoreGroup], workers: int) -> Iterator[list[Part]]:
    """All ways to give all cores to ``workers`` workers, who may get none, up to their order."""

    def hand_out(group: int, columns: tuple[tuple[int, ...], ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if group == len(groups):
            yield columns
            return
        alike = [[column] * columns.count(column) for column in sorted(set(columns))]
        for grown in to_alike(alike, groups[group].size):
            yield from hand_out(group + 1, grown)

    def to_alike(alike: list[list[tuple[int, ...]]], cores: int) -> Iterator[tuple[tuple[int, ...], ...]]:
        """Workers that hold the same so far are interchangeable."""
        if not alike:
            if not cores:
                yield ()
            return
        first, *rest = alike
        for here in range(cores + 1):
            for counts in integer_partitions(here, len(first)):
                for others in to_alike(rest, cores - here):
                    yield *((*column, count) for column, count in zip(first, counts, strict=True)), *others

    for columns in hand_out(0, ((),) * workers):
        yield [tuple((i, count) for i, count in enumerate(column) if count) for column in columns]


def crossed(groups: Sequence[CoreGroup], parts: Sequence[Part]) -> Key:
    """Boundaries on each level, the most important first; counted here once more, independently of the planner."""
    return tuple(
        sum(len({getattr(groups[i], level) for i, _ in part}) - 1 for part in parts)
        for level in ("kind", "node", "package", "l3")
    )


def sizes(parts: Sequence[Part]) -> list[int]:
    return [sum(count for _, count in part) for part in parts]


def check(groups: Sequence[CoreGroup], workers: int, *, equal: bool) -> None:
    """Compare with all divisions that keep to the same rules."""
    total = sum(group.size for group in groups)
    parts = cut_alike(groups, workers, equal=equal)
    assert [sum(dict(part).get(i, 0) for part in parts) for i in range(len(groups))] == [group.size for group in groups]
    share = total // workers, -(-total // workers)
    low, high = share if equal else (-(-total // (2 * workers)), 2 * total // workers)
    assert all(low <= size <= high for size in sizes(parts))
    best = min(
        crossed(groups, others)
        for others in divisions(groups, workers)
        if all(low <= size <= high for size in sizes(others))
    )
    assert crossed(groups, parts) == best, (groups, workers, parts)


def nested(cores: int, packages: int) -> Iterator[list[CoreGroup]]:
    """Every machine with so many cores in NUMA nodes of L3 domains; node i is in package i % packages."""
    domains = {total: list(compositions(total)) for total in range(1, cores + 1)}

    def fill(nodes: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
        if not nodes:
            yield []
            return
        for first in domains[nodes[0]]:
            for rest in fill(nodes[1:]):
                yield [first, *rest]

    for nodes in compositions(cores):
        for filled in fill(nodes):
            yield [
                CoreGroup(0, node, node % packages, 8 * node + l3, count)
                for node, counts in enumerate(filled)
                for l3, count in enumerate(counts)
            ]


@pytest.mark.no_cover
@pytest.mark.parametrize("packages", [1, 2])
@pytest.mark.parametrize("cores", [1, 2, 3, 4, 5, 6])
def test_no_division_of_a_small_machine_crosses_less(cores: int, packages: int) -> None:
    for groups in nested(cores, packages):
        for workers in range(1, cores + 1):
            check(groups, workers, equal=False)
            check(groups, workers, equal=True)


def odd_machine(chance: random.Random) -> list[CoreGroup]:
    """A machine of up to eight cores whose L3 domains span its nodes, or whose nodes span packages."""
    found: dict[tuple[int, int, int], int] = {}
    spanning = chance.random() < 0.5
    for _ in range(chance.randint(4, 8)):
        node, package = chance.randrange(4), chance.randrange(3)
        where = (node, node % 2, node % 2) if spanning else (node, package, 4 * node + package)
        found[where] = found.get(where, 0) + 1
    return [CoreGroup(0, *where, count) for where, count in sorted(found.items())]


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(20))
def test_no_division_of_an_odd_machine_crosses_less(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(10):
        groups = odd_machine(chance)
        check(groups, chance.randint(1, sum(group.size for group in groups)), equal=chance.random() < 0.3)


HARD = [  # where a simpler search misses the best
    pytest.param(4, [(0, 0, 1), (0, 0, 1), *((node, 0, 1) for node in range(1, 6))], id="whom to join"),
    pytest.param(3, [(0, 0, 2), (1, 1, 1), (2, 2, 1), (3, 0, 1), (4, 1, 1), (5, 2, 1)], id="packages interleaved"),
    pytest.param(2, [(0, 1, 1), (1, 1, 2), (1, 1, 4)], id="a small one meets a large one"),
]


@pytest.mark.no_cover
@pytest.mark.parametrize(("workers", "domains"), HARD)
def test_no_division_of_a_hard_machine_crosses_less(workers: int, domains: list[tuple[int, int, int]]) -> None:
    """Each domain: its NUMA node, its package, its cores."""
    check(
        [CoreGroup(0, node, package, i, count) for i, (node, package, count) in enumerate(domains)],
        workers,
        equal=False,
    )


def test_two_odd_nodes_make_room_for_one_more() -> None:
    """Parts have two cores or more here, so three and three hold three of them together but two apart."""
    groups = [CoreGroup(0, node, 0, node, cores) for node, cores in enumerate((2, 3, 3, 3, 3, 3, 3, 3))]
    parts = cut_alike(groups, 9)
    assert sum(len(part) - 1 for part in parts) == 1


def test_types_are_mixed_last() -> None:
    groups = [CoreGroup(0, 0, 0, 0, 4), CoreGroup(1, 0, 0, 0, 2), CoreGroup(0, 1, 1, 1, 4), CoreGroup(1, 1, 1, 1, 2)]
    parts = cut_alike(groups, 4)
    assert all(len({groups[i].kind for i, _ in part}) == 1 for part in parts)


def test_near_nodes_are_joined() -> None:
    """Four nodes on a ring, two workers: opposite nodes are further apart than neighbours."""
    groups = [CoreGroup(0, node, 0, node, 4) for node in (0, 1, 2, 3)]
    parts = cut(groups, [alike(16, 2)], distance=lambda a, b: 16 if a // 2 == b // 2 else 32)
    assert {tuple(i for i, _ in part) for part in parts} == {(0, 1), (2, 3)}


@pytest.mark.no_cover
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 8, 31, 64, 100, 256, 300])
@pytest.mark.parametrize("equal", [False, True])
def test_a_large_machine(workers: int, equal: bool) -> None:
    """512 cores in 8 nodes of 8 L3 domains: nothing crosses more than the groups' sizes force it to."""
    groups = [CoreGroup(0, node, node // 4, 8 * node + l3, 8) for node in range(8) for l3 in range(8)]
    parts = cut_alike(groups, workers, equal=equal)
    assert (len(parts), sum(sizes(parts))) == (workers, 512)
    if equal:
        assert max(sizes(parts)) - min(sizes(parts)) <= 1
    else:
        assert min(sizes(parts)) * 2 * workers >= 512
        assert max(sizes(parts)) * workers <= 2 * 512
        assert crossed(groups, parts) == (0, max(0, 8 - workers), max(0, 2 - workers), max(0, 64 - workers))


PACKED = [
    pytest.param([8, 8], [4, 4], ["0:4", "0:4"], id="close together"),
    pytest.param([8, 8], [4, 8], ["1:4", "0:8"], id="the largest chooses first"),
    pytest.param([8, 4], [4], ["1:4"], id="the tightest fit"),
    pytest.param([6, 6], [4, 4, 4], ["0:4", "1:4", "0:2 1:2"], id="what is left over"),
    pytest.param([6, 6, 3], [9], ["0:6 2:3"], id="few groups, filled exactly"),
    pytest.param([3, 3, 4, 4, 1], [5], ["2:4 4:1"], id="... though the largest would not"),
    pytest.param([4], [], [], id="nothing"),
]


@pytest.mark.parametrize(("domains", "wanted", "expected"), PACKED)
def test_pack(domains: list[int], wanted: list[int], expected: list[str]) -> None:
    groups = [CoreGroup(0, 0, 0, l3, size) for l3, size in enumerate(domains)]
    parts = pack(groups, wanted)
    assert sizes(parts) == wanted
    assert [" ".join(f"{i}:{count}" for i, count in part) for part in parts] == expected


def test_repair_gives_away_and_exchanges() -> None:
    groups = [CoreGroup(0, node, node, node, 6) for node in range(2)]
    costs = Costs(groups, far, [1.0])

    def repaired(parts: list[Part], least: int, most: int) -> list[Part]:
        return [part for _, part in repair(groups, [(0, part) for part in parts], [Claim(2, least, most)], costs)]

    crossing: list[Part] = [((0, 6), (1, 1)), ((1, 5),)]
    assert repaired(crossing, 3, 12) == [((0, 6),), ((1, 6),)]
    assert repaired(crossing, 7, 12) == crossing
    entangled: list[Part] = [((0, 3), (1, 3)), ((0, 3), (1, 3))]
    assert repaired(entangled, 6, 6) in ([((0, 6),), ((1, 6),)], [((1, 6),), ((0, 6),)])


@pytest.mark.parametrize(
    ("domains", "workers"),
    [*(([4] * 6, workers) for workers in (1, 2, 3, 5, 9, 24)), ([1, 3, 4], 3), ([1, 3, 4, 2], 4)],
    ids=str,
)
def test_parts_are_in_one_order(domains: list[int], workers: int) -> None:
    """Groups and parts are numbered upwards, so that the same machine always gives the same text."""
    groups = [CoreGroup(0, 0, 0, l3, cores) for l3, cores in enumerate(domains)]
    parts = cut_alike(groups, workers)
    assert len(parts) == workers
    assert all(list(part) == sorted(part) for part in parts)
    assert all(a[0][0] <= b[0][0] for a, b in pairwise(parts))


EVEN = [
    pytest.param([4, 4, 4, 4, 4, 4], 5, [8, 4, 4, 4, 4], id="one boundary: one part of two domains"),
    pytest.param([16], 10, [2, 2, 2, 2, 2, 2, 1, 1, 1, 1], id="no boundary at all"),
    pytest.param([2] * 22, 16, [4] * 6 + [2] * 10, id="nobody swallows what is left over"),
    pytest.param([8, 8], 3, [8, 4, 4], id="unequal where that saves a boundary"),
    pytest.param([9, 3], 3, [5, 4, 3], id="as equal as the domains allow"),
    pytest.param([20, 4], 2, [12, 12], id="nobody gets less than half of the equal share"),
    pytest.param([9, 2, 2, 2], 4, [5, 4, 4, 2], id="nobody gets more than twice of the equal share"),
    pytest.param([9, 2, 1], 2, [9, 3], id="small domains go together"),
]


@pytest.mark.parametrize(("domains", "workers", "expected"), EVEN)
def test_sizes_are_as_equal_as_boundaries_allow(domains: list[int], workers: int, expected: list[int]) -> None:
    groups = [CoreGroup(0, 0, 0, l3, size) for l3, size in enumerate(domains)]
    assert sorted(sizes(cut_alike(groups, workers)), reverse=True) == expected


MODELS = [  # where boundaries leave a choice between sizes, or the right ones must be found
    pytest.param(
        [[2] * 34], [Claim(2, 12, 45, 3.0), Claim(3, 4, 27)], [22, 22, 8, 8, 8], 29, id="in proportion to the shares"
    ),
    pytest.param(
        [[3, 4, 3, 3, 2, 1, 1, 3]], [Claim(2, 5, 17), Claim(1, 3, 3, 0)], [9, 8, 3], 5, id="as equal as can be"
    ),
    pytest.param(
        [[2] * 11, [2, 2, 1, 2, 2, 2, 2, 1, 2, 2, 2, 2]],
        [Claim(2, 9, 34), Claim(2, 5, 5, 0)],
        [22, 12, 5, 5],
        19,
        id="fixed sizes fill domains",
    ),
    pytest.param(
        [[4, 4], [4, 4], [4, 4], [4, 4], [4, 4], [4], [4, 4], [4, 4]],
        [Claim(6, 1, 1, 0), Claim(5, 2, 10), Claim(5, 4, 15, 2.5)],
        [8, 8, 8, 8, 4, 4, 4, 4, 4, 2, 1, 1, 1, 1, 1, 1],
        4,
        id="four single cores in one domain",
    ),
]


@pytest.mark.parametrize(("nodes", "claims", "expected", "boundaries"), MODELS)
def test_sizes_of_several_models(
    nodes: list[list[int]], claims: list[Claim], expected: list[int], boundaries: int
) -> None:
    groups = [
        CoreGroup(0, node, node, 100 * node + l3, size)
        for node, domains in enumerate(nodes)
        for l3, size in enumerate(domains)
    ]
    parts = cut(groups, claims, distance=far)
    assert sorted(sizes(parts), reverse=True) == expected
    assert crossed(groups, parts) == (0, 0, 0, boundaries)


@pytest.mark.no_cover
@given(
    domains=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12),
    workers=st.integers(1, 40),
)
def test_nobody_gets_less_than_half_or_more_than_twice_of_the_equal_share(
    domains: list[tuple[int, int]], workers: int
) -> None:
    groups = [CoreGroup(0, node, node // 2, l3, cores) for l3, (node, cores) in enumerate(domains)]
    total = sum(group.size for group in groups)
    assume(workers <= total)
    found = sizes(cut_alike(groups, workers))
    assert (len(found), sum(found)) == (workers, total)
    assert min(found) * 2 * workers >= total
    assert max(found) * workers <= 2 * total


def test_the_example_at_the_head_of_cut() -> None:
    groups = [CoreGroup(0, node, node, 3 * node + l3, 4) for node in range(2) for l3 in range(3)]
    parts = cut_alike(groups, 5)
    assert parts == [((0, 4), (1, 4)), ((2, 4),), ((3, 4),), ((4, 4),), ((5, 4),)]


# Several claims: fixed sizes and weights together


@st.composite
def mixed(draw: st.DrawFn) -> tuple[list[CoreGroup], list[Claim]]:
    """A machine of up to eight cores whose packages hold nodes that hold L3 domains; up to three claims."""
    nodes = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3))
    groups = [
        CoreGroup(0, node, node // 2, 8 * node + l3, cores)
        for node, domains in enumerate(nodes)
        for l3, cores in enumerate(domains)
    ]
    free = sum(group.size for group in groups)
    assume(2 <= free <= 8)
    claims = []
    for workers, size in draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=2)):
        if workers * size < free:
            claims.append(Claim(workers, size, size, weight=0))
            free -= workers * size
    if draw(st.booleans()):
        claims.append(alike(free, draw(st.integers(1, min(free, 3)))))
    elif free > 2:  # two weights: a worker of the first gets about twice the cores of one of the second
        claims += [Claim(1, free // 4 + 1, free - 1, weight=2), Claim(1, 1, free // 2 + 1, weight=1)]
    assume(claims and sum(claim.workers for claim in claims) <= 5)
    return groups, claims


def fewest(groups: Sequence[CoreGroup], claims: Sequence[Claim]) -> tuple[Key, float]:
    """The fewest boundaries of all divisions that keep to the claims, and how near to the weights sizes then come."""
    owners = [claim for claim in claims for _ in range(claim.workers)]
    known: dict[Key, float] = {}
    rest = not any(claim.weight for claim in claims)  # Some cores may be left over, like the part of one worker more.
    found = []
    for division in divisions(groups, len(owners) + rest):
        for parts in [division[:i] + division[i + 1 :] for i in range(len(division))] if rest else [division]:
            key = tuple(sorted(sizes(parts)))
            if key not in known:
                known[key] = min((spread(key, order) for order in set(permutations(owners))), default=float("inf"))
            if known[key] < float("inf"):
                found.append((crossed(groups, parts), known[key]))
    return min(found)


def spread(sizes: Sequence[int], claims: Sequence[Claim]) -> float:
    """Squared sizes, divided by their weights; endless if a size is against its claim."""
    pairs = list(zip(sizes, claims, strict=True))
    if not all(claim.least <= size <= claim.most for size, claim in pairs):
        return float("inf")
    return sum(size**2 / claim.weight for size, claim in pairs if claim.weight)


SPARE = [(0, 0, 0, 1), (0, 0, 1, 2), (0, 0, 2, 3), (1, 0, 3, 2)]  # the domain of one core must stay idle


@pytest.mark.no_cover
@settings(max_examples=300)
@given(case=mixed())
@example(case=([CoreGroup(0, *place) for place in SPARE], [Claim(1, 3, 3, 0), Claim(1, 4, 4, 0)]))
def test_no_division_among_several_claims_crosses_less(case: tuple[list[CoreGroup], list[Claim]]) -> None:
    groups, claims = case
    parts = cut(groups, claims, distance=far)
    owners = [claim for claim in claims for _ in range(claim.workers)]
    used = [sum(dict(part).get(i, 0) for part in parts) for i in range(len(groups))]
    if any(claim.weight for claim in claims):
        assert used == [group.size for group in groups]
    assert all(number <= group.size for number, group in zip(used, groups, strict=True))
    boundaries, equality = fewest(groups, claims)
    assert crossed(groups, parts) == boundaries
    assert spread(sizes(parts), owners) == pytest.approx(equality)


MIXED = [
    pytest.param([18, 18], [Claim(2, 5, 20), Claim(2, 8, 8, 0)], [10, 10, 8, 8], 0, id="8 + 10 in each node"),
    pytest.param([28, 28], [Claim(2, 10, 40), Claim(2, 8, 8, 0)], [20, 20, 8, 8], 0, id="equal where that is free"),
    pytest.param([28, 28], [Claim(1, 12, 48, 3), Claim(4, 4, 16)], [28, 7, 7, 7, 7], 0, id="weights"),
    pytest.param([10, 10], [Claim(1, 5, 5, 0), Claim(2, 4, 4, 0), Claim(1, 3, 3, 0), Claim(2, 2, 2, 0)],
                 [5, 4, 4, 3, 2, 2], 0, id="fixed sizes that fill the nodes"),
    pytest.param([8, 8], [Claim(1, 6, 6, 0), Claim(2, 3, 10)], [6, 5, 5], 1, id="forced to cross"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "claims", "expected", "crossings"), MIXED)
def test_several_claims(nodes: list[int], claims: list[Claim], expected: list[int], crossings: int) -> None:
    groups = [CoreGroup(0, node, node, node, cores) for node, cores in enumerate(nodes)]
    parts = cut(groups, claims, distance=far)
    assert sizes(parts) == expected
    assert crossed(groups, parts)[1] == crossings


@pytest.mark.no_cover
def test_many_workers_of_several_claims() -> None:
    """1,024 cores in 8 nodes of 16 L3 domains, 256 workers: every node and nearly every domain is divided by itself."""
    groups = [CoreGroup(0, node, node // 4, 16 * node + l3, 8) for node in range(8) for l3 in range(16)]
    claims = [Claim(86, 1, 1, 0), Claim(85, 2, 10), Claim(85, 4, 20, 2.5)]
    parts = cut(groups, claims, distance=far)
    assert sum(sizes(parts)) == 1024
    assert crossed(groups, parts)[:3] == (0, 0, 0)
