"""The only reader of ``/sys`` and of cgroup files: what the machine has, and what the kernel lets us use of it.

It runs at every worker start, so a file is read once per core, package or cache rather than once per CPU.
What is missing (gVisor, Firecracker, old kernels) makes the picture flatter and leaves a note; only a machine
without any CPU is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ts_plugin.machine.cgroups import Cgroups
from ts_plugin.machine.cpulist import CpuListError, format_cpulist, parse_cpulist
from ts_plugin.machine.topology import Allowance, Core, NumaNode, Topology
from ts_plugin.machine.tree import Tree

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"

_Value = TypeVar("_Value")
_PackageName = tuple[int | None, int | None, int | None, frozenset[int]]  # id, book, drawer, or siblings without them

_SAME_CAPACITY = 0.9  # of the fastest core of a kind: boost binning makes equal cores differ by a few per cent


class DiscoveryError(OSError):
    """No CPU can be found at all; the message begins with the directory that was read."""


def read_topology(root: str = "/") -> Topology:
    """Return the machine described below ``root``, which is ``/`` or a directory with a captured tree.

    Raises:
        DiscoveryError: there is no CPU below ``root``.

    Source: Documentation/admin-guide/cputopology.rst; Documentation/ABI/stable/sysfs-devices-system-cpu and
        sysfs-devices-node; Documentation/ABI/testing/sysfs-devices-system-cpu (caches, cpu_capacity, midr_el1).
    """
    tree = Tree(root)
    online = _online(tree)
    node_of, nodes = _numa_nodes(tree, online)
    package_of = _packages(tree, online)
    cores = _sibling_sets(tree, online, lambda cpu: (package_of[cpu], node_of[cpu]))
    l3_of = _l3_domains(tree, online, package_of)
    kind_of = _kinds(tree, [cpus[0] for cpus in cores], several_packages=len(set(package_of.values())) > 1)
    capacity_of = _capacities(tree, kind_of)
    for cpus in cores:
        if len({node_of[cpu] for cpu in cpus}) > 1:
            tree.notes.append(f"core {format_cpulist(cpus)} crosses NUMA nodes; counted in node {node_of[cpus[0]]}")
    return Topology(
        cores=tuple(
            Core(
                cpus=cpus,
                package=package_of[cpus[0]],
                node=node_of[cpus[0]],
                l3=l3_of[cpus[0]],
                kind=kind_of.get(cpus[0], 0),
                capacity=capacity_of.get(kind_of.get(cpus[0], 0)),
            )
            for cpus in cores
        ),
        nodes=nodes,
        isolated=(tree.cpulist(f"{_CPU}/isolated") or frozenset()) & online,
        notes=tuple(tree.notes),
    )


def read_allowance(root: str = "/") -> Allowance:
    """Return what a process may use: its affinity mask, what is online, its cpuset and its CFS quota.

    The mask is this process's own, or below another ``root`` the captured one (``proc/self/status``), or all that is
    online.

    Raises:
        DiscoveryError: there is no CPU below ``root``.

    Source: Documentation/admin-guide/cgroup-v1/cpusets.rst, Documentation/admin-guide/cgroup-v2.rst (cpu.max,
        cpuset.cpus.effective), Documentation/scheduler/sched-bwc.rst; man 5 proc (/proc/pid/mountinfo), man 7 cgroups.
    """
    tree = Tree(root)
    mask = _own_mask(tree)
    bounds = _bounds(tree, mask)
    return replace(bounds, cpus=bounds.cpus & mask)


def read_bounds(root: str = "/") -> Allowance:
    """Return what a process with this one's cgroups may use if no affinity mask holds it back further.

    Source: see ``read_allowance``.
    """
    tree = Tree(root)
    return _bounds(tree, _own_mask(tree))


def read_mask(pid: int, root: str = "/") -> frozenset[int] | None:
    """Return the affinity mask of ``pid``; unlike sched_getaffinity with the CPUs that are offline now.

    Source: man 5 proc, /proc/pid/status, Cpus_allowed_list.
    """
    return _mask_of(Tree(root), str(pid))


def memory_nodes(root: str = "/") -> frozenset[int]:
    """Return the NUMA nodes that have memory. Source: Documentation/ABI/stable/sysfs-devices-node."""
    tree = Tree(root)
    for name in ("has_memory", "has_normal_memory", "online"):
        nodes = tree.cpulist(f"{_NODE}/{name}")
        if nodes is not None:
            return nodes
    return frozenset()


def _bounds(tree: Tree, mask: frozenset[int]) -> Allowance:
    """Return the online CPUs of the cpuset, and the quota; one that has no CPU of ``mask`` is somebody else's."""
    cpus = _online(tree)
    cgroups = Cgroups(tree)
    cpuset = cgroups.cpuset()
    if cpuset is not None:
        if cpus & mask & cpuset:
            cpus &= cpuset
        else:
            mask_text = format_cpulist(cpus & mask)
            tree.notes.append(f"cpuset {format_cpulist(cpuset)} has no CPU of the affinity mask {mask_text}; ignored")
    return Allowance(cpus=cpus, quota=cgroups.quota(), notes=tuple(tree.notes))


