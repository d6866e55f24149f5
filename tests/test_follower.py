"""What the thread that runs the model does at a request boundary."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

CODE = """
import json, os
from dataclasses import replace
import torch
from tests.leases import lease_of, slice_of
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import State
from ts_plugin.machine import discovery, process
from ts_plugin.planning.planner import Demand
from ts_plugin.planning.policy import Memory, Policy
from ts_plugin.worker.follower import Follower

discovery.memory_nodes = lambda: frozenset({0, 1})

def policies():
    return {tid: open(f"/proc/self/task/{tid}/numa_maps").readline().split()[1] for tid in process.threads(os.getpid())}

cpus = frozenset(os.sched_getaffinity(0))
before = set(process.threads(os.getpid()))
there = slice_of(cpus, threads=2, numa_nodes=(1,))
demand = Demand(cpus, Policy(memory=Memory.PREFERRED))
lease = lease_of(there, demand=demand)
own = Follower(Ledger(), lease)
own.requests.hold()
ones = torch.ones(512, 512)
torch.mm(ones, ones).relu_()
team = set(process.threads(os.getpid())) - before
own.requests.adopt(replace(lease, slice=replace(there, numa_nodes=(0,))), State())  # moved to node 0
own.requests.hold()
torch.mm(ones, ones).relu_()
after = policies()
team_after = set(process.threads(os.getpid())) - before
print(json.dumps([len(team), after[os.getpid()], sorted({after[tid] for tid in team_after if tid in after})]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/numa_maps"), reason="this kernel has no numa_maps")
def test_after_a_move_the_threads_that_compute_have_the_new_memory_policy() -> None:
    """A policy belongs to a thread: those of the OpenMP team inherited the old one."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    threads, own, team = json.loads(done.stdout)
    assert threads >= 1
    assert own == "prefer:0"
    assert "default" not in team, "no thread of the old team is left"
    assert "prefer:0" in team
