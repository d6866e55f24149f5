"""Who gets which cores: tables of machines and wishes, moves, properties, and every captured machine."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import machines
from tests.machines import machine
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.machine.topology import Core, NumaNode, Topology
from ts_plugin.planning.core_groups import PlanError
from ts_plugin.planning.planner import Demand, Plan, plan
from ts_plugin.planning.policy import Lend, Pin, Policy

Group = tuple[int, int, int, int, int]  # kind, NUMA node, package, L3 domain, cores


def grouped(*groups: Group, smt: int = 1, isolated: Iterable[int] = ()) -> Topology:
    """A machine of groups of cores, in their order; siblings are numbered next to each other."""
    cores: list[Core] = []
    for kind, node, package, l3, count in groups:
        for _ in range(count):
            first = len(cores) * smt
            cores.append(Core(tuple(range(first, first + smt)), package, node, l3, kind))
    nodes = sorted({core.node for core in cores})
    cpus = {node: frozenset(cpu for core in cores if core.node == node for cpu in core.cpus) for node in nodes}
    return Topology(tuple(cores), tuple(NumaNode(n, cpus[n], None) for n in nodes), frozenset(isolated))


XEON = machine(packages=2, cores=28, smt=2)  # CPUs 0-27,56-83 in node 0, 28-55,84-111 in node 1
EPYC = machine(packages=2, l3=4, cores=4)
SMALL = machine(cores=4)
CHIPLETS = machine(l3=8, cores=2)
PRIVATE = machine(l3=16, cores=1)
NODES = machine(nodes=8, cores=3)
VM = grouped((0, 0, 0, 0, 4), smt=2)  # siblings 0-1, 2-3, 4-5, 6-7
HYBRID = machine(cores=12, slow=8)
WEAK = replace(HYBRID, cores=tuple(replace(core, capacity=[1.0, 0.2][core.kind]) for core in HYBRID.cores))
PHONE = grouped((0, 0, 0, 0, 1), (1, 0, 0, 0, 3), (2, 0, 0, 0, 4))
SNC = grouped((0, 0, 0, 0, 8), (0, 1, 0, 0, 8), (0, 2, 1, 1, 8), (0, 3, 1, 1, 8))  # L3 domains span two nodes each
SHREDS = grouped((0, 0, 0, 0, 1), (0, 1, 0, 1, 4), (0, 2, 0, 2, 2))
LAMED = grouped((0, 0, 0, 0, 10), (0, 1, 1, 1, 2))  # a cpuset that leaves little of node 1


def wants(topology: Topology, workers: int = 1, *, cpus: str = "", **policy: Any) -> list[Demand]:
    allowed = parse_cpulist(cpus) if cpus else topology.online
    return [Demand(allowed, Policy(**policy))] * workers


def cpus(text: str) -> frozenset[int]:
    return parse_cpulist(text)


def drawn(result: Plan) -> str:
    """Slices as CPU lists, one word each."""
    return " ".join(format_cpulist(piece.cpus) for piece in result.slices)


TABLE = [
    # Dividing everything
    pytest.param(XEON, wants(XEON), "0-55", id="one worker: all cores, one CPU each"),
    pytest.param(XEON, wants(XEON, 2), "0-27 28-55", id="two workers: a node each"),
    pytest.param(XEON, wants(XEON, 3), "0-27 28-41 42-55", id="three workers: unequal rather than straddling"),
    pytest.param(XEON, wants(XEON, 3, equal=True), "0-18 19-37 38-55", id="... unless equal sizes are asked for"),
    pytest.param(PRIVATE, wants(PRIVATE, 10), "0-1 2-3 4-5 6-7 8-9 10-11 12 13 14 15", id="an L3 per core is none"),
    pytest.param(EPYC, wants(EPYC, 3), "0-15 16-23 24-31", id="L3 domains stay whole"),
    pytest.param(EPYC, wants(EPYC, 6), "0-7 8-15 16-19 20-23 24-27 28-31", id="no L3 domain is cut in vain"),
    pytest.param(SNC, wants(SNC, 2), "0-15 16-31", id="joined nodes share a package"),
    pytest.param(SNC, wants(SNC, 3), "0-15 16-23 24-31", id="one pair of nodes joined, in one package"),
    pytest.param(LAMED, wants(LAMED, 2), "0-5 6-11", id="a node too small for a worker goes to a neighbour"),
    pytest.param(LAMED, wants(LAMED, 3), "0-4 5-9 10-11", id="half of the equal share is enough to stand alone"),
    pytest.param(VM, wants(VM, 2), "0,2 4,6", id="adjacent siblings: still one CPU per core"),
    pytest.param(VM, wants(VM, 2, cpus="1,3-5,7"), "1,3 4,7", id="one allowed sibling is still a core"),
    pytest.param(VM, wants(VM, 2, logical=True), "0-3 4-7", id="logical: both siblings"),
    pytest.param(VM, wants(VM, 2, cpus="0-2,4-7", logical=True), "0-2 4-7", id="logical: allowed siblings"),
    # Narrowing
    pytest.param(XEON, wants(XEON, 2, node_ids=frozenset({1})), "28-41 42-55", id="node id"),
    pytest.param(XEON, wants(XEON, 2, core_list=cpus("4-7,56")), "4-5,56 6-7", id="core list: 56 stands for core 0"),
    pytest.param(XEON, wants(XEON, 1, cpus="20-35"), "20-35", id="only allowed CPUs"),
    pytest.param(grouped((0, 0, 0, 0, 4), isolated=[1]), [Demand(cpus("0-3"))], "0,2-3", id="isolated CPUs stay idle"),
    pytest.param(
        grouped((0, 0, 0, 0, 4), isolated=[1]), [Demand(cpus("0-3"), Policy(core_list=cpus("0-1")))], "0-1",
        id="... unless a core list names them",
    ),
    pytest.param(grouped((0, 0, 0, 0, 4), isolated=[1]), [Demand(cpus("1"))], "1", id="... or there is nothing else"),
    pytest.param(XEON, wants(XEON, 2, reserve_cores=2), "2-27 28-55", id="reserved cores are compact"),
    pytest.param(LAMED, wants(LAMED, 1, reserve_cores=2), "2-11", id="... and leave nodes as equal as they can"),
    pytest.param(EPYC, wants(EPYC, 1, reserve_cores=18), "18-31", id="a large reserve takes a whole node first"),
    # Core types
    pytest.param(HYBRID, wants(HYBRID, 1), "0-3", id="hybrid: fast cores only"),
    pytest.param(HYBRID, wants(HYBRID, 2), "0-3 4-11", id="... until whole slices of slow ones have more capacity"),
    pytest.param(HYBRID, wants(HYBRID, 3), "0-3 4-7 8-11", id="... than a further slice of the fast ones"),
    pytest.param(HYBRID, wants(HYBRID, 6), "0-1 2 3 4-6 7-9 10-11", id="... or fast cores would have to be shared"),
    pytest.param(HYBRID, wants(HYBRID, 2, equal=True), "0-1 2-3", id="hybrid: equal sizes on equal cores"),
    pytest.param(HYBRID, wants(HYBRID, 5, equal=True), "0-1 2-3 4-6 7-9 10-11", id="... as long as there are enough"),
    pytest.param(
        HYBRID, [replace(wants(HYBRID)[0], cores=1), *wants(HYBRID, 2)], "0 1-3 4-11", id="hybrid: a fixed size"
    ),
    pytest.param(
        HYBRID, [replace(wants(HYBRID)[0], cores=10), *wants(HYBRID)], "0-1,4-11 2-3",
        id="hybrid: a fixed size for which no type has enough",
    ),
    pytest.param(
        HYBRID, [replace(wants(HYBRID)[0], share=2), *wants(HYBRID, 2)], "0-3 4-7 8-11", id="hybrid: weights"
    ),
    pytest.param(HYBRID, wants(HYBRID, 4, reserve_cores=1), "1-2 3 4-7 8-11", id="hybrid: a reserve"),
    pytest.param(
        machine(cores=9, slow=1), wants(machine(cores=9, slow=1), 8, reserve_cores=1), "0 1 2 3 4 5 6 7",
        id="hybrid: a slow core makes up for a reserved one",
    ),
    pytest.param(WEAK, wants(WEAK, 2), "0-1 2-3", id="hybrid: slow cores that the kernel calls weak"),
    pytest.param(HYBRID, wants(HYBRID, 1, use_e_cores=True), "0-11", id="e-cores: one worker has them all"),
    pytest.param(HYBRID, wants(HYBRID, 3, use_e_cores=True), "0-3 4-7 8-11", id="e-cores: no slice mixes types"),
    pytest.param(HYBRID, wants(HYBRID, 2, cpus="6-9"), "6-7 8-9", id="only slow cores allowed"),
    pytest.param(HYBRID, wants(HYBRID, 2, core_list=cpus("2-5")), "2-3 4-5", id="slow cores of a core list"),
    pytest.param(PHONE, wants(PHONE, 1), "1-3", id="three types: the one with the most capacity"),
    pytest.param(PHONE, wants(PHONE, 2), "0 1-3", id="... then the fastest"),
    # Fixed sizes
    pytest.param(XEON, wants(XEON, 3, cores_per_worker=(4,)), "0-3 4-7 8-11", id="cores per worker"),
    pytest.param(XEON, wants(XEON, 3, cores_per_worker=(18,)), "0-17 18-35 36-53", id="... across only in need"),
    pytest.param(XEON, wants(XEON, 2, cores_per_worker=(4, 20)), "0-3 4-23", id="... one number each"),
    pytest.param(VM, wants(VM, 2, cores_per_worker=(4,), logical=True), "0-3 4-7", id="logical: counts CPUs"),
    pytest.param(VM, wants(VM, 2, cores_per_worker=(3,), logical=True), "0-3 4-7", id="logical: whole cores"),
    pytest.param(XEON, wants(XEON, 2, latency=True), "0-3 4-7", id="latency mode: four cores each"),
    pytest.param(SMALL, wants(SMALL, 2, latency=True), "0-1 2-3", id="latency mode on a small machine"),
    pytest.param(XEON, [Demand(XEON.online, cores=8), *wants(XEON, 2)], "28-35 0-27 36-55", id="fixed sizes first"),
    pytest.param(
        SMALL, [Demand(SMALL.online, cores=3), *wants(SMALL, 2)], "0-1 2 3", id="fixed only if each gets a core"
    ),
    pytest.param(
        XEON, [*wants(XEON, 2), *[Demand(XEON.online, cores=8)] * 2], "0-19 28-47 20-27 48-55",
        id="fixed sizes where the others stay equal",
    ),
    pytest.param(
        XEON, [*wants(XEON, 2, equal=True), *[Demand(XEON.online, Policy(equal=True), cores=8)] * 2],
        "0-19 28-47 20-27 48-55", id="... and cross nothing with equal",
    ),
    pytest.param(
        XEON, [Demand(XEON.online, share=3), *wants(XEON, 4)], "0-27 28-34 35-41 42-48 49-55",
        id="one larger share, the others equal",
    ),
    pytest.param(SMALL, [Demand(SMALL.online, cores=3), *wants(SMALL)], "0-2 3", id="... but just that"),
    pytest.param(
        XEON, [Demand(XEON.online, share=2), *wants(XEON, 2)], "0-27 28-41 42-55", id="weights divide the cores"
    ),
    pytest.param(
        machine(cores=12), [replace(wants(SMALL)[0], allowed=cpus("0-11"), share=share) for share in (3, 2, 1)],
        "0-5 6-9 10-11", id="weights, in proportion",
    ),
    pytest.param(
        XEON, [replace(wants(XEON, equal=True)[0], share=share) for share in (3, 1, 1, 1, 1)],
        "0-23 24-31 32-39 40-47 48-55", id="weights, exact with equal",
    ),
    pytest.param(
        XEON, [replace(wants(XEON, equal=True)[0], share=share) for share in (3, 1, 1, 1)],
        "0-27 28-37 38-46 47-55", id="... within one core, where that crosses nothing",
    ),
    pytest.param(
        XEON, [replace(wants(XEON, skip_cross_node_cores=True)[0], share=share) for share in (3, 1, 1, 1, 1)],
        "0-27 28-34 35-41 42-48 49-55", id="skip: by weight",
    ),
    pytest.param(
        LAMED, [replace(wants(LAMED, skip_cross_node_cores=True, equal=True)[0], share=share) for share in (3, 1)],
        "0-7 8-9", id="skip and equal: by weight",
    ),
    # Never across a node
    pytest.param(XEON, wants(XEON, 1, skip_cross_node_cores=True), "0-27", id="skip: one node idles"),
    pytest.param(
        EPYC, [replace(wants(EPYC, skip_cross_node_cores=True)[0], share=share) for share in (1, 1, 2)],
        "0-7 8-15 16-31", id="skip: the largest slice to the largest share",
    ),
    pytest.param(EPYC, wants(EPYC, 5, skip_cross_node_cores=True), "0-7 8-15 16-23 24-27 28-31", id="skip: none idle"),
    pytest.param(
        LAMED, wants(LAMED, 3, skip_cross_node_cores=True, equal=True), "0-3 4-6 7-9", id="skip and equal: a rest idles"
    ),
    pytest.param(LAMED, wants(LAMED, 2, skip_cross_node_cores=True), "0-4 5-9", id="skip: too small a node idles"),
    # More workers than cores
    pytest.param(SMALL, wants(SMALL, 6), "0 1 2 3 0 1", id="more workers than cores share them"),
    pytest.param(VM, wants(VM, 9), "0 2 4 6 1 3 5 7 0", id="... by core first, then by SMT sibling"),
    pytest.param(
        VM, [*wants(VM, 7), replace(wants(VM)[0], held=cpus("7"))], "0 2 4 1 3 5 6 7", id="... and who has one keeps it"
    ),
    # Quota and pinning
    pytest.param(SMALL, [Demand(SMALL.online, quota=2.5)] * 2, "0-3 0-3", id="a quota below the cores: not pinned"),
    pytest.param(SMALL, [Demand(SMALL.online, quota=4)] * 2, "0-1 2-3", id="a quota of all the cores: pinned"),
    pytest.param(
        EPYC, [Demand(EPYC.online, Policy(pin=Pin.ALWAYS), quota=6.9)] * 3, "0-1 2-3 4-5", id="pin always: compact"
    ),
    pytest.param(
        HYBRID, [Demand(HYBRID.online, Policy(pin=Pin.ALWAYS), quota=4.5)] * 6, "0 1 2 3 4 5",
        id="pin always: no core is shared while others are idle",
    ),
    pytest.param(
        VM, [Demand(VM.online, Policy(pin=Pin.ALWAYS, logical=True), quota=4.0)] * 2, "0-1 2-3",
        id="pin always: a quota pays for threads, not for cores",
    ),
    pytest.param(SMALL, wants(SMALL, 2, pin=Pin.NEVER), "0-3 0-3", id="pin never"),
    # Several pools
    pytest.param(
        XEON, [*wants(XEON, 2), *wants(XEON, 1, cpus="0-7")], "8-27 28-55 0-7", id="a smaller cpuset is served first"
    ),
    pytest.param(
        SMALL, [*wants(SMALL, 1, cpus="0-2"), *wants(SMALL, 1, cpus="1-3")], "0-1 2-3", id="overlapping cpusets"
    ),
    pytest.param(
        SMALL, [*wants(SMALL, 3, cpus="0-2"), *wants(SMALL, 1, cpus="2-3")], "0 1 2 3", id="one core each first"
    ),
    pytest.param(
        XEON, [*wants(XEON, 1, node_ids=frozenset({0})), *wants(XEON, 1, node_ids=frozenset({1}))], "0-27 28-55",
        id="disjoint pools",
    ),
    pytest.param(
        SMALL, [*wants(SMALL, 2, cpus="0"), *wants(SMALL, 1, cpus="0-3")], "0 0 1-3", id="only one pool is crowded"
    ),
    pytest.param(
        SMALL, [*wants(SMALL, 1, cpus="0"), *wants(SMALL, 1, cpus="0", equal=True)], "0 0", id="a pool without a core"
    ),
    pytest.param(SMALL, [*wants(SMALL, cores_per_worker=(1,)), *wants(SMALL)], "0 1-3", id="fixed sizes and the rest"),
    pytest.param(SMALL, [], "", id="nobody"),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "demands", "expected"), TABLE)
def test_slices(topology: Topology, demands: list[Demand], expected: str) -> None:
    assert drawn(plan(topology, demands)) == expected


ERRORS = [
    pytest.param(
        grouped((0, 0, 0, 0, 12)), wants(machine(cores=12), 4, cores_per_worker=(4,)),
        "need 16 cores (4 workers x 4) but 12 are allowed (0-11); lower --ncores-per-instance to 3", id="not enough",
    ),
    pytest.param(
        SMALL, wants(SMALL, 2, cores_per_worker=(2, 3)),
        "need 5 cores (2 + 3) but 4 are allowed (0-3); lower --ncores-per-instance to 2", id="not enough for a list",
    ),
    pytest.param(
        SMALL, wants(SMALL, 5, cores_per_worker=(1,)),
        "need 5 cores (5 workers x 1) but 4 are allowed (0-3); lower the number of workers to 4", id="too many workers",
    ),
    pytest.param(
        SMALL, wants(SMALL, 3, cores_per_worker=(1, 2)),
        "--ncores-per-instance names 2 sizes but there are 3 workers; give one number for all or one per worker",
        id="too short a list",
    ),
    pytest.param(
        XEON, wants(XEON, 3, cores_per_worker=(18,), skip_cross_node_cores=True),
        "workers of 18, 18, 18 cores do not fit into NUMA nodes of 28, 28 cores; ask for fewer cores or drop "
        "--skip-cross-node-cores", id="no node has room",
    ),
    pytest.param(
        XEON, wants(XEON, node_ids=frozenset({0, 7})),
        "NUMA node 7 does not exist; this machine has 0-1; change --node-id", id="no such node",
    ),
    pytest.param(
        XEON, wants(XEON, cpus="0-3", node_ids=frozenset({1})),
        "NUMA node 1 has none of the CPUs 0-3 that may be used (its own: 28-55,84-111); change --node-id or widen the "
        "cpuset", id="a node that is not allowed",
    ),
    pytest.param(
        SMALL, wants(SMALL, core_list=cpus("2-5")),
        "CPUs 4-5 of --core-list are not online (0-3 are); remove them from the list", id="core list: offline",
    ),
    pytest.param(
        SMALL, wants(SMALL, cpus="0-2", core_list=cpus("2-3")),
        "CPUs 3 of --core-list are not allowed (0-2 are); remove them from the list or widen the cpuset",
        id="core list: not allowed",
    ),
    pytest.param(
        SMALL, wants(SMALL, cpus="8-9"),
        "no allowed CPU is online: allowed 8-9, online 0-3; widen the cpuset or the affinity mask", id="none allowed",
    ),
    pytest.param(
        SMALL, wants(SMALL, reserve_cores=4),
        "--reserve-cores 4 leaves none of the 4 cores that may be used (CPUs 0-3); lower it to 3", id="all reserved",
    ),
    pytest.param(
        SMALL, [*wants(SMALL, reserve_cores=2), *wants(SMALL, cpus="0")],
        "all cores that may be used (CPUs 0) are reserved for another server; lower its --reserve-cores",
        id="reserved by another server",
    ),
    pytest.param(
        SMALL, [Demand(SMALL.online, share=0)], "worker 0 has a share of 0; a share is more than 0", id="no share"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "demands", "message"), ERRORS)
def test_no_plan(topology: Topology, demands: list[Demand], message: str) -> None:
    with pytest.raises(PlanError) as raised:
        plan(topology, demands)
    assert str(raised.value) == message


THREADS = [
    pytest.param(XEON, wants(XEON, 3), [28, 14, 14], True, id="one per core"),
    pytest.param(VM, wants(VM, 2, cpus="0-2,4-7", logical=True), [3, 4], True, id="one per CPU with logical"),
    pytest.param(SMALL, wants(SMALL, 6, logical=True), [1] * 6, True, id="one where cores are shared"),
    pytest.param(SMALL, [Demand(SMALL.online, quota=3.5)] * 2, [2, 1], False, id="as the quota pays for"),
    pytest.param(SMALL, [Demand(SMALL.online, quota=0.5)] * 2, [1, 1], False, id="at least one"),
    pytest.param(
        EPYC, [Demand(EPYC.online, quota=10, cores=3), *[Demand(EPYC.online, quota=10)] * 2], [3, 4, 3], False,
        id="fixed within a quota",
    ),
    pytest.param(SMALL, [Demand(SMALL.online, quota=2, cores=8)] * 2, [1, 1], False, id="not more than the quota"),
    pytest.param(EPYC, [Demand(EPYC.online, quota=10, cores=3)], [3], False, id="nobody for the rest of a quota"),
    pytest.param(
        VM, [Demand(VM.online, Policy(logical=True), quota=4.0)], [4], False, id="a quota is compared with threads"
    ),
    pytest.param(
        VM, [Demand(VM.online, Policy(logical=logical), quota=4.0) for logical in (True, False)], [2, 2], False,
        id="... of all who share it",
    ),
    pytest.param(
        VM, [Demand(VM.online, Policy(logical=True), quota=8.0)] * 2, [4, 4], True, id="a quota of all the threads"
    ),
    pytest.param(
        XEON, [*[Demand(XEON.online, Policy(node_ids=frozenset({node})), quota=40.0) for node in (0, 1)]], [20, 20],
        False, id="one quota for workers on two nodes",
    ),
    pytest.param(XEON, wants(XEON, 3, pin=Pin.NEVER), [28, 14, 14], False, id="as if pinned"),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "demands", "threads", "pinned"), THREADS)
def test_threads(topology: Topology, demands: list[Demand], threads: list[int], pinned: bool) -> None:
    slices = plan(topology, demands).slices
    assert [piece.threads for piece in slices] == threads
    assert {piece.pinned for piece in slices} == {pinned}


NOTES = [
    pytest.param(XEON, wants(XEON, 3), "", id="nothing to say"),
    pytest.param(SMALL, wants(SMALL, 6), "more workers than cores: 6 on 4 (CPUs 0-3)", id="shared cores"),
    pytest.param(
        HYBRID, wants(HYBRID),
        "8 of 12 cores are left out because they are of the slowest type (CPUs 4-11): one slow core holds up all "
        "threads of its slice; --use-e-cores uses them", id="slow cores",
    ),
    pytest.param(
        HYBRID, wants(HYBRID, 2),
        "2 workers use the slowest cores too (CPUs 4-11), in slices of their own: a further slice of the faster ones "
        "(CPUs 0-3) would have less capacity; cores count 1, 0.5 by type (assumed: the kernel does not say); "
        "--core-list 0-3 uses the faster ones alone, --use-e-cores treats all cores alike",
        id="slow cores in use",
    ),
    pytest.param(PHONE, wants(PHONE), "5 of 8 cores are left out because they are of another type", id="three types"),
    pytest.param(SMALL, [Demand(SMALL.online, quota=2.5)], "a CFS quota of 2.5 CPUs is below the 4 cores", id="quota"),
    pytest.param(
        SMALL, [Demand(SMALL.online, quota=0.5)] * 2,
        "a CFS quota of 0.5 CPUs is below the 4 cores that may be used, so other programs use them too: 2 threads for "
        "2 workers, CPUs not pinned", id="a thread each",
    ),
    pytest.param(
        XEON, [*[Demand(XEON.online, Policy(node_ids=frozenset({node})), quota=40.0) for node in (0, 1)]],
        "a CFS quota of 40 CPUs is below the 56 cores that may", id="a quota for two nodes",
    ),
    pytest.param(
        VM, [Demand(VM.online, Policy(logical=True), quota=4.0)], "a CFS quota of 4 CPUs is below the 8 CPUs that may",
        id="a quota below the SMT siblings",
    ),
    pytest.param(
        SMALL, [Demand(SMALL.online, cores=4), *wants(SMALL)], "worker 0 asks for 4 cores and gets 2", id="not granted"
    ),
    pytest.param(
        SMALL,
        wants(SMALL, 2, latency=True),
        "8 cores asked for, 4 there: 2 workers divide them as if none had asked",
        id="latency",
    ),
    pytest.param(grouped((0, 0, 0, 0, 4), isolated=[1]), wants(SMALL), "CPUs 1 are isolated", id="isolated"),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "demands", "start"), NOTES)
def test_notes(topology: Topology, demands: list[Demand], start: str) -> None:
    notes = plan(topology, demands).notes
    assert len(notes) == bool(start)
    assert "".join(notes).startswith(start)


def test_a_slice_says_where_it_is() -> None:
    first, second = plan(SNC, wants(SNC, 2)).slices
    assert (first.numa_nodes, first.l3_domains, first.packages) == ((0, 1), (0,), (0,))
    assert (second.numa_nodes, second.l3_domains, second.packages) == ((2, 3), (1,), (1,))


def test_idle_and_reserved() -> None:
    result = plan(XEON, wants(XEON, 2, reserve_cores=2, cores_per_worker=(20,)))
    assert drawn(result) == "2-21 28-47"
    assert result.reserved == cpus("0-1,56-57")
    assert result.idle == cpus("0-1,22-27,48-55,56-57,78-83,104-111")
    assert not plan(XEON, wants(XEON, 5)).idle
    unpinned = plan(SMALL, wants(SMALL, 2, reserve_cores=1, pin=Pin.NEVER))
    assert unpinned.idle == unpinned.reserved == cpus("0")


def after(topology: Topology, demands: Sequence[Demand], result: Plan) -> list[Demand]:
    """The same demands, holding what they were given."""
    return [replace(d, held=frozenset(s.cpus)) for d, s in zip(demands, result.slices, strict=True)]


MOVES = [
    pytest.param(XEON, 3, [1, 2], 1, "28-55 0-27", id="only one has to leave a node with two"),
    pytest.param(XEON, 3, [0, 2], 1, "0-27 28-55", id="the neighbour takes over"),
    pytest.param(XEON, 3, [0, 1, 2], 2, "0-13 28-41 42-55 14-27", id="a newcomer halves the largest"),
    pytest.param(EPYC, 4, [0, 2, 3], 1, "0-15 16-23 24-31", id="the other node is not touched"),
    pytest.param(EPYC, 4, [1, 2, 3], 1, "0-15 16-23 24-31", id="... whoever leaves"),
    pytest.param(SNC, 4, [0, 2, 3], 1, "0-15 16-23 24-31", id="a neighbour takes the free node"),
    pytest.param(SNC, 4, [0, 1, 3], 1, "0-7 8-15 16-31", id="... and grows down as well as up"),
    pytest.param(NODES, 8, [1, 3, 4, 5, 6, 7], 1, "0-5 6-11 12-14 15-17 18-20 21-23", id="... two for two"),
    pytest.param(SHREDS, 3, [0, 1], 1, "0,5-6 1-4", id="two that swap spare each other a move"),
    pytest.param(SMALL, 2, [1], 2, "2-3 0-1", id="cores are kept"),
    pytest.param(SMALL, 6, [0, 1, 2, 3, 5], 1, "0 1 2 3 1", id="shared cores are kept"),
]


@pytest.mark.parametrize(("topology", "workers", "stay", "total", "expected"), MOVES)
def test_few_moves(topology: Topology, workers: int, stay: list[int], total: int, expected: str) -> None:
    """``stay`` are the survivors; a second ``total`` adds one newcomer."""
    before = after(topology, wants(topology, workers), plan(topology, wants(topology, workers)))
    demands = [before[i] for i in stay] + wants(topology, total - 1)
    assert drawn(plan(topology, demands)) == expected


def test_what_is_good_is_kept() -> None:
    """The same shapes elsewhere are as good, so nobody moves although a fresh plan would differ."""
    held = ["42-55", "0-27", "28-41"]
    demands = [Demand(XEON.online, held=cpus(text)) for text in held]
    assert drawn(plan(XEON, demands)) == " ".join(held)
    held = ["0-1,4-5,8-9", "2-3,6-7,10-11", "12-15"]
    demands = [Demand(CHIPLETS.online, held=cpus(text)) for text in held]
    assert drawn(plan(CHIPLETS, demands)) == " ".join(held)


def test_what_is_bad_is_not_kept() -> None:
    held = [Demand(XEON.online, held=cpus("14-41")), Demand(XEON.online, held=cpus("0-13,42-55"))]
    assert drawn(plan(XEON, held)) in ("0-27 28-55", "28-55 0-27")
    twice = [Demand(SMALL.online, held=cpus("0-1"))] * 2
    assert drawn(plan(SMALL, twice)) == "0-1 2-3"


# Properties


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any machine: groups of any size, levels that nest or not, several types, SMT, holes in the numbering."""
    place = st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 2), st.integers(0, 3), st.integers(1, 5))
    groups = draw(st.lists(place, min_size=1, max_size=6, unique_by=lambda group: group[:4]))
    if draw(st.booleans()):
        groups = [(0, *group[1:]) for group in groups]
    return grouped(*groups, smt=draw(st.sampled_from([1, 1, 2, 4])))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Topology, list[Demand]]:
    """A machine and workers with a few different cpusets, shares and sizes."""
    topology = draw(topologies())
    online = sorted(topology.online)
    masks = draw(st.lists(st.sets(st.sampled_from(online), min_size=1).map(frozenset), min_size=1, max_size=3))
    demands = st.builds(
        Demand,
        allowed=st.sampled_from([topology.online, *masks]),
        policy=st.builds(Policy, logical=st.booleans(), equal=st.booleans(), use_e_cores=st.booleans()),
        cores=st.sampled_from([None, None, None, 1, 2, 5]),
        share=st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.5]),
        held=st.sets(st.sampled_from(online), max_size=4).map(frozenset),
    )
    return topology, draw(st.lists(demands, min_size=1, max_size=8))


