"""Score plans on captured machines: ts-cores next to TorchServe's own launcher, against what the captures say.

``./dev topologies DIR [--json | --markdown]``: DIR has ``json/NAME.json`` (the truth about a machine),
``sysfs/NAME.tar.xz`` (the kernel files that ts-cores reads) and ``lscpu/NAME.txt`` (what the other launcher reads);
a directory ``derived`` of the same shape inside DIR is scored too. A case is one machine with one number of workers.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness.captures import unpacked
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.machine.discovery import read_allowance, read_topology
from ts_plugin.planning.planner import Demand, Slice, plan

__all__ = [
    "COLUMNS",
    "WORKERS",
    "Case",
    "Machine",
    "fewest_boundaries",
    "Slicer",
    "cases",
    "contest",
    "machines",
    "run_cpu",
    "score",
    "ts_cores",
]

WORKERS = (1, 2, 3, 4, 5, 8, 16)

COLUMNS = {
    "smt_inside": "cores with several siblings in one slice",
    "smt_between": "cores shared between slices",
    "overlapping": "workers that share a core",
    "offline": "CPUs offline",
    "nonexistent": "CPUs that do not exist",
    "not_allowed": "CPUs not allowed",
    "numa": "boundaries between NUMA nodes inside slices",
    "numa_avoidable": "… more than a lower bound",
    "l3": "boundaries between L3 domains inside slices",
    "l3_avoidable": "… more than a lower bound",
    "mixed": "boundaries between core types inside slices",
    "mixed_avoidable": "… more than a lower bound",
    "uneven": "slices below half or above twice of the equal share",
    "idle": "cores idle",
    "idle_avoidable": "… more than equal slices leave over",
    "dead": "workers that get no CPUs",
}
_TOTALS = {"cases": "cases", "slices": "slices", "unpinned": "slices without pinning (CFS quota)"}
_WRONG = [key for key in COLUMNS if key not in ("numa", "l3", "mixed", "idle")]

Slicer = Callable[[int, int], frozenset[int] | None]
"""The CPUs of the worker with this rank among so many, None without pinning."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is true about a captured machine; maps are from online CPU to the group it belongs to."""

    name: str
    arch: str
    archive: Path
    lscpu: str | None
    possible: frozenset[int]
    allowed: frozenset[int]
    isolated: frozenset[int]
    core_of: Mapping[int, Any]
    node_of: Mapping[int, Any]
    l3_of: Mapping[int, Any]
    kind_of: Mapping[int, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """The slices that ``contestant`` gave to ``workers`` workers: CPU sets, None where a worker was not pinned.

    A worker that died has no slice, and ``error`` says why. ``chooses_kinds``: core types that no slice touches are
    left out on purpose, as E-cores are by default.
    """

    machine: Machine
    contestant: str
    slices: tuple[frozenset[int] | None, ...]
    workers: int
    chooses_kinds: bool = False
    error: str = ""


def machines(directory: Path) -> list[Machine]:
    """Return all machines of ``directory`` and of ``derived`` below it, by name.

    Raises:
        FileNotFoundError: there is no machine.
    """
    files = [*sorted(directory.glob("json/*.json")), *sorted(directory.glob("derived/json/*.json"))]
    if not files:
        raise FileNotFoundError(f"{directory}/json: no captured machine; DIR must have json/*.json and sysfs/*.tar.xz")
    documents = [json.loads(file.read_text()) for file in files]
    kinds = {_source(document): _by_cpu(document, "class") for document in reversed(documents)}
    return [_machine(file, document, kinds) for file, document in zip(files, documents, strict=True)]


def _source(document: dict[str, Any]) -> tuple[str, str]:
    """Return where a machine was captured; machines derived from it name the same place."""
    source = document["source"]
    return source["repo"], source["path"].partition("  [derived")[0]


def _by_cpu(document: dict[str, Any], key: str) -> dict[int, Any]:
    return {entry["cpu"]: entry.get(key) for entry in document["cpus"] if entry["online"]}


def _machine(file: Path, document: dict[str, Any], kinds: dict[tuple[str, str], dict[int, Any]]) -> Machine:
    base = file.parent.parent
    present = frozenset(entry["cpu"] for entry in document["cpus"])
    kind_of = _by_cpu(document, "class")
    if document["origin"] == "derived" and len(set(kind_of.values())) == 1:
        kind_of = {cpu: kinds[_source(document)].get(cpu) for cpu in kind_of}  # the record of its original knows more
    return Machine(
        name=document["name"],
        arch=document["arch"],
        archive=base / "sysfs" / f"{file.stem}.tar.xz",
        lscpu=_lscpu(base / "lscpu" / f"{file.stem}.txt", document),
        possible=present | parse_cpulist(document["masks"].get("possible") or ""),
        allowed=parse_cpulist(document["allowed_cpus"]),
        isolated=parse_cpulist(document["masks"].get("isolated") or ""),
        core_of=_by_cpu(document, "core"),
        node_of=_by_cpu(document, "node"),
        l3_of=_by_cpu(document, "llc"),
        kind_of=kind_of,
    )


def _lscpu(file: Path, document: dict[str, Any]) -> str | None:
    """Read what lscpu says there; where only the record lacks NUMA nodes, not the machine, it is given node 0."""
    if not file.exists():
        return None
    incomplete = document["origin"] == "hwloc-xml" or "thin-dump" in document["tags"]
    lines = file.read_text().splitlines()
    return "\n".join(f"{line}0" if incomplete and line.endswith(",") else line for line in lines)


def ts_cores(root: str) -> Slicer:
    """Return the planner for the machine below ``root``, as ``ts-cores plan --sys-root`` uses it."""
    topology, allowance = read_topology(root), read_allowance(root)
    demand = Demand(allowed=allowance.cpus, quota=allowance.quota)

    @functools.cache
    def slices(workers: int) -> tuple[Slice, ...]:
        return plan(topology, [demand] * workers).slices

    def slice_of(workers: int, rank: int) -> frozenset[int] | None:
        chosen = slices(workers)[rank]
        return frozenset(chosen.cpus) if chosen.pinned else None

    return slice_of


def run_cpu(lscpu: str, *options: str) -> Slicer:
    """Return what torch.backends.xeon.run_cpu does where ``lscpu`` is the answer of lscpu.

    Its own code runs, as TorchServe starts it for every worker, up to where it would start numactl.

    Raises:
        ImportError: torch is not installed.
    """
    module: Any = importlib.import_module("torch.backends.xeon.run_cpu")
    parser = argparse.ArgumentParser()
    module.create_args(parser)
    module.logger.disabled = True
    launcher = object.__new__(module._Launcher)  # whose __init__ would run lscpu
    launcher.cpuinfo = module._CPUinfo(test_input=lscpu)
    launcher.is_numactl_available = lambda: True
    launcher.set_multi_thread_and_allocator = lambda *_: None  # would change our environment

    options = (*options, "--log-path", os.devnull)  # its main() does the same; without, every launch leaves a directory

    def slice_of(workers: int, rank: int) -> frozenset[int]:
        arguments = parser.parse_args([*options, "--ninstances", str(workers), "--rank", str(rank), "worker.py"])
        with mock.patch.object(module, "start_processes") as start:
            launcher.launch(arguments)
        numactl = start.call_args.kwargs["args"][0]
        return parse_cpulist(numactl[numactl.index("-C") + 1])

    return slice_of


def contest(
    machine: Machine, contestant: str, prepare: Callable[[], Slicer], *, chooses_kinds: bool = False
) -> Iterator[Case]:
    """Yield a case for every number of workers; whatever a contestant raises, the worker is dead."""
    for workers in WORKERS:
        slices: list[frozenset[int] | None] = []
        error = ""
        for rank in range(workers):
            try:
                slices.append(prepare()(workers, rank))
            except Exception as reason:  # noqa: BLE001
                error = f"{type(reason).__name__}: {reason}"
        yield Case(machine, contestant, tuple(slices), workers, chooses_kinds=chooses_kinds, error=error)


def cases(machine: Machine, *, with_run_cpu: bool) -> Iterator[Case]:
    """Yield every case of a machine: ts-cores, and run_cpu as it is and with the option that TorchServe recommends."""
    with unpacked(machine.archive) as root:
        yield from contest(machine, "ts-cores", functools.cache(lambda: ts_cores(root)), chooses_kinds=True)
    if with_run_cpu and machine.lscpu is not None:
        for options in ((), ("--use_logical_core",)):
            prepare = functools.cache(functools.partial(run_cpu, machine.lscpu, *options))
            yield from contest(machine, " ".join(("run_cpu", *options)), prepare)


def score(case: Case) -> Counter[str]:
    """Count what is wrong with a case, by the keys of COLUMNS."""
    machine, workers = case.machine, case.workers
    pinned = [cpus for cpus in case.slices if cpus is not None]
    count = Counter(cases=1, slices=len(case.slices), dead=workers - len(case.slices))
    count["unpinned"] = len(case.slices) - len(pinned)
    for cpus in pinned:
        known = cpus & machine.core_of.keys()
        count["nonexistent"] += len(cpus - machine.possible)
        count["offline"] += len((cpus & machine.possible) - known)
        count["not_allowed"] += len(known - machine.allowed)
    if not pinned:
        return count

    # From here on only what the kernel leaves of a mask: the CPUs that are online and allowed.
    slices = [cpus & machine.allowed for cpus in pinned]
    held = [frozenset(machine.core_of[cpu] for cpu in cpus) for cpus in slices]
    usable = {machine.core_of[cpu] for cpu in machine.allowed - machine.isolated}
    if case.chooses_kinds:
        kinds = {machine.core_of[cpu]: kind for cpu, kind in machine.kind_of.items()}
        touched = {kinds[core] for cores in held for core in cores}
        usable = {core for core in usable if kinds[core] in touched}
    count["smt_inside"] = sum(len(cpus) - len(cores) for cpus, cores in zip(slices, held, strict=True))
    if workers <= len(usable):
        sharers = Counter(core for cores in held for core in cores)
        count["smt_between"] = sum(number > 1 for number in sharers.values())
        count["overlapping"] = sum(any(sharers[core] > 1 for core in cores) for cores in held)
    if not count["unpinned"]:
        count["idle"] = len(usable.difference(*held))
        count["idle_avoidable"] = max(0, count["idle"] - len(usable) % workers)
    places = {"numa": machine.node_of, "l3": machine.l3_of, "mixed": machine.kind_of}
    if max(Counter({machine.core_of[cpu]: l3 for cpu, l3 in machine.l3_of.items()}.values()).values()) == 1:
        places["l3"] = dict.fromkeys(machine.l3_of)  # a domain per core tells nothing
    for column, place_of in places.items():
        groups = Counter(
            {machine.core_of[cpu]: place for cpu, place in place_of.items() if machine.core_of[cpu] in usable}.values()
        )
        count[column] = sum(len({place_of[cpu] for cpu in cpus}) - 1 for cpus in slices if cpus)
        count[f"{column}_avoidable"] = max(0, count[column] - fewest_boundaries(list(groups.values()), workers))
    count["uneven"] = _uneven(
        [frozenset(machine.kind_of[cpu] for cpu in cpus) for cpus in slices], list(map(len, held))
    )
    return count


def _uneven(kinds: Sequence[frozenset[Any]], sizes: Sequence[int]) -> int:
    """Count slices below half or above twice of the equal share, which is that of the slices on the same core types."""
    shares = {
        chosen: Fraction(
            sum(size for size, other in zip(sizes, kinds, strict=True) if other == chosen), kinds.count(chosen)
        )
        for chosen in kinds
    }
    return sum(not shares[chosen] <= 2 * size <= 4 * shares[chosen] for size, chosen in zip(sizes, kinds, strict=True))


def fewest_boundaries(groups: Sequence[int], workers: int) -> int:
    """Return a number of boundaries that ``workers`` slices of groups of these sizes cannot do without.

    A lower bound: it looks at one level alone. Nothing is idle, and every slice has half to twice of the equal share.
    Slices and groups that touch each other form components, and one of k groups crosses k - 1 boundaries. Joining two
    groups makes room for one more slice at most, or for one less. Groups that are too small for a slice are joined
    with each other or with a larger one.
    """
    cores = sum(groups)
    if cores < workers:
        return 0
    least, most = -(-cores // (2 * workers)), 2 * cores // workers
    small = [group for group in groups if group < least]
    return max(
        0,
        workers - sum(group // least for group in groups),
        sum(-(-group // most) for group in groups) - workers,
        len(small) - sum(small) // least,
    )


def _table(totals: Mapping[str, Counter[str]], *, markdown: bool) -> str:
    names = list(totals)
    rows = [["", *names]]
    rows += [[caption, *(str(totals[name][key]) for name in names)] for key, caption in (_TOTALS | COLUMNS).items()]
    if markdown:
        rows.insert(1, ["---", *["---:"] * len(names)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev topologies", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print every case with its slices and counts")
    parser.add_argument("--markdown", action="store_true", help="print the table of totals in Markdown")
    parser.add_argument("--arch", help="only machines of this architecture, such as x86_64")
    options = parser.parse_args(arguments)
    with_run_cpu = importlib.util.find_spec("torch") is not None
    if not with_run_cpu:
        print("torch is not installed: ts-cores alone is scored", file=sys.stderr)
    totals: dict[str, Counter[str]] = {}
    findings, documents = [], []
    try:
        chosen = [machine for machine in machines(options.directory) if options.arch in (None, machine.arch)]
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    for machine in chosen:
        for case in cases(machine, with_run_cpu=with_run_cpu):
            counts = score(case)
            totals.setdefault(case.contestant, Counter()).update(counts)
            if options.json:
                documents.append(_document(case, counts))
            wrong = {key: counts[key] for key in _WRONG if counts[key]}
            if case.contestant == "ts-cores" and wrong:
                findings.append(f"{machine.name}, {case.workers} workers: {wrong} {_listed(case)}")
    if options.json:
        json.dump({"machines": len(chosen), "totals": totals, "cases": documents}, sys.stdout)
        print()
        return 0
    print(f"{len(chosen)} machines, each with {', '.join(map(str, WORKERS))} workers\n")
    print(_table(totals, markdown=options.markdown))
    if findings:
        print("\nWhat is wrong with the slices of ts-cores:", *findings, sep="\n")
    return 0


def _document(case: Case, counts: Counter[str]) -> dict[str, Any]:
    return {
        "machine": case.machine.name,
        "contestant": case.contestant,
        "workers": case.workers,
        "slices": [None if cpus is None else format_cpulist(cpus) for cpus in case.slices],
        "error": case.error or None,
        "counts": {key: counts[key] for key in _TOTALS | COLUMNS},
    }


def _listed(case: Case) -> str:
    return case.error or " | ".join("unpinned" if cpus is None else format_cpulist(cpus) for cpus in case.slices)


if __name__ == "__main__":
    sys.exit(main())
