"""Who gets which cores: topology and demands in, one disjoint slice per worker out. Pure: no I/O, no clock, no chance.

Demands that may use the same cores under the same rules form a pool. Overlapping pools divide the cores first
(``allotment``), then every pool is divided among its workers (``pool``) by cutting it into local parts
(``partition``). Where a CFS quota says that strangers use the same CPUs, threads are only counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Core, Topology
from ts_plugin.planning.allotment import Taker, allot, apportion
from ts_plugin.planning.cells import PlanError
from ts_plugin.planning.eligibility import fast, narrow
from ts_plugin.planning.policy import Pin, Policy
from ts_plugin.planning.pool import Worker, compact, crowd, divide

__all__ = ["Demand", "Plan", "PlanError", "Slice", "plan"]

LATENCY_CORES = 4  # run_cpu's --latency-mode


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

    One CPU per core and as many threads as cores; with ``Policy.logical`` all siblings and as many threads as CPUs.
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
    reserve, a quota or ``skip_cross_node_cores`` says so. After that, in this order: no worker gets less than half of
    the equal share; fewest crossings of core types, NUMA nodes, L3 domains and packages (``cells.score``); equal
    sizes; short distances; few moves. ``Policy.equal`` puts equal sizes (within one core) before the crossings.

    Raises:
        PlanError: no plan exists, for example a node that the machine does not have.
    """
    notes: list[str] = []
    claims = _claims(topology, demands, notes)
    reserved = _reserve(topology, claims)
    bounded, pools = _pools(topology, claims, reserved)
    slices: dict[int, Slice] = {}
    for pool in bounded:
        slices.update(_bound(topology, pool, notes))
    loads = _Loads()
    for pool, cores in zip(pools, _allot(topology, pools), strict=True):
        slices.update(_assign(topology, pool, cores, loads, notes))
    chosen = tuple(slices[place] for place in range(len(demands)))
    allowed = topology.online.intersection(frozenset().union(*(demand.allowed for demand in demands)))
    busy = frozenset(cpu for piece in chosen for cpu in piece.cpus)
    free = {i for i, core in enumerate(topology.cores) if i in reserved or busy.isdisjoint(core.cpus)}
    return Plan(
        chosen,
        idle=allowed & _cpus(topology, free),
        reserved=allowed & _cpus(topology, reserved),
        notes=tuple(dict.fromkeys(notes)),
    )


def _cpus(topology: Topology, cores: Iterable[int]) -> frozenset[int]:
    return frozenset(cpu for i in cores for cpu in topology.cores[i].cpus)


def _list(cpus: Iterable[int]) -> str:
    return format_cpulist(cpus) or "none"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# What each demand may use. From here on a core is its position in ``topology.cores``.


@dataclass(frozen=True, slots=True)
class _Claim:
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
        mask: list[int] = []
        for i in cores:
            usable = [cpu for cpu in topology.cores[i].cpus if cpu in self.cpus]
            if shared is not None:
                usable.sort(key=lambda cpu: (shared[cpu], cpu not in self.demand.held))
            mask += usable if self.demand.policy.logical else usable[:1]
        threads = len(mask) if shared is None else 1
        if self.demand.policy.pin is Pin.NEVER:
            return self.unpinned(topology, threads)
        return _slice((topology.cores[i] for i in cores), mask, threads, pinned=True)

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


def _claims(topology: Topology, demands: Sequence[Demand], notes: list[str]) -> list[_Claim]:
    known: dict[object, tuple[frozenset[int], frozenset[int]]] = {}
    claims = []
    for place, demand in enumerate(demands):
        policy = demand.policy
        if demand.share <= 0:
            raise PlanError(f"worker {place} has a share of {demand.share:g}; a share is more than 0")
        key = (demand.allowed, policy.node_ids, policy.core_list, policy.use_e_cores)
        if key not in known:
            cpus = narrow(topology, demand.allowed, policy)
            cores, left_out = fast(topology, cpus, policy)
            known[key] = cpus, cores
            if isolated := (demand.allowed & topology.isolated) - cpus:
                notes.append(f"CPUs {_list(isolated)} are isolated (isolcpus=) and left out; --core-list can name them")
            notes += left_out
        claims.append(_Claim(place, demand, *known[key]))
    return claims