def owned(topology: Topology, result: Plan) -> list[frozenset[int]]:
    """The cores of each slice."""
    core_of = {cpu: core.number for core in topology.cores for cpu in core.cpus}
    return [frozenset(core_of[cpu] for cpu in piece.cpus) for piece in result.slices]


def shares_cores(result: Plan) -> bool:
    return any("more workers than cores" in note for note in result.notes)


@pytest.mark.no_cover
@given(case=cases())
def test_the_same_demands_get_the_same_plan(case: tuple[Topology, list[Demand]]) -> None:
    assert plan(*case) == plan(*case)


def no_core_has_two_owners_while_there_are_enough(topology: Topology, demands: list[Demand], result: Plan) -> None:
    used = Counter(itertools.chain.from_iterable(owned(topology, result)))
    assert shares_cores(result) or max(used.values()) == 1


def a_slice_has_allowed_cpus_only(topology: Topology, demands: list[Demand], result: Plan) -> None:
    for demand, piece in zip(demands, result.slices, strict=True):
        assert piece.cpus
        assert set(piece.cpus) <= demand.allowed


def a_slice_has_one_cpu_per_core_or_with_logical_all(topology: Topology, demands: list[Demand], result: Plan) -> None:
    for demand, piece in zip(demands, result.slices, strict=True):
        for core in topology.cores_of(piece.cpus):
            usable = demand.allowed & set(core.cpus)
            mine = usable & set(piece.cpus)
            if demand.policy.logical:
                assert mine == usable
            elif shares_cores(result):
                assert len(mine) == 1
            else:
                assert mine == {min(usable)}


