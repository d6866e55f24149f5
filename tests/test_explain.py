"""Why a worker has its cores: the reasons, for the cases that differ."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.machines import machine
from ts_plugin.leases.board import Entry, Totals
from ts_plugin.leases.ledger import Lease, State
from ts_plugin.machine.topology import Topology
from ts_plugin.operate.explain import explain, find
from ts_plugin.operate.lending import learned
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.planning.policy import Lend, Policy
from ts_plugin.planning.width import Measured, Record, new_record


def leases(topology: Topology, *demands: Demand) -> tuple[Lease, ...]:
    slices = plan(topology, demands).slices
    return tuple(
        Lease(10 + n, 1, "ab"[n % 2], f"{n}.0", str(9000 + n), 1, demand, piece)
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
MEASURED = (Measured(2, 0.1, 20.0), Measured(4, 0.055, 9.0))
RECORD = Record(5, 2, 4, MEASURED, 1.0, 2.0, 1000.0, 900.0, 1000.05)


def widths(record: Record | None, *, demands: list[Demand] = TWO, other: Record = RECORD) -> dict[str, str]:
    """Return what is said of the first worker's width, by heading; ``other`` is the second one's record."""
    held = leases(NODE, *demands)
    state = State(leases=held)
    published = {lease.identity: Entry(lease.identity, other, Totals(50, 20, 2.5, 0.3)) for lease in held}
    if record is None:
        del published[held[0].identity]
    else:
        published[held[0].identity] = Entry(held[0].identity, record, Totals(50, 20, 2.5, 0.3))
    rows = explain(held[0], state, NODE, learned(held[0], state, published, 1000.1))
    return {head: text for head, text in rows if head in ("width", "load", "service time", "expected", "cap", "so far")}


def test_widths_that_were_measured() -> None:
    said = widths(RECORD)
    assert said["width"] == (
        "its slice, and for the length of a request idle slices of 1 other worker (b), which borrow its own likewise"
    )
    times = r"100\.0 ms on 2 cores \(40 requests\), 5\d\.\d ms on 4 cores \(18 requests\)"
    assert re.fullmatch(times, said["service time"])
    assert said["load"].endswith("2 requests at once lately")
    assert re.match(r"\d\.\d requests/s for its model; all models of these slices take \d+%", said["load"])
    assert re.match(r"from arrival to answer: \d+\.\d ms on 2, \d+\.\d ms on 4", said["expected"])
    assert said["cap"] == "at most 4 cores a request: its requests are answered soonest with that"
    assert said["so far"] == (
        "50 requests, 20 of them wide: 2.5 core-seconds on borrowed cores; 0.3 s of waiting for its own slice"
    )


@pytest.mark.parametrize(
    ("record", "why"),
    [
        pytest.param(
            replace(RECORD, width=2), "at most 2 cores a request: its next request would have 4", id="changes"
        ),
        pytest.param(
            replace(RECORD, rate=40.0, width=2),
            "at most 2 cores a request: no worker borrows from a load of 85%",
            id="full",
        ),
    ],
)
def test_why_the_present_cap(record: Record, why: str) -> None:
    assert widths(record)["cap"].startswith(why)


def test_a_width_that_does_not_pay() -> None:
    slower = (Measured(2, 0.1, 20.0), Measured(4, 0.2, 20.0))
    said = widths(replace(RECORD, measured=slower, width=2), other=replace(RECORD, measured=slower, width=2))
    assert said["cap"] == "at most 2 cores a request: its requests are answered soonest with that"


def test_a_width_that_is_only_guessed() -> None:
    known = replace(RECORD, measured=MEASURED[:1])
    assert re.search(r", \d+\.\d ms on 4 cores \(guessed\)$", widths(known, other=known)["service time"])


def test_whoever_runs_long_does_not_borrow_from_whoever_runs_short() -> None:
    short = replace(RECORD, model=6, measured=(Measured(2, 0.01, 20.0),), rate=5.0)
    said = widths(replace(RECORD, width=2), other=short)
    assert said["cap"].startswith("at most 2 cores a request: its requests take so long that those of the others")
    assert "55.0 ms on 4 cores (9 requests)" in said["service time"], "it was measured all the same"


def test_nothing_served_yet() -> None:
    fresh = new_record(5, 2, 1000.0)
    said = widths(fresh, other=fresh)
    assert said["cap"] == "at most 2 cores a request: it borrows when it knows how long its requests take on its slice"
    assert "service time" not in said
    assert "expected" not in said


@pytest.mark.parametrize(
    ("record", "demands", "words"),
    [
        pytest.param(RECORD, [replace(TWO[0], policy=Policy(lend=Lend.NEVER))] * 2, "lending is off", id="never"),
        pytest.param(RECORD, TWO[:1], "there is no worker to lend to", id="alone"),
        pytest.param(RECORD, TWO[:1] * 9, "workers that share cores may compute at the same time", id="crowd"),
        pytest.param(
            replace(RECORD, cores=0), TWO, "(asyncCommunication, torchrun, MicroBatching), or a GPU", id="keeps"
        ),
        pytest.param(None, TWO, "it has not joined 1 other worker (b)", id="no record"),
    ],
)
def test_why_a_worker_computes_on_its_slice_alone(record: Record | None, demands: list[Demand], words: str) -> None:
    said = widths(record, demands=demands)
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
