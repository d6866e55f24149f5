"""Join, leave, replan: one plan for all living workers, written to the ledger and then told to the kernel.

Whoever changes who is alive holds the ledger's lock, plans, writes and binds all workers, the others' threads included.
The ledger is written first: if the process dies half-way, any other worker finds the truth there and finishes the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ts_plugin.ledger.binding import bind_all
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease, Refusal, Server, State
from ts_plugin.log import debug
from ts_plugin.machine import discovery, process
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Allowance, Topology
from ts_plugin.planning.core_groups import PlanError
from ts_plugin.planning.planner import Demand, Slice, plan
from ts_plugin.planning.policy import Policy


class CannotBind(RuntimeError):
    """This worker must serve unbound; the message is the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Applicant:
    """A worker that asks for a slice.

    ``bounds`` is what its cgroups let it use, ``limit`` the CPUs that its own mask held it to when it started, or None;
    its server's limit goes before that. ``cores`` and ``share`` are what its archive asks for. ``hooked``: its frontend
    has our hook, and so an entry, which says which cores its config.properties allows.
    """

    pid: int
    start_time: int
    model: str
    version: str
    worker_id: str
    bounds: Allowance
    limit: frozenset[int] | None = None
    cores: int | None = None
    share: float = 1.0
    notes: tuple[str, ...] = ()
    hooked: bool = False


def join(ledger: Ledger, applicant: Applicant) -> Lease:
    """Give a new worker its slice, make room for it among the others, bind it, and return its lease.

    It is bound before the lock is released: the next change may take cores from it again.

    Raises:
        CannotBind: the frontend of a hooked worker has no entry, or its config.properties an error; or the kernel does
            not bind this process.
        LedgerError: the ledger cannot be used. PlanError: no plan exists with this worker in it.
        In all cases the others have, or get back, what they had.
    """
    topology = discovery.read_topology()  # takes milliseconds, so before the lock that all workers share
    with ledger.locked() as state:
        server = server_of(state, applicant.pid)
        if server is None and applicant.hooked:
            raise CannotBind(
                f"{ledger.path}: no entry of process {process.parent(applicant.pid)}, which started this worker, and "
                "none came when it was asked for; start TorchServe with plugins_path, or set its property python to an "
                "interpreter"
            )
        if server is not None and server.error is not None:
            raise CannotBind(server.error)
        debug("process %s asks for a slice; its server says %s", applicant.pid, server or "nothing: it has no entry")
        limit = applicant.limit if server is None else server.limit
        demand = Demand(
            allowed=applicant.bounds.within(limit).cpus,
            policy=Policy() if server is None else server.policy,
            quota=applicant.bounds.quota,
            cores=applicant.cores,
            share=applicant.share,
        )
        others = _without(state, applicant.pid)
        newcomer = _Asking(applicant.pid, applicant.pid if server is None else server.pid, demand)
        planned = _plan_all(topology, others.leases, newcomer)
        lease = Lease(
            pid=applicant.pid,
            start_time=applicant.start_time,
            model=applicant.model,
            version=applicant.version,
            worker_id=applicant.worker_id,
            server_pid=None if server is None else server.pid,
            demand=demand,
            slice=planned.slices[applicant.pid],
            notes=applicant.notes,
            limit=limit,
        )
        after = planned.apply(_allowing(others, lease))
        after, refused = _write_and_bind(ledger, state, replace(after, leases=(*after.leases, lease)))
        if error := refused.get(lease.pid):
            _settle(ledger, topology, after, _without(after, lease.pid))
            cpus = format_cpulist(lease.slice.cpus)
            raise CannotBind(
                f"CPUs {cpus}: sched_setaffinity: {error.strerror}; a seccomp filter must let it pass, "
                "and the cpuset must have these CPUs"
            ) from error
    return lease


