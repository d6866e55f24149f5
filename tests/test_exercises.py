"""The tutorial's exercises with one process: which bindings they compare, and where they say that there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pytest

from benchmarks import exercises
from benchmarks.exercises import Exercise
from tests.machines import machine
from ts_plugin.trial.bare import Binding


def test_they_say_why_they_are_missing() -> None:
    found = list(exercises.exercises(machine(packages=1, cores=2).cores))
    assert ["no SMT" in (one.missing or "") for one in found] == [True, False]
    assert "one NUMA node" in (found[1].missing or "")


def test_they_compare_the_same_cores() -> None:
    smt, numa = exercises.exercises(machine(packages=2, cores=2, smt=2).cores)
    assert [binding.threads for _, binding in smt.bindings] == [4, 2]
    (everything, whole), (unbound, bound) = ([binding.cpus for _, binding in one.bindings] for one in (smt, numa))
    assert everything is not None
    assert whole is not None
    assert set(whole) < set(everything)
    assert (unbound, bound) == (None, whole)


def test_they_run_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the process, whose requests take as many milliseconds as it has threads, or 9."""
    ran = []

    class Bare:
        def __init__(self, archive: Path, body: bytes, bindings: list[Binding]) -> None:
            (self.binding,) = bindings

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def work(self, seconds: float) -> list[float]:
            ran.append((self.binding.threads, seconds))
            return [self.binding.threads / 1000] * 2 + [0.009]

    monkeypatch.setattr(exercises, "Bare", Bare)
    found = exercises.run(Exercise("", (("a", Binding(None, 1)), ("b", Binding(None, 2)))), Path("archive"), b"body")
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert ran == [(threads, span) for threads in (1, 2, 2, 1, 1, 2) for span in (exercises.WARM_UP, exercises.SECONDS)]
