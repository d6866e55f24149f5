"""The value behind every picture."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.leases import lease_of, slice_of
from tests.machines import machine
from ts_plugin.ledger.model import Lease, State
from ts_plugin.ledger.unbound import Unbound
from ts_plugin.machine import cpu_time
from ts_plugin.machine.topology import Topology
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.view import view
from ts_plugin.view.view import Use, View, tag


def lease(pid: int, cpus: tuple[int, ...], *, server_pid: int = 1, pinned: bool = True) -> Lease:
    names = {"model": "resnet18", "worker_id": str(9000 + pid)}
    demand = Demand(frozenset(range(8)))
    return lease_of(slice_of(cpus, pinned=pinned), pid, start_time=1, server_pid=server_pid, demand=demand, **names)


def uses(picture: View) -> list[str]:
    return [picture.use(core).value for core in picture.topology.cores]


@pytest.mark.parametrize(
    ("index", "expected"),
    [(0, "A"), (25, "Z"), (26, "AA"), (51, "AZ"), (52, "BA"), (701, "ZZ"), (702, "AAA")],
)
def test_tag(index: int, expected: str) -> None:
    assert tag(index) == expected


def test_every_use_of_a_core() -> None:
    state = State(leases=(lease(1, (0, 1)), lease(2, (2,), server_pid=7)), reserved=frozenset({3}))
    picture = view.of_state(state, machine(cores=10), frozenset(range(8)), server_pid=1)
    expected = ["owned", "owned", "elsewhere", "reserved", *["idle"] * 4, "barred", "barred"]
    assert uses(picture) == expected
    assert picture.idle() == {4, 5, 6, 7}
    assert picture.summary() == ("1 worker on 2 of 10 cores · 1 another server's · 4 idle · 1 reserved · 2 not allowed")


def test_threads_only_workers_own_no_core() -> None:
    state = State(leases=(lease(1, (0, 1, 2, 3), pinned=False),))
    picture = view.of_state(state, machine(cores=4), frozenset(range(4)))
    assert uses(picture) == ["shared"] * 4
    assert picture.idle() == frozenset()


def test_a_core_of_several_workers() -> None:
    state = State(leases=(lease(1, (0,)), lease(2, (0,)), lease(3, (1,))))
    picture = view.of_state(state, machine(cores=2), frozenset(range(2)))
    assert [picture.owners(core) for core in picture.topology.cores] == [(0, 1), (2,)]


def test_a_sibling_outside_the_slice_belongs_to_the_core() -> None:
    picture = view.of_state(State(leases=(lease(1, (0,)),)), machine(cores=2, smt=2), frozenset(range(4)))
    assert picture.use(picture.topology.cores[0]) is Use.OWNED
    assert [picture.in_slice(cpu) for cpu in picture.topology.cores[0].cpus] == [True, False]


def test_unbound_workers_of_one_server() -> None:
    unbound = [Unbound(5, "why", 1), Unbound(6, "why not", 2)]
    picture = view.of_state(State(), machine(), frozenset(range(4)), unbound, server_pid=2)
    assert picture.unbound == ((6, "why not"),)


def test_workers_of_others_are_counted_and_not_judged() -> None:
    unbound = [Unbound(5, "why", 1), Unbound(6, "", 2, "user 7"), Unbound(8, "", 3, "user 7")]
    picture = view.of_state(State(notes=("first",)), machine(), frozenset(range(4)), unbound)
    assert picture.unbound == ((5, "why"),)
    assert picture.notes == ("first", "not judged here: 2 workers of user 7 (pid 6, 8)")
    assert "1 unbound" in picture.summary()


@pytest.mark.parametrize(
    ("topology", "labels"),
    [
        pytest.param(machine(), ["package 0 · NUMA node 0 · 64 GiB"], id="one of each"),
        pytest.param(
            machine(packages=2),
            ["package 0 · NUMA node 0 · 64 GiB", "package 1 · NUMA node 1 · 64 GiB"],
            id="a node per package",
        ),
        pytest.param(
            machine(nodes=2, l3=2, cores=2),
            ["package 0", "NUMA node 0 · 64 GiB", "L3 0", "L3 1", "NUMA node 1 · 64 GiB", "L3 2", "L3 3"],
            id="all levels",
        ),
        pytest.param(machine(l3=4, cores=1), ["package 0 · NUMA node 0 · 64 GiB"], id="an L3 per core tells nothing"),
    ],
)
def test_levels_that_tell_nothing_are_left_out(topology: Topology, labels: list[str]) -> None:
    def walk(groups: tuple[view.Group, ...]) -> list[str]:
        return [label for group in groups for label in (group.label, *walk(group.groups))]

    picture = View(topology, (), topology.online)
    assert walk(picture.packages()) == labels


def test_every_core_appears_once() -> None:
    topology = machine(packages=2, nodes=2, l3=3, cores=5, smt=2)

    def cores(groups: tuple[view.Group, ...]) -> list[int]:
        return [n for group in groups for n in (*(core.number for core in group.cores), *cores(group.groups))]

    assert sorted(cores(View(topology, (), topology.online).packages())) == [core.number for core in topology.cores]


PAIR = frozenset({0, 1, 2, 3})


def lending(pid: int, *cpus: int, server_pid: int = 1) -> Lease:
    known = lease(pid, cpus, server_pid=server_pid)
    return replace(known, slice=replace(known.slice, reach=PAIR))


@pytest.mark.parametrize(
    ("users", "borrowers", "first", "second"),
    [
        pytest.param(None, [None] * 4, None, None, id="no board"),
        pytest.param({}, [None] * 4, ((), ()), ((), ()), id="all idle"),
        pytest.param({0: 11, 1: 11}, [None] * 4, ((0, 1), ()), ((), ()), id="on its own slice"),
        pytest.param({0: 11, 1: 11, 2: 11, 3: 11}, [None, None, 0, 0], ((0, 1), (2, 3)), ((), ()), id="on both"),
        pytest.param(
            {0: 12, 2: 12, 3: 12}, [1, None, None, None], ((), ()), ((2, 3), (0,)), id="on a part of another's"
        ),
        pytest.param({0: 99}, [Use.ELSEWHERE, None, None, None], ((), ()), ((), ()), id="one that is not shown"),
    ],
)
def test_borrowed_cores(users: dict[int, int] | None, borrowers: list[object], first: object, second: object) -> None:
    picture = view.of_state(State(leases=(lending(11, 0, 1), lending(12, 2, 3))), machine(cores=4), PAIR)
    picture = replace(picture, users=users)
    assert [picture.borrower(core) for core in picture.topology.cores] == borrowers
    assert [picture.computes_on(0), picture.computes_on(1)] == [first, second]
    taken = 4 - borrowers.count(None)
    assert (f"{taken} borrowed" in picture.summary()) == (taken > 0)
    assert uses(picture) == ["owned"] * 4, "whose they are does not change"


def test_cores_that_the_server_of_the_picture_borrows_elsewhere() -> None:
    state = State(leases=(lending(11, 0, 1), lending(12, 2, 3, server_pid=2)))
    picture = replace(view.of_state(state, machine(cores=4), PAIR, server_pid=1), users={2: 11, 3: 12})
    assert [picture.borrower(core) for core in picture.topology.cores] == [None, None, 0, None]


def test_a_worker_that_does_not_lend_says_nothing() -> None:
    picture = replace(view.of_state(State(leases=(lease(11, (0, 1)),)), machine(cores=4), PAIR), users={})
    assert picture.computes_on(0) is None


def test_plan_as_a_picture() -> None:
    topology = machine(cores=4)
    result = plan(topology, [Demand(topology.online)] * 2)
    picture = view.of_plan(topology, result, topology.online, ("a note",))
    assert [worker.name for worker in picture.workers] == ["worker 0", "worker 1"]
    assert picture.notes == ("a note",)
    assert picture.idle() == frozenset()


def test_ticks(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(
        "cpu  30 0 10 100 0 0 0 0 0 0\ncpu0 10 1 5 50 2 1 1 3 0 0\ncpu7 20 0 5 50 0 0 0 0\nintr 1 2 3\n"
    )
    assert cpu_time.ticks(str(tmp_path)) == {0: (21, 73), 7: (25, 75)}


def test_look_at_this_machine() -> None:
    picture = view.current_view()
    assert picture.topology.online >= frozenset(os.sched_getaffinity(0))
    assert picture.workers == ()
