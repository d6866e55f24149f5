"""The score of captured machines: what it counts, that its minima are exact, and that it agrees with others' counts."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from benchmarks.checks import topologies
from benchmarks.checks.topologies import (
    COLUMNS,
    Case,
    Machine,
    Place,
    fewest_boundaries,
    machines,
    score,
)
from benchmarks.harness.machines import FILE
from tests.captures import CAPTURES, RECORDS, needs_captures
from ts_plugin.machine.cpulist import parse_cpulist

# Two NUMA nodes of two L3 domains of two cores, SMT siblings apart; CPU 15 is offline, so CPU 7 is a core alone.
ONLINE = range(15)
MACHINE = Machine(
    name="2n2l2c2t",
    arch="x86_64",
    tree=lambda: nullcontext(""),
    lscpu=None,
    possible=frozenset(range(16)),
    allowed=frozenset(ONLINE),
    isolated=frozenset(),
    core_of={cpu: cpu % 8 for cpu in ONLINE},
    node_of={cpu: cpu % 8 // 4 for cpu in ONLINE},
    l3_of={cpu: cpu % 8 // 2 for cpu in ONLINE},
    package_of=dict.fromkeys(ONLINE),
    kind_of=dict.fromkeys(ONLINE),
)

COUNTS = [
    pytest.param("0-3 4-7", {}, id="nothing wrong"),
    pytest.param("0-5 6-7", {"numa": 1, "numa_avoidable": 1, "l3": 2, "l3_avoidable": 0}, id="an avoidable boundary"),
    pytest.param("0-7 -", {"numa": 1, "l3": 3}, id="groups touched minus one"),
    pytest.param("0-1 2-4 5-7", {"numa": 1, "numa_avoidable": 1}, id="28 + 14 + 14 is possible"),
    pytest.param("0-3 4-5 6-7", {"l3": 1, "l3_avoidable": 0}, id="... and wanted"),
    pytest.param("0-6 7", {"uneven": 1}, id="less than half of the equal share"),
    pytest.param("0-4 5 6 7", {"uneven": 1}, id="more than twice of it"),
    pytest.param("0,8 1-7", {"smt_inside": 1}, id="both siblings of a core"),
    pytest.param("0-3,4 4-7", {"smt_between": 1, "overlapping": 2}, id="one core twice"),
    pytest.param("0-3 4-7,11", {"smt_between": 1, "overlapping": 2}, id="a core through its other sibling"),
    pytest.param("0-3 4-6", {"idle": 1, "idle_avoidable": 1}, id="an idle core"),
    pytest.param("0-1 2-3 4-5", {"idle": 2}, id="a remainder that equal slices leave over"),
    pytest.param("0-3 4-7,15,99", {"offline": 1, "nonexistent": 1}, id="CPUs that are not there"),
    pytest.param("0-3 -", {"dead": 1, "idle": 4}, id="a worker without CPUs"),
    pytest.param("0-3 *", {"unpinned": 1}, id="a worker without pinning"),
]


def case(text: str, machine: Machine = MACHINE) -> Case:
    """Name slices by CPU lists: ``-`` is a dead worker, ``*`` one that is not pinned."""
    words = text.split()
    slices = tuple(None if word == "*" else parse_cpulist(word) for word in words if word != "-")
    return Case(machine, "test", slices, len(words))


@pytest.mark.parametrize(("slices", "expected"), COUNTS)
def test_counts(slices: str, expected: dict[str, int]) -> None:
    counts = score(case(slices))
    assert {key: counts[key] for key in expected} == expected
    if not expected:
        assert not any(counts[key] for key in COLUMNS if key not in ("mixed", "numa", "package", "l3"))


def test_what_is_not_allowed_is_counted_and_then_cut_away() -> None:
    counts = score(case("0-3 4-7", replace(MACHINE, allowed=frozenset({0, 1, 2, 3}))))
    assert (counts["not_allowed"], counts["idle"]) == (4, 0)


def test_isolated_cpus_are_not_idle() -> None:
    assert score(case("0-3 4-5", replace(MACHINE, isolated=frozenset({6, 14, 7}))))["idle"] == 0


SHARES = [
    pytest.param("0-1 2-7", [(2, 1.0), (None, 1.0)], {"unmet": 0, "uneven": 0}, id="a fixed size and the rest"),
    pytest.param("0-2 3-7", [(2, 1.0), (None, 1.0)], {"unmet": 1}, id="a fixed size that is not met"),
    pytest.param("0-1 2-6", [(2, 1.0), (None, 1.0)], {"idle_avoidable": 1}, id="idle beside a fixed size"),
    pytest.param("0-5 6-7", [(None, 3.0), (None, 1.0)], {"uneven": 0}, id="by share"),
    pytest.param("0-1 2-7", [(None, 3.0), (None, 1.0)], {"uneven": 1}, id="against the shares"),
    pytest.param("0-1 2-3,4-5 6-7", [(2, 1.0), (None, 1.0), (None, 1.0)], {"numa_avoidable": 1}, id="2 + 2 and 4"),
]


@pytest.mark.parametrize(("slices", "wishes", "expected"), SHARES)
def test_counts_of_several_models(slices: str, wishes: list[topologies.Wish], expected: dict[str, int]) -> None:
    counts = score(replace(case(slices), wishes=tuple(wishes)))
    assert {key: counts[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("slices", "equal", "expected"),
    [
        pytest.param("0-3 4-5 6-7", "0-1 2-3 4-7", 0, id="as equal as it gets"),
        pytest.param("0-3 4-6 7", "0-3 4-5 6-7", 1, id="unequal for nothing"),
        pytest.param("0-3 4-6 7", "0-2 3-5 6-7", 0, id="unequal rather than crossing"),
    ],
)
def test_sizes_are_compared_with_equal_ones(slices: str, equal: str, expected: int) -> None:
    counts = score(replace(case(slices), equal=tuple(map(parse_cpulist, equal.split()))))
    assert counts["unequal"] == expected


def test_core_types_that_nobody_touches_may_be_left_out_on_purpose() -> None:
    hybrid = replace(MACHINE, kind_of={cpu: cpu % 8 >= 4 for cpu in ONLINE})
    accidental = case("0-1 2-3", hybrid)
    assert score(accidental)["idle"] == 4
    assert score(replace(accidental, chooses_kinds=True))["idle"] == 0
    assert score(case("0-2 3-7", hybrid))["mixed_avoidable"] == 1


def test_more_workers_than_cores_must_share() -> None:
    counts = score(case(" ".join(str(rank % 8) for rank in range(10))))
    assert not any(counts[key] for key in COLUMNS)


def compositions(total: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write ``total`` as ``parts`` ordered numbers from ``least``."""
    if parts == 1:
        if total >= least:
            yield (total,)
        return
    for first in range(least, total + 1):
        for rest in compositions(total - first, parts - 1, least):
            yield (first, *rest)


