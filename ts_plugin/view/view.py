"""The core map as a value: what a picture shows, in whatever form it is drawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby

from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import State
from ts_plugin.ledger.unbound import Unbound, unbound_workers
from ts_plugin.lending import words as lending_words
from ts_plugin.lending.status import computes_on, computing, status_of, summary
from ts_plugin.machine import discovery
from ts_plugin.machine.topology import Core, Topology
from ts_plugin.machine.words import count
from ts_plugin.planning.planner import Plan, Slice

LISTED = 40  # workers that a picture lists one by one; more are summed up, a line per model


class Use(StrEnum):
    """What a core is used for."""

    OWNED = "owned"
    SHARED = "shared"  # its CPUs are open to workers whose threads are bounded but not pinned
    ELSEWHERE = "elsewhere"  # in the slice of another server's worker
    IDLE = "idle"
    RESERVED = "reserved"
    BARRED = "barred"  # outside the allowed CPUs


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker in the picture; a planned one is only a slice, without process and model."""

    slice: Slice
    pid: int | None = None
    model: str = ""
    version: str = ""
    worker_id: str = ""
    moves: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return for example ``resnet18 1.0``; ``worker 0`` for a planned one."""
        return f"{self.model} {self.version}".strip() or f"worker {self.worker_id}"


@dataclass(frozen=True, slots=True)
class Group:
    """A package, NUMA node or L3 domain in the picture: ``groups`` inside it, or ``cores`` in the innermost one.

    ``kind`` is package, node or l3.
    """

    kind: str
    label: str
    groups: tuple[Group, ...] = ()
    cores: tuple[Core, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """All that a picture shows.

    ``elsewhere`` are the CPUs in slices of workers that the picture leaves out, ``unbound`` the PIDs of workers without
    a slice, each with the reason. ``ledger`` is the file that was read, ``server_pid`` the one frontend that is shown.
    ``users`` are the PIDs of the workers that compute now, by CPU; None where that is not known. With ``whole`` the
    workers are listed one by one however many they are.
    """

    topology: Topology
    workers: tuple[Worker, ...]
    allowed: frozenset[int]
    reserved: frozenset[int] = frozenset()
    elsewhere: frozenset[int] = frozenset()
    unbound: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()
    title: str = "ts-cores"
    ledger: str = ""
    host: str = ""
    server_pid: int | None = None
    users: Mapping[int, int] | None = None
    whole: bool = False
    _owners: dict[int, list[int]] = field(init=False, repr=False, compare=False)
    _places: dict[int, int] = field(init=False, repr=False, compare=False)
    _ranks: dict[int, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        owners: dict[int, list[int]] = {}
        for index, worker in enumerate(self.workers):
            for cpu in worker.slice.cpus if worker.slice.pinned else ():
                owners.setdefault(cpu, []).append(index)
        object.__setattr__(self, "_owners", owners)
        places = {worker.pid: index for index, worker in enumerate(self.workers) if worker.pid is not None}
        object.__setattr__(self, "_places", places)
        ranks = {
            index: (row, member) for row, members in enumerate(self.listed()) for member, index in enumerate(members)
        }
        object.__setattr__(self, "_ranks", ranks)

    def owners(self, core: Core) -> tuple[int, ...]:
        """Return the positions in ``workers`` of those whose slice has a CPU of ``core``."""
        return tuple(sorted({index for cpu in core.cpus for index in self._owners.get(cpu, ())}))

    def in_slice(self, cpu: int) -> bool:
        return cpu in self._owners

    def use(self, core: Core) -> Use:
        if self.owners(core):
            return Use.OWNED
        if not self.reserved.isdisjoint(core.cpus):
            return Use.RESERVED
        if self.allowed.isdisjoint(core.cpus):
            return Use.BARRED
        if not self.elsewhere.isdisjoint(core.cpus):
            return Use.ELSEWHERE
        threads_only = (worker.slice.cpus for worker in self.workers if not worker.slice.pinned)
        return Use.SHARED if any(not set(cpus).isdisjoint(core.cpus) for cpus in threads_only) else Use.IDLE

    def borrower(self, core: Core) -> int | Use | None:
        """Return the position in ``workers`` of the one that computes on ``core`` now without owning it.

        Use.ELSEWHERE is a worker that the picture leaves out, on a core of one that it shows.
        """
        for cpu in core.cpus:
            pid = (self.users or {}).get(cpu)
            place = None if pid is None else self._places.get(pid)
            if place is not None and place not in self._owners.get(cpu, ()):
                return place
            if pid is not None and place is None and self.in_slice(cpu):
                return Use.ELSEWHERE
        return None

    def borrowed(self) -> int:
        """Return the number of cores that have a borrower."""
        return sum(self.borrower(core) is not None for core in self.topology.cores)

    def resting(self) -> bool:
        """Tell whether a slice leaves SMT siblings of its cores free."""
        return any(self.owners(core) and not self.in_slice(cpu) for core in self.topology.cores for cpu in core.cpus)

    def computes_on(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the CPUs that worker ``index`` computes on now, its own and borrowed ones; None: not known."""
        piece = self.workers[index].slice
        now = computes_on(self.workers[index].pid, piece, self.users)
        if now is None:
            return None
        return tuple(cpu for cpu in now if cpu in piece.cpus), tuple(cpu for cpu in now if cpu not in piece.cpus)

    @property
    def summed_up(self) -> bool:
        """Whether the list has a line per model, since there are more than LISTED workers."""
        return len(self.workers) > LISTED and not self.whole

    def listed(self) -> tuple[tuple[int, ...], ...]:
        """Return the positions in ``workers`` of those in each row of the list."""
        if not self.summed_up:
            return tuple((index,) for index in range(len(self.workers)))
        models: dict[tuple[str, str], list[int]] = {}
        for index, worker in enumerate(self.workers):
            models.setdefault((worker.model, worker.version), []).append(index)
        return tuple(map(tuple, models.values()))

    def rank(self, index: int) -> tuple[int, int]:
        """Return the number of the row that worker ``index`` stands in, and its place there."""
        return self._ranks[index]

    def tag(self, index: int) -> str:
        """Return the letters of the row that worker ``index`` stands in."""
        return tag(self.rank(index)[0])

    def label(self, index: int) -> str:
        """Return for example ``A (resnet18 1.0)``, and which of its model's workers it is if letters do not say so."""
        worker = self.workers[index]
        which = f", worker {worker.worker_id}" if self.summed_up and worker.model else ""
        return f"{self.tag(index)} ({worker.name}{which})"

    def idle(self) -> frozenset[int]:
        """Return the allowed CPUs of the cores that no worker uses and no option keeps free."""
        idle = {cpu for core in self.topology.cores if self.use(core) is Use.IDLE for cpu in core.cpus}
        return self.allowed & idle

    def packages(self) -> tuple[Group, ...]:
        """Return the machine as packages of NUMA nodes of L3 domains; a level that tells nothing is left out.

        NUMA nodes that span packages, and L3 domains that span NUMA nodes, appear in each of them.
        """
        memory = {node.number: node.memory_kib for node in self.topology.nodes}

        def node_label(number: int) -> str:
            size = memory.get(number)
            return f"NUMA node {number}" + (f" · {_gibibytes(size)}" if size else "")

        def node(number: int, cores: tuple[Core, ...]) -> Group:
            domains = _split(cores, lambda core: core.l3)
            if len(domains) == 1 or all(len(part) == 1 for _, part in domains):
                return Group("node", node_label(number), cores=cores)
            return Group("node", node_label(number), tuple(Group("l3", f"L3 {l3}", cores=part) for l3, part in domains))

        packages = []
        for number, cores in _split(self.topology.cores, lambda core: core.package):
            nodes = tuple(node(*part) for part in _split(cores, lambda core: core.node))
            package = Group("package", f"package {number}", nodes)
            if len(nodes) == 1:
                package = replace(nodes[0], kind="package", label=f"{package.label} · {nodes[0].label}")
            packages.append(package)
        return tuple(packages)

    def summary(self) -> str:
        """Return one line, for example ``2 workers on 12 of 16 cores · 2 reserved · 2 idle``."""
        counts = dict.fromkeys(Use, 0)
        for core in self.topology.cores:
            counts[self.use(core)] += 1
        total = sum(counts.values())
        used = counts[Use.OWNED] + counts[Use.SHARED]
        words = [f"{count(len(self.workers), 'worker')} on {used} of {count(total, 'core')}"]
        others = (use for use in Use if use not in (Use.OWNED, Use.SHARED))
        words += [f"{counts[use]} {WORDS[use]}" for use in others if counts[use]]
        words += [f"{borrowed} borrowed"] if (borrowed := self.borrowed()) else []
        words += [f"{len(self.unbound)} unbound"] if self.unbound else []
        return " · ".join(words)


