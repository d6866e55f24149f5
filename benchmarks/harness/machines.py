"""The machines of benchmarks/machines.txt, which says how they are written: as values, and as trees of kernel files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import CHECKOUT
from benchmarks.harness.captures import in_memory
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Core, NumaNode, Topology

FILE = CHECKOUT / "benchmarks" / "machines.txt"

Groups = tuple[frozenset[int], ...]

_WORD = re.compile(r"(?:(?P<number>\d+)@)?(?P<cpus>-|[\d,:-]+)(?:x(?P<size>\d+))?(?P<further>(?:\+\d+)*)")
_PERIOD = 100_000  # microseconds, the kernel's default


@dataclass(frozen=True, slots=True)
class Facts:
    """One machine. Groups have the CPUs that are online; a group may have none, and a CPU may be in no group.

    ``nodes`` is empty where the kernel shows no node, ``l3`` where it shows no cache, ``types`` where all cores are
    alike, and ``capacities`` where the kernel does not say them. ``cpuset`` is how the cpuset is mounted: "v1", "v2",
    "dev", or "" where there is none and ``allowed`` is all that is online. ``quota`` is in CPUs' worth of time.
    """

    name: str
    arch: str
    cores: Groups
    packages: Groups
    nodes: Mapping[int, frozenset[int]]
    distances: tuple[tuple[int, ...], ...]
    l3: Groups
    clusters: Groups
    types: Groups
    capacities: tuple[int, ...]
    possible: frozenset[int]
    online: frozenset[int]
    isolated: frozenset[int]
    cpuset: str
    allowed: frozenset[int]
    quota: float | None

    def topology(self) -> Topology:
        """Return what discovery has to find in ``tree``, but for its notes."""
        nodes = dict(self.nodes)
        if unlisted := self.online.difference(*nodes.values()):
            nodes[min(set(range(len(nodes) + 1)) - nodes.keys())] = unlisted
        said = dict(zip(self.nodes, self.distances, strict=False))
        return Topology(
            tuple(self._core(cpus, nodes) for cpus in self.cores),
            tuple(
                NumaNode(number, nodes[number], None, tuple(zip(self.nodes, said.get(number, ()), strict=False)))
                for number in sorted(nodes)
            ),
            self.isolated & self.online,
        )

    def _core(self, cpus: frozenset[int], nodes: Mapping[int, frozenset[int]]) -> Core:
        cpu = min(cpus)
        domains = (*self.l3, *(self.clusters or self.packages))  # the latter where the kernel shows no cache
        kind = next((kind for kind, members in enumerate(self.types) if cpu in members), 0)
        return Core(
            cpus=tuple(sorted(cpus)),
            package=next(number for number, members in enumerate(self.packages) if cpu in members),
            node=min((len(members), number) for number, members in nodes.items() if cpu in members)[1],
            l3=next(number for number, members in enumerate(domains) if cpu in members),
            kind=kind,
            capacity=self.capacities[kind] / self.capacities[0] if self.capacities else None,
        )

    def lscpu(self) -> str:
        """Return what ``lscpu --parse=CPU,Core,Socket,Node`` prints there: cores and sockets counted by their CPUs."""
        rows = ["# CPU,Core,Socket,Node"]
        sockets: dict[int, int] = {}
        core_of = {cpu: number for number, cpus in enumerate(self.cores) for cpu in cpus}
        for cpu in sorted(self.online):
            package = next(number for number, members in enumerate(self.packages) if cpu in members)
            node = next((str(number) for number, members in self.nodes.items() if cpu in members), "")
            rows.append(f"{cpu},{core_of[cpu]},{sockets.setdefault(package, len(sockets))},{node}")
        return "\n".join(rows)

    @contextmanager
    def tree(self) -> Iterator[str]:
        """Make the kernel files that say all this, for as long as the context lasts."""
        with in_memory() as root:
            made = set()
            for path, text in self._files():  # tens of thousands for all machines: no pathlib here
                directory, _, name = f"{root}/{path}".rpartition("/")
                if directory not in made:
                    os.makedirs(directory, exist_ok=True)
                    made.add(directory)
                file = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT)
                os.write(file, f"{text}\n".encode())
                os.close(file)
            yield root

    def _files(self) -> Iterator[tuple[str, str]]:
        system = "sys/devices/system"
        for name, cpus in (("possible", self.possible), ("online", self.online), ("isolated", self.isolated)):
            yield f"{system}/cpu/{name}", format_cpulist(cpus)
        for number, cpus in self.nodes.items():
            yield f"{system}/node/node{number}/cpulist", format_cpulist(cpus)
        for number, distances in zip(self.nodes, self.distances, strict=False):
            yield f"{system}/node/node{number}/distance", " ".join(map(str, distances))
        for name, groups in (
            ("topology/core_cpus_list", self.cores),
            ("topology/package_cpus_list", self.packages),
            ("topology/cluster_cpus_list", self.clusters),
            ("cache/index3/shared_cpu_list", self.l3),
        ):
            yield from _of_each(f"{system}/cpu/cpu{{}}/{name}", groups, map(format_cpulist, groups))
        packages = map(str, range(len(self.packages)))
        yield from _of_each(f"{system}/cpu/cpu{{}}/topology/physical_package_id", self.packages, packages)
        yield from _of_each(f"{system}/cpu/cpu{{}}/cache/index3/level", self.l3, ["3"] * len(self.l3))
        yield from self._files_of_types()
        yield from self._files_of_cgroups()

    def _files_of_types(self) -> Iterator[tuple[str, str]]:
        """Core types are told as kernels of their kind do: by capacity, by lists on x86, else by ARM's main id."""
        cpu = "sys/devices/system/cpu/cpu{}"
        kinds = range(len(self.types))
        if self.capacities:
            yield from _of_each(f"{cpu}/cpu_capacity", self.types, map(str, self.capacities))
        elif self.arch == "x86_64":
            for name, cpus in zip(("cpu_core", "cpu_atom"), self.types, strict=False):
                yield f"sys/devices/{name}/cpus", format_cpulist(cpus)
        else:
            parts = (f"0x00000000410f{0xD00 + kind:03x}0" for kind in kinds)
            yield from _of_each(f"{cpu}/regs/identification/midr_el1", self.types, parts)
            yield from _of_each(
                f"{cpu}/cpufreq/cpuinfo_max_freq", self.types, (str(3_000_000 >> kind) for kind in kinds)
            )

    def _files_of_cgroups(self) -> Iterator[tuple[str, str]]:
        cpus, mounts = format_cpulist(self.allowed), "sys/fs/cgroup"
        if self.cpuset == "dev":
            yield "proc/mounts", "none /dev/cpuset cgroup rw,cpuset,noprefix 0 0"
            yield "proc/self/cpuset", "/job"
            yield "dev/cpuset/job/cpus", cpus
        elif self.cpuset == "v2":
            yield "proc/self/mountinfo", f"31 23 0:27 / /{mounts} rw - cgroup2 cgroup2 rw"
            yield "proc/self/cgroup", "0::/job"
            yield f"{mounts}/job/cpuset.cpus.effective", cpus
        elif self.cpuset == "v1":
            yield "proc/self/mountinfo", f"32 23 0:28 / /{mounts}/cpuset rw - cgroup cgroup rw,cpuset"
            yield "proc/self/cgroup", "3:cpuset:/job"
            yield f"{mounts}/cpuset/job/cpuset.cpus", cpus
        elif self.quota:
            yield "proc/self/mountinfo", f"33 23 0:29 / /{mounts}/cpu rw - cgroup cgroup rw,cpu,cpuacct"
            yield "proc/self/cgroup", "2:cpu,cpuacct:/job"
            yield f"{mounts}/cpu/job/cpu.cfs_quota_us", str(round(self.quota * _PERIOD))
            yield f"{mounts}/cpu/job/cpu.cfs_period_us", str(_PERIOD)