def a_slice_has_as_many_threads_as_cpus_or_one_on_shared_cores(
    topology: Topology, demands: list[Demand], result: Plan
) -> None:
    for piece in result.slices:
        assert piece.threads == len(piece.cpus) or (shares_cores(result) and piece.threads == 1)


def a_slice_names_its_nodes(topology: Topology, demands: list[Demand], result: Plan) -> None:
    for piece in result.slices:
        assert piece.numa_nodes == tuple(sorted({core.node for core in topology.cores_of(piece.cpus)}))


def idle_is_what_no_slice_touches(topology: Topology, demands: list[Demand], result: Plan) -> None:
    busy = frozenset().union(*owned(topology, result))
    allowed = frozenset().union(*(demand.allowed for demand in demands))
    assert result.idle == allowed - {cpu for core in topology.cores if core.number in busy for cpu in core.cpus}


@pytest.mark.no_cover
@settings(max_examples=200)
@given(case=cases())
def test_what_holds_of_every_plan(case: tuple[Topology, list[Demand]]) -> None:
    result = plan(*case)
    no_core_has_two_owners_while_there_are_enough(*case, result)
    a_slice_has_allowed_cpus_only(*case, result)
    a_slice_has_one_cpu_per_core_or_with_logical_all(*case, result)
    a_slice_has_as_many_threads_as_cpus_or_one_on_shared_cores(*case, result)
    a_slice_names_its_nodes(*case, result)
    idle_is_what_no_slice_touches(*case, result)