def _reserve(topology: Topology, claims: Sequence[_Claim]) -> frozenset[int]:
    """Cores kept free of workers: compact, and out of the NUMA node that has most cores, so that nodes stay equal."""
    reserved: set[int] = set()
    asked = {claim.cores: 0 for claim in claims}
    for claim in claims:
        asked[claim.cores] = max(asked[claim.cores], claim.demand.policy.reserve_cores)
    for cores, count in sorted(asked.items(), key=lambda item: (len(item[0]), sorted(item[0]))):
        if count and count >= len(cores):
            raise PlanError(
                f"--reserve-cores {count} leaves none of the {len(cores)} cores that may be used "
                f"(CPUs {_list(_cpus(topology, cores))}); lower it to {len(cores) - 1}"
            )
        while (missing := count - len(reserved & cores)) > 0:
            nodes: dict[int, set[int]] = {}
            for i in sorted(cores - reserved):
                nodes.setdefault(topology.cores[i].node, set()).add(i)
            largest = max(nodes.values(), key=len)
            reserved |= compact(topology, largest, [min(missing, len(largest))])[0]
    return frozenset(reserved)


# Claims that may use the same cores under the same rules form a pool.


@dataclass(frozen=True, slots=True)
class _Pool:
    """At most ``limit`` of ``cores`` for ``claims``; ``fixed`` is the size each of them insists on, or 0."""

    cores: frozenset[int]
    limit: int
    claims: list[_Claim]
    fixed: tuple[int, ...] = ()

    @property
    def policy(self) -> Policy:
        return self.claims[0].demand.policy


def _pools(topology: Topology, claims: Sequence[_Claim], reserved: frozenset[int]) -> tuple[list[_Pool], list[_Pool]]:
    """Sort claims into pools whose threads are only bounded, and pools that own cores.

    A CFS quota belongs to all the claims that have the same allowed CPUs and quota. Below the number of cores it means
    that strangers use these CPUs too.
    """
    bounded: dict[object, _Pool] = {}
    owning: dict[object, _Pool] = {}
    for claim in claims:
        demand, policy = claim.demand, claim.demand.policy
        cores = claim.cores - reserved
        if not cores:
            raise PlanError(
                f"all cores that may be used (CPUs {_list(_cpus(topology, claim.cores))}) are reserved for another "
                "server; lower its --reserve-cores"
            )
        scarce = demand.quota is not None and demand.quota < len(cores)
        limit = max(1, int(demand.quota)) if scarce and demand.quota is not None else len(cores)
        if scarce and policy.pin is Pin.AUTO:
            key: object = (demand.allowed, demand.quota)
            bounded.setdefault(key, _Pool(cores, limit, [])).claims.append(claim)
        else:
            rules = (policy.equal, policy.skip_cross_node_cores, policy.cores_per_worker, policy.latency)
            key = (cores, rules, (demand.allowed, demand.quota) if scarce else None)
            owning.setdefault(key, _Pool(cores, limit, [])).claims.append(claim)
    for key, pool in owning.items():
        owning[key] = replace(pool, fixed=_fixed(topology, pool))
        _check(topology, owning[key])
    return list(bounded.values()), list(owning.values())


