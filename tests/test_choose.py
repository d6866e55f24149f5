"""What tune chooses: tables, exhaustive search on synthetic machines, Packrat's protocol, a simulated frontend."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_plugin.errors import CommandError
from ts_plugin.tune.choose import choose, share
from ts_plugin.tune.values import LOAD, Cell, Choice, Profile, Target

Seconds = Callable[[float, float, float], float]  # by threads, batch and instances at once


def amdahl(seconds: float = 0.1, *, serial: float = 0.2, each: float = 0.8, crowd: float = 0.0) -> Seconds:
    """Each more request of a batch costs ``each`` of the first, each core that others keep busy slows by ``crowd``."""

    def time(threads: float, batch: float, instances: float) -> float:
        return (
            seconds
            * (serial + (1 - serial) / threads)
            * (1 + each * (batch - 1))
            * (1 + crowd * threads * (instances - 1))
        )

    return time


def profiled(
    time: Seconds,
    cores: int = 4,
    *,
    node: int | None = None,
    memory: tuple[int, int, int] = (1, 1, 10**9),  # first, next, free
    batches: bool = True,
) -> Profile:
    """Return what measuring at few points makes of ``time``."""
    node = node or cores
    threads = [one for one in (1, 2, 4, 8, 16) if one < node] + [node]
    points = [(t, b, n) for t in threads for b in ((1, 2, 4, 8) if batches else (1,)) for n in sorted({1, cores // t})]
    cells = tuple(Cell(t, b, n, time(t, b, n), 0.01, 30) for t, b, n in points)
    return Profile("m.mar", cores, node, *memory, batches, cells)


def met(choice: Choice, target: Target) -> bool:
    return target.met(choice.throughput, choice.p99)


def shape(choice: Choice) -> tuple[int, int, int]:
    return choice.workers, choice.threads, choice.batch


@pytest.mark.parametrize(
    ("profile", "target", "expected"),
    [
        pytest.param(
            profiled(amdahl()), Target(), (4, 1, 8), id="the serial part makes narrow workers most productive"
        ),
        pytest.param(profiled(amdahl(each=1)), Target(), (4, 1, 1), id="no gain by batches, no batches"),
        pytest.param(profiled(amdahl(serial=0, each=1)), Target(), (1, 4, 1), id="equals: fewer workers, more cores"),
        pytest.param(
            profiled(amdahl(serial=0, each=1), 8, node=4), Target(), (2, 4, 1), id="no wider than a NUMA node"
        ),
        pytest.param(profiled(amdahl(crowd=1, each=1, serial=0.5)), Target(), (1, 4, 1), id="crowded memory channels"),
        pytest.param(
            profiled(amdahl(serial=0.05), memory=(60, 40, 110)), Target(), (2, 2, 8), id="memory for two workers"
        ),
        pytest.param(profiled(amdahl(), memory=(60, 40, 50)), Target(), (1, 4, 8), id="not even for one"),
        pytest.param(profiled(amdahl(), batches=False), Target(), (4, 1, 1), id="a handler that takes one request"),
        pytest.param(profiled(amdahl()), Target(rate=0.1), (1, 4, 1), id="hardly any load: as fast as can be"),
        pytest.param(profiled(amdahl(each=1)), Target(rate=26), (4, 1, 1), id="a rate that only four workers serve"),
        pytest.param(profiled(amdahl()), Target(rate=1000), (4, 1, 8), id="no rate as high: the most there is"),
    ],
)
def test_the_best(profile: Profile, target: Target, expected: tuple[int, int, int]) -> None:
    assert shape(choose(profile, target)[0]) == expected


def test_the_example_of_the_module() -> None:
    profile = profiled(amdahl(each=2 / 3))
    throughput = {shape(one): one.throughput for one in choose(profile, Target())}
    assert throughput[4, 1, 4] == pytest.approx(53, abs=0.5)
    assert throughput[1, 4, 4] == pytest.approx(33, abs=0.5)
    p99 = {shape(one): one.p99 for one in choose(profile, Target(rate=10))}
    assert p99[1, 4, 4] < p99[4, 1, 4]


def test_cells_in_between_and_cells_that_are_missing() -> None:
    time = amdahl(crowd=0.1)
    profile = profiled(time, 8)
    sparse = [cell for cell in profile.cells if cell.batch == 1 or cell.instances == 1]  # a crowd with single requests
    for one in choose(replace(profile, cells=tuple(sparse)), Target()):
        assert one.throughput == pytest.approx(one.workers * one.batch / time(one.threads, one.batch, one.workers))


def test_a_target_that_holds_and_one_that_cannot() -> None:
    profile = profiled(amdahl())
    loose, tight = Target(p99=0.5), Target(p99=0.01)
    first = choose(profile, loose)[0]
    assert met(first, loose)
    assert first.throughput < choose(profile, Target())[0].throughput  # the most productive is too slow
    nearest = choose(profile, tight)
    assert not any(met(one, tight) for one in nearest)
    assert nearest[0].p99 <= min(one.p99 for one in nearest) * 1.02


def test_a_rate_with_a_limit_needs_both() -> None:
    target = Target(p99=0.3, rate=20)
    first = choose(profiled(amdahl()), target)[0]
    assert met(first, target)
    assert first.rate == 20
    assert not met(replace(first, throughput=20 / LOAD - 1), target)
    assert not met(replace(first, p99=0.31), target)


def test_batches_wait_for_half_of_a_request_and_single_requests_do_not() -> None:
    delays = {one.batch_delay_ms for one in choose(profiled(amdahl()), Target()) if one.batch > 1}
    assert delays == {50}
    assert {one.batch_delay_ms for one in choose(profiled(amdahl()), Target()) if one.batch == 1} == {0}
    assert {one.batch_delay_ms for one in choose(profiled(amdahl(1e-4)), Target())} == {0, 1}


machines = st.builds(
    lambda time, cores, nodes, memory, batches: profiled(
        time, cores * nodes, node=cores, memory=(300, 200, memory), batches=batches
    ),
    st.builds(
        amdahl,
        st.floats(0.001, 1),
        serial=st.floats(0, 0.9),
        each=st.floats(0.2, 1),
        crowd=st.floats(0, 0.1),
    ),
    cores=st.integers(1, 8),
    nodes=st.integers(1, 3),
    memory=st.integers(100, 5000),
    batches=st.booleans(),
)
targets = st.builds(
    Target,
    p99=st.none() | st.floats(0.001, 5),
    rate=st.none() | st.floats(0.1, 1000),
)


def all_shapes(profile: Profile) -> Iterator[tuple[int, int, int]]:
    for workers, threads in itertools.product(range(1, profile.cores + 1), range(1, profile.node_cores + 1)):
        memory = profile.first_memory + (workers - 1) * profile.next_memory
        if workers * threads <= profile.cores and (workers == 1 or memory <= profile.free_memory):
            yield from ((workers, threads, batch) for batch in ((1, 2, 4, 8) if profile.batches else (1,)))


@pytest.mark.no_cover
@given(machines, targets)
def test_all_there_is_in_the_order_that_was_asked_for(profile: Profile, target: Target) -> None:
    choices = choose(profile, target)
    assert sorted(map(shape, choices)) == sorted(all_shapes(profile))
    first, meeting = choices[0], [one for one in choices if met(one, target)]
    serving = [one for one in choices if target.rate is None or one.throughput * LOAD >= target.rate]
    if meeting and target.rate is not None and target.p99 is None:
        assert first.p99 <= min(one.p99 for one in meeting) * 1.021
    elif meeting:
        assert first in meeting
        assert first.throughput * 1.021 >= max(one.throughput for one in meeting)
    elif serving:
        assert first in serving
        assert first.p99 <= min(one.p99 for one in serving) * 1.021
    else:
        assert first.throughput * 1.021 >= max(one.throughput for one in choices)


@pytest.mark.no_cover
@settings(max_examples=50)
@given(st.integers(1, 12), st.floats(0, 0.9), st.floats(0.2, 1), st.floats(0, 0.1))
def test_the_most_throughput_of_an_exhaustive_search(cores: int, serial: float, each: float, crowd: float) -> None:
    time = amdahl(serial=serial, each=each, crowd=crowd)
    profile = profiled(time, cores)
    most = max(w * b / time(t, b, w) for w, t, b in all_shapes(profile))
    workers, threads, batch = shape(choose(profile, Target())[0])
    assert workers * batch / time(threads, batch, workers) >= 0.97 * most


@pytest.mark.parametrize(("workers", "threads", "batch"), [(1, 4, 1), (4, 1, 1), (2, 2, 4), (4, 1, 8), (1, 4, 2)])
@pytest.mark.parametrize("load", [0.2, 0.5, 0.7])
def test_the_99th_percentile_of_a_simulated_frontend(workers: int, threads: int, batch: int, load: float) -> None:
    time = amdahl(each=0.6)
    profile = profiled(time)
    wanted = workers, threads, batch
    most = next(one.throughput for one in choose(profile, Target()) if shape(one) == wanted)
    choice = next(one for one in choose(profile, Target(rate=load * most)) if shape(one) == wanted)
    seen = simulated(choice, lambda size: time(threads, size, workers))
    assert 0.75 * seen <= choice.p99 <= 1.7 * seen


def simulated(choice: Choice, time: Callable[[int], float]) -> float:
    """Return the 99th percentile with the frontend's rule: one worker at a time collects a batch."""
    dice, requests = random.Random(7), 6000
    arrivals = list(itertools.accumulate(dice.expovariate(choice.rate) for _ in range(requests)))
    free, collected, latencies, at = [0.0] * choice.workers, 0.0, [], 0
    while at < requests:
        start = max(heapq.heappop(free), collected, arrivals[at])
        end = start + choice.batch_delay_ms / 1000
        batch = [one for one in arrivals[at : at + choice.batch] if one <= end]
        collected = max(start, batch[-1]) if len(batch) == choice.batch else end
        done = collected + time(len(batch)) * dice.gammavariate(100, 0.01)
        latencies += [done - one for one in batch]
        heapq.heappush(free, done)
        at += len(batch)
    return sorted(latencies)[math.floor(0.99 * requests)]


