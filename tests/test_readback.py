"""Read-back: what it finds on a real process, and what it repairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.leases import lease_of, slice_of
from ts_plugin.ledger.model import Lease
from ts_plugin.lending.words import Status
from ts_plugin.machine import discovery, process
from ts_plugin.worker import openmp
from ts_plugin.worker.readback import METRICS, ReadBack, lending

pytestmark = pytest.mark.process

ALLOWED = tuple(sorted(os.sched_getaffinity(0)))
needs_two = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two CPUs to tell one mask from another")

SETUP = """
import json, os, threading
from tests.leases import lease_of
from ts_plugin.ledger.file import Ledger
from ts_plugin.worker.readback import ReadBack
from ts_plugin.worker.requests import Requests
cpus = tuple(sorted(os.sched_getaffinity(0)))
lease = lease_of(cpus[:1])
look, requests = ReadBack(), Requests(Ledger(), lease, print)
"""


def run(code: str) -> Any:
    """Run ``code`` after SETUP in a process of its own, which may change its masks, and return the JSON it prints."""
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@needs_two
def test_masks_outside_the_slice_are_put_back_and_counted_once() -> None:
    found = run("""
threading.Thread(target=threading.Event().wait, daemon=True).start()
first, second = (requests.bind().changed for _ in range(2))
print(json.dumps([first, second, sorted(os.sched_getaffinity(0)), cpus]))
""")
    outside, again, mask, cpus = found
    assert outside == 2
    assert again == 0
    assert mask == cpus[:1]


@needs_two
def test_moves_between_cpus_are_counted_since_the_last_look() -> None:
    found = run("""
wide = lease_of(cpus)
first = look.read(wide, 1, thorough=False).migrations
for _ in range(10):
    for cpu in cpus[:2]:
        os.sched_setaffinity(0, {cpu})
os.sched_setaffinity(0, cpus)
print(json.dumps([first, look.read(wide, 1, thorough=False).migrations]))
""")
    first, moved = found
    if first is None:
        pytest.skip("this kernel does not count migrations (CONFIG_SCHED_DEBUG)")
    assert first == 0, "what happened before the first look is not counted"
    assert moved >= 10


def look_at(lease: Lease) -> tuple[Lease, int]:
    return lease, lease.slice.threads


def test_a_thorough_look_finds_two_openmp_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "runtimes", lambda: {"libgomp.so.1": "", "libiomp5.so": ""})
    problems = ReadBack().read(*look_at(lease_of(ALLOWED)), thorough=True).problems
    assert any("libgomp.so.1, libiomp5.so" in problem for problem in problems)
    assert ReadBack().read(*look_at(lease_of(ALLOWED)), thorough=False).problems == ()


def test_pages_on_other_nodes_are_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "memory_nodes", lambda: frozenset({0, 1}))
    here = ReadBack().read(*look_at(lease_of(ALLOWED)), thorough=True)
    if here.remote_pages is None:
        pytest.skip("this kernel has no numa_maps")
    assert here.remote_pages == 0 or len(os.listdir("/sys/devices/system/node")) > 1
    lease = lease_of(slice_of(ALLOWED, numa_nodes=(1023,)))
    pages = ReadBack().read(*look_at(lease), thorough=True).remote_pages
    assert pages is not None
    assert pages > 100, "all of this process's memory is elsewhere then"
    monkeypatch.setattr(discovery, "memory_nodes", lambda: frozenset({0}))
    assert ReadBack().read(*look_at(lease), thorough=True).remote_pages == 0, "it is not looked at on one node"


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        pytest.param(Status(), Status(), {}, id="nothing"),
        pytest.param(Status(9, 1, 0.5, 2), Status(10, 1, 0.5, 2), {}, id="a request on its slice"),
        pytest.param(
            Status(9, 1, 0.5, 2, wait=0.25),
            Status(12, 3, 1.5, 5, wait=0.5),
            {"WideRequests": 2, "BorrowedCoreSeconds": 1.0, "HandBacks": 3, "SliceWaitSeconds": 0.25},
            id="all four",
        ),
        pytest.param(Status(9, 8, 7.0), Status(1, 1, 0.5), {"WideRequests": 1, "BorrowedCoreSeconds": 0.5}, id="anew"),
    ],
)
def test_counters_of_lending_get_what_is_new(before: Status, after: Status, added: dict[str, float]) -> None:
    assert lending(before, after) == added
    assert set(added) <= set(METRICS)


def test_a_crowd_is_reported_once_after_several_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "state", lambda pid, tid: "R")
    monkeypatch.setattr(process, "threads", lambda pid: list(range(100)))
    look = ReadBack()
    problems = [look.read(*look_at(lease_of(ALLOWED)), thorough=False).problems for _ in range(5)]
    assert [len(found) for found in problems] == [0, 0, 1, 0, 0]
    assert "100 runnable threads" in problems[2][0]
