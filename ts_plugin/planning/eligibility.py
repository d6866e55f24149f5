"""Which CPUs and cores a worker may use at all. Pure.

A core is its position in ``topology.cores``.
"""

from __future__ import annotations

from collections.abc import Iterable

from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Topology
from ts_plugin.planning.cells import PlanError
from ts_plugin.planning.policy import Policy

__all__ = ["fast", "narrow"]


def narrow(topology: Topology, allowed: frozenset[int], policy: Policy) -> frozenset[int]:
    """The online CPUs that are allowed, on the nodes and of the list that the policy names, and not isolated.

    Isolated CPUs that a core list names are used, and so are they where nothing else is allowed: the kernel leaves
    them out of every default mask, so somebody meant it.
    """
    online = topology.online
    cpus = allowed & online
    if not cpus:
        raise PlanError(
            f"no allowed CPU is online: allowed {_listed(allowed)}, online {_listed(online)}; "
            "widen the cpuset or the affinity mask"
        )
    if policy.core_list is not None:
        if offline := policy.core_list - online:
            raise PlanError(
                f"CPUs {_listed(offline)} of --core-list are not online ({_listed(online)} are); "
                "remove them from the list"
            )
        if denied := policy.core_list - cpus:
            raise PlanError(
                f"CPUs {_listed(denied)} of --core-list are not allowed ({_listed(cpus)} are); "
                "remove them from the list or widen the cpuset"
            )
        cpus = policy.core_list
    if policy.node_ids is not None:
        there = {core.node for core in topology.cores}
        if missing := policy.node_ids - there - {node.number for node in topology.nodes}:
            raise PlanError(
                f"NUMA node {_listed(missing)} does not exist; this machine has {_listed(there)}; change --node-id"
            )
        within = frozenset(cpu for core in topology.cores if core.node in policy.node_ids for cpu in core.cpus)
        if not cpus & within:
            raise PlanError(
                f"NUMA node {_listed(policy.node_ids)} has none of the CPUs {_listed(cpus)} that may be used "
                f"(its own: {_listed(within)}); change --node-id or widen the cpuset"
            )
        cpus &= within
    if policy.core_list is None:
        cpus = cpus - topology.isolated or cpus
    return cpus


def fast(topology: Topology, cpus: frozenset[int], policy: Policy) -> tuple[frozenset[int], tuple[str, ...]]:
    """The cores of ``cpus``, without the slowest type of two or more, unless asked for or named by a core list.

    Also returns notes. A slice that mixes types runs as fast as its slowest core.
    """
    cores = {i for i, core in enumerate(topology.cores) if not cpus.isdisjoint(core.cpus)}
    kinds = sorted({topology.cores[i].kind for i in cores})
    if len(kinds) == 1 or policy.use_e_cores or policy.core_list is not None:
        return frozenset(cores), ()
    slow = {i for i in cores if topology.cores[i].kind == kinds[-1]}
    numbers = _listed(cpu for i in slow for cpu in topology.cores[i].cpus)
    note = (
        f"{len(slow)} of {len(cores)} cores are left out because they are of the slowest type (CPUs {numbers}): "
        "one slow core holds up all threads of its slice; --use-e-cores uses them"
    )
    return frozenset(cores - slow), (note,)


def _listed(cpus: Iterable[int]) -> str:
    return format_cpulist(cpus) or "none"
