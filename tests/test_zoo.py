"""Results of many models whose cores are taken back in the middle of their requests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.harness import CHECKOUT
from tests.zoo import ZOO

pytestmark = pytest.mark.process

SECONDS = 1.0  # for each model; ten times that finds no more


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """What the zoo says of each model: of all parts, since one process loads torch once."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.zoo", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("part", ZOO)
def test_results_are_those_of_an_undisturbed_run(lines: list[dict[str, Any]], part: str) -> None:
    tried = [one for one in lines if one["part"] == part]
    assert tried
    assert [one for one in tried if not one["worst"] <= one["allowed"]] == []
    assert [one["name"] for one in tried if not one["wide"] or not one["regions"]] == []
    assert sum(one["taken"] for one in tried) >= len(tried), "cores were taken back"
