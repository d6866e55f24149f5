"""Idle cores compute for whoever has a request: real processes with the board between them, without TorchServe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checks import watch
from benchmarks.harness import CHECKOUT
from tests.claimants import ALLOWED, CORES, TOPOLOGY, Claimant
from tests.eventually import eventually
from ts_plugin.leases import coordinator
from ts_plugin.leases.ledger import Ledger, Server
from ts_plugin.machine import process
from ts_plugin.planning.policy import Lend, Policy

NODES = len({core.node for core in TOPOLOGY.cores_of(ALLOWED)})
pytestmark = [
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
    first = start(worker="9000", wide=True, **options)
    first.facts()
    second = start(worker="9001", wide=True, **options)
    second.facts()
    assert eventually(lambda: len(first.follow()["cpus"]) == CORES - CORES // 2)
    assert eventually(lambda: len(second.follow()["cpus"]) == CORES // 2)
    return first, second


def test_a_lone_request_computes_on_all_cores_and_gives_them_back(start: Start) -> None:
    first, second = pair(start)
    for worker in (first, second, first):
        begin_wide(worker)
        after = worker.follow("end")
        assert after["mask"] == after["cpus"]
        assert after["wide"] >= 1


def begin_wide(worker: Claimant) -> None:
    """Begin a request that computes on all cores; the first ones may still find that the other worker starts."""
    while worker.follow("begin")["mask"] != ALL:
        worker.follow("end")


def test_an_owner_waits_for_its_borrower_and_borrows_from_it_then(start: Start) -> None:
    first, second = pair(start, patience=60)
    begin_wide(second)
    second.follow("end")
    begin_wide(first)
    assert second.process.stdin is not None
    second.process.stdin.write("begin\n")
    second.process.stdin.flush()
    assert eventually(lambda: waits(second)), "the owner waits"
    first.follow("end")
    facts = second.facts()
    assert facts["waited"] > 0
    assert facts["mask"] == ALL


def waits(worker: Claimant) -> bool:
    """Whether ``worker`` sleeps between two tries for a lock: its main thread is neither reading nor running."""
    with open(f"/proc/{worker.pid}/wchan", encoding="ascii") as file:
        return "nanosleep" in file.read()


def test_an_owner_takes_its_cores_back_in_the_end(start: Start) -> None:
    first, second = pair(start)
    begin_wide(first)
    facts = second.follow("begin")  # returns although the first one's request does not end
    assert facts["mask"] == facts["cpus"]
    assert all(mask.isdisjoint(facts["cpus"]) for mask in first.masks()), "the borrower computes on with the rest"
    assert facts["waited"] > 0
    after = first.follow("end")
    assert after["mask"] == after["cpus"]
    assert set(first.follow("begin")["mask"]).isdisjoint(facts["cpus"]), "the owner computes there by right"


def test_a_stopped_borrower_keeps_nobody_waiting(start: Start) -> None:
    first, second = pair(start)
    begin_wide(first)
    first.process.send_signal(signal.SIGSTOP)
    facts = second.follow("begin")
    assert facts["mask"] == facts["cpus"]
    assert all(mask.isdisjoint(facts["cpus"]) for mask in first.masks())
    first.process.send_signal(signal.SIGCONT)


def test_a_borrower_that_is_killed_leaves_nothing(start: Start) -> None:
    first, second = pair(start)
    begin_wide(first)
    first.kill()
    assert eventually(lambda: second.follow()["cpus"] == ALL)
    begin_wide(second)


def test_requests_that_overlap_end_the_lending(start: Start) -> None:
    first, second = pair(start)
    first.follow("begin")
    first.follow("begin")
    first.follow("end")
    first.follow("end")
    facts = second.follow("begin")
    assert facts["mask"] == facts["cpus"], "the slice of the first worker is never idle for certain"


def test_a_worker_that_still_starts_does_not_lend(start: Start) -> None:
    first = start(worker="9000", wide=True)
    first.facts()
    second = start(worker="9001", wide=True, loads=True)
    second.facts()
    assert eventually(lambda: len(first.follow()["cpus"]) == CORES - CORES // 2)
    for _ in range(3):
        facts = first.follow("begin")
        assert facts["mask"] == facts["cpus"]
        first.follow("end")


@pytest.mark.parametrize(("lend", "widest"), [(Lend.AUTO, ALL), (Lend.NEVER, None)], ids=["auto", "never"])
def test_the_server_says_whether_cores_are_lent(
    start: Start,
    state: Path,
    lend: Lend,
    widest: list[int] | None,
) -> None:
    register(state, lend)
    first, _ = pair(start)
    masks = []
    for _ in range(5):
        masks.append(first.follow("begin")["mask"])
        first.follow("end")
    assert masks[-1] == (widest or first.follow()["cpus"])


def test_a_child_that_is_forked_meanwhile_stays_on_the_slice(start: Start) -> None:
    first, _ = pair(start)
    begin_wide(first)
    facts = first.follow("fork")
    assert facts["child_mask"] == facts["cpus"]


def test_a_deleted_state_directory_ends_no_lending(start: Start, state: Path) -> None:
    first, second = pair(start)
    begin_wide(first)
    for file in state.iterdir():
        file.unlink()
    first.follow("end")
    assert eventually(lambda: len(Ledger(str(state)).read().leases) == 2)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        begin_wide(first)
        second_mask = second.follow("begin")
        first.follow("end")
        second.follow("end")
        if second_mask["mask"] == second_mask["cpus"]:
            return
    pytest.fail("both computed on one core")


def test_all_threads_follow_a_slice_that_grows_during_a_request(start: Start) -> None:
    first = start(worker="9000")
    first.facts()
    second = start(worker="9001")
    half = second.facts()["cpus"]
    assert eventually(lambda: set(first.follow()["cpus"]).isdisjoint(half))
    first.follow("begin")
    second.kill()
    assert eventually(lambda: first.follow("fork")["cpus"] == ALL)
    first.follow("end")
    assert first.masks() == {frozenset(ALL)}


STARTS = """
from ts_plugin.leases import claim
from ts_plugin.leases.claim import Archive
from ts_plugin.leases.ledger import Ledger
from ts_plugin.worker import follower
follower.attach(claim.claim(Ledger(), archive=Archive("m", "1.0"), worker="9000"))
print("attached", flush=True)
input()
"""


def test_a_worker_holds_its_slice_while_it_imports(state: Path) -> None:
    environment = {**os.environ, "TS_CORES_STATE_DIR": str(state), "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(
        [sys.executable, "-c", STARTS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        assert any(line == "attached\n" for line in worker.stdout)
        (board,) = state.glob("board-*")
        held = watch.locks(board)[worker.pid]
        worker.communicate("\n")
    assert held.use == held.right == frozenset(ALL)
