"""Who gets which cores: topology and demands in, one disjoint slice per worker out. Pure, and always the same.

Demands that may use the same cores under the same rules form a pool. Overlapping pools divide the cores first
(``allotment``), then every pool is divided among its workers (``pool``): it is cut into local parts, of fixed sizes and
by weight (``partition``). Where a CFS quota says that others use the same CPUs, threads are only counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ts_plugin.machine.topology import Core, Topology
from ts_plugin.machine.words import count, listed
from ts_plugin.planning.allotment import Taker, allot, apportion
from ts_plugin.planning.core_groups import PlanError
from ts_plugin.planning.eligibility import eligible_cpus, fastest_cores, mixes_types
from ts_plugin.planning.policy import Lend, Pin, Policy
from ts_plugin.planning.pool import Worker, divide, pack, share_cores

MOST_WORKERS = 4096  # in a plan; no server starts as many, and a plan for more only takes time
LATENCY_CORES = 4  # run_cpu's --latency-mode


@dataclass(frozen=True, slots=True)
class Demand:
    """What one worker may use and asks for, in the order of arrival.

    ``allowed`` are the CPUs of its cpuset and mask, ``quota`` the CFS limit in CPUs; ``cores`` is a fixed number of
    cores, ``share`` its weight when the rest is divided, ``held`` the CPUs of the slice it has now (few moves).
    A worker with ``cores=0`` owns none: it runs with one thread wherever it may, and does not count when cores are
    divided.
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

    One CPU per core and as many threads as cores; with ``Policy.logical`` all siblings and as many threads as CPUs.
    ``pinned`` is False where only the threads are bounded; ``cpus`` are then all CPUs that it may use.

    ``reach`` are the CPUs of all slices that lend to each other, this one included: equal for all of them. Empty where
    the slice neither lends nor borrows.
    """

    cpus: tuple[int, ...]
    threads: int
    numa_nodes: tuple[int, ...]
    l3_domains: tuple[int, ...]
    packages: tuple[int, ...]
    pinned: bool = True
    reach: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """One slice per demand, in the same order. ``reserved`` CPUs are part of ``idle``.

    ``idle`` are the allowed CPUs of cores that no slice touches; SMT siblings of a slice's CPUs are not idle.
    """

    slices: tuple[Slice, ...]
    idle: frozenset[int]
    reserved: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


def plan(topology: Topology, demands: Sequence[Demand]) -> Plan:
    """Return a slice for every demand.

    Always: slices are disjoint sets of whole cores, unless there are more workers than cores; then each core carries
    about equally many one-thread workers. Nothing is idle that a worker could use, except where a fixed size, a
    reserve, a quota or ``skip_cross_node_cores`` says so, or a slice would have to mix core types. After that, in this
    order: no worker gets less than half of its share of what fixed sizes leave, or more than twice of it (or of the
    equal share, if that is more); fewest boundaries (groups touched minus one) between core types, NUMA nodes, packages
    and L3 domains; equal sizes, or in proportion to the shares; short distances; few moves. ``Policy.equal`` puts these
    sizes (within one core) before the boundaries.

    Raises:
        PlanError: no plan exists, for example a node that the machine does not have.
    """
    notes: list[str] = []
    members = _members(topology, demands, notes)
    reserved = _reserve(topology, members)
    owners = [member for member in members if member.demand.cores != 0]
    limited, pools = _pools(topology, owners, reserved)
    slices = {member.place: member.guest(topology, reserved) for member in members if member.demand.cores == 0}
    for pool in limited:
        slices.update(_limit_threads_only(topology, pool, notes))
    loads = _Loads()
    for pool, cores in zip(pools, _allot(topology, pools), strict=True):
        slices.update(_assign(topology, pool, cores, loads, notes))
    chosen = _lending(topology, [slices[place] for place in range(len(demands))], members)
    allowed = topology.online.intersection(frozenset().union(*(demand.allowed for demand in demands)))
    busy = frozenset(cpu for owner in owners for cpu in chosen[owner.place].cpus)
    free = {i for i, core in enumerate(topology.cores) if i in reserved or busy.isdisjoint(core.cpus)}
    return Plan(
        chosen,
        idle=allowed & _cpus(topology, free),
        reserved=allowed & _cpus(topology, reserved),
        notes=tuple(dict.fromkeys(notes)),
    )


def _lending(topology: Topology, slices: Sequence[Slice], members: Sequence[_Member]) -> tuple[Slice, ...]:
    """Tell every slice its reach: slices lend to each other on one NUMA node, of one core type, under one rule.

    Slices that share cores do not lend: their workers may compute at the same time already. Nor do those that own none.
    """
    workers = Counter(cpu for piece in slices if piece.pinned for cpu in piece.cpus)
    domains: dict[object, list[int]] = {}
    for place, (piece, member) in enumerate(zip(slices, members, strict=True)):
        policy = member.demand.policy
        if policy.lend is Lend.NEVER or member.demand.cores == 0:
            continue
        if piece.pinned and any(workers[cpu] > 1 for cpu in piece.cpus):
            continue
        kinds = frozenset(core.kind for core in topology.cores_of(piece.cpus))
        place_of = (piece.numa_nodes, kinds, policy.logical) if piece.pinned else (member.demand.quota, policy.pin)
        domains.setdefault((member.cpus, piece.pinned, place_of), []).append(place)
    found = list(slices)
    for places in domains.values():
        reach = frozenset(cpu for place in places for cpu in slices[place].cpus)
        for place in places:
            found[place] = replace(slices[place], reach=reach)
    return tuple(found)


def _cpus(topology: Topology, cores: Iterable[int]) -> frozenset[int]:
    return frozenset(cpu for i in cores for cpu in topology.cores[i].cpus)


# What each demand may use. From here on a core is its position in ``topology.cores``.


@dataclass(frozen=True, slots=True)
class _Member:
    """A demand on its way to a slice: ``place`` in the order of demands, ``cpus`` and ``cores`` it may use."""

    place: int
    demand: Demand
    cpus: frozenset[int]
    cores: frozenset[int]

    def slice(self, topology: Topology, cores: Iterable[int], shared: Counter[int] | None) -> Slice:
        """The slice of ``cores``: one CPU of each, the lowest, or all with ``logical``; unpinned with --pin never.

        ``shared`` counts the workers on each CPU of cores that have to be shared, with one thread each: their workers
        spread over the SMT siblings.
        """
        mask = self.mask(topology, cores, shared)
        threads = len(mask) if shared is None else 1
        if self.demand.policy.pin is Pin.NEVER:
            return self.unpinned(topology, threads)
        return _slice((topology.cores[i] for i in cores), mask, threads, pinned=True)

    def mask(self, topology: Topology, cores: Iterable[int], shared: Counter[int] | None = None) -> list[int]:
        """The CPUs that a slice of ``cores`` has, and may run threads on."""
        mask: list[int] = []
        for i in cores:
            usable = [cpu for cpu in topology.cores[i].cpus if cpu in self.cpus]
            if shared is not None:
                usable.sort(key=lambda cpu: (shared[cpu], cpu not in self.demand.held))
            mask += usable if self.demand.policy.logical else usable[:1]
        return mask

    def guest(self, topology: Topology, reserved: frozenset[int]) -> Slice:
        """One thread on any core that is not kept free of workers."""
        cpus = self.cpus - _cpus(topology, reserved)
        return replace(self, cpus=cpus or self.cpus).unpinned(topology, 1)

    def unpinned(self, topology: Topology, threads: int) -> Slice:
        return _slice(topology.cores_of(self.cpus), self.cpus, threads, pinned=False)


def _slice(cores: Iterable[Core], cpus: Iterable[int], threads: int, *, pinned: bool) -> Slice:
    cores = tuple(cores)
    return Slice(
        cpus=tuple(sorted(cpus)),
        threads=threads,
        numa_nodes=tuple(sorted({core.node for core in cores})),
        l3_domains=tuple(sorted({core.l3 for core in cores})),
        packages=tuple(sorted({core.package for core in cores})),
        pinned=pinned,
    )


def _members(topology: Topology, demands: Sequence[Demand], notes: list[str]) -> list[_Member]:
    eligible: dict[object, frozenset[int]] = {}
    cpus: list[frozenset[int]] = []
    for place, demand in enumerate(demands):
        policy = demand.policy
        if demand.share <= 0:
            raise PlanError(f"worker {place} has a share of {demand.share:g}; a share is more than 0")
        key = demand.allowed, policy.node_ids, policy.core_list
        if key not in eligible:
            eligible[key] = eligible_cpus(topology, demand.allowed, policy)
            if isolated := (demand.allowed & topology.isolated) - eligible[key]:
                notes.append(
                    f"CPUs {listed(isolated)} are isolated (isolcpus=) and left out; --core-list can name them"
                )
        cpus.append(eligible[key])
    workers = Counter(mine for mine, demand in zip(cpus, demands, strict=True) if demand.cores != 0)
    known: dict[object, frozenset[int]] = {}
    members: list[_Member] = []
    for mine, demand in zip(cpus, demands, strict=True):
        policy = demand.policy
        rules = mine, policy.core_list is None, policy.use_e_cores, policy.equal, policy.reserve_cores
        if rules not in known:
            rivals = sum(number for others, number in workers.items() if not mine.isdisjoint(others))
            known[rules], more = fastest_cores(topology, mine, policy, rivals)
            notes += more
        members.append(_Member(len(members), demand, mine, known[rules]))
    return members


def _reserve(topology: Topology, members: Sequence[_Member]) -> frozenset[int]:
    """Cores kept free of workers: compact, and out of the NUMA node that has most cores, so that nodes stay equal."""
    reserved: set[int] = set()
    asked = {member.cores: 0 for member in members}
    for member in members:
        asked[member.cores] = max(asked[member.cores], member.demand.policy.reserve_cores)
    for cores, kept in sorted(asked.items(), key=lambda item: (len(item[0]), sorted(item[0]))):
        if kept and kept >= len(cores):
            raise PlanError(
                f"--reserve-cores {kept} leaves none of the {len(cores)} cores that may be used "
                f"(CPUs {listed(_cpus(topology, cores))}); lower it to {len(cores) - 1}"
            )
        while (missing := kept - len(reserved & cores)) > 0:
            nodes: dict[int, set[int]] = {}
            for i in sorted(cores - reserved):
                nodes.setdefault(topology.cores[i].node, set()).add(i)
            largest = max(nodes.values(), key=len)
            reserved |= pack(topology, largest, [min(missing, len(largest))])[0]
    return frozenset(reserved)


# Members that may use the same cores under the same rules form a pool.


@dataclass(frozen=True, slots=True)
class _Pool:
    """At most ``limit`` of ``cores`` for ``members``; ``fixed`` is the size each of them insists on, or 0.

    Where only threads are limited, ``limit`` is the number of threads that could run.
    """

    cores: frozenset[int]
    limit: int
    members: list[_Member]
    mixes_types: bool = False
    fixed: tuple[int, ...] = ()

    @property
    def policy(self) -> Policy:
        return self.members[0].demand.policy


def _pools(topology: Topology, members: Sequence[_Member], reserved: frozenset[int]) -> tuple[list[_Pool], list[_Pool]]:
    """Sort members into pools whose threads are only limited, and pools that own cores.

    A CFS quota belongs to all the members that have the same allowed CPUs and quota. Below the number of threads that
    they would run on all their cores it means that others use these CPUs too.
    """
    limited: dict[object, _Pool] = {}
    owning: dict[object, _Pool] = {}
    scarce = _scarce(topology, members, reserved)
    for member in members:
        policy, source = member.demand.policy, (member.demand.allowed, member.demand.quota)
        cores = member.cores - reserved
        if not cores:
            raise PlanError(
                f"all cores that may be used (CPUs {listed(_cpus(topology, member.cores))}) are reserved for another "
                "server; lower its --reserve-cores"
            )
        if source in scarce and policy.pin is Pin.AUTO:
            limited.setdefault(source, _Pool(cores, scarce[source], [])).members.append(member)
        else:
            mixes = mixes_types(policy) or len({topology.cores[i].kind for i in cores}) == 1
            rules = (policy.equal, policy.skip_cross_node_cores, policy.cores_per_worker, policy.latency, mixes)
            key: object = (cores, rules, source if source in scarce else None)
            owning.setdefault(key, _Pool(cores, len(cores), [], mixes)).members.append(member)
    for rule, pool in owning.items():
        demand, siblings = pool.members[0].demand, _siblings(topology, pool)
        if (demand.allowed, demand.quota) in scarce:  # Nobody shares a core while others are idle all the same.
            limit = max(int(demand.quota or 0) // siblings, len(pool.members))
            pool = replace(pool, limit=min(pool.limit, limit))
        owning[rule] = replace(pool, fixed=_fixed(topology, pool))
        _check(topology, owning[rule])
    return list(limited.values()), list(owning.values())


def _scarce(topology: Topology, members: Sequence[_Member], reserved: frozenset[int]) -> dict[object, int]:
    """Allowed CPUs and quota of members that could run more threads than the quota pays for, and how many."""
    alike = {(m.demand.allowed, m.demand.quota, m.cpus, m.cores, m.demand.policy.logical): m for m in members}
    threads: dict[tuple[frozenset[int], float], set[int]] = {}
    for member in alike.values():
        if member.demand.quota is not None:
            mask = member.mask(topology, member.cores - reserved)
            threads.setdefault((member.demand.allowed, member.demand.quota), set()).update(mask)
    return {source: len(cpus) for source, cpus in threads.items() if source[1] < len(cpus)}


def _siblings(topology: Topology, pool: _Pool) -> int:
    """The most threads that a core has in a slice."""
    first = pool.members[0]
    logical = any(member.demand.policy.logical for member in pool.members)
    return max(len(first.cpus.intersection(topology.cores[i].cpus)) for i in pool.cores) if logical else 1


def _fixed(topology: Topology, pool: _Pool) -> tuple[int, ...]:
    """The number of cores that each member insists on: its own, or what the policy says for all; 0 for none.

    With ``logical``, ``cores_per_worker`` counts CPUs and a slice has the whole cores that hold so many.

    Source: torch/backends/xeon/run_cpu.py: with --use_logical_core the list it cuts is one of logical CPUs.
    """
    members, policy = pool.members, pool.policy
    asked = policy.cores_per_worker or ((LATENCY_CORES,) if policy.latency else (0,))
    if 1 < len(asked) < len(members):
        raise PlanError(
            f"--ncores-per-instance names {len(asked)} sizes but there are {len(members)} workers; "
            "give one number for all or one per worker"
        )
    per_worker = asked * len(members) if len(asked) == 1 else asked[: len(members)]
    if policy.logical and policy.cores_per_worker:
        siblings = _siblings(topology, pool)
        per_worker = tuple(-(-cpus // siblings) for cpus in per_worker)
    return tuple(member.demand.cores or size for member, size in zip(members, per_worker, strict=True))


def _check(topology: Topology, pool: _Pool) -> None:
    """Raise PlanError if the cores cannot be there that the policy wants for each worker."""
    need, limit, workers = sum(pool.fixed), pool.limit, len(pool.members)
    if not pool.policy.cores_per_worker or need <= limit:
        return
    same = len(set(pool.fixed)) == 1
    terms = f"{workers} workers x {pool.fixed[0]}" if same else " + ".join(map(str, pool.fixed))
    remedy = f"--ncores-per-instance to {limit // workers}" if limit >= workers else f"the number of workers to {limit}"
    raise PlanError(
        f"need {need} cores ({terms}) but {limit} are allowed "
        f"({listed(pool.members[0].cpus & _cpus(topology, pool.cores))}); lower {remedy}"
    )


def _limit_threads_only(topology: Topology, pool: _Pool, notes: list[str]) -> dict[int, Slice]:
    """Pin nothing; all members together have as many threads as the CFS quota pays for, rounded down, but one each."""
    members, siblings = pool.members, _siblings(topology, pool)
    quota = members[0].demand.quota or 0
    fixed = _fixed(topology, pool)
    fair = [i for i, size in enumerate(fixed) if not size]
    threads = [1] * len(members)
    room = max(0, int(quota) - len(members))
    for i, size in enumerate(fixed):
        if size:
            threads[i] = min(size * (siblings if members[i].demand.policy.logical else 1), 1 + room)
            room -= threads[i] - 1
    for i, size in zip(fair, apportion(len(fair) + room, [members[i].demand.share for i in fair]), strict=True):
        threads[i] = size
    notes.append(
        f"a CFS quota of {quota:g} CPUs is below the {pool.limit} {'cores' if siblings == 1 else 'CPUs'} that may be "
        f"used, so other programs use them too: {count(sum(threads), 'thread')} for {count(len(members), 'worker')}, "
        "CPUs not pinned; --pin always pins all the same"
    )
    return {member.place: member.unpinned(topology, number) for member, number in zip(members, threads, strict=True)}


def _allot(topology: Topology, pools: Sequence[_Pool]) -> list[frozenset[int]]:
    """The cores of each pool, disjoint; none at all for a pool if there are not enough."""
    if len(pools) == 1 and pools[0].limit == len(pools[0].cores):
        return [pools[0].cores]
    shares = allot(
        [
            Taker(
                pool.cores,
                workers=len(pool.members),
                need=sum(pool.fixed),
                limit=min(pool.limit, sum(pool.fixed)) if all(pool.fixed) else pool.limit,
                weight=sum(member.demand.share for member in pool.members),
            )
            for pool in pools
        ]
    )
    chosen: list[frozenset[int]] = [frozenset()] * len(pools)
    for cores, counts in shares:
        fastest = _fastest(topology, frozenset(cores), sum(counts.values()))
        for p, part in zip(counts, pack(topology, fastest, list(counts.values())), strict=True):
            chosen[p] |= part
    return chosen


def _fastest(topology: Topology, cores: frozenset[int], number: int) -> frozenset[int]:
    """So many of ``cores``, close together; those of the fastest type first."""
    if number == len(cores):
        return cores
    by_kind: dict[int, set[int]] = {}
    for i in cores:
        by_kind.setdefault(topology.cores[i].kind, set()).add(i)
    taken: frozenset[int] = frozenset()
    for _, mine in sorted(by_kind.items()):
        taken |= pack(topology, mine, [min(number - len(taken), len(mine))])[0]
    return taken


@dataclass(frozen=True, slots=True)
class _Loads:
    """How many workers each core carries, and each of its CPUs."""

    cores: Counter[int] = field(default_factory=Counter)
    cpus: Counter[int] = field(default_factory=Counter)


def _assign(
    topology: Topology, pool: _Pool, cores: frozenset[int], loads: _Loads, notes: list[str]
) -> dict[int, Slice]:
    """Divide ``cores`` among the members of the pool."""
    members, policy = pool.members, pool.policy
    sizes = pool.fixed
    if sum(sizes) > len(cores) and (policy.latency or policy.cores_per_worker):
        sizes = tuple(member.demand.cores or 0 for member in members)
        notes.append(
            f"{sum(pool.fixed)} cores asked for, {len(cores)} there: "
            f"{len(members)} workers divide them as if none had asked"
        )
    core_of = {cpu: i for i in cores or pool.cores for cpu in topology.cores[i].cpus}
    workers = [
        Worker(size, member.demand.share, frozenset(core_of[cpu] for cpu in member.demand.held & core_of.keys()))
        for member, size in zip(members, sizes, strict=True)
    ]
    shared = len(members) > len(cores)
    if shared:
        parts = share_cores(cores or pool.cores, workers, loads.cores)
        notes.append(
            f"more workers than cores: {len(members)} on {len(cores or pool.cores)} "
            f"(CPUs {listed(core_of)}), which they share with one thread each; use fewer workers"
        )
    else:
        parts = divide(
            topology,
            cores,
            workers,
            equal=policy.equal,
            within_nodes=policy.skip_cross_node_cores,
            mixes_types=pool.mixes_types,
        )
        loads.cores.update(core for part in parts for core in part)
    for member, size, part in zip(members, sizes, parts, strict=True):
        if size > len(part) and not shared:
            notes.append(
                f"worker {member.place} asks for {count(size, 'core')} and gets {len(part)}: "
                f"there are {len(cores)} for {count(len(members), 'worker')}, and each needs one"
            )
    slices = {}
    for member, part in zip(members, parts, strict=True):
        slices[member.place] = member.slice(topology, part, loads.cpus if shared else None)
        loads.cpus.update(slices[member.place].cpus)
    return slices
