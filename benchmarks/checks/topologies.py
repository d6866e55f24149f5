"""Score plans on captured machines: ts-cores next to TorchServe's own launcher, against what is true there.

``./dev topologies [PLACE] [--json]``: PLACE is a file like benchmarks/machines.txt, which is taken where
none is given; kernel files are made from the facts in it. Or it is a directory of captures: ``json/NAME.json`` (the
truth about a machine), ``sysfs/NAME.tar.xz`` (the kernel files that ts-cores reads) and ``lscpu/NAME.txt`` (what the
other launcher reads); a directory ``derived`` of the same shape inside it is scored too. A case is one machine with one
number of workers, which ask for the same; for ts-cores also workers of several models, some with a fixed size or a
larger share.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import operator
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness.captures import unpacked
from benchmarks.harness.machines import FILE, Facts, read
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.machine.discovery import read_allowance, read_topology
from ts_plugin.planning.planner import Demand, Slice, plan
from ts_plugin.planning.policy import Policy

WORKERS = (1, 2, 3, 4, 5, 8, 16)
SEVERAL = "ts-cores, several models"
BITS = 16  # of each number in a mix of workers, and of each level in a cost

COLUMNS = {
    "smt_inside": "cores with several siblings in one slice",
    "smt_between": "cores shared between slices",
    "overlapping": "workers that share a core",
    "offline": "CPUs offline",
    "nonexistent": "CPUs that do not exist",
    "not_allowed": "CPUs not allowed",
    "mixed": "boundaries between core types inside slices",
    "mixed_avoidable": "… more than necessary",
    "numa": "boundaries between NUMA nodes inside slices",
    "numa_avoidable": "… more than necessary",
    "package": "boundaries between packages inside slices",
    "package_avoidable": "… more than necessary",
    "l3": "boundaries between L3 domains inside slices",
    "l3_avoidable": "… more than necessary",
    "uneven": "slices below half or above twice of the equal share",
    "unequal": "divisions worse than one into equal sizes",
    "unmet": "slices that have not the fixed size asked for",
    "idle": "cores idle",
    "idle_avoidable": "… more than equal slices leave over",
    "dead": "workers that get no CPUs",
}
_TOTALS = {"cases": "cases", "slices": "slices", "unpinned": "slices without pinning (CFS quota)"}
_WRONG = [key for key in COLUMNS if key not in ("mixed", "numa", "package", "l3", "idle")]

Place = tuple[Any, ...]
"""Where a core is: its group on each level, the outermost first."""

Wish = tuple[int | None, float]
"""What a worker asks for: a fixed number of cores, or its share."""

Slicer = Callable[[int, int], frozenset[int] | None]
"""The CPUs of the worker with this rank among so many, None without pinning."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is true about a captured machine; maps are from online CPU to the group it belongs to."""

    name: str
    arch: str
    tree: Callable[[], AbstractContextManager[str]]  # its kernel files, for as long as the context lasts
    lscpu: str | None
    possible: frozenset[int]
    allowed: frozenset[int]
    isolated: frozenset[int]
    core_of: Mapping[int, Any]
    node_of: Mapping[int, Any]
    l3_of: Mapping[int, Any]
    package_of: Mapping[int, Any]
    kind_of: Mapping[int, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """The slices that ``contestant`` gave to ``workers`` workers: CPU sets, None where a worker was not pinned.

    A worker that died has no slice, and ``error`` says why. ``chooses_kinds``: core types that no slice touches are
    left out on purpose, as E-cores are by default. ``wishes`` are those of workers that do not all ask for the same;
    ``equal`` are the slices if sizes have to be equal (or in proportion to the shares), whatever they cross.
    """

    machine: Machine
    contestant: str
    slices: tuple[frozenset[int] | None, ...]
    workers: int
    chooses_kinds: bool = False
    error: str = ""
    wishes: tuple[Wish, ...] = ()
    equal: tuple[frozenset[int] | None, ...] = ()


def machines(place: Path = FILE) -> list[Machine]:
    """Return all machines of a file like benchmarks/machines.txt, or of a directory and of ``derived`` below it.

    Raises:
        OSError: there is no machine.
        ValueError: a line of the file is malformed.
    """
    if not place.is_dir():
        return [_from_facts(facts) for facts in read(place)]
    files = [*sorted(place.glob("json/*.json")), *sorted(place.glob("derived/json/*.json"))]
    if not files:
        raise FileNotFoundError(f"{place}/json: no captured machine; there must be json/*.json and sysfs/*.tar.xz")
    documents = [json.loads(file.read_text()) for file in files]
    kinds = {_source(document): _by_cpu(document, "class") for document in reversed(documents)}
    return [_machine(file, document, kinds) for file, document in zip(files, documents, strict=True)]


def _from_facts(facts: Facts) -> Machine:
    cores = {cpu: core for core in facts.topology().cores for cpu in core.cpus}
    domain_of = {cpu: domain for domain in facts.l3 or facts.clusters or facts.packages for cpu in domain}
    return Machine(
        name=facts.name,
        arch=facts.arch,
        tree=facts.tree,
        lscpu=facts.lscpu(),
        possible=facts.possible,
        allowed=facts.allowed,
        isolated=facts.isolated,
        core_of={cpu: core.number for cpu, core in cores.items()},
        node_of={cpu: core.node for cpu, core in cores.items()},
        l3_of={cpu: domain_of.get(cpu) for cpu in cores},
        package_of={cpu: core.package for cpu, core in cores.items()},
        kind_of={cpu: core.kind for cpu, core in cores.items()},
    )


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
        tree=functools.partial(unpacked, base / "sysfs" / f"{file.stem}.tar.xz"),
        lscpu=_lscpu(base / "lscpu" / f"{file.stem}.txt", document),
        possible=present | parse_cpulist(document["masks"].get("possible") or ""),
        allowed=parse_cpulist(document["allowed_cpus"]),
        isolated=parse_cpulist(document["masks"].get("isolated") or ""),
        core_of=_by_cpu(document, "core"),
        node_of=_by_cpu(document, "node"),
        l3_of=_l3_domains(document),
        package_of=_by_cpu(document, "pkg"),
        kind_of=kind_of,
    )


