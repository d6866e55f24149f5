"""Dividing cores among groups of workers with different, overlapping cpusets."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_plugin.planning.allotment import Taker, allot, apportion, choose_types


def taker(cores: str, workers: int = 1, *, need: int = 0, limit: int | None = None, share: float = 1) -> Taker:
    """``cores`` is a run of digits, one core each; ``share`` is that of each worker."""
    numbers = frozenset(map(int, cores))
    return Taker(numbers, workers, need, len(numbers) if limit is None else limit, workers * share)


def totals(takers: list[Taker]) -> list[int]:
    got = Counter[int]()
    for cores, counts in allot(takers):
        assert sum(counts.values()) <= len(cores)
        for t, count in counts.items():
            assert takers[t].cores.issuperset(cores)
            got[t] += count
    return [got[t] for t in range(len(takers))]


ALLOTTED = [
    pytest.param([taker("0123")], [4], id="alone"),
    pytest.param([taker("0123", 3), taker("0123", 1)], [3, 1], id="by workers"),
    pytest.param([taker("01234567", 1), taker("01", 1)], [6, 2], id="cores that only one can use go first"),
    pytest.param([taker("012"), taker("1234"), taker("45")], [2, 2, 2], id="a chain"),
    pytest.param([taker("01"), taker("0", 3)], [1, 1], id="nobody starves"),
    pytest.param([taker("0"), taker("0")], [1, 0], id="too few"),
    pytest.param([taker("012"), taker("0"), taker("12")], [1, 1, 1], id="one makes way for another"),
    pytest.param([taker("01234567", 3), taker("01234567", need=6)], [3, 5], id="a core each before fixed sizes"),
    pytest.param([taker("0123", 3, share=0.1), taker("0123", need=3)], [3, 1], id="... whatever the shares"),
    pytest.param([taker("01234567", share=3), taker("01234567")], [6, 2], id="by share"),
    pytest.param([taker("01234567", 1, need=4, limit=4), taker("01234567", 1)], [4, 4], id="what one may not have"),
    pytest.param([taker("01234567", 1, limit=2), taker("01234567", 1)], [2, 6], id="... the other gets"),
]


@pytest.mark.parametrize(("takers", "expected"), ALLOTTED)
def test_allot(takers: list[Taker], expected: list[int]) -> None:
    assert totals(takers) == expected


@pytest.mark.no_cover
@given(st.lists(st.builds(taker, st.sets(st.sampled_from("0123456789"), min_size=1).map("".join), st.integers(1, 4)),
                min_size=1, max_size=4))  # fmt: skip
def test_nothing_usable_is_left_and_nobody_starves(takers: list[Taker]) -> None:
    got = totals(takers)
    usable = frozenset().union(*(taker.cores for taker in takers))
    assert sum(got) == len(usable)
    for chosen in range(1, 1 << len(takers)):  # Hall: cores go to everybody where any division could do it
        few = [t for t in range(len(takers)) if chosen >> t & 1]
        if len(frozenset().union(*(takers[t].cores for t in few))) < sum(takers[t].workers for t in few):
            return
    assert all(number >= taker.workers for number, taker in zip(got, takers, strict=True))


@pytest.mark.no_cover
@given(st.integers(0, 60), st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_apportion(extra: int, weights: list[float]) -> None:
    sizes = apportion(len(weights) + extra, weights)
    assert sum(sizes) == len(weights) + extra
    assert min(sizes) >= 1
    more = apportion(len(weights) + extra + 1, weights)
    assert all(b >= a for a, b in zip(sizes, more, strict=True))


def test_apportion_is_proportional() -> None:
    assert apportion(12, [3, 2, 1]) == [6, 4, 2]
    assert apportion(7, [1, 1, 1]) == [3, 2, 2]
    assert apportion(3, [100, 1, 1]) == [1, 1, 1]


def test_apportion_within_limits() -> None:
    assert apportion(12, [3, 2, 1], most=[4, 12, 12]) == [4, 5, 3]
    assert apportion(12, [3, 2, 1], least=[1, 1, 5], most=[12, 12, 12]) == [4, 3, 5]
    assert apportion(3, []) == []


TYPES = [
    pytest.param([4, 8], [1, 0.5], [1], [0], id="the fastest first"),
    pytest.param([4, 8], [1, 0.5], [1, 1], [0, 1], id="the slow ones before half of the fast ones"),
    pytest.param([4, 8], [1, 0.2], [1, 1], [0, 0], id="... unless they are too slow"),
    pytest.param([4, 8], [1, 0.5], [1, 1, 1, 1], [0, 1, 1, 0], id="of equals the slower one"),
    pytest.param([2, 10], [1, 1], [1], [0], id="the slowest only if every faster one is used"),
    pytest.param([2, 10], [1, 1], [1, 1, 1], [0, 1, 1], id="... then most go there"),
    pytest.param([1, 4, 3], [1, 0.8, 0.3], [1, 1], [1, 1], id="one fastest core is less than four that are slower"),
    pytest.param([1, 4, 3], [1, 0.8, 0.3], [1, 1, 1, 1, 1], [1, 1, 1, 0, 2], id="every type in the end"),
    pytest.param([2, 1], [1, 0.01], [1, 1, 1], [0, 0, 1], id="a core each"),
    pytest.param([6, 4], [1, 0.5], [3, 1, 1], [0, 1, 0], id="by weight"),
    pytest.param([8], [1], [1, 1], [0, 0], id="one type"),
]


@pytest.mark.parametrize(("cores", "capacities", "weights", "expected"), TYPES)
def test_choose_types(cores: list[int], capacities: list[float], weights: list[float], expected: list[int]) -> None:
    assert choose_types(cores, capacities, weights) == expected


def test_a_type_in_use_already_lets_the_slowest_in() -> None:
    assert choose_types([2, 8], [1, 0.5], [1], busy={0}) == [1]


@pytest.mark.no_cover
@given(
    types=st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 1)), min_size=1, max_size=3), workers=st.integers(1, 18)
)
def test_no_type_gets_more_workers_than_cores(types: list[tuple[int, float]], workers: int) -> None:
    cores, capacities = map(list, zip(*types, strict=True))
    chosen = Counter(choose_types(cores, capacities, [1.0] * min(workers, sum(cores))))
    assert all(chosen[t] <= count for t, count in enumerate(cores))
