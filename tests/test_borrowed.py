"""What a reader knows of lending: from real processes that hold locks, and from what they publish."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.machines import machine
from ts_plugin.leases.board import Board, Entry, Records, Totals
from ts_plugin.leases.ledger import Lease, Ledger, State
from ts_plugin.machine import process
from ts_plugin.operate.core_map import core_map
from ts_plugin.operate.lending import computing, entries, learned, learned_document
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.planning.policy import Lend, Policy
from ts_plugin.planning.width import Measured, Record

NOTHING = Totals()
FOUR = machine(cores=4)
COMPUTE = """
import json, sys
from ts_plugin.leases.board import Board
from ts_plugin.leases.ledger import Ledger
board = Board(*Ledger(sys.argv[1]).beside("board"))
print(json.dumps(board.take(json.loads(sys.argv[2]), patience=0)), flush=True)
sys.stdin.read()
"""


def worker(state: Path, *cpus: int) -> subprocess.Popen[str]:
    """Start a process that computes on ``cpus``, as far as the board knows, until its input ends."""
    command = [sys.executable, "-c", COMPUTE, str(state), json.dumps(cpus)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "true\n"
    return started


def leases(*pids: int, policy: Policy = Policy(lend=Lend.AUTO)) -> tuple[Lease, ...]:
    demand = Demand(FOUR.online, policy)
    slices = plan(FOUR, [demand] * len(pids)).slices
    return tuple(
        Lease(pid, 1, "resnet18", "1.0", str(9000 + n), 1, demand, piece)
        for n, (pid, piece) in enumerate(zip(pids, slices, strict=True))
    )


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[tuple[Ledger, State, list[subprocess.Popen[str]]]]:
    """Two workers: the first computes on its own slice and on a CPU of the second, which is idle."""
    state = tmp_path / "state"
    workers = [worker(state, 0, 1, 2), worker(state)]
    yield Ledger(str(state)), State(leases=leases(*(one.pid for one in workers))), workers
    for one in workers:
        one.communicate()


def test_who_computes_where_is_read_from_the_locks_of_real_processes(
    wide: tuple[Ledger, State, list[subprocess.Popen[str]]],
) -> None:
    ledger, state, workers = wide
    first, second = state.leases
    assert [first.slice.cpus, second.slice.cpus] == [(0, 1), (2, 3)]
    users = computing(ledger, state)
    assert users == dict.fromkeys([0, 1, 2], first.pid)
    one, other = core_map(state, users)["slices"]
    assert (one["computes_on"], one["lent_cpus"]) == ([0, 1, 2], [])
    assert (other["computes_on"], other["lent_cpus"]) == ([], [2])
    workers[0].kill()
    workers[0].wait()
    assert computing(ledger, state) == {}


def test_a_reader_makes_nothing_and_knows_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    ledger, state = Ledger(str(tmp_path / "state")), State(leases=leases(7, 8))
    assert computing(ledger, state) is None
    assert entries(ledger) == {}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "state").mkdir(mode=0o700)
    assert computing(ledger, state) is None
    assert entries(ledger) == {}
    assert list((tmp_path / "state").iterdir()) == []
    for piece in core_map(state, computing(ledger, state))["slices"]:
        assert (piece["computes_on"], piece["lent_cpus"]) == (None, None)


def test_nothing_is_known_of_workers_that_do_not_lend(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "state"))
    Board(*ledger.beside("board")).close()
    state = State(leases=leases(7, 8, policy=Policy(lend=Lend.NEVER)))
    users = computing(ledger, state)
    assert users == {}
    assert [piece["computes_on"] for piece in core_map(state, users)["slices"]] == [None, None]


def publish(ledger: Ledger, lease: Lease, slot: int, record: Record, totals: Totals = NOTHING) -> None:
    Records(*ledger.beside("records")).write(slot, Entry(lease.identity, record, totals))


BUSY = Record(5, 2, 4, (Measured(2, 0.1, 20.0), Measured(4, 0.055, 9.0)), 1.0, 2.0, 1000.0, 900.0, 1000.05)


def test_what_a_worker_has_published(tmp_path: Path) -> None:
    ledger, held = Ledger(str(tmp_path / "state")), leases(7, 8)
    state = State(leases=held)
    publish(ledger, held[0], 3, BUSY)
    assert entries(ledger) == {}, "slots are taken from the first on"
    publish(ledger, held[0], 0, BUSY, Totals(9, 4, 0.5, 0.25))
    publish(ledger, held[1], 1, replace(BUSY, rate=0.0, measured=()))
    found = learned(held[0], state, entries(ledger), 1000.1)
    document = learned_document(found)
    assert document is not None
    json.dumps(document, allow_nan=False)
    assert [one["cores"] for one in document["estimates"]] == [2, 4]
    assert document["measured"][0] == {"cores": 2, "seconds": 0.1, "requests": 20.0}
    assert (document["cap"], document["next_cap"]) == (4, 4)
    assert 0 < document["rate"] < 2
    assert (document["requests"], document["wide_requests"]) == (9, 4)
    assert (document["borrowed_core_seconds"], document["waited_seconds"]) == (0.5, 0.25)


def test_an_endless_response_is_null(tmp_path: Path) -> None:
    ledger, held = Ledger(str(tmp_path / "state")), leases(7, 8)
    for slot, lease in enumerate(held):
        publish(ledger, lease, slot, replace(BUSY, rate=1000.0, seen=50.0))
    document = learned_document(learned(held[0], State(leases=held), entries(ledger), 1000.1))
    assert document is not None
    json.dumps(document, allow_nan=False)
    assert {one["response"] for one in document["estimates"]} == {None}


def test_a_worker_that_keeps_its_slice_or_has_published_nothing(tmp_path: Path) -> None:
    ledger, held = Ledger(str(tmp_path / "state")), leases(7, 8)
    state = State(leases=held)
    assert learned(held[0], state, entries(ledger), 0.0) is None
    publish(ledger, held[0], 0, replace(BUSY, cores=0))
    publish(ledger, held[1], 1, BUSY)
    kept = learned(held[0], state, entries(ledger), 1000.1)
    assert kept is not None
    assert kept.decision is None
    document = learned_document(kept)
    assert document is not None
    assert (document["cap"], document["estimates"]) == (None, [])
    beside = learned(held[1], state, entries(ledger), 1000.1)
    assert beside is not None
    assert beside.decision is not None
    assert beside.decision.cores == 2, "a slice that is kept is no part of the domain"


def test_the_record_of_a_process_that_has_ended_is_not_another_ones(tmp_path: Path) -> None:
    ledger, (first, second) = Ledger(str(tmp_path / "state")), leases(7, 8)
    publish(ledger, first, 0, BUSY)
    reborn = replace(first, start_time=first.start_time + 1)
    assert learned(reborn, State(leases=(reborn, second)), entries(ledger), 1000.1) is None
    assert process.Identity(7, 1) in entries(ledger)