def _own_mask(tree: Tree) -> frozenset[int]:
    """Return the mask of who asks; all CPUs where a captured tree does not say."""
    return frozenset(os.sched_getaffinity(0)) if tree.base == "/" else _mask_of(tree, "self") or _online(tree)


def _mask_of(tree: Tree, pid: str) -> frozenset[int] | None:
    path = f"proc/{pid}/status"
    for line in (tree.text(path) or "").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            try:
                return parse_cpulist(line.partition(":")[2])
            except CpuListError as error:
                tree.malformed(path, str(error))
    return None


def _online(tree: Tree) -> frozenset[int]:
    online = tree.cpulist(f"{_CPU}/online")
    if not online:
        online = frozenset(n for n in tree.numbered(_CPU, "cpu") if tree.text(f"{_CPU}/cpu{n}/online") != "0")
    if not online:
        # Not the affinity mask: who asks may be bound already, and the machine is the same for all who ask.
        names = (line.split(maxsplit=1)[0] for line in (tree.text("proc/stat") or "").splitlines() if line)
        online = frozenset(int(name[3:]) for name in names if name.startswith("cpu") and name[3:].isdecimal())
        if online:
            tree.notes.append(f"{tree.base}{_CPU}: missing; CPUs as in /proc/stat, each taken as a core")
    if not online:
        raise DiscoveryError(f"{tree.base}{_CPU}: no CPU found; the root must be a directory that has {_CPU}")
    return online


def _numa_nodes(tree: Tree, online: frozenset[int]) -> tuple[dict[int, int], tuple[NumaNode, ...]]:
    """Return the node of every CPU, and all nodes."""
    numbers = tree.numbered(_NODE, "node")
    nodes = []
    for number in numbers:
        directory = f"{_NODE}/node{number}"
        cpus = tree.cpus(f"{directory}/cpulist", f"{directory}/cpumap")
        if cpus is None:
            cpus = frozenset(tree.numbered(directory, "cpu"))  # symbolic links
        memory = _memory_kib(tree, f"{directory}/meminfo")
        nodes.append(NumaNode(number, cpus & online, memory, _distances(tree, numbers, number)))
    # Nodes of one machine never overlap; where a hand-made tree's do, the smallest node is the closest.
    node_of = {cpu: node.number for node in sorted(nodes, key=lambda node: -len(node.cpus)) for cpu in node.cpus}
    unlisted = online - node_of.keys()
    if unlisted:
        number = next(n for n in range(len(nodes) + 1) if n not in numbers)
        if nodes:
            tree.notes.append(
                f"no NUMA node lists CPUs {format_cpulist(unlisted)}; taken as node {number}, without memory"
            )
            memory = 0
        else:
            tree.notes.append(f"{tree.base}{_NODE}: no NUMA node; the machine is taken as one node")
            memory = _memory_kib(tree, "proc/meminfo")
        nodes.append(NumaNode(number, unlisted, memory))
        node_of |= dict.fromkeys(unlisted, number)
    return node_of, tuple(sorted(nodes, key=lambda node: node.number))


def _memory_kib(tree: Tree, path: str) -> int | None:
    for line in (tree.text(path) or "").splitlines():
        _, found, value = line.partition("MemTotal:")
        if found and value.split()[:1] and value.split()[0].isdecimal():
            return int(value.split()[0])
    return None


def _distances(tree: Tree, numbers: list[int], number: int) -> tuple[tuple[int, int], ...]:
    path = f"{_NODE}/node{number}/distance"
    values = (tree.text(path) or "").split()
    if not values:
        return ()
    if len(values) != len(numbers) or not all(value.isdecimal() for value in values):
        tree.malformed(path, f"{len(values)} distances for {len(numbers)} nodes")
        return ()
    return tuple(zip(numbers, map(int, values), strict=True))


