"""The machine as a value: packages, NUMA nodes, L3 domains and cores. No I/O happens here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Core:
    """One physical core, named by its lowest CPU, because the kernel's core ids repeat across packages.

    ``cpus`` are all its online SMT siblings in ascending order, for example ``(3, 59)``.
    ``l3`` numbers the L3 domain: what shares the highest cache, usually L3, else L2; where the kernel shows no such
    cache a cluster or package. ``kind`` is the core type of a hybrid from the fastest (0) to the slowest; a machine
    of one type has only kind 0. ``capacity`` is that of its type against the fastest, 0.5 for example; None where the
    kernel does not say.
    """

    cpus: tuple[int, ...]
    package: int
    node: int
    l3: int
    kind: int = 0
    capacity: float | None = None

    @property
    def number(self) -> int:
        return self.cpus[0]


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One NUMA node; ``cpus`` is empty for a memory-only node, ``memory_kib`` is None where the kernel does not say.

    CPUs that no node lists make up a node of their own, with 0 KiB and the lowest free number.
    ``distances`` maps node ids to the firmware's relative distance, 10 being the node itself.
    """

    number: int
    cpus: frozenset[int]
    memory_kib: int | None
    distances: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole machine: online cores in ascending order of their lowest CPU, and every NUMA node.

    ``isolated`` are the CPUs of ``isolcpus=``; ``notes`` tell a person what was missing or odd while reading it.
    """

    cores: tuple[Core, ...]
    nodes: tuple[NumaNode, ...]
    isolated: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def online(self) -> frozenset[int]:
        return frozenset(cpu for core in self.cores for cpu in core.cpus)

    def cores_of(self, cpus: Iterable[int]) -> tuple[Core, ...]:
        """Return the cores that own at least one of ``cpus``."""
        wanted = frozenset(cpus)
        return tuple(core for core in self.cores if not wanted.isdisjoint(core.cpus))


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the kernel lets a process use.

    ``cpus``: affinity mask, online CPUs and cpuset together. ``quota``: CPUs' worth of time per period under the
    tightest CFS limit of all cgroup ancestors, 2.5 for example; None without a limit.
    """

    cpus: frozenset[int]
    quota: float | None = None
    notes: tuple[str, ...] = ()

    def limit(self, mask: frozenset[int] | None) -> frozenset[int] | None:
        """Return ``mask`` if it holds a process back further than this, by taskset for example; else None.

        A mask that covers the cpuset is no restriction: it follows the cpuset, and CPUs that come online.
        """
        return None if mask is None or mask >= self.cpus else mask

    def within(self, limit: frozenset[int] | None) -> Allowance:
        """Return what is left inside ``limit``; where that is nothing, all of it, as the kernel does it."""
        return self if limit is None or limit.isdisjoint(self.cpus) else replace(self, cpus=self.cpus & limit)