WORDS = {
    Use.OWNED: "in a slice",
    Use.SHARED: "shared: threads bounded, not pinned",
    Use.ELSEWHERE: "another server's",
    Use.IDLE: "idle",
    Use.RESERVED: "reserved",
    Use.BARRED: "not allowed",
}


def current_view(server_pid: int | None = None, *, whole: bool = False) -> View:
    """Return the picture of what is held now on this machine; only one frontend's workers if ``server_pid`` is given.

    ``whole`` is that of View.

    Raises:
        LedgerError: the ledger is not this user's alone.
    """
    ledger = Ledger()
    state = ledger.read()
    unbound = unbound_workers(state)
    picture = of_state(state, discovery.read_topology(), discovery.read_allowance().cpus, unbound, server_pid)
    seen = lending_words.look(ledger)
    shown = [status for worker in picture.workers if (status := status_of(state, worker.pid, seen))]
    told = summary(shown)
    return replace(
        picture,
        ledger=ledger.path,
        host=os.uname().nodename,
        server_pid=server_pid,
        users=computing(seen, state),
        whole=whole,
        notes=(*picture.notes, *[told] * bool(told)),
    )


def of_state(
    state: State,
    topology: Topology,
    allowed: frozenset[int],
    unbound: Iterable[Unbound] = (),
    server_pid: int | None = None,
) -> View:
    """Return the picture of a ledger's content; what its servers and workers may use counts as allowed, too."""

    def wanted(owner: int | None) -> bool:
        return server_pid is None or owner == server_pid

    leases = sorted(state.leases, key=lambda lease: (lease.slice.cpus, lease.pid))
    workers = tuple(
        Worker(lease.slice, lease.pid, lease.model, lease.version, lease.worker_id, lease.moves, lease.notes)
        for lease in leases
        if wanted(lease.server_pid)
    )
    without_lease = [item for item in unbound if wanted(item.server_pid)]
    foreign = (
        cpu for lease in leases if not wanted(lease.server_pid) and lease.slice.pinned for cpu in lease.slice.cpus
    )
    return View(
        topology,
        workers,
        allowed.union(*(item.allowed for item in state.servers), *(lease.demand.allowed for lease in leases)),
        reserved=state.reserved,
        elsewhere=frozenset(foreign),
        unbound=tuple((item.pid, item.reason) for item in without_lease if not item.elsewhere),
        notes=(*state.notes, *not_judged(without_lease)),
    )