def _fixed(topology: Topology, pool: _Pool) -> tuple[int, ...]:
    """The number of cores that each claim insists on: its own, or what the policy says for all; 0 for none.

    With ``logical``, ``cores_per_worker`` counts CPUs and a slice has the whole cores that hold so many.

    Source: torch/backends/xeon/run_cpu.py: with --use_logical_core the list it cuts is one of logical CPUs.
    """
    claims, policy = pool.claims, pool.policy
    asked = policy.cores_per_worker or ((LATENCY_CORES,) if policy.latency else (0,))
    if 1 < len(asked) < len(claims):
        raise PlanError(
            f"--ncores-per-instance names {len(asked)} sizes but there are {len(claims)} workers; "
            "give one number for all or one per worker"
        )
    per_worker = asked * len(claims) if len(asked) == 1 else asked[: len(claims)]
    if policy.logical and policy.cores_per_worker:
        siblings = max(len(claims[0].cpus.intersection(topology.cores[i].cpus)) for i in pool.cores)
        per_worker = tuple(-(-cpus // siblings) for cpus in per_worker)
    return tuple(claim.demand.cores or size for claim, size in zip(claims, per_worker, strict=True))


def _check(topology: Topology, pool: _Pool) -> None:
    """Raise PlanError if the cores cannot be there that the policy wants for each worker."""
    need, limit, workers = sum(pool.fixed), pool.limit, len(pool.claims)
    if not pool.policy.cores_per_worker or need <= limit:
        return
    same = len(set(pool.fixed)) == 1
    terms = f"{workers} workers x {pool.fixed[0]}" if same else " + ".join(map(str, pool.fixed))
    remedy = f"--ncores-per-instance to {limit // workers}" if limit >= workers else f"the number of workers to {limit}"
    raise PlanError(
        f"need {need} cores ({terms}) but {limit} are allowed "
        f"({_list(pool.claims[0].cpus & _cpus(topology, pool.cores))}); lower {remedy}"
    )


def _bound(topology: Topology, pool: _Pool, notes: list[str]) -> dict[int, Slice]:
    """Threads only, as many for all claims together as the CFS quota pays for, rounded down."""
    claims = pool.claims
    notes.append(
        f"a CFS quota of {claims[0].demand.quota:g} CPUs is below the {len(pool.cores)} cores that may be used, so "
        f"others use them too: {_count(pool.limit, 'thread')} for {_count(len(claims), 'worker')}, CPUs not pinned; "
        "--pin always pins all the same"
    )
    fixed = _fixed(topology, pool)
    fair = [i for i, size in enumerate(fixed) if not size]
    threads = [1] * len(claims)
    if len(claims) <= pool.limit:
        room = pool.limit - len(claims)
        for i, size in enumerate(fixed):
            if size:
                threads[i] = min(size, 1 + room)
                room -= threads[i] - 1
        for i, size in zip(fair, apportion(len(fair) + room, [claims[i].demand.share for i in fair]), strict=True):
            threads[i] = size
    return {claim.place: claim.unpinned(topology, count) for claim, count in zip(claims, threads, strict=True)}


def _allot(topology: Topology, pools: Sequence[_Pool]) -> list[frozenset[int]]:
    """The cores of each pool, disjoint; none at all for a pool if there are not enough."""
    if len(pools) == 1 and pools[0].limit == len(pools[0].cores):
        return [pools[0].cores]
    shares = allot(
        [
            Taker(
                pool.cores,
                workers=len(pool.claims),
                need=sum(pool.fixed),
                limit=min(pool.limit, sum(pool.fixed)) if all(pool.fixed) else pool.limit,
                weight=sum(claim.demand.share for claim in pool.claims),
            )
            for pool in pools
        ]
    )
    chosen: list[frozenset[int]] = [frozenset()] * len(pools)
    for cores, counts in shares:
        for p, part in zip(counts, compact(topology, cores, list(counts.values())), strict=True):
            chosen[p] |= part
    return chosen


@dataclass(frozen=True, slots=True)
class _Loads:
    """How many workers each core carries, and each of its CPUs."""

    cores: Counter[int] = field(default_factory=Counter)
    cpus: Counter[int] = field(default_factory=Counter)


def _assign(
    topology: Topology, pool: _Pool, cores: frozenset[int], loads: _Loads, notes: list[str]
) -> dict[int, Slice]:
    """Divide ``cores`` among the claims of the pool."""
    claims, policy = pool.claims, pool.policy
    sizes = pool.fixed
    if sum(sizes) > len(cores) and (policy.latency or policy.cores_per_worker):
        sizes = tuple(claim.demand.cores or 0 for claim in claims)
        notes.append(f"{sum(pool.fixed)} cores asked for, {len(cores)} there: {len(claims)} workers share them equally")
    core_of = {cpu: i for i in cores or pool.cores for cpu in topology.cores[i].cpus}
    workers = [
        Worker(size, claim.demand.share, frozenset(core_of[cpu] for cpu in claim.demand.held & core_of.keys()))
        for claim, size in zip(claims, sizes, strict=True)
    ]
    crowded = len(claims) > len(cores)
    if crowded:
        parts = crowd(cores or pool.cores, workers, loads.cores)
        notes.append(
            f"more workers than cores: {len(claims)} on {len(cores or pool.cores)} "
            f"(CPUs {_list(core_of)}), which they share with one thread each; use fewer workers"
        )
    else:
        parts = divide(topology, cores, workers, equal=policy.equal, within_nodes=policy.skip_cross_node_cores)
        loads.cores.update(core for part in parts for core in part)
    for claim, size, part in zip(claims, sizes, parts, strict=True):
        if size > len(part) and not crowded:
            notes.append(
                f"worker {claim.place} asks for {_count(size, 'core')} and gets {len(part)}: "
                f"there are {len(cores)} for {_count(len(claims), 'worker')}, and each needs one"
            )
    slices = {}
    for claim, part in zip(claims, parts, strict=True):
        slices[claim.place] = claim.slice(topology, part, loads.cpus if crowded else None)
        loads.cpus.update(slices[claim.place].cpus)
    return slices
