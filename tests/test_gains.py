"""What a worker learns of its requests: which widths are worth it."""

from __future__ import annotations

import pytest

from ts_plugin.lending.gains import FIRST_PAUSE, KNOWN, LONGEST_PAUSE, Gains


def learned(own: int, *served: tuple[int, float], now: float = 0.0) -> Gains:
    """Return what is known after requests of (threads, seconds); the first of each width counts for nothing."""
    gains = Gains(own)
    for threads, seconds in served:
        gains.learn(threads, seconds, now)
    return gains


ALONE = ((1, 9.0), *[(1, 0.1)] * KNOWN)


def test_nothing_is_borrowed_before_a_request_on_the_slice_is_known() -> None:
    gains = Gains(1)
    for threads, seconds in ALONE:
        assert (gains.most(8, 0.0), gains.alone) == (1, 0.0)
        gains.learn(threads, seconds, 0.0)
    assert gains.most(8, 0.0) == 8
    assert gains.alone == pytest.approx(0.1)


def test_a_width_that_makes_requests_faster_is_used() -> None:
    gains = learned(1, *ALONE, (2, 5.0), *[(2, 0.06)] * 9)
    assert gains.most(2, 0.0) == 2
    assert gains.times == {1: pytest.approx(0.1), 2: pytest.approx(0.06)}


def test_a_width_that_gains_nothing_is_left_alone_for_longer_each_time() -> None:
    gains = learned(1, *ALONE, (2, 5.0))
    now, pauses = 0.0, []
    for _ in range(12):
        assert gains.most(2, now) == 2
        gains.learn(2, 0.1, now)
        assert gains.most(2, now) == 1
        start = now
        while gains.most(2, now) == 1:
            now += 0.5
        pauses.append(now - start)
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (FIRST_PAUSE, LONGEST_PAUSE)


def test_a_wider_one_that_adds_nothing_leaves_the_narrower_one() -> None:
    gains = learned(2, (2, 9.0), *[(2, 0.2)] * KNOWN, (4, 9.0), (4, 0.1), (4, 0.1), (8, 9.0), (8, 0.1))
    assert gains.most(8, 0.0) == 7, "regions.c rounds that down"
    assert gains.most(8, FIRST_PAUSE) == 8


def test_a_program_that_takes_a_core_and_ends() -> None:
    """Wide requests take longer than their budget then; when it has ended, they are as fast as before."""
    gains = learned(1, *ALONE, (2, 5.0), *[(2, 0.06)] * 9)
    gains.learn(2, 0.14, 10.0)
    assert gains.most(2, 10.0) == 1, "one request is enough"
    gains.learn(2, 0.14, 12.0)
    assert gains.most(2, 12.0 + FIRST_PAUSE) == 1
    for now in (20.0, 21.0, 22.0):
        assert gains.most(2, now) == 2
        gains.learn(2, 0.06, now)
    gains.learn(2, 0.2, 23.0)
    assert gains.most(2, 23.0) == 1
    assert gains.most(2, 23.0 + FIRST_PAUSE) == 2, "the pause is a short one again"


def test_a_profile_is_believed_at_once() -> None:
    gains = Gains(2)
    gains.prime({1: 0.4, 2: 0.2, 4: 0.11})
    assert (gains.alone, gains.most(8, 0.0)) == (0.2, 8)
    assert gains.times == {2: 0.2, 4: 0.11}