@pytest.mark.no_cover
@given(case=cases())
def test_nothing_is_idle_that_a_worker_could_use(case: tuple[Topology, list[Demand]]) -> None:
    topology, demands = case
    everybody = [replace(d, cores=None, policy=replace(d.policy, use_e_cores=True)) for d in demands]
    assert not plan(topology, everybody).idle


@pytest.mark.no_cover
@given(topology=topologies(), workers=st.integers(1, 12))
def test_no_slice_mixes_core_types(topology: Topology, workers: int) -> None:
    kind_of = {core.number: core.kind for core in topology.cores}
    for cores in owned(topology, plan(topology, wants(topology, workers))):
        assert len({kind_of[core] for core in cores}) == 1


@pytest.mark.no_cover
@given(topology=topologies(), workers=st.integers(1, 12))
def test_slow_cores_are_used_before_any_core_is_shared(topology: Topology, workers: int) -> None:
    used = Counter(itertools.chain.from_iterable(owned(topology, plan(topology, wants(topology, workers)))))
    if workers <= len(topology.cores):
        assert max(used.values()) == 1
    else:
        assert len(used) == len(topology.cores)


@pytest.mark.no_cover
@given(topology=topologies(), workers=st.integers(1, 6), reserve=st.integers(1, 3))
def test_slow_cores_make_up_for_reserved_ones(topology: Topology, workers: int, reserve: int) -> None:
    if workers + reserve <= len(topology.cores):
        slices = owned(topology, plan(topology, wants(topology, workers, reserve_cores=reserve)))
        assert max(Counter(itertools.chain.from_iterable(slices)).values()) == 1


