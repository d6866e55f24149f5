"""What a worker's requests compute with: real processes that claim slices and lend them, without TorchServe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.claimants import ALLOWED, CORES, TOPOLOGY, Claimant
from tests.eventually import eventually
from ts_plugin.ledger import coordinator
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Server
from ts_plugin.machine import process
from ts_plugin.planning.policy import Lend, Policy

NODES = len({core.node for core in TOPOLOGY.cores_of(ALLOWED)})
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CORES < 2, reason="needs two cores to lend one"),
    pytest.mark.skipif(NODES > 1, reason="cores are lent inside one NUMA node"),
]

ALL = sorted(core.number for core in TOPOLOGY.cores_of(ALLOWED))
Start = Callable[..., Claimant]


@pytest.fixture(autouse=True)
def _server(state: Path) -> None:
    register(state, Lend.AUTO)


def register(state: Path, lend: Lend) -> None:
    """Let this process be the workers' frontend, which says whether they lend."""
    me = process.identify(os.getpid())
    assert me is not None
    coordinator.register_server(Ledger(str(state)), Server(me.pid, me.start_time, Policy(lend=lend), ALLOWED))


def pair(start: Start, **options: Any) -> tuple[Claimant, Claimant]:
    """Return two idle workers that have half of the cores each, and know it."""
    first, second = (start(worker=worker, torch=True, **options) for worker in ("9000", "9001"))
    first.facts()
    second.facts()
    assert eventually(lambda: len(first.follow()["cpus"]) == CORES - CORES // 2)
    assert eventually(lambda: len(second.follow()["cpus"]) == CORES // 2)
    return first, second


def request(worker: Claimant) -> dict[str, Any]:
    """Return the facts from the midst of a request."""
    worker.follow("begin")
    computes = worker.follow("compute")
    worker.follow("end")
    return computes


def begins_wide(worker: Claimant) -> bool:
    facts = worker.follow("begin")
    wide: bool = facts["computes_with"] > len(facts["cpus"])
    if not wide:
        worker.follow("end")
    return wide


def becomes_wide(worker: Claimant) -> bool:
    return eventually(lambda: request(worker)["computes_with"] > len(worker.follow()["cpus"]))


def test_a_lone_request_computes_on_all_cores(start: Start, state: Path) -> None:
    """Until the slices change; a state directory that is deleted ends no lending."""
    first, second = pair(start)
    for worker in (first, second):
        assert becomes_wide(worker)
        after = worker.follow()
        assert after["wide"] >= 1
        assert after["mask"] == after["cpus"]
        assert after["computes_with"] == after["threads"] == len(after["cpus"])

    for file in state.iterdir():
        file.unlink()
    assert eventually(lambda: len(Ledger(str(state)).read().leases) == 2)
    assert becomes_wide(first)
    assert becomes_wide(second)

    assert eventually(lambda: begins_wide(first))
    second.kill()
    assert eventually(lambda: first.follow("compute")["computes_with"] < CORES)
    first.follow("end")
    assert eventually(lambda: first.follow()["cpus"] == ALL)
    assert eventually(lambda: first.masks() == {frozenset(ALL)})


def test_under_lend_never_nothing_is_shared(start: Start, state: Path) -> None:
    register(state, Lend.NEVER)
    first, _ = pair(start)
    assert {request(first)["computes_with"] for _ in range(8)} == {len(first.follow()["cpus"])}
    assert not list(state.glob("lending-*"))
    assert not list(state.glob("slots-*"))


def test_a_worker_whose_requests_overlap_keeps_its_slice_for_good(start: Start) -> None:
    first, second = pair(start)
    assert becomes_wide(second)
    for order in ("begin", "begin", "end", "end"):
        first.follow(order)
    assert first.follow()["keeps"]
    assert {request(second)["computes_with"] for _ in range(8)} == {CORES // 2}
    second.kill()
    assert eventually(lambda: first.follow()["cpus"] == ALL)
    third = start(worker="9002", torch=True)
    third.facts()
    assert eventually(lambda: len(first.follow()["cpus"]) == CORES - CORES // 2)
    assert {request(third)["computes_with"] for _ in range(8)} == {CORES // 2}, "it is among others anew"


def test_a_worker_that_still_starts_does_not_lend(start: Start) -> None:
    first, second = start(worker="9000", torch=True), start(worker="9001", torch=True, loads=True)
    first.facts()
    second.facts()
    assert eventually(lambda: len(first.follow()["cpus"]) < CORES)
    assert {request(first)["computes_with"] for _ in range(8)} == {len(first.follow()["cpus"])}


def test_words_that_cannot_be_made_leave_a_worker_on_its_slice(start: Start, state: Path) -> None:
    Ledger(str(state)).beside("lending")[0].open("probe", os.O_WRONLY | os.O_CREAT)
    (state / Ledger(str(state)).beside("lending")[1]).mkdir()
    first, _ = pair(start)
    assert {request(first)["computes_with"] for _ in range(8)} == {CORES - CORES // 2}
    assert any("neither lends cores nor borrows any" in line for line in first.log)