def test_two_models_share_by_their_load() -> None:
    heavy, light = profiled(amdahl(0.4), 8), profiled(amdahl(0.02), 8)
    goals = [Target(rate=6), Target(rate=5)]
    best = share([heavy, light], goals)[0]
    assert all(met(one, goal) for one, goal in zip(best, goals, strict=True))
    assert sum(one.workers * one.threads for one in best) <= 8
    assert best[0].workers * best[0].threads > best[1].workers * best[1].threads


@pytest.mark.no_cover
@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 50)), min_size=1, max_size=3), st.integers(3, 8))
def test_sharing_keeps_within_cores_and_memory_and_meets_what_can_be_met(
    models: list[tuple[float, float]], cores: int
) -> None:
    profiles = [profiled(amdahl(seconds), cores, memory=(100, 50, 600)) for seconds, _ in models]
    goals = [Target(rate=rate) for _, rate in models]
    divisions = share(profiles, goals)
    missed = [sum(not met(one, goal) for one, goal in zip(each, goals, strict=True)) for each in divisions]
    assert missed == sorted(missed)
    for division in divisions:
        assert len(division) == len(models)
        assert sum(one.workers * one.threads for one in division) <= cores
        assert sum(one.memory for one in division) <= 600


def test_models_that_want_many_workers_share_the_memory() -> None:
    for division in share([profiled(amdahl(), 8, memory=(100, 50, 400))] * 2, [Target(), Target()]):
        assert sum(one.memory for one in division) <= 400


def test_many_models_on_many_cores_are_divided_too() -> None:
    profiles = [profiled(amdahl(each=1), 32, batches=False) for _ in range(6)]
    best = share(profiles, [Target(rate=1)] * 6)[0]
    assert all(one.workers * one.threads >= 2 for one in best)


def test_more_models_than_cores() -> None:
    with pytest.raises(CommandError, match="3 models share 2 cores"):
        share([profiled(amdahl(), 2)] * 3, [Target(rate=1)] * 3)