@pytest.mark.no_cover
@given(case=cases())
def test_a_plan_is_stable(case: tuple[Topology, list[Demand]]) -> None:
    topology, demands = case
    first = plan(topology, demands)
    assert plan(topology, after(topology, demands, first)).slices == first.slices


@pytest.mark.no_cover
@given(topology=topologies(), workers=st.integers(1, 12))
def test_cores_are_shared_out_evenly_if_they_must(topology: Topology, workers: int) -> None:
    demands = wants(topology, workers, use_e_cores=True)
    loads = Counter(itertools.chain.from_iterable(owned(topology, plan(topology, demands))))
    if workers > len(topology.cores):
        assert max(loads.values()) - min(loads[core.number] for core in topology.cores) <= 1


@pytest.mark.no_cover
@given(topology=topologies(), workers=st.integers(1, 8), equal=st.booleans())
def test_nobody_crosses_a_node_if_told_so(topology: Topology, workers: int, equal: bool) -> None:
    demands = wants(topology, workers, use_e_cores=True, skip_cross_node_cores=True, equal=equal)
    result = plan(topology, demands)
    assert all(len(piece.numa_nodes) == 1 for piece in result.slices)


@pytest.mark.no_cover
@given(topology=topologies(), workers=st.integers(1, 8), equal=st.booleans())
def test_sizes(topology: Topology, workers: int, equal: bool) -> None:
    cores = len(topology.cores)
    sizes = [
        len(piece.cpus) for piece in plan(topology, wants(topology, workers, use_e_cores=True, equal=equal)).slices
    ]
    if workers <= cores:
        assert sum(sizes) == cores
        assert min(sizes) * 2 * workers >= cores
        assert max(sizes) * workers <= 2 * cores
        assert not equal or max(sizes) - min(sizes) <= 1


