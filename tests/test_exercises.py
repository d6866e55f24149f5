"""The tutorial's exercises with one process: which bindings they compare, and where they say that there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import exercises
from benchmarks.exercises import Exercise
from tests.machines import machine
from tests.test_tune import BODY, archive
from ts_plugin.trial.bare import Binding

pytestmark = pytest.mark.process


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


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "WARM_UP", 0.1)
    monkeypatch.setattr(exercises, "SECONDS", 0.1)
    found = exercises.run(Exercise("", (("a", Binding(None, 1)), ("b", Binding(None, 2)))), archive(tmp_path), BODY)
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}
