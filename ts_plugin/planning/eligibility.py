"""Which CPUs and cores a worker may use at all. Pure.

A core is its position in ``topology.cores``.
"""

from __future__ import annotations

from collections.abc import Iterable

from ts_plugin.machine.topology import Topology
from ts_plugin.machine.words import listed
from ts_plugin.planning.allotment import choose_types
from ts_plugin.planning.core_groups import PlanError
from ts_plugin.planning.policy import Policy

_SLOWER = 0.5  # capacity of a core against one of the next faster type, where the kernel does not say


def eligible_cpus(topology: Topology, allowed: frozenset[int], policy: Policy) -> frozenset[int]:
    """The online CPUs that are allowed, on the nodes and of the list that the policy names, and not isolated.

    Skip isolated CPUs unless the core list names them or nothing else is allowed: the kernel puts no process there
    by itself.
    """
    online = topology.online
    cpus = allowed & online
    if not cpus:
        raise PlanError(
            f"no allowed CPU is online: allowed {listed(allowed)}, online {listed(online)}; "
            "widen the cpuset or the affinity mask"
        )
    if policy.core_list is not None:
        if offline := policy.core_list - online:
            raise PlanError(
                f"CPUs {listed(offline)} of --core-list are not online ({listed(online)} are); "
                "remove them from the list"
            )
        if denied := policy.core_list - cpus:
            raise PlanError(
                f"CPUs {listed(denied)} of --core-list are not allowed ({listed(cpus)} are); "
                "remove them from the list or widen the cpuset"
            )
        cpus = policy.core_list
    if policy.node_ids is not None:
        there = {core.node for core in topology.cores}
        if missing := policy.node_ids - there - {node.number for node in topology.nodes}:
            raise PlanError(
                f"NUMA node {listed(missing)} does not exist; this machine has {listed(there)}; change --node-id"
            )
        within = frozenset(cpu for core in topology.cores if core.node in policy.node_ids for cpu in core.cpus)
        if not cpus & within:
            raise PlanError(
                f"NUMA node {listed(policy.node_ids)} has none of the CPUs {listed(cpus)} that may be used "
                f"(its own: {listed(within)}); change --node-id or widen the cpuset"
            )
        cpus &= within
    if policy.core_list is None:
        cpus = cpus - topology.isolated or cpus
    return cpus


def mixes_types(policy: Policy) -> bool:
    """Whether slices may mix core types: where the user chose the cores, or wants equal sizes above all."""
    return policy.use_e_cores or policy.core_list is not None or policy.equal


def capacity_of_types(topology: Topology) -> dict[int, float]:
    """The capacity of a core of each type, against a core of the fastest."""
    return {core.kind: core.capacity or _SLOWER**core.kind for core in topology.cores}


def fastest_cores(
    topology: Topology, cpus: frozenset[int], policy: Policy, workers: int
) -> tuple[frozenset[int], tuple[str, ...]]:
    """The cores of ``cpus`` that so many workers use, and notes.

    On a machine of one type, with --use-e-cores and with a core list these are all cores. Else the slowest type is
    left out, as long as whole slices of it have less capacity than a further slice of the faster cores.
    """
    cores = {i for i, core in enumerate(topology.cores) if not cpus.isdisjoint(core.cpus)}
    kinds = sorted({topology.cores[i].kind for i in cores})
    if len(kinds) == 1 or policy.use_e_cores or policy.core_list is not None:
        return frozenset(cores), ()
    capacity_of = capacity_of_types(topology)
    capacities = [capacity_of[kind] for kind in kinds]
    by_type = [{i for i in cores if topology.cores[i].kind == kind} for kind in kinds]
    slowest = len(kinds) - 1
    if policy.equal:
        used = set(range(slowest))
    else:
        used = set(choose_types(list(map(len, by_type)), capacities, [1.0] * min(workers, len(cores))))
    for kind in range(len(kinds)):  # Workers share cores only when they outnumber all of them.
        if sum(len(by_type[t]) for t in used) < workers + policy.reserve_cores:
            used.add(kind)

    def cpus_of(types: Iterable[int]) -> str:
        return listed(cpu for t in types for i in by_type[t] for cpu in topology.cores[i].cpus if cpu in cpus)

    notes = []
    unused = set(range(len(kinds))) - used
    if unused:
        count = sum(len(by_type[t]) for t in unused)
        which = "the slowest" if unused == {slowest} else "another"
        notes.append(
            f"{count} of {len(cores)} cores are left out because they are of {which} type (CPUs {cpus_of(unused)}): "
            "one slow core holds up all threads of its slice; --use-e-cores uses them"
        )
    if slowest in used:
        faster = cpus_of(used - {slowest})
        ratio = ", ".join(f"{capacity:.2g}" for capacity in capacities)
        known = any(core.capacity for core in topology.cores)
        notes.append(
            f"{workers} workers use the slowest cores too (CPUs {cpus_of([slowest])}), in slices of their own: a "
            f"further slice of the faster ones (CPUs {faster}) would have less capacity; cores count {ratio} by type "
            f"({'as the kernel says' if known else 'assumed: the kernel does not say'}); "
            f"--core-list {faster} uses the faster ones alone, --use-e-cores treats all cores alike"
        )
    return frozenset(i for t in used for i in by_type[t]), tuple(notes)