def read(file: Path = FILE) -> list[Facts]:
    """Return all machines of ``file`` in their order.

    Raises:
        ValueError: a line is not written as the file says; the message begins with its place.
    """
    fields_of: dict[str, dict[str, str]] = {}
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        try:
            name, *words = line.split()
            fields = dict(word.split("=", 1) for word in words)
            if "like" in fields:
                fields = fields_of[fields["like"]] | fields
            fields_of[name] = fields
            found.append(_facts(name, fields))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file}:{number}: {error!r}; how a machine is written stands at the top") from error
    return found


def _facts(name: str, fields: Mapping[str, str]) -> Facts:
    written = [cpus for _, cpus in _groups(fields["cores"])]
    offline = frozenset(_numbers(fields.get("offline", "-")))
    online = frozenset().union(*written) - offline

    def placed(key: str) -> list[tuple[int, frozenset[int]]]:
        groups = list(_groups(fields.get(key, "")))
        named = frozenset().union(*(cpus for _, cpus in groups))
        follow = [(min(core), core - named) for core in written]  # a core's other CPUs, where they are not named
        return [
            (number, cpus.union(*(rest for lowest, rest in follow if lowest in cpus)) & online)
            for number, cpus in groups
        ]

    nodes = dict(placed("nodes"))
    cpuset, _, allowed = fields.get("cpuset", "").partition(":")
    return Facts(
        name=name,
        arch=fields.get("arch", "x86_64"),
        cores=tuple(sorted((core & online for core in written if core & online), key=min)),
        packages=tuple(cpus for _, cpus in placed("packages") if cpus) or (online,),
        nodes=nodes,
        distances=_distances(fields.get("distances", ""), len(nodes)),
        l3=tuple(cpus for _, cpus in placed("l3") if cpus),
        clusters=tuple(cpus for _, cpus in placed("clusters") if cpus),
        types=tuple(cpus for _, cpus in placed("types") if cpus),
        capacities=tuple(map(int, fields["capacities"].split(","))) if "capacities" in fields else (),
        possible=online | offline,
        online=online,
        isolated=frozenset(_numbers(fields.get("isolated", "-"))),
        cpuset=cpuset,
        allowed=frozenset(_numbers(allowed)) & online if cpuset else online,
        quota=float(fields["quota"]) if "quota" in fields else None,
    )


