"""The decision of elastic width: tables of what it should choose, and properties of all choices."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_plugin.planning.width import (
    Decision,
    Lender,
    Measured,
    Record,
    arrived,
    decide,
    ended,
    fit,
    new_record,
    offers,
    patience,
    primed,
    served,
    widths,
)

NOW = 1000.0
SURE = 1e4  # requests: so well known that nothing is tried out


def amdahl(seconds: float, serial: float) -> Callable[[float], float]:
    return lambda cores: seconds * (serial + (1 - serial) / cores)


def domain(
    service: Callable[[float], float],
    load: float,
    *,
    slices: Sequence[int] = (4,) * 8,
    width: int | None = None,
    seen: float | None = None,
) -> dict[int, Record]:
    """Workers of one model that know their service times, at ``load``, part of what slices alone can serve."""
    known = {cores for own in slices for cores in widths(own, sum(slices))}
    measured = tuple(Measured(cores, service(cores), SURE) for cores in sorted(known))
    return {
        slot: Record(
            0,
            own,
            width or own,
            measured,
            rate=load / service(own),
            seen=len(slices) if seen is None else seen,
            at=NOW,
            idle_since=NOW - len(slices) + slot,
        )
        for slot, own in enumerate(slices)
    }


@pytest.mark.parametrize(
    ("service", "load", "slices", "cores"),
    [
        pytest.param(amdahl(0.4, 0.03), 0.02, (4,) * 8, 32, id="nearly idle: everything"),
        pytest.param(amdahl(0.4, 0.03), 0.3, (4,) * 8, 16, id="the example"),
        pytest.param(amdahl(0.4, 0.03), 0.6, (4,) * 8, 8, id="twice the rate"),
        pytest.param(amdahl(0.4, 0.03), 0.95, (4,) * 8, 4, id="nearly full: its own slice"),
        pytest.param(amdahl(0.4, 0.05), 0.5, (14,) * 4, 14, id="4 x 14, where taking everything collapses"),
        pytest.param(amdahl(0.11, 0.0), 3 * 0.11 / 2, (1, 1), 2, id="ResNet-50 at 3/s on 2 cores"),
        pytest.param(amdahl(0.11, 0.0), 7 * 0.11 / 2, (1, 1), 2, id="ResNet-50 at 7/s on 2 cores"),
        pytest.param(amdahl(0.11, 0.05), 1.0, (1, 1), 1, id="full load"),
        pytest.param(lambda cores: 0.005, 0.05, (1,) * 8, 1, id="gains nothing"),
        pytest.param(lambda cores: 0.0052 + 0.0003 * (cores > 1), 0.3, (1, 1), 1, id="loses by width: mobilenet_v3"),
        pytest.param(amdahl(0.4, 0.03), 0.0, (4,), 4, id="alone in its domain"),
    ],
)
def test_cap(service: Callable[[float], float], load: float, slices: Sequence[int], cores: int) -> None:
    assert decide(domain(service, load, slices=slices), 0, NOW).width == cores


def test_one_client_that_waits_for_its_answer_gets_everything_though_it_never_pauses() -> None:
    """Closed loop: the rate alone looks like saturation; that no two requests were ever seen at once says otherwise."""
    service = amdahl(0.11, 0.02)
    records = domain(service, service(1) / service(2) / 2, slices=(1, 1), width=2, seen=1)
    assert decide(records, 0, NOW).width == 2
    crowded = {slot: replace(record, seen=2.0) for slot, record in records.items()}
    assert decide(crowded, 0, NOW).width == 1


def test_one_hot_model_beside_an_idle_one_gets_everything_even_when_saturated() -> None:
    service = amdahl(0.11, 0.1)
    hot, cold = domain(service, 1.0, slices=(1, 1)).values()
    records = {0: hot, 1: replace(cold, model=1, rate=0.0)}
    decision = decide(records, 0, NOW)
    assert decision.width == 2
    assert decision.lenders == (Lender(1, 1, 1, 0.0),)


def test_who_runs_long_does_not_borrow_from_who_runs_short_but_lends_to_it() -> None:
    long = domain(amdahl(2.0, 0.02), 0.1, slices=(1,) * 4)
    short = domain(amdahl(0.05, 0.02), 0.1, slices=(1,) * 4)
    records = long | {slot + 4: replace(record, model=1) for slot, record in short.items()}
    assert {lender.model for lender in decide(records, 0, NOW).lenders} == {0}
    assert {lender.model for lender in decide(records, 4, NOW).lenders} == {0, 1}
    idle = {slot: replace(record, rate=0.0) if record.model else record for slot, record in records.items()}
    assert {lender.model for lender in decide(idle, 0, NOW).lenders} == {0, 1}


def test_a_model_that_serves_but_is_not_known_yet_is_not_borrowed_from() -> None:
    records = domain(amdahl(0.4, 0.03), 0.1)
    records[7] = replace(new_record(1, 4, 0.0), rate=0.1, at=NOW)
    assert 7 not in {lender.slot for lender in decide(records, 0, NOW).lenders}


def test_nothing_known_means_the_own_slice() -> None:
    records = {slot: new_record(0, 4, 0.0) for slot in range(8)}
    decision = decide(records, 3, NOW)
    assert (decision.width, decision.lenders) == (4, ())


def test_a_profile_makes_the_first_request_wide_where_that_pays() -> None:
    def first(profile: dict[int, float]) -> int:
        records = {slot: primed(new_record(0, 4, 0.0), profile) for slot in range(4)}
        records[0] = arrived(records[0], 10.0, 0)
        return decide(records, 0, 10.0).width

    assert first({}) == 4
    assert first({1: 0.4, 4: 0.1, 8: 0.052, 16: 0.028}) == 16
    assert first({4: 0.1, 8: 0.1, 16: 0.1}) == 4


def test_what_was_measured_in_service_wins_over_a_profile() -> None:
    record = served(served(new_record(0, 4, 0.0), 4, 0.2, 1.0), 4, 0.2, 2.0)
    assert primed(record, {4: 0.1}) is record
    learned = primed(new_record(0, 4, 0.0), {4: 0.1})
    for _ in range(40):
        learned = served(learned, 4, 0.2, 1.0)
    assert 0.18 < learned.measured[0].seconds < 0.2


def test_the_present_width_is_kept_unless_another_is_clearly_better() -> None:
    """There is a load where both neighbouring widths stay: no flapping around the border."""
    service = amdahl(0.4, 0.03)
    both = [
        load
        for load in (step / 100 for step in range(2, 80))
        if all(decide(domain(service, load, width=width), 0, NOW).width == width for width in (8, 16))
    ]
    assert both


def test_noise_on_rates_and_times_does_not_flap() -> None:
    """Within 5 % of noise in all that is measured, at a load that is not at a border, one width is chosen always."""
    chance = random.Random(1)
    service = amdahl(0.4, 0.03)
    records = domain(service, 0.5, width=8)

    def noisy(record: Record) -> Record:
        measured = tuple(replace(one, seconds=one.seconds * chance.gauss(1, 0.01)) for one in record.measured)
        return replace(record, measured=measured, rate=record.rate * chance.gauss(1, 0.05))

    chosen = {decide({slot: noisy(record) for slot, record in records.items()}, 0, NOW).width for _ in range(100)}
    assert chosen == {8}


@settings(max_examples=60)
@given(
    serial=st.floats(0, 1),
    load=st.floats(0, 1.2),
    slices=st.lists(st.integers(1, 14), min_size=1, max_size=12),
    me=st.integers(0, 11),
)
def test_every_decision_is_possible(serial: float, load: float, slices: list[int], me: int) -> None:
    me %= len(slices)
    decision = decide(domain(amdahl(0.4, serial), load, slices=slices), me, NOW)
    assert decision.widths[0] == slices[me]
    assert decision.width in decision.widths
    assert slices[me] <= decision.width <= slices[me] + sum(lender.cores for lender in decision.lenders)
    assert me not in {lender.slot for lender in decision.lenders}
    assert decision.until > NOW


@settings(max_examples=40)
@given(serial=st.floats(0, 0.5), lower=st.floats(0, 1), higher=st.floats(0, 1))
def test_more_load_never_means_more_cores(serial: float, lower: float, higher: float) -> None:
    lower, higher = sorted((lower, higher))
    service = amdahl(0.4, serial)
    assert decide(domain(service, higher), 0, NOW).width <= decide(domain(service, lower), 0, NOW).width


@settings(max_examples=40)
@given(load=st.floats(0, 1), better=st.floats(0, 1), worse=st.floats(0, 1))
def test_a_model_that_scales_worse_never_gets_more_cores(load: float, better: float, worse: float) -> None:
    better, worse = sorted((better, worse))
    assert (
        decide(domain(lambda cores: 0.1 * (worse + (1 - worse) * 4 / cores), load), 0, NOW).width
        <= decide(domain(lambda cores: 0.1 * (better + (1 - better) * 4 / cores), load), 0, NOW).width
    )


@pytest.mark.parametrize(
    ("own", "cores", "expected"),
    [
        pytest.param(4, 4, (4,), id="alone"),
        pytest.param(1, 2, (1, 2), id="two"),
        pytest.param(2, 28, (2, 4, 8, 16, 28), id="the whole domain is a width"),
        pytest.param(7, 24, (7, 14, 24), id="odd"),
    ],
)
def test_widths(own: int, cores: int, expected: tuple[int, ...]) -> None:
    assert widths(own, cores) == expected


def decision(width: int, lenders: Sequence[Lender] = (), cores: int = 32) -> Decision:
    return Decision(width, cores, widths(4, cores), tuple(lenders), NOW, ())


@pytest.mark.parametrize(
    ("slices", "width", "expected"),
    [
        pytest.param([4], 32, (1, 4), id="nobody idle"),
        pytest.param([4, 4, 4], 32, (2, 8), id="three of eight: two, the third goes back"),
        pytest.param([4, 7], 8, (2, 8), id="a larger slice"),
        pytest.param([4, 2, 1], 32, (1, 4), id="too small to help"),
        pytest.param([4] * 8, 32, (8, 32), id="all"),
        pytest.param([4] * 8, 8, (2, 8), id="never more than the cap"),
    ],
)
def test_fit(slices: Sequence[int], width: int, expected: tuple[int, int]) -> None:
    assert fit(slices, width, decision(32)) == expected


def test_offers_start_with_the_neighbour_whose_next_request_is_furthest_away() -> None:
    lenders = [
        Lender(1, 4, 0, 2.0),
        Lender(2, 4, 0, 2.0),
        Lender(3, 4, 1, 9.0),
        Lender(4, 4, 2, 0.0),
        Lender(5, 4, 0, 2.0),
    ]
    idle: dict[int, float | None] = {0: None, 1: 10.0, 2: 30.0, 3: 1.0, 4: 5.0, 5: 20.0, 6: 0.0, 7: 0.0}
    width, offered = offers(decision(32, lenders), idle)
    assert width == 32
    assert [lender.slot for lender in offered] == [4, 2, 5, 1, 3]  # idle model, then last in line, then the busy model


@pytest.mark.parametrize(
    ("requests", "width"),
    [
        pytest.param(1, 32, id="alone"),
        pytest.param(2, 16, id="two"),
        pytest.param(4, 8, id="four"),
        pytest.param(7, 4, id="a burst"),
        pytest.param(8, 4, id="everybody"),
    ],
)
def test_a_request_takes_little_more_than_its_share(requests: int, width: int) -> None:
    lenders = [Lender(slot, 4, 0, 1.0) for slot in range(1, 8)]
    idle = {slot: None if slot < requests else 1.0 for slot in range(8)}
    got, offered = offers(decision(32, lenders), idle)
    assert got == width
    assert {lender.slot for lender in offered} <= set(range(requests, 8))


def test_service_times_are_learned_per_width_and_the_slow_first_request_does_not_count() -> None:
    record = new_record(0, 4, 0.0)
    for seconds in (9.0, 1.0, 2.0):
        record = served(record, 4, seconds, NOW)
    record = served(record, 8, 7.0, NOW)
    four, eight = record.measured
    assert (four.cores, four.seconds) == (4, 1.5)
    assert 1.9 < four.weight < 2
    assert eight == Measured(8, 7.0, 0.0)
    assert ended(replace(record, idle_since=None), NOW + 1) == replace(record, idle_since=NOW + 1)


def test_what_is_not_tried_is_forgotten_and_tried_again() -> None:
    """A model whose second width was measured badly once does not stay narrow for ever."""
    service = amdahl(0.4, 0.03)
    records = {
        slot: replace(record, measured=(Measured(4, service(4), 32.0), Measured(8, service(4) * 1.1, 8.0)))
        for slot, record in domain(service, 0.05, slices=(4, 4)).items()
    }
    assert decide(records, 0, NOW).width == 4
    for _ in range(6000):
        records = {slot: served(record, 4, service(4), NOW) for slot, record in records.items()}
    assert decide(records, 0, NOW).width == 8


def test_a_flat_model_tries_the_second_width_a_few_times_and_no_third() -> None:
    records = {slot: replace(record, measured=()) for slot, record in domain(lambda _: 0.1, 0.05).items()}
    tried = {4: 0, 8: 0, 16: 0, 32: 0}
    for _ in range(200):
        for slot in records:
            width = decide(records, slot, NOW).width
            tried[width] += 1
            records[slot] = replace(served(records[slot], width, 0.1, NOW), width=width)
    assert tried[16] == tried[32] == 0
    assert 0 < tried[8] < 40


def test_rates_follow_arrivals_and_fade() -> None:
    record = new_record(0, 4, 0.0)
    for i in range(1, 601):
        record = arrived(record, i / 10, others=1)
    assert record.rate == pytest.approx(10, rel=0.1)
    assert record.seen == 2
    assert record.idle_since is None
    later = arrived(record, 160.0, others=0)
    assert later.rate < 1


def test_an_owner_is_patient_for_a_few_of_its_own_requests() -> None:
    record = new_record(0, 1, 0.0)
    for seconds in (0.5, 0.5):
        record = served(record, 1, seconds, NOW)
    assert patience(record) == 2.0
    assert patience(new_record(0, 1, 0.0)) == 0.1


def test_a_client_that_waits_is_told_from_many_that_do_not() -> None:
    """At full load several requests are seen at once; arrivals that find nobody at work for long say it is over."""
    record = replace(new_record(1, cores=1, now=0.0), measured=(Measured(1, 0.1, 32.0),))
    for i in range(100):
        record = arrived(record, i / 10, others=1)
    assert record.seen == 2
    alone = 0
    while record.seen > 1:
        alone += 1
        record = arrived(record, 10 + alone / 5, others=0)
    assert 2 <= alone <= 20, "a run that chance gives once in a thousand, at half of the time busy"
    for i in range(100):
        record = arrived(record, 40 + i / 5, others=int(i % 5 == 0))
        assert record.seen > 1.5, "who meets others now and then is not alone"