def _packages(tree: Tree, online: frozenset[int]) -> dict[int, int]:
    """Return the package of every CPU.

    The kernel's id names a package, on s390 together with its book and drawer; where it knows none (-1), the
    siblings do, and the package gets a number that no other has.
    """
    name_of: dict[int, _PackageName] = {}
    for cpu in sorted(online):
        if cpu in name_of:
            continue
        directory = f"{_CPU}/cpu{cpu}/topology"
        kernel_id = tree.number(f"{directory}/physical_package_id")
        siblings = _siblings(tree, directory, "package_cpus", "core_siblings") or frozenset()
        if kernel_id is None or kernel_id < 0:
            name: _PackageName = (None, None, None, siblings)
        else:
            book = tree.number(f"{directory}/book_id")
            drawer = None if book is None else tree.number(f"{directory}/drawer_id")
            name = (kernel_id, book, drawer, frozenset[int]())
        for sibling in (siblings & online) | {cpu}:
            name_of.setdefault(sibling, name)
    kernel_ids = {kernel_id for kernel_id, *_ in name_of.values()}
    free = (number for number in range(2 * len(name_of)) if number not in kernel_ids)
    number_of: dict[_PackageName, int] = {}
    used: set[int] = set()
    for _, name in sorted(name_of.items()):
        if name not in number_of:
            kernel_id = name[0]
            number_of[name] = next(free) if kernel_id is None or kernel_id in used else kernel_id
            used.add(number_of[name])
    return {cpu: number_of[name] for cpu, name in name_of.items()}


def _siblings(tree: Tree, directory: str, name: str, old_name: str) -> frozenset[int] | None:
    """Read a sibling set under its name since Linux 5.3 or the older one; the CPU itself is always in it."""
    for stem in (name, old_name):
        cpus = tree.cpus(f"{directory}/{stem}_list", f"{directory}/{stem}")
        if cpus is not None:
            return cpus
    return None