def enter(ledger: Ledger, lease: Lease) -> tuple[State, OSError | None]:
    """Enter what a worker knows of itself, and plan anew if that or a death asks for it.

    A worker knows its model's name, its demand and its notes best; the ledger knows its slice. Where its entry is
    missing, since somebody deleted or damaged the ledger, all of ``lease`` is entered. Return the state that holds now,
    and the error if the kernel has just refused to bind this worker.

    Takes the lock only if there is something to write: after a death every survivor comes here, the first one plans for
    all, and the others find that done.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    written = ledger.read_all()
    living = written.living()
    if living.leases == written.leases and _knowing(living, lease) == living:
        return living, None
    topology = discovery.read_topology()
    with ledger.locked() as state:
        wanted = _knowing(state, lease)
        if wanted == state and not ledger.needs_write:
            debug("nothing to plan: another worker was first")
            return state, None
        gone = sorted({known.pid for known in written.leases} - {known.pid for known in state.leases})
        debug("a new plan: ended %s; this worker says %s; the ledger said %s", gone, lease, state.lease_of(lease.pid))
        now, refused = _settle(ledger, topology, state, wanted)
    return now, refused.get(lease.pid)


def leave(ledger: Ledger, pid: int, reason: str | None = None) -> None:
    """End the lease, if any, of a worker that lives on unbound, and enter the reason.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    topology = discovery.read_topology()
    with ledger.locked() as state:
        wanted = _without(state, pid)
        if reason is not None and (identity := process.identify(pid)):
            refusal = Refusal(pid, identity.start_time, reason)
            wanted = replace(wanted, refusals=(*wanted.refusals, refusal))
        _settle(ledger, topology, state, wanted)


def register_server(ledger: Ledger, server: Server) -> None:
    """Enter a TorchServe frontend with what its config.properties asks for.

    One that is entered again keeps its first ``allowed`` and ``limit``: its mask may be narrower by now, because
    frontends are moved off the slices.
    """
    with ledger.locked() as state:
        for known in state.servers:
            if known.identity == server.identity:
                server = replace(server, allowed=known.allowed, limit=known.limit)
        others = tuple(other for other in state.servers if other.pid != server.pid)
        ledger.write(replace(state, generation=state.generation + 1, servers=(*others, server)))


def server_of(state: State, pid: int) -> Server | None:
    """Return the TorchServe frontend that ``pid`` descends from: its parent, or its grandparent under torchrun."""
    servers = {server.pid: server for server in state.servers}
    ancestor = process.parent(pid)
    for _ in range(4):
        if ancestor is None or ancestor in servers:
            break
        ancestor = process.parent(ancestor)
    return None if ancestor is None else servers.get(ancestor)


def _without(state: State, pid: int) -> State:
    return replace(
        state,
        leases=tuple(lease for lease in state.leases if lease.pid != pid),
        refusals=tuple(refusal for refusal in state.refusals if refusal.pid != pid),
    )


def _knowing(state: State, lease: Lease) -> State:
    """Return ``state`` with what the worker of ``lease`` knows of itself; its slice is not for it to say."""
    entry = state.lease_of(lease.pid)
    if entry is None:
        return replace(state, leases=(*_without(state, lease.pid).leases, lease))
    known = replace(entry, model=lease.model, demand=lease.demand, notes=lease.notes)
    if known == entry:
        return state
    leases = tuple(known if other is entry else other for other in state.leases)
    return _allowing(replace(state, leases=leases), lease)


def _allowing(state: State, lease: Lease) -> State:
    """Copy what ``lease`` is allowed to its frontend: it is in the same cpuset, and this reading of it is newer."""
    servers = tuple(
        replace(server, allowed=lease.demand.allowed) if server.pid == lease.server_pid else server
        for server in state.servers
    )
    return replace(state, servers=servers)


class _Asking(NamedTuple):
    """A worker in the planner's eyes. ``server_pid``: its frontend, blamed if its demands cannot be planned."""

    pid: int
    server_pid: int
    demand: Demand


class _Slices(NamedTuple):
    """A slice for every PID that could be planned; the others keep what they have, and ``notes`` say why."""

    slices: dict[int, Slice]
    reserved: frozenset[int]
    notes: tuple[str, ...]

    def apply(self, state: State) -> State:
        leases = []
        for lease in state.leases:
            given = self.slices.get(lease.pid, lease.slice)
            moved = not set(lease.slice.numa_nodes) & set(given.numa_nodes)
            leases.append(replace(lease, slice=given, moves=lease.moves + moved))
        return replace(state, leases=tuple(leases), reserved=self.reserved, notes=self.notes)