@pytest.mark.no_cover
@given(topology=topologies(), shares=st.lists(st.sampled_from([1.0, 1.1, 2.0, 3.0]), min_size=1, max_size=6))
def test_shares(topology: Topology, shares: list[float]) -> None:
    """Nobody is far below its due, which locality may halve and whole cores round."""
    cores = len(topology.cores)
    demands = [replace(wants(topology, use_e_cores=True)[0], share=share) for share in shares]
    if len(shares) <= cores:
        for share, piece in zip(shares, plan(topology, demands).slices, strict=True):
            assert len(piece.cpus) >= max(1, (cores * share / sum(shares) - 1) / 2)


@pytest.mark.no_cover
@given(topology=topologies(), workers=st.integers(1, 6), size=st.integers(1, 4))
def test_fixed_sizes_are_exact_or_impossible(topology: Topology, workers: int, size: int) -> None:
    demands = wants(topology, workers, use_e_cores=True, cores_per_worker=(size,))
    if workers * size > len(topology.cores):
        with pytest.raises(PlanError, match="need"):
            plan(topology, demands)
    else:
        assert {piece.threads for piece in plan(topology, demands).slices} == {size}


@pytest.mark.no_cover
@settings(max_examples=50)
@given(topology=topologies(), workers=st.integers(2, 6), gone=st.integers(0, 5))
def test_whoever_leaves_moves_few(topology: Topology, workers: int, gone: int) -> None:
    """In the new plan's shapes no other way to hand them out has fewer workers on nodes that are new to them."""
    everyone = wants(topology, workers, use_e_cores=True)
    before = after(topology, everyone, plan(topology, everyone))
    del before[gone % workers]
    slices = plan(topology, before).slices
    if len({piece.cpus for piece in slices}) < len(slices):
        return
    old = [{core.node for core in topology.cores_of(demand.held)} for demand in before]

    def new_nodes(order: Sequence[int]) -> int:
        return sum(len(set(slices[i].numa_nodes) - nodes) for i, nodes in zip(order, old, strict=True))

    orders = itertools.permutations(range(len(slices)))
    assert new_nodes(range(len(slices))) == min(map(new_nodes, orders))


