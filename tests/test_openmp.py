"""torch's OpenMP runtime on a mask that grows: its threads must not be slower for having started on one CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

pytestmark = pytest.mark.process

ALLOWED = sorted(os.sched_getaffinity(0))
needs_two = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two CPUs to grow")

# Counts how often the team's threads go to sleep while parallel regions follow each other without a pause.
GROWS = """
import json, os, sys
from ts_plugin.worker import openmp
mask = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(mask)})
if sys.argv[1] == "load":
    openmp.load()
assert os.sched_getaffinity(0) == {min(mask)}
import torch
os.sched_setaffinity(0, sorted(mask)[:2])
torch.set_num_threads(2)
before = set(os.listdir("/proc/self/task"))
ones = torch.ones(1 << 17)
ones.add_(1)
team = set(os.listdir("/proc/self/task")) - before
def sleeps():
    words = [open(f"/proc/self/task/{tid}/status").read().split() for tid in team]
    return sum(int(found[found.index("voluntary_ctxt_switches:") + 1]) for found in words)
start = sleeps()
for _ in range(2000):
    ones.add_(1)
slept = sleeps() - start
runtimes = [*openmp.runtimes()]
ended = openmp.end_team()
import time
deadline = time.monotonic() + 60
while team & set(os.listdir("/proc/self/task")) and time.monotonic() < deadline:
    time.sleep(0.01)
left = len(team & set(os.listdir("/proc/self/task")))
ones.add_(1)
print(json.dumps([len(team), slept, ended, left, float(ones[0]), runtimes]))
"""


@cache
def run(how: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", GROWS, how], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    return json.loads(done.stdout)


@needs_two
def test_threads_that_started_on_one_cpu_spin_on_two_as_others_do() -> None:
    team, slept, *_ = run("load")
    if team != 1:
        pytest.skip("this torch has no libgomp")
    assert slept < 1000, "in half of the regions at most"
    assert run("too late")[1] > slept, "the reason for loading it early"


@needs_two
def test_a_team_that_is_ended_starts_again() -> None:
    team, _, ended, left, value, _ = run("load")
    if team != 1:
        pytest.skip("this torch has no libgomp")
    assert ended
    assert left == 0
    assert value == 2003.0


@needs_two
@pytest.mark.parametrize("how", ["load", "too late"])
def test_the_runtime_of_torch_is_seen_and_is_the_only_one(how: str) -> None:
    assert len(run(how)[-1]) == 1
