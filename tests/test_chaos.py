"""Chaos in its short form, and that its watcher would see what it watches for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.checks import chaos

ALLOWED = sorted(os.sched_getaffinity(0))
PATIENCE = 20.0  # seconds: that everything is right again within 2 is measured, not tested


@pytest.fixture
def two() -> Iterator[list[int]]:
    """Two processes that may use all CPUs, as unpinned workers may."""
    both = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    yield [one.pid for one in both]
    for one in both:
        one.communicate()


def test_a_minute_of_chaos_breaks_no_promise() -> None:
    report = chaos.run(minutes=1, seed=2026, grace=PATIENCE)
    assert report.violations == []
    assert report.failed_requests == []
    assert sum(report.actions.values()) >= 3
    assert report.answered > 0


@pytest.mark.skipif(len(chaos.physical_cores(frozenset(ALLOWED))) < 2, reason="needs two cores to overlap on")
def test_the_watcher_sees_overlaps_and_idle_cores(two: list[int]) -> None:
    first, second = two
    assert "overlap" in (chaos.inspect(frozenset(two)) or "")
    cores = [min(core) for core in chaos.physical_cores(frozenset(ALLOWED))]
    os.sched_setaffinity(first, cores[:1])
    os.sched_setaffinity(second, cores[1:])
    assert chaos.inspect(frozenset(two)) is None
    assert "idle" in (chaos.inspect(frozenset({first})) or "")
