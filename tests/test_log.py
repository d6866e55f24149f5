"""TS_CORES_LOG=debug: a start and a replan tell what they have read, what was asked, what was granted, and why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.claimants import CORES, Claimant
from tests.eventually import eventually


@pytest.fixture
def _debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_CORES_LOG", "debug")


def told(claimant: Claimant, *words: str) -> bool:
    """Tell whether one debug line of a claimant has all ``words``."""
    claimant.follow()
    lines = [line for line in claimant.log if line.startswith("ts-cores: debug: ")]
    return any(all(word in line for word in words) for line in lines)


@pytest.mark.usefixtures("_debug")
def test_a_start_tells_what_was_read_asked_granted_and_done(start: Callable[..., Claimant]) -> None:
    worker = start(model="small", cores=1)
    cpus = worker.facts()["cpus"]
    assert told(worker, "start.claim", "Wishes(model=small, version=1.0, cores=1)", "Allowance(cpus=")
    assert told(worker, "coordinator.join", f"process {worker.pid} asks", "it has no entry")
    assert told(worker, f"process {worker.pid} of server {worker.pid} asks: Demand(allowed=", "cores=1")
    assert told(worker, f"process {worker.pid} gets Slice(cpus=({cpus[0]}", "threads=1")
    assert told(worker, "plan 1 in ", "ledger-")


@pytest.mark.usefixtures("_debug")
@pytest.mark.skipif(CORES < 2, reason="needs two cores to tell one slice from another")
def test_a_replan_tells_who_ended_and_who_gets_what(start: Callable[..., Claimant]) -> None:
    stays = start()
    stays.facts()
    goes = start(worker="9001")
    goes.facts()
    assert told(goes, "bind_all", f"process {stays.pid}: ", "threads to CPUs"), "who joins binds the others, too"
    assert eventually(lambda: told(stays, "follower._follow: plan 2: Lease(", f"pid={stays.pid}"))
    goes.kill()
    assert eventually(lambda: told(stays, "coordinator.enter: a new plan", f"ended [{goes.pid}]"))
    assert eventually(lambda: told(stays, "follower._follow: plan 3: Lease(", f"threads={CORES}"))


def test_without_the_variable_nothing_is_told_and_logging_is_not_even_loaded(start: Callable[..., Claimant]) -> None:
    worker = start()
    worker.facts()
    assert not told(worker)
    code = "import sys, ts_plugin.worker.launcher; print('logging' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
