"""Why a worker has the cores that it has: the reasons behind one lease, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ts_plugin.ledger.model import Lease, State
from ts_plugin.lending.status import faster
from ts_plugin.lending.words import Status
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Topology
from ts_plugin.machine.words import count
from ts_plugin.planning.policy import Lend, Pin


def find(state: State, who: str) -> tuple[Lease, ...]:
    """Return the leases of ``who``: a PID, or a model by name or as NAME:VERSION."""
    name, _, version = who.partition(":")
    return tuple(
        lease
        for lease in sorted(state.leases, key=lambda lease: (lease.model, lease.worker_id))
        if str(lease.pid) == who or (lease.model == name and version in ("", lease.version))
    )


def explain(lease: Lease, state: State, topology: Topology, lending: Status | None = None) -> list[tuple[str, str]]:
    """Return (heading, sentence) pairs in the order of the reasons; ``lending`` is what the worker tells of it."""
    rows = [("owns", _owns(lease, topology)), ("threads", _threads(lease, topology))]
    rows += [("may use", text) for text in _allowed(lease, topology)]
    rows += [("size", text) for text in _size(lease, state, topology)]
    rows += [("place", text) for text in _place(lease, topology)]
    rows += _width(lease, state, lending)
    rows += [("note", text) for text in (*lease.notes, *lease.demand.policy.notes, *state.notes)]
    return rows


def _owns(lease: Lease, topology: Topology) -> str:
    piece = lease.slice
    if not piece.pinned:
        return f"no cores of its own: it runs anywhere in CPUs {format_cpulist(piece.cpus)}"
    where = [
        f"{what} {format_cpulist(numbers)}"
        for what, numbers in (
            ("NUMA node", piece.numa_nodes),
            ("L3 domain", piece.l3_domains),
            ("package", piece.packages),
        )
        if numbers
    ]
    cores = topology.cores_of(piece.cpus)
    return f"{count(len(cores), 'core')}, CPUs {format_cpulist(piece.cpus)}: {', '.join(where)}"


def _threads(lease: Lease, topology: Topology) -> str:
    piece, cores = lease.slice, topology.cores_of(lease.slice.cpus)
    text = f"{piece.threads} intra-op"
    if not piece.pinned:
        if lease.demand.cores == 0:
            return f"{text}: a workflow's function needs little computing"
        return f"{text}: bounded, so that all workers together do not exceed what the CPUs can do"
    if piece.threads == len(cores):
        text += ": one per core"
    siblings = {cpu for core in cores for cpu in core.cpus} & lease.demand.allowed - set(piece.cpus)
    if siblings:
        text += f"; the SMT siblings {format_cpulist(siblings)} stay free, they would share the cores' arithmetic units"
    elif lease.demand.policy.logical:
        text += ", on both SMT siblings of its cores (--use-logical-core)"
    return text


def _allowed(lease: Lease, topology: Topology) -> Iterator[str]:
    demand, policy = lease.demand, lease.demand.policy
    cores = topology.cores_of(demand.allowed)
    yield f"{count(len(cores), 'core')}, CPUs {format_cpulist(demand.allowed)}: the server's affinity mask and cpuset"
    if policy.node_ids is not None:
        yield f"only NUMA nodes {format_cpulist(policy.node_ids)} (--node-id)"
    if policy.core_list is not None:
        yield f"only CPUs {format_cpulist(policy.core_list)} (--core-list)"
    if policy.reserve_cores:
        yield f"all but {count(policy.reserve_cores, 'core')} that no worker gets (--reserve-cores)"
    kinds = {core.kind for core in cores}
    if len(kinds) > 1 and not policy.use_e_cores:
        fastest = all(core.kind == min(kinds) for core in topology.cores_of(lease.slice.cpus))
        which = "the fastest core type" if fastest else "one core type, not the fastest"
        yield f"only {which}: one slow core holds up all threads of its slice (--use-e-cores changes that)"
    if demand.quota is not None:
        yield f"the CPU time of {demand.quota:g} CPUs: the CFS quota of its cgroup"


def _size(lease: Lease, state: State, topology: Topology) -> Iterator[str]:
    demand, policy = lease.demand, lease.demand.policy
    rivals = [other for other in state.leases if not other.demand.allowed.isdisjoint(demand.allowed)]
    others = [other for other in rivals if other.pid != lease.pid and other.demand.cores != 0]
    if demand.cores == 0:
        yield "a function of a workflow owns no core unless the workflow asks for it (cpu: in its specification)"
        return
    if demand.cores is not None:
        yield f"{count(demand.cores, 'core')} asked for by its archive (cpu: cores) or because a GPU does its work"
    elif policy.cores_per_worker:
        asked = ", ".join(map(str, policy.cores_per_worker))
        yield f"{asked} cores per worker asked for (--ncores-per-instance)"
    if not others:
        yield "no other worker is alive, so nothing is divided"
        return
    models = sorted({f"{other.model} {other.version}" for other in others})
    yield f"shared with {count(len(others), 'other worker')}: {', '.join(models)}"
    if demand.cores is None and not policy.cores_per_worker:
        yield from _share(lease, rivals, topology)


def _share(lease: Lease, rivals: Sequence[Lease], topology: Topology) -> Iterator[str]:
    free = frozenset(lease.demand.allowed)
    fixed = [other for other in rivals if other.demand.cores]
    weights = sum(other.demand.share for other in rivals if other.demand.cores is None)
    cores = len(topology.cores_of(free)) - sum(len(topology.cores_of(other.slice.cpus)) for other in fixed)
    cores -= lease.demand.policy.reserve_cores
    part = cores * lease.demand.share / weights
    weight = "" if lease.demand.share == 1 else f" (cpu: share {lease.demand.share:g} of {weights:g})"
    yield f"its share of {count(cores, 'core')} is {part:.3g}{weight}"
    owned = len(topology.cores_of(lease.slice.cpus))
    if part < 1:
        yield "there are more workers than cores, so cores are shared, one thread each; use fewer workers"
    elif lease.slice.pinned and abs(owned - part) >= 1:
        alike = len({other.demand.share for other in rivals if other.demand.cores is None}) == 1
        alike = alike and not lease.demand.policy.equal
        yield (
            f"it has {owned}, because slices that stay inside NUMA nodes, L3 domains and core types go before equal "
            f"sizes{' (--equal changes that)' if alike else ''}"
        )


def _place(lease: Lease, topology: Topology) -> Iterator[str]:
    piece, policy = lease.slice, lease.demand.policy
    if not piece.pinned:
        if lease.demand.cores == 0:
            return
        if policy.pin is Pin.NEVER:
            yield "not pinned: --pin never is set"
        elif lease.demand.quota is not None:
            yield "not pinned: a CFS quota means CPUs that other containers use too (--pin always pins all the same)"
        return
    nodes, domains = len(piece.numa_nodes), len(piece.l3_domains)
    if nodes > 1:
        yield f"it spans {nodes} NUMA nodes: none alone has room for {count(piece.threads, 'core')} beside the others"
    elif domains > 1 and len({core.l3 for core in topology.cores}) < len(topology.cores):
        yield f"inside one NUMA node, over {domains} L3 domains: none alone has room for {count(piece.threads, 'core')}"
    elif piece.numa_nodes:
        yield "inside one NUMA node" + (" and one L3 domain" if domains == 1 else "") + ": no access is remote"
    if lease.moves:
        yield f"it had to change its NUMA node {count(lease.moves, 'time')} since it started"


def _width(lease: Lease, state: State, status: Status | None) -> Iterator[tuple[str, str]]:
    """Tell how wide its requests compute, and why: on its slice, or on idle neighbours' slices too."""
    neighbours = state.neighbours(lease)
    if not neighbours:
        yield "width", f"its slice, always: {_alone(lease, state)}"
        return
    others = f"{count(len(neighbours), 'other worker')} ({', '.join(sorted({other.model for other in neighbours}))})"
    if status is None:
        yield "width", f"its slice: it has not joined {others}, which lend to each other; its log may say why"
        return
    if status.keeps:
        yield "width", f"its slice, always, and it lends it to none of {others}: {status.why}"
        return
    yield "width", f"its slice and idle ones of {others}, which get theirs back inside the request when they want it"
    if status.times:
        times = (f"{_milliseconds(seconds)} on {count(cores, 'core')}" for cores, seconds in status.times.items())
        yield "service time", ", ".join(times)
    if status.requests:
        text = (
            f"{status.wide} of {count(status.requests, 'request')} computed wide ({status.wide / status.requests:.0%})"
        )
        gain = faster(status)
        text += f", {gain:.2f} x as fast as on its slice" if gain and status.wide else ""
        text += f"; {status.borrowed:,.1f} core-seconds on borrowed cores"
        yield "so far", f"{text}; {status.handed_back} of them gave cores back before they ended"
    if status.waited:
        mean, longest = status.wait / status.waited, status.longest
        text = f"{count(status.waited, 'request')} had to take its slice back, in {_milliseconds(mean)} on average"
        text += f", {_milliseconds(longest)} at most"
        yield "waits", text + (f"; {count(status.forced, 'time')} by force" if status.forced else "")
    if status.why:
        yield "lately", f"it did not borrow: {status.why}"


def _alone(lease: Lease, state: State) -> str:
    policy, piece = lease.demand.policy, lease.slice
    if policy.lend is Lend.NEVER:
        return "lending is off (--lend never in cpu_launcher_args)"
    if piece.pinned and any(
        other.pid != lease.pid and other.slice.pinned and not set(piece.cpus).isdisjoint(other.slice.cpus)
        for other in state.leases
    ):
        return "workers that share cores may compute at the same time already, so they do not lend"
    return (
        "there is no worker to lend to or borrow from: no other slice on its NUMA node with its core type and options"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