def _sibling_sets(tree: Tree, online: frozenset[int], place: Callable[[int], tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return the online SMT siblings of every core, by ascending lowest CPU."""
    cores: list[tuple[int, ...]] = []
    unknown: list[int] = []
    seen: set[int] = set()
    for cpu in sorted(online):
        if cpu in seen:
            continue
        siblings = _siblings(tree, f"{_CPU}/cpu{cpu}/topology", "core_cpus", "thread_siblings")
        if siblings is None:
            unknown.append(cpu)
            continue
        core = ((siblings & online) - seen) | {cpu}
        seen |= core
        cores.append(tuple(sorted(core)))
    if unknown:
        cores += _cores_by_id(tree, unknown, place)
        cores.sort()
    return cores


def _cores_by_id(tree: Tree, cpus: list[int], place: Callable[[int], tuple[int, int]]) -> list[tuple[int, ...]]:
    """Group CPUs whose sibling files are missing: by core id within package and node, else one core per CPU."""
    tree.notes.append(f"no SMT sibling files for CPUs {format_cpulist(cpus)}; cores are told apart by core id, if any")
    fields = dict.fromkeys(("siblings", "cpu cores"), "")
    for line in (tree.text("proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if fields.get(name.strip()) == "":
            fields[name.strip()] = value.strip()
    smt = not fields["siblings"] or fields["siblings"] != fields["cpu cores"]
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in cpus:
        number = tree.number(f"{_CPU}/cpu{cpu}/topology/core_id") if smt else None
        cores.setdefault((-1, cpu) if number is None or number < 0 else (*place(cpu), number), []).append(cpu)
    return [tuple(core) for core in cores.values()]


def _l3_domains(tree: Tree, online: frozenset[int], package_of: dict[int, int]) -> dict[int, int]:
    """Return the L3 domain of every CPU: its highest cache, else its cluster, else its package."""
    domain_of: dict[int, int] = {}
    domains = 0
    without: list[int] = []
    for cpu in sorted(online):
        if cpu in domain_of:
            continue
        shared = _last_level_cache(tree, cpu)
        if shared is None:
            without.append(cpu)
            continue
        for sharer in (shared & online) | {cpu}:
            domain_of.setdefault(sharer, domains)
        domains += 1
    if len(without) == len(online):
        tree.notes.append("no L2 or L3 cache files; a cluster, else a package, is taken as an L3 domain")
    rest: dict[frozenset[int] | int, int] = {}
    for cpu in without:
        cluster = tree.cpus(f"{_CPU}/cpu{cpu}/topology/cluster_cpus_list", f"{_CPU}/cpu{cpu}/topology/cluster_cpus")
        domain_of[cpu] = rest.setdefault(cluster or package_of[cpu], domains + len(rest))
    return domain_of


def _last_level_cache(tree: Tree, cpu: int) -> frozenset[int] | None:
    """Return the CPUs that share the highest data or unified cache with ``cpu``; None if the kernel shows only L1."""
    cache = f"{_CPU}/cpu{cpu}/cache"
    levels = {index: tree.number(f"{cache}/index{index}/level") or 0 for index in tree.numbered(cache, "index")}
    for index in sorted(levels, key=lambda index: -levels[index]):
        if levels[index] > 1 and tree.text(f"{cache}/index{index}/type") != "Instruction":
            return tree.cpus(f"{cache}/index{index}/shared_cpu_list", f"{cache}/index{index}/shared_cpu_map")
    return None


def _kinds(tree: Tree, cpus: list[int], *, several_packages: bool) -> dict[int, int]:
    """Return the core type of every core, named by its lowest CPU: 0 is the fastest; nothing where all are alike.

    Known: the kernel's own lists of a hybrid x86 processor, capacities, ARM's main id. Inferred, in one package only:
    equal cores have equal L1 data caches. A frequency alone tells nothing, since equal cores are binned differently.

    Source: Documentation/scheduler/sched-capacity.rst; arch/x86/events/intel/core.c (cpu_core, cpu_atom); Arm
        Architecture Reference Manual, MIDR_EL1.
    """
    fast = tree.cpulist("sys/devices/cpu_core/cpus")
    if fast and tree.cpulist("sys/devices/cpu_atom/cpus"):
        return {cpu: 0 if cpu in fast else 1 for cpu in cpus}  # some low-power E-cores are in neither list
    capacity = _of_every(cpus, lambda cpu: tree.number(f"{_CPU}/cpu{cpu}/cpu_capacity"))
    if capacity:
        return _kinds_by_capacity(capacity)
    part = _of_every(cpus, lambda cpu: _part(tree.text(f"{_CPU}/cpu{cpu}/regs/identification/midr_el1")))
    if not part and (tree.base != "/" or os.uname().machine.startswith("arm")):
        part = _cpuinfo_parts(tree)  # not on x86: reading it there interrupts every CPU of some kernels
    if len(set(part.values())) > 1:
        return _kinds_by_part(tree, part, cpus)
    if several_packages:
        return {}
    l1d = _of_every(cpus, lambda cpu: _kib(tree.text(f"{_CPU}/cpu{cpu}/cache/index0/size")))
    sizes = sorted(set(l1d.values()), reverse=True)
    if len(sizes) < 2 or any(tree.text(f"{_CPU}/cpu{cpu}/cache/index0/type") != "Data" for cpu in cpus):
        return {}
    tree.notes.append(f"core types are told apart by L1 data caches of {' and '.join(f'{size} KiB' for size in sizes)}")
    return {cpu: sizes.index(size) for cpu, size in l1d.items()}


def _kib(text: str | None) -> int | None:
    """Return the size of a cache, for example 48 for ``48K``."""
    return int(text[:-1]) if text and text.endswith("K") and text[:-1].isdecimal() else None


def _of_every(cpus: list[int], read: Callable[[int], _Value | None]) -> dict[int, _Value]:
    """Return what ``read`` says for every CPU, or nothing if it has no answer for one; gives up at the first."""
    values: dict[int, _Value] = {}
    for cpu in cpus:
        value = read(cpu)
        if value is None:
            return {}
        values[cpu] = value
    return values


def _capacities(tree: Tree, kind_of: dict[int, int]) -> dict[int, float]:
    """Return the capacity of each of several core types against the fastest, or nothing where the kernel has none."""
    if not any(kind_of.values()):
        return {}
    capacity = _of_every(list(kind_of), lambda cpu: tree.number(f"{_CPU}/cpu{cpu}/cpu_capacity"))
    best: dict[int, int] = {}
    for cpu, number in capacity.items():
        best[kind_of[cpu]] = max(number, best.get(kind_of[cpu], 1))
    return {kind: number / best[0] for kind, number in best.items()}


def _kinds_by_capacity(capacity: dict[int, int]) -> dict[int, int]:
    kind_of: dict[int, int] = {}
    kind, best = -1, 0
    for cpu in sorted(capacity, key=lambda cpu: (-capacity[cpu], cpu)):
        if kind < 0 or capacity[cpu] < _SAME_CAPACITY * best:
            kind, best = kind + 1, capacity[cpu]
        kind_of[cpu] = kind
    return kind_of


def _kinds_by_part(tree: Tree, part: dict[int, str], cpus: list[int]) -> dict[int, int]:
    """Rank ARM core types by their highest frequency, which orders types even though it cannot tell them apart."""
    speed: dict[str, int] = {}
    for cpu in cpus:
        frequency = tree.number(f"{_CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq") or 0
        speed[part[cpu]] = max(speed.get(part[cpu], 0), frequency)
    ranking = sorted(speed, key=lambda name: -speed[name])
    return {cpu: ranking.index(part[cpu]) for cpu in cpus}


def _part(midr: str | None) -> str | None:
    """Return implementer and part of a main id: ``0x00000000411fd050`` is ``41d05``; its revision is no core type."""
    return midr[-8:-6] + midr[-4:-1] if midr and len(midr) >= 8 else None


def _cpuinfo_parts(tree: Tree) -> dict[int, str]:
    parts: dict[int, str] = {}
    cpu: int | None = None
    for line in (tree.text("proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "processor" and value.strip().isdecimal():
            cpu = int(value)
        elif name.strip() == "CPU part" and cpu is not None:
            parts[cpu] = value.strip()
    return parts