def _l3_domains(document: dict[str, Any]) -> dict[int, Any]:
    """The last cache of every CPU; where the record has none at all, the cluster, else the package, counts as one."""
    found = _by_cpu(document, "llc")
    clusters, packages = _by_cpu(document, "cluster_cpus"), _by_cpu(document, "pkg")
    return found if any(found.values()) else {cpu: clusters[cpu] or packages[cpu] for cpu in found}


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


def mixes(workers: int, cores: int) -> Iterator[tuple[Wish, ...]]:
    """Yield what workers of several models ask for: half of the equal share, three times of it, and both."""
    small = max(1, cores // (2 * workers)), 1.0
    yield tuple(small if w % 2 else (None, 1.0) for w in range(workers))
    yield tuple((None, 1.0 if w % 3 else 3.0) for w in range(workers))
    yield tuple([small, (None, 1.0), (None, 2.5)][w % 3] for w in range(workers))


def mixed_cases(machine: Machine, root: str) -> Iterator[Case]:
    """Yield a case for every mix of two workers or more, as ``ts-cores plan --model`` would divide the cores."""
    topology, allowance = read_topology(root), read_allowance(root)
    cores = len(topology.cores_of(allowance.cpus))

    def slices(wishes: Sequence[Wish], *, equal: bool) -> tuple[frozenset[int] | None, ...]:
        policy = Policy(equal=equal)
        made = plan(topology, [Demand(allowance.cpus, policy, allowance.quota, *wish) for wish in wishes]).slices
        return tuple(frozenset(piece.cpus) if piece.pinned else None for piece in made)

    for workers in WORKERS:
        for wishes in mixes(workers, cores) if 1 < workers <= cores else ():
            default, equal = slices(wishes, equal=False), slices(wishes, equal=True)
            yield Case(machine, SEVERAL, default, workers, chooses_kinds=True, wishes=wishes, equal=equal)


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
    with machine.tree() as root:
        yield from contest(machine, "ts-cores", functools.cache(lambda: ts_cores(root)), chooses_kinds=True)
        yield from mixed_cases(machine, root)
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
    kind_of = {machine.core_of[cpu]: kind for cpu, kind in machine.kind_of.items()}
    if case.chooses_kinds:
        touched = {kind_of[core] for cores in held for core in cores}
        usable = {core for core in usable if kind_of[core] in touched}
    count["smt_inside"] = sum(len(cpus) - len(cores) for cpus, cores in zip(slices, held, strict=True))
    if workers <= len(usable):
        sharers = Counter(core for cores in held for core in cores)
        count["smt_between"] = sum(number > 1 for number in sharers.values())
        count["overlapping"] = sum(any(sharers[core] > 1 for core in cores) for cores in held)
    if not count["unpinned"]:
        count["idle"] = len(usable.difference(*held))
        count["idle_avoidable"] = max(0, count["idle"] - len(usable) % workers)
    sizes = list(map(len, held))
    kinds = [frozenset(machine.kind_of[cpu] for cpu in cpus) for cpus in slices]
    one_kind = len(frozenset().union(*kinds)) == 1
    wishes = case.wishes or ((None, 1.0),) * workers
    limits = _limits(len(usable), wishes)
    if case.wishes:  # A core type that only fixed sizes use may have cores left.
        count["idle_avoidable"] = count["idle"] if one_kind else 0
    places = _places(machine)
    home = {machine.core_of[cpu]: tuple(place_of[cpu] for place_of in places.values()) for cpu in machine.core_of}
    teams: list[tuple[set[Any], Sequence[Wish]]] = [(usable, wishes)]
    if len(slices) == workers and all(len(chosen) == 1 for chosen in kinds):  # Capacity decides who is on which type.
        teams[:] = [_team(usable, kind_of, chosen, zip(wishes, kinds, strict=True)) for chosen in dict.fromkeys(kinds)]
    fewest = [
        fewest_boundaries(Counter(home[core] for core in cores), _limits(len(cores), mine)) for cores, mine in teams
    ]
    for level, (column, place_of) in enumerate(places.items()):
        count[column] = _boundaries(place_of, slices)
        if None not in fewest:  # Where nobody can, nobody is to blame.
            count[f"{column}_avoidable"] = max(0, count[column] - sum(numbers[level] for numbers in fewest if numbers))
    if not case.wishes:
        count["uneven"] = _uneven(kinds, sizes)
    elif one_kind:
        count["uneven"] = sum(
            not least <= size <= most
            for size, (least, most), (fixed, _) in zip(sizes, limits, wishes, strict=False)
            if fixed is None
        )
    count["unmet"] = sum(fixed not in (None, size) for size, (fixed, _) in zip(sizes, wishes, strict=False))
    if case.equal and None not in case.equal:
        equal = [cpus for cpus in case.equal if cpus is not None]
        rivals = [
            ([_boundaries(place_of, made) for place_of in places.values()], _spread(made, wishes))
            for made in (equal, slices)
        ]
        count["unequal"] = int(one_kind and sum(map(len, equal)) == sum(sizes) and rivals[0] < rivals[1])
    return count


def _places(machine: Machine) -> dict[str, Mapping[int, Any]]:
    """By column, the group that every CPU belongs to; the level that matters most comes first."""
    places = {"mixed": machine.kind_of, "numa": machine.node_of, "package": machine.package_of, "l3": machine.l3_of}
    if max(Counter({machine.core_of[cpu]: l3 for cpu, l3 in machine.l3_of.items()}.values()).values()) == 1:
        places["l3"] = dict.fromkeys(machine.l3_of)  # a domain per core tells nothing
    return places


def _team(
    usable: Iterable[Any], kind_of: Mapping[Any, Any], chosen: frozenset[Any], workers: Iterable[tuple[Wish, Any]]
) -> tuple[set[Any], list[Wish]]:
    """The cores of one type, and what the workers on it ask for."""
    return {core for core in usable if kind_of[core] in chosen}, [wish for wish, kinds in workers if kinds == chosen]


def _boundaries(place_of: Mapping[int, Any], slices: Iterable[frozenset[int]]) -> int:
    return sum(len({place_of[cpu] for cpu in cpus}) - 1 for cpus in slices if cpus)


def _spread(slices: Sequence[frozenset[int]], wishes: Sequence[Wish]) -> Fraction:
    """Squared sizes, divided by their shares: least where sizes are equal, or in proportion to the shares."""
    pairs = zip(slices, wishes, strict=True)
    return sum((Fraction(len(cpus) ** 2) / Fraction(share) for cpus, (fixed, share) in pairs if not fixed), Fraction())


def _limits(cores: int, wishes: Sequence[Wish]) -> list[tuple[int, int]]:
    """The fewest and the most cores of each worker.

    That is half to twice of its share of what fixed sizes leave; but nobody's upper limit is below twice the equal one.
    Cores that nobody is to have count as workers.
    """
    fair = [Fraction(share) for fixed, share in wishes if not fixed]
    free = cores - sum(fixed or 0 for fixed, _ in wishes)
    if not fair:
        return [(fixed or 0, fixed or 0) for fixed, _ in wishes] + [(1, 1)] * free  # what is left over, core by core
    rest, weight = free, sum(fair)
    for share in sorted(fair):  # Whoever is due less than one core gets one, which the others have less.
        if rest * share < weight:
            rest, weight = rest - 1, weight - share
    shares = [max(Fraction(1), rest * Fraction(share) / weight) if weight else Fraction(1) for _, share in wishes]
    return [
        (fixed, fixed) if fixed else (max(1, ceil(share / 2)), max(1, floor(2 * max(share, Fraction(free, len(fair))))))
        for (fixed, _), share in zip(wishes, shares, strict=True)
    ]


def _uneven(kinds: Sequence[frozenset[Any]], sizes: Sequence[int]) -> int:
    """Count slices below half or above twice of the equal share, which is that of the slices on the same core types."""
    shares = {
        chosen: Fraction(
            sum(size for size, other in zip(sizes, kinds, strict=True) if other == chosen), kinds.count(chosen)
        )
        for chosen in kinds
    }
    return sum(not shares[chosen] <= 2 * size <= 4 * shares[chosen] for size, chosen in zip(sizes, kinds, strict=True))


def fewest_boundaries(groups: Mapping[Place, int], limits: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
    """Return how many boundaries of each level slices within ``limits`` cannot do without; None if nobody can.

    ``groups`` are the numbers of cores by place, ``limits`` each worker's fewest and most cores. Nothing is idle. First
    comes the outermost level; the other numbers are those that it leaves possible.

    Slices and groups that touch each other form components, and one of k groups crosses k - 1 boundaries at least. All
    ways to form components are tried, level by level within those of the level before: so fewer cannot be, and where
    no component of an outer level has more than one group, so many can.
    """
    depth = len(next(iter(groups)))
    cost = _Fewest(groups, limits).of_all()
    return (
        None if cost is None else tuple(cost >> BITS * (depth - 1 - level) & (1 << BITS) - 1 for level in range(depth))
    )


class _Fewest:
    """Tables of what it costs at least to divide a set of groups among a mix of workers.

    A mix is how many workers there are with each of the limits, a cost how many boundaries are crossed on each level;
    both are numbers with some bits for each.
    """

    def __init__(self, groups: Mapping[Place, int], limits: Sequence[tuple[int, int]]) -> None:
        self.places, self.sizes = list(groups), list(groups.values())
        self.depth = len(self.places[0])
        kinds = sorted(Counter(limits).items())
        self.everybody = sum(number << BITS * k for k, (_, number) in enumerate(kinds))
        self.spans: dict[int, tuple[int, int]] = {}  # the fewest and the most cores of a mix
        for numbers in itertools.product(*(range(number + 1) for _, number in kinds)):
            mix = sum(number << BITS * k for k, number in enumerate(numbers))
            each = [(n * low, n * high) for n, ((low, high), _) in zip(numbers, kinds, strict=True)]
            self.spans[mix] = sum(low for low, _ in each), sum(high for _, high in each)
        self.known: dict[Any, dict[int, int]] = {}

    def of_all(self) -> int | None:
        """The least cost for all workers on all groups: larger components are tried until they cost more."""
        members = tuple(range(len(self.places)))
        level = next((i for i in range(self.depth) if len(self._children(members, i)) > 1), self.depth - 1)
        for joins in range(len(members)):
            cost = self._table(members, level, joins).get(self.everybody)
            if cost is not None and cost >> BITS * (self.depth - 1 - level) <= joins:
                return cost
        return None

    def _children(self, members: Iterable[int], level: int) -> list[tuple[int, ...]]:
        found: dict[Any, list[int]] = {}
        for i in members:
            found.setdefault(self.places[i][level], []).append(i)
        return list(map(tuple, found.values()))

    def _look(self, members: tuple[int, ...], level: int) -> Any:
        """What is the same for sets of groups that differ in nothing that matters from this level on."""
        if level == self.depth:
            return sum(self.sizes[i] for i in members)
        return tuple(sorted((self._look(child, level + 1) for child in self._children(members, level)), key=repr))

    def _table(self, members: tuple[int, ...], level: int, joins: int | None = None) -> dict[int, int]:
        """The least cost of each mix that can have just these groups, no more than ``joins`` + 1 in a component."""
        key = level, joins, self._look(members, level)
        if key not in self.known:
            if level == self.depth:
                size = sum(self.sizes[i] for i in members)
                self.known[key] = {mix: 0 for mix, (low, high) in self.spans.items() if mix and low <= size <= high}
            else:
                self.known[key] = self._joined(members, level, joins)
        return self.known[key]

    def _joined(self, members: tuple[int, ...], level: int, joins: int | None) -> dict[int, int]:
        alike: dict[Any, list[tuple[int, ...]]] = {}
        for child in self._children(members, level):
            alike.setdefault(self._look(child, level + 1), []).append(child)
        children, unit = list(alike.values()), 1 << BITS * (self.depth - 1 - level)
        some = list(itertools.product(*(range(len(same) + 1) for same in children)))
        components: dict[tuple[int, ...], dict[int, int]] = {}
        for numbers in some[1:]:
            crossed = sum(numbers) - 1
            if joins is None or crossed <= joins:
                inside = itertools.chain(*(same[:n] for same, n in zip(children, numbers, strict=True)))
                table = self._table(tuple(sorted(itertools.chain(*inside))), level + 1)
                components[numbers] = {mix: cost + crossed * unit for mix, cost in table.items()}
        best = {some[0]: {0: 0}}
        for numbers in some[1:]:
            first = next(k for k, number in enumerate(numbers) if number)  # is in one of the components
            best[numbers] = {}
            for more, table in components.items():
                rest = tuple(map(operator.sub, numbers, more))
                if more[first] and min(rest) >= 0:
                    self._improve(best[numbers], best[rest], table)
        return best[some[-1]]

    def _improve(self, found: dict[int, int], some: Mapping[int, int], more: Mapping[int, int]) -> None:
        for mix, cost in some.items():
            for other, further in more.items():
                if mix + other in self.spans:
                    found[mix + other] = min(found.get(mix + other, cost + further), cost + further)


def _table(totals: Mapping[str, Counter[str]]) -> str:
    names = list(totals)
    rows = [["", *names], ["---", *["---:"] * len(names)]]
    rows += [[caption, *(str(totals[name][key]) for name in names)] for key, caption in (_TOTALS | COLUMNS).items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev topologies", description=__doc__.split("\n")[0])
    parser.add_argument(
        "place", type=Path, nargs="?", default=FILE, help="facts or captures, instead of benchmarks/machines.txt"
    )
    parser.add_argument("--json", action="store_true", help="print every case with its slices and counts")
    parser.add_argument("--arch", help="only machines of this architecture, such as x86_64")
    options = parser.parse_args(arguments)
    with_run_cpu = importlib.util.find_spec("torch") is not None
    if not with_run_cpu:
        print("torch is not installed: ts-cores alone is scored", file=sys.stderr)
    totals: dict[str, Counter[str]] = {}
    findings, documents = [], []
    try:
        chosen = [machine for machine in machines(options.place) if options.arch in (None, machine.arch)]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for machine in chosen:
        for case in cases(machine, with_run_cpu=with_run_cpu):
            counts = score(case)
            totals.setdefault(case.contestant, Counter()).update(counts)
            if options.json:
                documents.append(_document(case, counts))
            wrong = {key: counts[key] for key in _WRONG if counts[key]}
            if case.contestant in ("ts-cores", SEVERAL) and wrong:
                findings.append(f"{machine.name}, {case.wishes or case.workers} workers: {wrong} {_listed(case)}")
    if options.json:
        json.dump({"machines": len(chosen), "totals": totals, "cases": documents}, sys.stdout)
        print()
        return 0
    print(f"{len(chosen)} machines, each with {', '.join(map(str, WORKERS))} workers\n")
    print(_table(totals))
    print(f"\nmisses of ts-cores: {len(findings)}", *findings, sep="\n")
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