def _plan_all(topology: Topology, leases: Iterable[Lease], newcomer: _Asking | None = None) -> _Slices:
    """Plan for all. A server whose demands are impossible by themselves keeps its slices; the others share the rest.

    Raises:
        PlanError: the newcomer cannot get a slice.
    """
    asking = [
        _Asking(lease.pid, lease.server_pid or lease.pid, replace(lease.demand, held=_held(lease))) for lease in leases
    ]
    asking += [newcomer] if newcomer else []
    try:
        return _plan(topology, asking)
    except PlanError as error:
        together = error
    impossible: dict[int, PlanError] = {}
    for server in dict.fromkeys(worker.server_pid for worker in asking):
        try:
            _plan(topology, [worker for worker in asking if worker.server_pid == server])
        except PlanError as error:
            impossible[server] = error
    # Where each server alone could be served, the last one to come is one too many.
    failed = impossible or {(newcomer or asking[-1]).server_pid: together}
    if newcomer and newcomer.server_pid in failed:
        raise failed[newcomer.server_pid]
    notes = tuple(f"the workers of process {server} keep their slices: {error}" for server, error in failed.items())
    kept = {cpu for worker in asking if worker.server_pid in failed for cpu in worker.demand.held}
    taken = frozenset(cpu for core in topology.cores_of(kept) for cpu in core.cpus)
    others = [worker for worker in asking if worker.server_pid not in failed]
    rest = [worker._replace(demand=_beside(worker.demand, taken)) for worker in others]
    try:
        planned = _plan(topology, rest)
    except PlanError as error:
        if newcomer:
            raise
        return _Slices({}, frozenset(), (*notes, str(error)))
    return planned._replace(notes=(*planned.notes, *notes))


def _beside(demand: Demand, taken: frozenset[int]) -> Demand:
    """Return ``demand`` without the CPUs that are ``taken``; unchanged if nothing is left, cores are shared then."""
    allowed, named = demand.allowed - taken, demand.policy.core_list
    if named is None:
        return replace(demand, allowed=allowed or demand.allowed)
    if not named - taken:
        return demand
    return replace(demand, allowed=allowed, policy=replace(demand.policy, core_list=named - taken))


def _plan(topology: Topology, asking: Sequence[_Asking]) -> _Slices:
    for worker in asking:
        debug("process %s of server %s asks: %s", worker.pid, worker.server_pid, worker.demand)
    try:
        result = plan(topology, [worker.demand for worker in asking])
    except PlanError as error:
        debug("no plan: %s", error)
        raise
    for worker, given in zip(asking, result.slices, strict=True):
        debug("process %s gets %s", worker.pid, given)
    slices = {worker.pid: given for worker, given in zip(asking, result.slices, strict=True)}
    return _Slices(slices, result.reserved, result.notes)


def _held(lease: Lease) -> frozenset[int]:
    return frozenset(lease.slice.cpus) if lease.slice.pinned else frozenset()


def _settle(ledger: Ledger, topology: Topology, before: State, wanted: State) -> tuple[State, dict[int, OSError]]:
    """Plan for all workers of ``wanted``; see ``_write_and_bind``."""
    return _write_and_bind(ledger, before, _plan_all(topology, wanted.leases).apply(wanted))


def _write_and_bind(ledger: Ledger, before: State, after: State) -> tuple[State, dict[int, OSError]]:
    """Write ``after`` if the file says something else, and bind all workers.

    Return the state that holds now, and what the kernel refused, by PID.
    """
    if ledger.needs_write or after != before:
        after = replace(after, generation=before.generation + 1)
        ledger.write(after)
        debug("plan %s in %s: reserved CPUs %s, notes %s", after.generation, ledger.path, after.reserved, after.notes)
    return after, bind_all(before, after)