def alike(cores: int, workers: int) -> list[tuple[int, int]]:
    """The limits of workers that ask for the same: half to twice of the equal share."""
    return [(-(-cores // (2 * workers)), 2 * cores // workers)] * workers


def fewest_by_trying(groups: Mapping[Place, int], limits: list[tuple[int, int]]) -> tuple[int, ...] | None:
    """Try every division of every group among the workers."""
    places = list(groups)
    levels = range(len(places[0]))

    def boundaries(held: Iterable[tuple[tuple[int, int], int, frozenset[Place]]]) -> tuple[int, ...]:
        return tuple(sum(len({place[level] for place in touched}) - 1 for *_, touched in held) for level in levels)

    @cache
    def best(group: int, held: tuple[tuple[tuple[int, int], int, frozenset[Place]], ...]) -> tuple[int, ...] | None:
        if group == len(groups):
            fits = all(least <= size <= most for (least, most), size, _ in held)
            return boundaries(held) if fits else None
        found = set()
        for shares in compositions(groups[places[group]], len(limits), 0):
            more = [
                (limit, size + share, touched | {places[group]} if share else touched)
                for (limit, size, touched), share in zip(held, shares, strict=True)
            ]
            found.add(best(group + 1, tuple(sorted(more, key=repr))))
        return min((one for one in found if one is not None), default=None)

    return best(0, tuple(sorted((limit, 0, frozenset()) for limit in limits)))


def one_level(*sizes: int) -> dict[Place, int]:
    return {(place,): size for place, size in enumerate(sizes)}


GROUPS = [(2, 2, 2, 2), (4, 4), (3, 5), (1, 1, 1, 5), (1, 2, 3), (7,), (1, 1, 1, 1, 1), (6, 1), (2, 1, 2, 1), (5, 1, 1)]


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_the_fewest_boundaries_of_small_machines_are_exact(sizes: tuple[int, ...]) -> None:
    groups = one_level(*sizes)
    for workers in range(1, min(5, sum(sizes)) + 1):
        limits = alike(sum(sizes), workers)
        assert fewest_boundaries(groups, limits) == fewest_by_trying(groups, limits), workers


MIXED = [[(3, 3), (1, 5)], [(1, 1), (1, 1), (2, 8)], [(3, 3), (2, 2), (1, 4)], [(4, 8), (1, 3), (1, 3)]]


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (2, 2, 3), (1, 1, 5), (6, 2)], ids=str)
def test_the_fewest_boundaries_of_several_models(sizes: tuple[int, ...]) -> None:
    groups = one_level(*sizes)
    for limits in MIXED:
        assert fewest_boundaries(groups, limits) == fewest_by_trying(groups, limits), limits


@pytest.mark.parametrize("inner", [(2, 2, 2, 2), (1, 3, 2, 2), (1, 2, 3, 1), (3, 1, 1, 2)], ids=str)
def test_the_fewest_boundaries_on_two_levels(inner: tuple[int, ...]) -> None:
    """Two nodes of two L3 domains: a node is not crossed for the sake of an L3 domain."""
    groups = {(place // 2, place): size for place, size in enumerate(inner)}
    exact = 0
    for limits in (*MIXED, *(alike(sum(inner), workers) for workers in (2, 3, 4))):
        found, tried = fewest_boundaries(groups, limits), fewest_by_trying(groups, limits)
        if found is None or found[0] == 0:
            assert found == tried, limits
            exact += found is not None
        else:
            assert tried is not None
            assert found <= tried, limits
    assert exact > 1


@pytest.mark.parametrize(
    ("sizes", "workers", "expected"),
    [
        pytest.param([28, 28], 2, (0,), id="a node each"),
        pytest.param([28, 28], 3, (0,), id="28 + 14 + 14"),
        pytest.param([2, 2, 2, 2], 3, (1,), id="four nodes of two cores"),
        pytest.param([8, 8, 8], 2, (1,), id="fewer workers than nodes"),
        pytest.param([20, 4], 2, (1,), id="a node too small for a worker"),
        pytest.param([3, 3, 3, 3], 5, (1,), id="three and three hold three of two, apart only two"),
        pytest.param([8], 2, (0,), id="one node"),
        pytest.param([4, 4], 16, None, id="more workers than cores"),
    ],
)
def test_the_fewest_boundaries(sizes: list[int], workers: int, expected: tuple[int, ...] | None) -> None:
    assert fewest_boundaries(one_level(*sizes), alike(sum(sizes), workers)) == expected


def test_an_l3_domain_per_core_tells_nothing() -> None:
    private = replace(MACHINE, l3_of={cpu: cpu % 8 for cpu in ONLINE})
    assert score(case("0-3 4-7", private))["l3"] == 0


RUN_CPU = [
    pytest.param("nri-server", 3, "0-17 18-35 36-53", id="siblings apart"),
    pytest.param("ul-x86_64-64cpu-linux6.2", 2, "0-1 2-3", id="one node"),
    pytest.param("ghw-i7-1270P", 4, "0-2 3-5 6-8 9-11", id="adjacent siblings of P-cores: CPU numbers for cores"),
    pytest.param("hwloc-16amd64-8n2c", 3, "0-4 5-9 10-14", id="many nodes"),
    pytest.param("dv13-housekeeping-off-libvirt-caps-resctrl-mba_MBps", 2, "0-11 12-23", id="it looks at no cpuset"),
    pytest.param("ul-x86_64-64cpu-linux6.2", 8, "- - - - - - - -", id="more workers than cores die"),
]


@pytest.mark.process
@pytest.mark.parametrize(("name", "workers", "expected"), RUN_CPU)
def test_run_cpu_is_driven_as_torchserve_drives_it(
    name: str, workers: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="run_cpu is part of torch")
    monkeypatch.setattr(topologies, "WORKERS", (workers,))
    (machine,) = [machine for machine in machines() if machine.name == name]
    assert machine.lscpu is not None
    (played,) = topologies.contest(machine, "run_cpu", partial(topologies.run_cpu, machine.lscpu))
    assert played.slices == case(expected, machine).slices


@needs_captures
@pytest.mark.process
@pytest.mark.no_cover
@pytest.mark.parametrize("place", [FILE, CAPTURES], ids=["facts", "captures"])
def test_run_cpu_is_driven_as_it_was_when_the_captures_were_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the counts that came with the captures, on x86 machines of which nothing is forbidden."""
    pytest.importorskip("torch", reason="run_cpu is part of torch")
    monkeypatch.setattr(topologies, "WORKERS", (2, 3, 4, 8))
    monkeypatch.setattr(topologies, "fewest_boundaries", lambda groups, limits: None)  # they did not count these
    with open(CAPTURES / "native_score.csv", newline="") as file:
        rows = {(row["name"], int(row["W"])): row for row in csv.DictReader(file)}
    columns = {
        "smt_inside": "smt_cores",
        "smt_between": "overlap_cores",
        "overlapping": "overlap_workers",
        "idle": "idle_cores",
        "idle_avoidable": "idle_avoidable",
    }
    with_l3 = {
        record.stem for record in RECORDS if any(one.get("llc") for one in json.loads(record.read_text())["cpus"])
    }
    compared = 0
    for machine in machines(place):
        odd = machine.name == "hwloc-fakeheterocpunuma" or machine.arch != "x86_64"  # CPUs without node; odd core ids
        if odd or machine.lscpu is None or machine.allowed - machine.isolated != machine.core_of.keys():
            continue
        for played in topologies.contest(machine, "run_cpu", partial(topologies.run_cpu, machine.lscpu)):
            row = rows.get((machine.name, played.workers))
            if row and row["status"] == "ok" and not played.error:
                counts = score(played)
                assert {key: counts[key] for key in columns} == {
                    key: int(row[theirs]) for key, theirs in columns.items()
                }, (machine.name, played.workers)
                places = {"numa_cross": machine.node_of}
                if machine.name in with_l3:  # without, ours are clusters or packages, and theirs are none
                    places["l3_cross"] = machine.l3_of
                for column, place_of in places.items():
                    held = [cpus & machine.allowed for cpus in played.slices if cpus]
                    assert sum(len({place_of[cpu] for cpu in cpus}) > 1 for cpus in held) == int(row[column])
                compared += 1
            elif row and row["status"] == "infeasible":
                assert played.error
    assert compared > 200


HARD = (
    "smt_inside",
    "smt_between",
    "overlapping",
    "offline",
    "nonexistent",
    "not_allowed",
    "idle",
    "mixed_avoidable",
    "dead",
)

PROMISES = ("numa_avoidable", "package_avoidable", "l3_avoidable", "uneven", "unequal", "unmet", "idle_avoidable")


SMALL = "nri-sample1"
SCORED = ["flux-ipa20", SMALL, "hwloc-16amd64-8n2c-cpusets", "nri-server", "flux-sierra", "hwloc-20s390-2g6s4c"]


def one_machine(name: str, directory: Path) -> Path:
    (line,) = [line for line in FILE.read_text().splitlines() if line.startswith(f"{name} ")]
    (directory / "machine").write_text(line)
    return directory / "machine"


@pytest.fixture(params=[*SCORED, pytest.param("captures", marks=needs_captures)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One machine: the line with its facts, or a directory with its capture."""
    if request.param != "captures":
        return one_machine(request.param, tmp_path)
    for kind, suffix in (("json", "json"), ("sysfs", "tar.xz"), ("lscpu", "txt")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{SMALL}.{suffix}").symlink_to(CAPTURES / kind / f"{SMALL}.{suffix}")
    return tmp_path


@pytest.mark.process  # run_cpu imports torch, which asks ldconfig
@pytest.mark.no_cover
def test_the_command_scores_a_machine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert topologies.main([str(place), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["machines"] == 1
    assert document["totals"]["ts-cores"]["cases"] == len(topologies.WORKERS)
    assert not [case for case in document["cases"] if case["contestant"] == "ts-cores" and case["error"]]
    promised = {*HARD, *PROMISES}
    assert {key: document["totals"]["ts-cores"].get(key, 0) for key in promised} == dict.fromkeys(promised, 0)
    several = document["totals"][topologies.SEVERAL]
    assert several["cases"] > 10
    promised -= {"idle"}  # a fixed size may leave cores of its type idle
    assert {key: several.get(key, 0) for key in promised} == dict.fromkeys(promised, 0)


@pytest.mark.process
def test_without_json_there_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert topologies.main([str(one_machine(SMALL, tmp_path))]) == 0
    said = capsys.readouterr().out
    assert f"\n| cases | {len(topologies.WORKERS)} | " in said
    assert said.endswith("\nmisses of ts-cores: 0\n")


def test_a_tree_lies_in_memory_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with machines()[0].tree() as root:
        assert Path(root, "sys/devices/system/cpu/online").exists()
        assert list(tmp_path.iterdir()) == []
    assert not Path(root).exists()


def test_a_directory_without_captures_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert topologies.main([str(tmp_path)]) == 1
    assert f"{tmp_path}/json: no captured machine" in capsys.readouterr().err


def test_a_line_that_says_nothing_sensible_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machines"
    for line in ("name", "name cores=0-1;2", "name cores=0-x", "name like=other", "name cores"):
        file.write_text(f"# a comment\n{line}\n")
        assert topologies.main([str(file)]) == 1
        assert capsys.readouterr().err.startswith(f"{file}:2: "), line
