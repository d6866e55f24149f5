"""What a trial may use: cores that no worker of a live server computes on, and memory that is free."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import psutil

from ts_plugin.errors import CommandError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.unbound import unbound_workers
from ts_plugin.machine import discovery
from ts_plugin.machine.cgroups import Cgroups
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Topology
from ts_plugin.machine.tree import Tree
from ts_plugin.machine.words import count
from ts_plugin.planning.eligibility import eligible_cpus, fastest_cores
from ts_plugin.planning.planner import Demand, Slice, plan
from ts_plugin.planning.policy import Policy


@dataclass(frozen=True, slots=True)
class Room:
    """``cpus`` that may be used, of so many ``cores``, ``node_cores`` of them on the smallest NUMA node.

    ``quota`` is the CFS limit in CPUs, which bounds ``cores`` too.
    """

    topology: Topology
    cpus: frozenset[int]
    cores: int
    nodes: tuple[int, ...]  # cores of each NUMA node
    quota: float | None = None

    @property
    def node_cores(self) -> int:
        return min(min(self.nodes), self.cores)

    def instances(self, threads: int) -> int:
        """Return how many workers of so many threads fit beside each other, none across NUMA nodes."""
        return max(min(sum(cores // threads for cores in self.nodes), self.cores // threads), 1)

    def slices(self, threads: int, instances: int) -> tuple[Slice, ...]:
        """Return what so many workers of ts-cores would get."""
        demand = Demand(self.cpus, Policy(), self.quota, cores=threads)
        return plan(self.topology, [demand] * instances).slices


def free_memory() -> int:
    """Return the bytes that new processes may take. Source: cgroup-v2.rst, memory.max and memory.current."""
    free = psutil.virtual_memory().available
    limit = Cgroups(Tree("/")).memory()
    return free if limit is None else min(free, limit)


def find_room(*, anyway: bool = False) -> Room:
    """Return the cores that are free; ``anyway``: all that this process may use, whoever else computes there.

    Raises:
        CommandError: none are free, or there are TorchServe workers that may be on any of them.
        DiscoveryError, LedgerError, PlanError: the machine or the ledger cannot be read, or no CPU is allowed.
    """
    topology, allowance = discovery.read_topology(), discovery.read_allowance()
    ledger = Ledger()
    state = ledger.read()
    strays = [] if anyway else unbound_workers(state)
    if strays:
        pids = ", ".join(str(worker.pid) for worker in strays[:4])
        raise CommandError(
            f"{count(len(strays), 'TorchServe worker')} without a slice in {ledger.directory} (pid {pids}): they may "
            "compute on any core, so that nothing measured here would hold; stop their server, or measure beside it "
            "with --anyway"
        )
    leases = () if anyway else state.leases
    held = {cpu for lease in leases if lease.demand.cores != 0 for cpu in lease.slice.cpus}
    cpus = eligible_cpus(topology, allowance.cpus, Policy())
    busy = {cpu for core in topology.cores if not held.isdisjoint(core.cpus) for cpu in core.cpus}
    free = cpus - busy
    if not free:
        servers = sorted({str(lease.server_pid) for lease in leases})
        raise CommandError(
            f"no free core: workers of server {', '.join(servers)} hold CPUs {format_cpulist(held & cpus)} of the "
            f"{format_cpulist(cpus)} that may be used here; stop the server, start it with --reserve-cores N, or "
            "measure beside it with --anyway"
        )
    chosen, _ = fastest_cores(topology, free, Policy(), 1)
    nodes = Counter(topology.cores[index].node for index in chosen)
    cores = sum(nodes.values())
    if allowance.quota is not None:
        cores = max(min(cores, int(allowance.quota)), 1)
    usable = frozenset(cpu for index in chosen for cpu in topology.cores[index].cpus if cpu in free)
    return Room(topology, usable, cores, tuple(nodes.values()), allowance.quota)