# Captured machines


@pytest.mark.no_cover
@pytest.mark.parametrize("facts", machines.read(), ids=lambda facts: facts.name)
def test_a_captured_machine(facts: machines.Facts) -> None:
    """With 1 to 16 workers: all cores are used once, about equally, and no division in a row crosses less."""
    alike = tuple(replace(core, kind=0, capacity=None) for core in facts.topology().cores)
    topology, allowed = replace(facts.topology(), cores=alike, isolated=frozenset()), facts.allowed
    usable = topology.cores_of(allowed)
    for workers in range(1, 17):
        result = plan(topology, [Demand(allowed)] * workers)
        held = owned(topology, result)
        assert not result.idle
        assert all(set(piece.cpus) <= allowed and len(piece.cpus) == piece.threads for piece in result.slices)
        if workers > len(usable):
            continue
        assert sum(map(len, held)) == len(usable) == len(frozenset().union(*held)), workers
        assert min(map(len, held)) * 2 * workers >= len(usable), workers
        assert max(map(len, held)) * workers <= 2 * len(usable), workers
        crossed = boundaries([topology.cores_of(piece.cpus) for piece in result.slices])
        assert crossed <= boundaries(in_a_row(usable, workers)), workers
        fitting = [fits(Counter(getattr(core, level) for core in usable), workers) for level in ("node", "package")]
        assert not all(fitting) or crossed[:2] == (0, 0), workers