def not_judged(workers: Iterable[Unbound]) -> tuple[str, ...]:
    """Return one sentence for each owner of the workers that the ledger cannot know."""
    found: dict[str, list[int]] = {}
    for worker in workers:
        if worker.elsewhere:
            found.setdefault(worker.elsewhere, []).append(worker.pid)
    return tuple(
        f"not judged here: {count(len(pids), 'worker')} of {whose} (pid {', '.join(map(str, pids))})"
        for whose, pids in found.items()
    )


def of_plan(
    topology: Topology, plan: Plan, allowed: frozenset[int], notes: tuple[str, ...], models: Sequence[str] = ()
) -> View:
    """Return the picture of what would be given to workers, of these models if they are named."""
    names = models or [""] * len(plan.slices)
    workers = tuple(
        Worker(piece, model=name, worker_id=str(number))
        for number, (name, piece) in enumerate(zip(names, plan.slices, strict=True))
    )
    return View(topology, workers, allowed, plan.reserved, notes=notes, title="ts-cores plan")


def tag(index: int) -> str:
    """Return the short name of a row of workers in the map: A to Z, then AA, AB, ..."""
    return (tag(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _split(cores: Sequence[Core], key: Callable[[Core], int]) -> list[tuple[int, tuple[Core, ...]]]:
    return [(number, tuple(part)) for number, part in groupby(sorted(cores, key=key), key)]


def _gibibytes(kib: int) -> str:
    gib = kib / 2**20
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB" if gib >= 1 else f"{kib / 2**10:.0f} MiB"
