"""Why a worker has its cores: the reasons, for the cases that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.leases import lease_of
from tests.machines import machine
from ts_plugin.ledger.model import Lease, State
from ts_plugin.lending.words import Status
from ts_plugin.machine.topology import Topology
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.planning.policy import Lend, Policy
from ts_plugin.view.explain import explain, find


def leases(topology: Topology, *demands: Demand) -> tuple[Lease, ...]:
    slices = plan(topology, demands).slices
    return tuple(
        lease_of(
            piece, 10 + n, model="ab"[n % 2], version=f"{n}.0", worker_id=str(9000 + n), server_pid=1, demand=demand
        )
        for n, (demand, piece) in enumerate(zip(demands, slices, strict=True))
    )


def reasons(topology: Topology, *demands: Demand) -> str:
    held = leases(topology, *demands)
    return "\n".join(f"{head}: {text}" for head, text in explain(held[0], State(leases=held), topology))


EIGHT = machine(packages=2, cores=4, smt=2)
ALL = Demand(EIGHT.online)


@pytest.mark.parametrize(
    ("demands", "words"),
    [
        pytest.param([ALL], "no other worker is alive", id="alone"),
        pytest.param([ALL, ALL], "its share of 8 cores is 4", id="halves"),
        pytest.param([ALL, ALL, ALL], "it has 4, because ", id="larger than its share"),
        pytest.param([ALL, ALL], "inside one NUMA node and one L3 domain", id="local"),
        pytest.param([ALL], "it spans 2 NUMA nodes", id="spans"),
        pytest.param([ALL], "SMT siblings 8-15 stay free", id="siblings"),
        pytest.param([ALL, ALL, ALL], "shared with 2 other workers: a 2.0, b 1.0", id="company"),
        pytest.param([replace(ALL, cores=3), ALL], "3 cores asked for", id="fixed"),
        pytest.param([replace(ALL, share=3.0), ALL], "is 6 (cpu: share 3 of 4)", id="share"),
        pytest.param([ALL] * 9, "more workers than cores", id="crowd"),
        pytest.param([replace(ALL, policy=Policy(reserve_cores=1))], "all but 1 core", id="reserved"),
        pytest.param([replace(ALL, policy=Policy(node_ids=frozenset({1})))], "only NUMA nodes 1", id="node"),
        pytest.param([replace(ALL, policy=Policy(core_list=frozenset({1, 2})))], "only CPUs 1-2", id="list"),
        pytest.param([replace(ALL, policy=Policy(logical=True))], "on both SMT siblings", id="logical"),
        pytest.param([replace(ALL, quota=2.0)], "not pinned: a CFS quota", id="quota"),
        pytest.param([replace(ALL, cores=0), ALL], "a function of a workflow owns no core", id="function"),
        pytest.param([ALL, replace(ALL, cores=0)], "no other worker is alive", id="beside a function"),
        pytest.param([ALL, ALL, replace(ALL, cores=0)], "its share of 8 cores is 4", id="halves beside a function"),
    ],
)
def test_reasons(demands: list[Demand], words: str) -> None:
    assert words in reasons(EIGHT, *demands)


def test_equal_is_not_advised_where_it_is_on() -> None:
    equal = replace(ALL, policy=Policy(equal=True))
    held = tuple(replace(lease, demand=equal) for lease in leases(EIGHT, ALL, ALL, ALL))
    said = "\n".join(text for _, text in explain(held[0], State(leases=held), EIGHT))
    assert "it has 4, because" in said
    assert "--equal changes that" not in said


NODE = machine(cores=4)
TWO = [Demand(NODE.online, Policy(lend=Lend.AUTO))] * 2
STATUS = Status(50, 20, 2.5, 3, 4, 0.001, 0.0007, 1, {2: 0.1, 4: 0.055})


def widths(status: Status | None, demands: list[Demand] = TWO) -> dict[str, str]:
    """Return what is said of the first worker's width, by heading, after it has told ``status``."""
    held = leases(NODE, *demands)
    rows = explain(held[0], State(leases=held), NODE, status)
    return {head: text for head, text in rows if head in ("width", "service time", "so far", "waits", "lately")}


def test_what_lending_has_done() -> None:
    assert widths(STATUS) == {
        "width": "its slice and idle ones of 1 other worker (b), which get theirs back inside the request when they "
        "want it",
        "service time": "100.0 ms on 2 cores, 55.0 ms on 4 cores",
        "so far": "20 of 50 requests computed wide (40%), 1.82 x as fast as on its slice; 2.5 core-seconds on borrowed "
        "cores; 3 of them gave cores back before they ended",
        "waits": "4 requests had to take its slice back, in 0.2 ms on average, 0.7 ms at most; 1 time by force",
    }


def test_nothing_served_yet() -> None:
    assert set(widths(Status(why="no reason"))) == {"width", "lately"}


@pytest.mark.parametrize(
    ("status", "demands", "words"),
    [
        pytest.param(STATUS, [replace(TWO[0], policy=Policy(lend=Lend.NEVER))] * 2, "lending is off", id="never"),
        pytest.param(STATUS, TWO[:1], "there is no worker to lend to", id="alone"),
        pytest.param(STATUS, TWO[:1] * 9, "workers that share cores may compute at the same time", id="crowd"),
        pytest.param(replace(STATUS, keeps=True, why="its requests overlap"), TWO, "its requests overlap", id="keeps"),
        pytest.param(None, TWO, "it has not joined 1 other worker (b)", id="no status"),
    ],
)
def test_why_a_worker_computes_on_its_slice_alone(status: Status | None, demands: list[Demand], words: str) -> None:
    said = widths(status, demands)
    assert words in said.pop("width")
    assert said == {}


def test_moves_and_notes() -> None:
    (lease,) = leases(EIGHT, ALL)
    lease = replace(lease, moves=2, notes=("no such option",))
    rows = explain(lease, State(leases=(lease,), notes=("the planner's",)), EIGHT)
    texts = [text for _, text in rows]
    assert "it had to change its NUMA node 2 times since it started" in texts
    assert texts[-2:] == ["no such option", "the planner's"]
    assert [head for head, _ in rows][-2:] == ["note", "note"]


def test_hybrids() -> None:
    topology = machine(cores=6, slow=4)
    everybody = Demand(topology.online)
    assert "only the fastest core type" in reasons(topology, everybody)
    slow = leases(machine(cores=6, slow=4), everybody, everybody)[1]
    rows = explain(slow, State(leases=(slow,)), topology)
    assert "only one core type, not the fastest" in "\n".join(text for _, text in rows)


@pytest.mark.parametrize(
    ("who", "pids"), [("a", [10, 12]), ("a:2.0", [12]), ("11", [11]), ("c", []), ("a:9", []), ("", [])]
)
def test_find(who: str, pids: list[int]) -> None:
    assert [lease.pid for lease in find(State(leases=leases(EIGHT, ALL, ALL, ALL)), who)] == pids