def boundaries(slices: Iterable[Sequence[Core]]) -> tuple[int, ...]:
    """Groups touched minus one, over all slices; the levels that matter most come first."""
    places = [[(core.node, core.package, core.l3) for core in cores] for cores in slices]
    return tuple(sum(len({place[level] for place in held}) - 1 for held in places) for level in range(3))


def in_a_row(cores: Sequence[Core], workers: int) -> list[list[Core]]:
    """Equal slices of neighbouring cores."""
    ordered = sorted(cores, key=lambda core: (core.package, core.node, core.l3, core.number))
    ends = [len(ordered) * rank // workers for rank in range(workers + 1)]
    return [ordered[start:stop] for start, stop in itertools.pairwise(ends)]


def fits(groups: Counter[int], workers: int) -> bool:
    """Whether slices of half to twice of the equal share can divide each of the groups by itself."""
    cores = sum(groups.values())
    least, most = -(-cores // (2 * workers)), 2 * cores // workers
    few, many = sum(-(-size // most) for size in groups.values()), sum(size // least for size in groups.values())
    return all(size // least >= -(-size // most) >= 1 for size in groups.values()) and few <= workers <= many


GUEST = Demand(SMALL.online, cores=0)


@pytest.mark.parametrize("guests", [1, 9], ids=["one", "more than cores"])
@pytest.mark.parametrize(
    "owners",
    [
        pytest.param(wants(SMALL, 2), id="equal shares"),
        pytest.param(wants(SMALL, 2, cores_per_worker=(1,)), id="a size for all"),
        pytest.param([Demand(SMALL.online, cores=3), Demand(SMALL.online)], id="a fixed size"),
        pytest.param([Demand(SMALL.online, quota=2.0)] * 2, id="a quota"),
        pytest.param(wants(SMALL, 4), id="as many as cores"),
    ],
)
def test_a_worker_that_wants_no_core_takes_none(owners: list[Demand], guests: int) -> None:
    alone = plan(SMALL, owners)
    together = plan(SMALL, [*[GUEST] * guests, *owners])
    assert together.slices[guests:] == alone.slices
    assert (together.idle, together.notes) == (alone.idle, alone.notes)
    for guest in together.slices[:guests]:
        assert (frozenset(guest.cpus), guest.threads, guest.pinned) == (SMALL.online, 1, False)


def test_a_worker_that_wants_no_core_leaves_reserved_ones_free() -> None:
    policy = Policy(reserve_cores=1)
    result = plan(SMALL, [Demand(SMALL.online, policy, cores=0), Demand(SMALL.online, policy)])
    assert len(result.reserved) == 1
    assert frozenset(result.slices[0].cpus) == SMALL.online - result.reserved


def test_workers_that_want_no_core_need_nobody_else() -> None:
    result = plan(SMALL, [GUEST, GUEST])
    assert [piece.threads for piece in result.slices] == [1, 1]
    assert result.idle == SMALL.online


AUTO = {"lend": Lend.AUTO}
LENDERS = [
    pytest.param(AUTO, AUTO, {0: {0, 1, 2, 3}, 2: {0, 1, 2, 3}}, id="one node"),
    pytest.param({}, {}, {0: {0, 1, 2, 3}, 2: {0, 1, 2, 3}}, id="by default"),
    pytest.param(AUTO, {"lend": Lend.NEVER}, {0: {0, 1}, 2: set()}, id="one of them never"),
    pytest.param(AUTO, AUTO | {"logical": True}, {0: {0, 1}, 2: {2, 3}}, id="other rules"),
]


@pytest.mark.parametrize(("first", "second", "expected"), LENDERS)
def test_who_lends_to_whom(first: dict[str, Any], second: dict[str, Any], expected: dict[int, set[int]]) -> None:
    allowed = frozenset(range(4))
    found = plan(machine(cores=4), [Demand(allowed, Policy(**rules)) for rules in (first, second)])
    assert {piece.cpus[0]: set(piece.reach) for piece in found.slices} == expected


def test_cores_are_lent_inside_a_numa_node_only() -> None:
    topology = machine(packages=2, cores=4)
    found = plan(topology, [Demand(topology.online, Policy(lend=Lend.AUTO))] * 4)
    assert [set(piece.reach) for piece in found.slices] == [{0, 1, 2, 3}] * 2 + [{4, 5, 6, 7}] * 2


def test_workers_that_share_a_core_do_not_lend() -> None:
    found = plan(machine(cores=2), [Demand(frozenset({0, 1}), Policy(lend=Lend.AUTO))] * 3)
    assert [piece.reach for piece in found.slices if piece.cpus == (0,)] == [frozenset()] * 2


def test_a_worker_without_a_core_of_its_own_does_not_lend() -> None:
    one = Demand(frozenset({0, 1}), Policy(lend=Lend.AUTO))
    found = plan(machine(cores=2), [one, replace(one, cores=0), replace(one, cores=0)])
    assert [piece.reach for piece in found.slices] == [one.allowed, frozenset(), frozenset()]
