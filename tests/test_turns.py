"""Who gets which load when: the order of turns, what is left out, and what a resumed run does not measure again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_tune import BODY, archive
from ts_plugin.trial.archive import read_archive
from ts_plugin.trial.asked import Model
from ts_plugin.trial.load import Body
from ts_plugin.trial.store import Store
from ts_plugin.trial.turns import FULL, Contender, Load, Sample, Turns, packed, rounds_of

A, B = Contender("a", {}), Contender("b", {})
LOADS = (
    Load(FULL, 1.0, 2, clients=(4,)),
    Load("half", 1.0, 2, share=0.5),
    Load("most", 1.0, 1, share=0.8),
)


class Standing(Turns):
    """Turns of servers that are not there: ``answers`` says what a load would have met."""

    def __init__(self, directory: Path, answers: Callable[[str, Load, float | None], Sample]) -> None:
        model = Model(read_archive(archive(directory)), Body(BODY))
        super().__init__([model], store=Store(directory / "store.json"), clients=[4], cpus=frozenset())
        self.servers: dict[str, Any] = {"a": "a", "b": "b"}
        self.seen: list[tuple[str, str]] = []
        self._answers = answers

    def _measured(self, server: Any, load: Load, rates: Sequence[float] | None, turn: int) -> list[Sample]:
        self.seen.append((server, load.name))
        return [self._answers(server, load, rates[0] if rates else None)]


def well(server: str, load: Load, rate: float | None) -> Sample:
    return Sample(rate, rate or {"a": 20.0, "b": 10.0}[server], (0.1,), 0)


def later() -> float:
    return time.monotonic() + 60


def test_all_get_a_load_one_after_the_other_and_then_backwards(tmp_path: Path) -> None:
    turns = Standing(tmp_path, well)
    turns.measure([A, B], LOADS, deadline=later(), essential=1)
    once = [("a", FULL), ("b", FULL), ("a", "half"), ("b", "half"), ("a", "most"), ("b", "most")]
    assert turns.seen == [*once, ("b", FULL), ("a", FULL), ("b", "half"), ("a", "half")]
    assert turns.capacity() == [20.0]
    rates = {one.samples[0].rate for one in rounds_of(Store(tmp_path / "store.json"), [A, B], ["half", "most"])}
    assert rates == {10.0, 16.0}  # parts of what the first one answers, the same for all


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    Standing(tmp_path, well).measure([A, B], LOADS[:2], deadline=later(), essential=1)
    again = Standing(tmp_path, well)
    again.measure([A, B], LOADS, deadline=later(), essential=1)
    assert again.seen == [("a", "most"), ("b", "most")]


def test_when_the_time_is_over_only_the_essential_is_measured(tmp_path: Path) -> None:
    turns = Standing(tmp_path, well)
    turns.measure([A, B], LOADS, deadline=time.monotonic() - 1, essential=1)
    assert turns.seen == [("a", FULL), ("b", FULL)]


@pytest.mark.parametrize(
    ("answered", "expected"),
    [
        pytest.param(3.0, [FULL, "half", FULL], id="far too much"),
        pytest.param(11.0, [FULL, "half", "most", FULL, "half"], id="just too much"),
    ],
)
def test_a_rate_that_was_far_too_much_is_not_tried_again(tmp_path: Path, answered: float, expected: list[str]) -> None:
    def slow(server: str, load: Load, rate: float | None) -> Sample:
        return Sample(rate, answered, (9.0,), 0, True) if rate and server == "b" else well(server, load, rate)

    turns = Standing(tmp_path, slow)
    turns.measure([A, B], LOADS, deadline=later(), essential=1)
    assert [load for server, load in turns.seen if server == "b"] == expected
    rounds = list(rounds_of(Store(tmp_path / "store.json"), [B], ["half", "most"]))
    assert len(rounds) == 3
    assert all(one.samples[0].saturated for one in rounds)


def test_another_setting_is_another_contender(tmp_path: Path) -> None:
    Standing(tmp_path, well).measure([A], LOADS, deadline=later(), essential=1)
    store = Store(tmp_path / "store.json")
    assert len(list(rounds_of(store, [A], [FULL]))) == 2
    assert not list(rounds_of(store, [Contender("a", {"batch_size": 2})], [FULL]))


def test_groups_are_as_large_as_memory_allows() -> None:
    assert packed("abcde", lambda letter: 2 if letter == "c" else 1, 3) == [["a", "b"], ["c", "d"], ["e"]]