def _groups(text: str) -> Iterator[tuple[int, frozenset[int]]]:
    """Yield each group with its number."""
    following = 0
    for word in text.split("/") if text else ():
        if (match := _WORD.fullmatch(word)) is None:
            raise ValueError(f"{word!r} is no group of CPUs")
        cpus = _numbers(match["cpus"])
        size = int(match["size"] or max(1, len(cpus)))
        further = (0, *map(int, match["further"].split("+")[1:]))
        number = int(match["number"] or following)
        for start in range(0, max(1, len(cpus)), size):
            yield number, frozenset(cpu + step for cpu in cpus[start : start + size] for step in further)
            number += 1
        following = number


def _numbers(text: str) -> list[int]:
    """Return the CPUs of a list, in their order: ``0-6:2,1`` is 0, 2, 4, 6, 1."""
    cpus: list[int] = []
    for part in text.split(",") if text != "-" else ():
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        cpus += range(int(first), int(last or first) + 1, int(step or 1))
    return cpus


def _distances(text: str, nodes: int) -> tuple[tuple[int, ...], ...]:
    if not text:
        return ()
    if text.isdecimal():
        return tuple(tuple(10 if row == column else int(text) for column in range(nodes)) for row in range(nodes))
    return tuple(tuple(map(int, row.split(","))) for row in text.split("/"))


def _of_each(path: str, groups: Groups, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield a file for each CPU of each group, with the group's text; ``{}`` in ``path`` is the CPU."""
    for cpus, text in zip(groups, texts, strict=True):
        for cpu in cpus:
            yield path.format(cpu), text
