"""Discovery: small trees with one peculiarity each, and whole machines against what is known about them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import machines
from benchmarks.harness.captures import unpacked
from tests.captures import RECORDS, needs_captures
from ts_plugin.machine.cpulist import parse_cpulist
from ts_plugin.machine.discovery import DiscoveryError, read_allowance, read_bounds, read_mask, read_topology
from ts_plugin.machine.topology import Allowance, Core, NumaNode, Topology

MACHINES = {facts.name: facts for facts in machines.read()}

KNOWN_DIFFERENCES = {
    ("dv04-offline-random-ghw-i7-1270P", "class"): (
        "the record lost the core types of the machine that it is derived from: 4 P-cores, 8 E-cores"
    ),
    ("hwloc-offline-cpu0-node0", "distance"): "two distances for the only node: no column can be told from the other",
}


def tree(root: Path, files: dict[str, str]) -> str:
    """Write ``files`` below ``root``; paths begin at sys/devices/system/cpu unless they say otherwise."""
    for path, text in files.items():
        place = path if path.startswith(("sys/", "proc/", "dev/", "cg/")) else f"sys/devices/system/cpu/{path}"
        file = root / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return str(root)


def cpu(number: int, **files: str) -> dict[str, str]:
    """Name the files of one CPU: ``_`` stands for ``/`` at the first place, as in ``topology_core_cpus_list``."""
    return {f"cpu{number}/{name.replace('_', '/', 1)}": text for name, text in files.items()}


def cache(number: int, index: int, level: int, kind: str, shared: str, size: str = "") -> dict[str, str]:
    directory = f"cpu{number}/cache/index{index}"
    files = {f"{directory}/level": str(level), f"{directory}/type": kind, f"{directory}/shared_cpu_list": shared}
    return files | ({f"{directory}/size": size} if size else {})


def sets(topology: Topology) -> list[tuple[int, ...]]:
    return [core.cpus for core in topology.cores]


# --- topology -------------------------------------------------------------------------------------------------------


def test_a_plain_machine_needs_no_note(tmp_path: Path) -> None:
    files = {"online": "0-3", "isolated": "1,3"}
    for number, siblings in ((0, "0,2"), (1, "1,3")):
        files |= cpu(number, topology_core_cpus_list=siblings, topology_physical_package_id="0")
        files |= cpu(number, topology_package_cpus_list="0-3")
    files |= cache(0, 3, 3, "Unified", "0-3")
    files |= {
        "sys/devices/system/node/node0/cpulist": "0-3",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       1024 kB\nNode 0 MemFree: 1 kB",
        "sys/devices/system/node/node0/distance": "10",
    }
    assert read_topology(tree(tmp_path, files)) == Topology(
        cores=(Core((0, 2), 0, 0, 0), Core((1, 3), 0, 0, 0)),
        nodes=(NumaNode(0, frozenset({0, 1, 2, 3}), 1024, ((0, 10),)),),
        isolated=frozenset({1, 3}),
    )


def test_without_sys_the_kernel_still_counts_its_cpus(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text("cpu  9 9 9\ncpu0 4 4 4\ncpu2 5 5 5\nintr 1 2 3\nctxt 7\n")
    topology = read_topology(str(tmp_path))
    assert [core.cpus for core in topology.cores] == [(0,), (2,)]
    assert any("CPUs as in /proc/stat" in note for note in topology.notes)


def test_only_an_online_file_is_a_flat_machine_with_notes(tmp_path: Path) -> None:
    """GVisor and some microVMs."""
    topology = read_topology(tree(tmp_path, {"online": "0-3"}))
    assert sets(topology) == [(0,), (1,), (2,), (3,)]
    assert {(core.package, core.node, core.l3, core.kind) for core in topology.cores} == {(0, 0, 0, 0)}
    assert [note.split(";")[0].split(": ")[-1] for note in topology.notes] == [
        "no NUMA node",
        "no SMT sibling files for CPUs 0-3",
        "no L2 or L3 cache files",
    ]


def test_no_cpu_is_an_error_that_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match=rf"^{tmp_path}/sys/devices/system/cpu: no CPU found"):
        read_topology(str(tmp_path))
    with pytest.raises(DiscoveryError):
        read_allowance(str(tmp_path))


def test_this_machine_is_readable() -> None:
    topology = read_topology()
    assert topology.online >= os.sched_getaffinity(0)
    assert read_allowance().cpus == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        pytest.param("online", "0-x", "invalid CPU list '0-x'", id="online"),
        pytest.param("cpu0/topology/core_cpus_list", "1-0", "invalid CPU list '1-0'", id="siblings"),
        pytest.param("cpu0/topology/physical_package_id", "zero", "invalid number 'zero'", id="package"),
        pytest.param("cpu0/topology/thread_siblings", "xyz", "invalid CPU mask 'xyz'", id="mask"),
        pytest.param("sys/devices/system/node/node0/distance", "10 x", "2 distances for 1 nodes", id="distance"),
    ],
)
def test_a_malformed_file_is_a_note_that_begins_with_its_path(
    tmp_path: Path, path: str, text: str, reason: str
) -> None:
    files = {"cpu0/online": "1", "cpu1/online": "1", "sys/devices/system/node/node0/cpulist": "0-1", path: text}
    topology = read_topology(tree(tmp_path, files))
    assert sets(topology) == [(0,), (1,)]
    place = path if path.startswith("sys/") else f"sys/devices/system/cpu/{path}"
    assert any(note.startswith(f"{tmp_path}/{place}: {reason}") for note in topology.notes), topology.notes


def test_masks_of_old_kernels(tmp_path: Path) -> None:
    files = {"online": "0-35", "sys/devices/system/node/node0/cpumap": "f,fffffffc"}
    files |= cpu(0, topology_thread_siblings="00000001,00000001")  # words of 32 bits, the highest first
    files |= cpu(1, topology_thread_siblings="00000000,00000006")
    topology = read_topology(tree(tmp_path, files))
    assert sets(topology)[:3] == [(0, 32), (1, 2), (3,)]
    assert topology.nodes[0].cpus == set(range(2, 36))


def test_offline_siblings_are_no_part_of_a_core(tmp_path: Path) -> None:
    files = {"cpu0/online": "1", "cpu1/online": "0", "cpu2/topology/core_cpus_list": "2-3", "cpu3/online": "1"}
    files |= cpu(0, topology_core_cpus_list="0-1")
    assert sets(read_topology(tree(tmp_path, files))) == [(0,), (2, 3)]


def test_packages_without_ids_are_their_siblings(tmp_path: Path) -> None:
    files = {"online": "0-3"}
    for number, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        files |= cpu(number, topology_physical_package_id="-1", topology_core_siblings_list=siblings)
    assert [core.package for core in read_topology(tree(tmp_path, files)).cores] == [0, 0, 1, 1]


def test_package_ids_that_repeat_in_another_book(tmp_path: Path) -> None:
    files = {"online": "0-3"}
    for number, book in enumerate("0011"):
        files |= cpu(
            number, topology_physical_package_id="5", topology_book_id=book, topology_core_siblings_list=str(number)
        )
    assert [core.package for core in read_topology(tree(tmp_path, files)).cores] == [5, 5, 0, 0]


def test_l3_domains(tmp_path: Path) -> None:
    files = {"online": "0-7"}
    files |= cache(0, 2, 2, "Unified", "0-1") | cache(0, 3, 3, "Unified", "0-3")  # the highest level counts
    files |= cache(4, 0, 1, "Data", "4") | cache(4, 2, 2, "Unified", "4-5")  # no L3
    files |= cache(6, 0, 1, "Unified", "6-7")  # L1 alone is no domain
    files |= cpu(6, topology_cluster_cpus_list="6-7") | cpu(7, topology_cluster_cpus_list="6-7")
    assert [core.l3 for core in read_topology(tree(tmp_path, files)).cores] == [0, 0, 0, 0, 1, 1, 2, 2]


def test_nodes_without_cpus_and_cpus_without_node(tmp_path: Path) -> None:
    files = {
        "online": "0-3",
        "sys/devices/system/node/node1/cpulist": "0-1",
        "sys/devices/system/node/node1/distance": "10 20",
        "sys/devices/system/node/node4/cpulist": "",
        "sys/devices/system/node/node4/distance": "20 10",
    }
    topology = read_topology(tree(tmp_path, files))
    assert [core.node for core in topology.cores] == [1, 1, 0, 0]
    assert [(node.number, set(node.cpus), node.memory_kib, node.distances) for node in topology.nodes] == [
        (0, {2, 3}, 0, ()),
        (1, {0, 1}, None, ((1, 10), (4, 20))),
        (4, set(), None, ((1, 20), (4, 10))),
    ]
    assert "no NUMA node lists CPUs 2-3; taken as node 0, without memory" in topology.notes


def each(path: str, *values: str) -> dict[str, str]:
    """Give every CPU its value in a file; ``{}`` in ``path`` is its number."""
    return {path.format(number): value for number, value in enumerate(values)}


MIDR, FREQUENCY = "cpu{}/regs/identification/midr_el1", "cpu{}/cpufreq/cpuinfo_max_freq"
KINDS = [
    pytest.param(
        {"sys/devices/cpu_core/cpus": "0-1", "sys/devices/cpu_atom/cpus": "2"},
        [0, 0, 1, 1],
        id="lists of a hybrid x86 processor; what is in neither is no fast core",
    ),
    pytest.param(each("cpu{}/cpu_capacity", "446", "1024", "430", "1010"), [1, 0, 1, 0], id="capacities, binned"),
    pytest.param(each("cpu{}/cpu_capacity", "1024"), [0, 0, 0, 0], id="the capacity of one CPU alone"),
    pytest.param(
        each(MIDR, "0x00000000410fd034", "0x00000000410fd030", "0x00000000410fd090", "0x00000000410fd091")
        | each(FREQUENCY, "1500000", "1500000", "2100000", "2100000"),
        [1, 1, 0, 0],
        id="ARM main ids without their revision, the faster type first",
    ),
    pytest.param(
        {"proc/cpuinfo": "".join(f"processor\t: {n}\nCPU part\t: 0xc0{'77ff'[n]}\n" for n in range(4))}
        | each(FREQUENCY, "1300000", "1300000", "1900000", "1900000"),
        [1, 1, 0, 0],
        id="ARM parts in cpuinfo",
    ),
    pytest.param(
        each("cpu{}/cache/index0/size", "32K", "32K", "48K", "48K")
        | each("cpu{}/cache/index0/type", "Data", "Data", "Data", "Data"),
        [1, 1, 0, 0],
        id="L1 data caches of different size",
    ),
    pytest.param(
        each("cpu{}/cache/index0/size", "32K", "32K", "48K", "48K")
        | each("cpu{}/cache/index0/type", "Data", "Data", "Unified", "Unified"),
        [0, 0, 0, 0],
        id="caches of different type say nothing",
    ),
    pytest.param(each(FREQUENCY, "3500000", "3500000", "3700000", "3700000"), [0, 0, 0, 0], id="frequency misleads"),
]


@pytest.mark.parametrize(("files", "kinds"), KINDS)
def test_core_types(tmp_path: Path, files: dict[str, str], kinds: list[int]) -> None:
    topology = read_topology(tree(tmp_path, {"online": "0-3"} | files))
    assert [core.kind for core in topology.cores] == kinds


def test_capacities_are_against_the_fastest_type(tmp_path: Path) -> None:
    files = {"online": "0-3"} | each("cpu{}/cpu_capacity", "256", "256", "1024", "1000")
    assert [core.capacity for core in read_topology(tree(tmp_path, files)).cores] == [0.25, 0.25, 1, 1]


def test_equal_cores_need_no_capacity(tmp_path: Path) -> None:
    files = {"online": "0-1"} | each("cpu{}/cpu_capacity", "1024", "1024")
    assert [core.capacity for core in read_topology(tree(tmp_path, files)).cores] == [None, None]


def test_two_packages_are_no_hybrid(tmp_path: Path) -> None:
    files = {"online": "0-1"}
    for number, size in enumerate(("32K", "48K")):
        files |= cpu(number, topology_physical_package_id=str(number)) | cache(number, 0, 1, "Data", str(number), size)
    assert [core.kind for core in read_topology(tree(tmp_path, files)).cores] == [0, 0]


# --- allowance ------------------------------------------------------------------------------------------------------

V2 = "31 23 0:27 / /cg rw - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 23 0:28 / /cg/cpuset rw - cgroup cgroup rw,cpuset\n33 23 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct"

ALLOWANCES = [
    pytest.param({}, {0, 1, 2, 3, 4, 5}, None, id="nothing said"),
    pytest.param(
        {"proc/self/status": "Cpus_allowed_list:\t0-3,9"}, {0, 1, 2, 3}, None, id="captured mask, offline CPU"
    ),
    pytest.param(
        {
            "proc/self/mountinfo": V2,
            "proc/self/cgroup": "0::/pod/app",
            "cg/cpu.max": "max 100000",
            "cg/pod/cpu.max": "250000 100000",
            "cg/pod/app/cpu.max": "400000 100000",
            "cg/pod/cpuset.cpus.effective": "0-3",
        },
        {0, 1, 2, 3},
        2.5,
        id="v2: the tightest ancestor; the nearest cpuset",
    ),
    pytest.param(
        {
            "proc/self/mountinfo": V1,
            "proc/self/cgroup": "3:cpuset:/job\n2:cpu,cpuacct:/job/step\n0::/elsewhere",
            "cg/cpuset/job/cpuset.cpus": "2-5",
            "cg/cpu/job/cpu.cfs_quota_us": "50000",
            "cg/cpu/job/cpu.cfs_period_us": "100000",
            "cg/cpu/job/step/cpu.cfs_quota_us": "-1",
            "cg/cpu/job/step/cpu.cfs_period_us": "100000",
        },
        {2, 3, 4, 5},
        0.5,
        id="v1",
    ),
    pytest.param(
        {
            "proc/self/mountinfo": V1.replace(" / ", " /docker/c0ffee "),
            "proc/self/cgroup": "3:cpuset:/docker/c0ffee/init\n2:cpu,cpuacct:/docker/c0ffee/init",
            "cg/cpuset/cpuset.cpus": "0-1",
            "cg/cpu/cpu.cfs_quota_us": "150000",
            "cg/cpu/cpu.cfs_period_us": "100000",
            "cg/cpu/init/cpu.cfs_quota_us": "120000",
            "cg/cpu/init/cpu.cfs_period_us": "100000",
        },
        {0, 1},
        1.2,
        id="a container that sees its cgroup as the root of the mount",
    ),
    pytest.param(
        {
            "proc/self/mountinfo": f"{V1.replace(' / /cg', ' /docker/other /cg/merged')}\n{V1}",
            "proc/self/cgroup": "3:cpuset:/docker/mine\n2:cpu:/docker/mine",
            "cg/merged/cpuset/cpuset.cpus": "0-1",
            "cg/cpuset/cpuset.cpus": "0-5",
            "cg/cpuset/docker/mine/cpuset.cpus": "4-5",
        },
        {4, 5},
        None,
        id="another container's mount does not count",
    ),
    pytest.param(
        {"proc/self/mountinfo": V2, "proc/self/cgroup": "0::/../../app", "cg/cpu.max": "100000 100000"},
        {0, 1, 2, 3, 4, 5},
        1.0,
        id="a path above the namespace's root",
    ),
    pytest.param(
        {
            "proc/mounts": "none /dev/cpuset cgroup rw,relatime,cpuset,noprefix 0 0",
            "proc/self/cpuset": "/torque/job",
            "dev/cpuset/torque/job/cpus": "1-2",
        },
        {1, 2},
        None,
        id="a cpuset mounted in /dev",
    ),
    pytest.param(
        {
            "proc/mounts": "cgroup /cg/cpuset cgroup rw,cpuset,cpuset_v2_mode 0 0",
            "proc/self/cgroup": "3:cpuset:/job",
            "cg/cpuset/job/cpuset.cpus": "0-5",
            "cg/cpuset/job/cpuset.effective_cpus": "0-1",
        },
        {0, 1},
        None,
        id="v1 in v2 mode: the effective CPUs",
    ),
]


@pytest.mark.parametrize(("files", "cpus", "quota"), ALLOWANCES)
def test_allowance(tmp_path: Path, files: dict[str, str], cpus: set[int], quota: float | None) -> None:
    allowance = read_allowance(tree(tmp_path, {"online": "0-5"} | files))
    assert (set(allowance.cpus), allowance.quota, allowance.notes) == (cpus, quota, ())


def test_a_mask_is_cut_to_the_cpuset(tmp_path: Path) -> None:
    files = {"online": "0-5", "proc/self/mountinfo": V2, "proc/self/cgroup": "0::/", "cg/cpuset.cpus.effective": "0-3"}
    files["proc/self/status"] = "Cpus_allowed_list:\t3-4,9\n"
    assert read_allowance(tree(tmp_path, files)).cpus == {3}


def test_a_cpuset_beside_the_mask_is_ignored_with_a_note(tmp_path: Path) -> None:
    files = {"online": "0-5", "proc/self/mountinfo": V2, "proc/self/cgroup": "0::/", "cg/cpuset.cpus.effective": "0-3"}
    files["proc/self/status"] = "Cpus_allowed_list:\t4-5\n"
    allowance = read_allowance(tree(tmp_path, files))
    assert allowance.cpus == {4, 5}
    assert allowance.notes == ("cpuset 0-3 has no CPU of the affinity mask 4-5; ignored",)


@pytest.mark.parametrize("text", ["much 100000", "100000", "100000 0", "1e5 100000"])
def test_a_malformed_quota_is_a_note(tmp_path: Path, text: str) -> None:
    files = {"online": "0", "proc/self/mountinfo": V2, "proc/self/cgroup": "0::/", "cg/cpu.max": text}
    allowance = read_allowance(tree(tmp_path, files))
    assert allowance.quota is None
    assert allowance.notes[0].startswith(f"{tmp_path}/cg/cpu.max: invalid CFS quota")


# --- captured machines ----------------------------------------------------------------------------------------------


def partition(pairs: Iterable[tuple[int, Hashable]]) -> set[frozenset[int]]:
    groups = defaultdict(set)
    for number, group in pairs:
        groups[group].add(number)
    return {frozenset(group) for group in groups.values()}


def facts_of(topology: Topology) -> dict[str, Any]:
    """What is found about a machine, whatever the numbers of its packages and L3 domains are."""
    distances = [node.distances for node in topology.nodes]
    return {
        "cores": [(core.cpus, core.node, core.kind, core.capacity) for core in topology.cores],
        "packages": partition((core.number, core.package) for core in topology.cores),
        "l3": partition((core.number, core.l3) for core in topology.cores),
        "nodes": [(node.number, node.cpus) for node in topology.nodes],
        "distances": distances if len(distances) > 1 else [],
        "isolated": topology.isolated,
    }


@pytest.mark.no_cover
@pytest.mark.parametrize("facts", MACHINES.values(), ids=MACHINES)
def test_machine(facts: machines.Facts) -> None:
    """Discovery finds in kernel files the facts that they are made from."""
    with facts.tree() as root:
        topology, allowance = read_topology(root), read_allowance(root)
    assert facts_of(topology) == facts_of(facts.topology())
    assert (allowance.cpus, allowance.quota) == (facts.allowed, facts.quota)


@needs_captures
def test_every_captured_machine_is_written_down() -> None:
    assert {record.stem for record in RECORDS} == MACHINES.keys()


@pytest.mark.no_cover
@needs_captures
@pytest.mark.process
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_captured_machine(record: Path) -> None:
    """The capture, what others say about it, and the facts that are written down agree."""
    truth: dict[str, Any] = json.loads(record.read_text())
    with unpacked(record.parent.parent / "sysfs" / f"{record.stem}.tar.xz") as root:
        topology, allowance = read_topology(root), read_allowance(root)
    facts = MACHINES[record.stem]
    assert facts_of(facts.topology()) == facts_of(topology)
    assert (facts.allowed, facts.quota, facts.arch) == (allowance.cpus, allowance.quota, truth["arch"])

    def differs(aspect: str) -> bool:
        return (truth["name"], aspect) in KNOWN_DIFFERENCES

    assert topology.online == parse_cpulist(truth["online_cpus"])
    assert allowance.cpus == parse_cpulist(truth["allowed_cpus"])
    assert allowance.quota == truth["cgroup"].get("cpu_limit")

    entries = {entry["cpu"]: entry for entry in truth["cpus"] if entry["online"]}
    core_of = {number: core for core in topology.cores for number in core.cpus}
    assert partition((n, e["core"]) for n, e in entries.items()) == {frozenset(core.cpus) for core in topology.cores}
    for key, ours in (("pkg", "package"), ("node", "node"), ("class", "kind")):
        expected = partition((number, entry.get(key)) for number, entry in entries.items())
        found = partition((number, getattr(core_of[number], ours)) for number in entries)
        assert (found == expected) is not differs(key), (key, found, expected)

    domains = partition((core.number, core.l3) for core in topology.cores)
    if any(entry.get("llc") for entry in entries.values()):
        assert domains == partition((core.number, entries[core.number].get("llc")) for core in topology.cores)
    else:  # the record has one group where it knows no cache; ours are clusters or packages
        assert all(len({core_of[number].package for number in domain}) == 1 for domain in domains)

    nodes = {node.number: node for node in topology.nodes}
    for expected in truth["nodes"]:
        node = nodes.pop(expected["node"])
        assert node.cpus == parse_cpulist(expected["cpus"]) & topology.online
        assert node.memory_kib == expected.get("mem_kb")
        distances = [distance for _, distance in node.distances] or None
        assert (distances == expected.get("distance")) is not differs("distance")
    unlisted = {number for number, entry in entries.items() if entry["node"] is None}
    assert {number for node in nodes.values() for number in node.cpus} == unlisted


def test_bounds_follow_the_cpuset_and_the_cpus_that_are_online_whatever_the_mask(tmp_path: Path) -> None:
    files = {"proc/self/mountinfo": V2, "proc/self/cgroup": "0::/", "proc/self/status": "Cpus_allowed_list:\t0\n"}
    for online, cpuset, cpus in (("0-5", "0", {0}), ("0-5", "0-3", {0, 1, 2, 3}), ("0-2", "0-3", {0, 1, 2})):
        root = tree(tmp_path, {"online": online, "cg/cpuset.cpus.effective": cpuset} | files)
        assert read_bounds(root).cpus == cpus


@pytest.mark.parametrize(
    ("mask", "limit", "later"),
    [
        pytest.param("0-3", None, {2, 3, 4, 5}, id="a mask that spans the cpuset is no limit"),
        pytest.param("0-127", None, {2, 3, 4, 5}, id="nor is one of all CPUs that there may ever be"),
        pytest.param("2", {2}, {2}, id="taskset's mask is"),
        pytest.param("2,9", {2, 9}, {2}, id="with a CPU that is offline now"),
        pytest.param("0-1", {0, 1}, {2, 3, 4, 5}, id="until the cpuset has none of it, as the kernel does it"),
    ],
)
def test_a_limit_is_what_holds_a_process_back_inside_its_cpuset(
    tmp_path: Path, mask: str, limit: set[int] | None, later: set[int]
) -> None:
    root = tree(tmp_path, {"proc/7/status": f"Name:\tpython\nCpus_allowed_list:\t{mask}\n", "online": "0-5"})
    found = Allowance(frozenset({0, 1, 2})).limit(read_mask(7, root))
    assert found == (None if limit is None else frozenset(limit))
    assert Allowance(frozenset({2, 3, 4, 5})).within(found).cpus == later
