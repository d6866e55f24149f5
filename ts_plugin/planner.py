"""Who gets which cores: topology and demands in, one disjoint slice per worker out. Pure: no I/O, no clock, no chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ts_plugin.policy import Policy
from ts_plugin.topology import Topology

__all__ = ["Demand", "Plan", "PlanError", "Slice", "plan"]


class PlanError(ValueError):
    """No plan exists; the message has both numbers and the remedy."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one worker may use and asks for, in the order of arrival.

    ``allowed`` are the CPUs of its cpuset and mask, ``quota`` the CFS limit in CPUs; ``cores`` is a fixed number of
    cores, ``share`` its weight when the rest is divided, ``held`` the CPUs of the slice it has now (few moves).
    """

    allowed: frozenset[int]
    policy: Policy = Policy()
    quota: float | None = None
    cores: int | None = None
    share: float = 1.0
    held: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Slice:
    """The cores of one worker: ``cpus`` in its affinity mask, ``threads`` intra-op threads.

    ``pinned`` is False where only the threads are bounded; ``cpus`` are then all CPUs that it may use.
    """

    cpus: tuple[int, ...]
    threads: int
    numa_nodes: tuple[int, ...]
    l3_domains: tuple[int, ...]
    packages: tuple[int, ...]
    pinned: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """One slice per demand, in the same order. ``reserved`` CPUs are part of ``idle``."""

    slices: tuple[Slice, ...]
    idle: frozenset[int]
    reserved: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


def plan(topology: Topology, demands: Sequence[Demand]) -> Plan:
    """Return a slice for every demand.

    Raises:
        PlanError: no plan exists, for example a node that the machine does not have.
    """
    raise NotImplementedError
