"""Join, leave, settle: one plan for all living workers, written to the ledger and then told to the kernel.

Whoever changes who is alive holds the ledger's lock, plans, writes and binds all workers, the others' threads included.
The ledger is written first: if the process dies half-way, any other worker finds the truth there and finishes the job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ts_plugin.leases import binding
from ts_plugin.leases.ledger import LEASE_VARIABLE, Lease, Ledger, LedgerError, Server, State, state_directory
from ts_plugin.machine import discovery, process
from ts_plugin.planning.planner import PlanError, plan

__all__ = [
    "JAR",
    "UNBOUND_VARIABLE",
    "Unbound",
    "amend",
    "enlist",
    "join",
    "leave",
    "server_of",
    "settle",
    "unbound_workers",
]

UNBOUND_VARIABLE = "TS_CORES_UNBOUND"  # in a worker's environment: why the launcher could not bind it
JAR = "ts-cores.jar"  # the frontend keeps it open where the plug-in is loaded
WORKER_SCRIPT = "/ts/model_service_worker.py"
PAST_LAUNCHER = "started past the launcher, and its handler does not claim a slice; use CoreSliceMixin"


@dataclass(frozen=True, slots=True)
class Unbound:
    """A TorchServe worker without a slice in our ledger, and why.

    ``elsewhere`` names whose it is if it is not ours: then ``reason`` says nothing, it may well own cores there.
    """

    pid: int
    reason: str
    server_pid: int | None = None
    elsewhere: str = ""


def join(ledger: Ledger, lease: Lease) -> Lease:
    """Give a new worker its slice, make room for it among the others, bind it, and return its lease.

    ``lease.slice`` is ignored. It is bound before the lock is released: the next change may take cores from it again.

    Raises:
        LedgerError: the ledger cannot be used. PlanError: no plan exists with this worker in it; nothing has changed.
    """
    with ledger.locked() as state:
        others = tuple(other for other in state.leases if other.pid != lease.pid)
        after = _settle(ledger, state, replace(state, leases=(*others, lease)))
    joined = after.lease_of(lease.pid)
    if joined is None:  # it died between the two lines above; whoever asks is another process then
        raise LedgerError(f"{ledger.path}: process {lease.pid} ended while it joined")
    return joined


def settle(ledger: Ledger) -> State:
    """Divide the machine anew among those who live; return the state that holds now.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    with ledger.locked() as state:
        try:
            return _settle(ledger, state, state)
        except PlanError as error:  # CPUs went offline under a core list, say: everyone keeps what it has
            return replace(state, notes=(*state.notes, str(error)))


def leave(ledger: Ledger, pid: int) -> None:
    """End the lease of a worker that lives on unbound.

    Raises:
        LedgerError: the ledger cannot be used. PlanError: no plan exists for the others.
    """
    with ledger.locked() as state:
        _settle(ledger, state, replace(state, leases=tuple(lease for lease in state.leases if lease.pid != pid)))


def amend(ledger: Ledger, corrected: Lease) -> None:
    """Take over the model's name, demand and notes of ``corrected``, which a worker knows better than when it joined.

    Raises:
        LedgerError: the ledger cannot be used. PlanError: no plan exists with this demand; nothing has changed.
    """
    with ledger.locked() as state:
        leases = tuple(
            replace(lease, model=corrected.model, demand=corrected.demand, notes=corrected.notes)
            if lease.pid == corrected.pid
            else lease
            for lease in state.leases
        )
        _settle(ledger, state, replace(state, leases=leases))


def enlist(ledger: Ledger, server: Server) -> None:
    """Enter a TorchServe frontend with what its config.properties asks for."""
    with ledger.locked() as state:
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


def unbound_workers(state: State, directory: str | None = None) -> list[Unbound]:
    """Return the TorchServe workers of this machine that hold no lease in ``state``, as far as /proc shows them.

    ``state`` is that of the ledger in ``directory``, which is this process's own unless it is given. A worker that this
    ledger cannot know says so in ``elsewhere``; whether it is bound is not for us to judge.
    """
    directory = directory or state_directory()
    bound = {lease.pid for lease in state.leases}
    found = []
    for pid in process.pids():
        arguments = process.command_line(pid)
        if pid in bound or not any(argument.endswith(WORKER_SCRIPT) for argument in arguments[1:3]):
            continue
        if process.parent(pid) in bound:  # a child that a worker forked looks like the worker
            continue
        server = server_of(state, pid)
        environment = process.environment(pid)
        elsewhere = "" if server else _elsewhere(pid, environment, directory)
        reason = environment.get(UNBOUND_VARIABLE, PAST_LAUNCHER)
        # A frontend that could not be entered into the ledger is still the parent of its workers.
        found.append(Unbound(pid, reason, server.pid if server else process.parent(pid), elsewhere))
    return found


def _elsewhere(pid: int, environment: Mapping[str, str], directory: str) -> str:
    """Return whose the worker ``pid`` is if its frontend did not enter itself here; nothing if it should have."""
    user = process.owner(pid)
    if user != os.getuid():
        return f"user {user}"
    if process.namespace(pid) != process.namespace(os.getpid()):
        return "another container"
    with contextlib.suppress(OSError):  # it names no directory that could be used, which is why the worker is unbound
        other = state_directory(environment)
        if other != directory:
            return f"the ledger in {other}"
    frontend = process.parent(pid)
    hooked = frontend is not None and any(path.endswith(f"/{JAR}") for path in process.opened(frontend))
    known = UNBOUND_VARIABLE in environment or LEASE_VARIABLE in environment
    return "" if hooked or known else "a TorchServe without ts-cores"


def _settle(ledger: Ledger, before: State, wanted: State) -> State:
    """Plan ``wanted``, write it if it differs from the ledger, and make the kernel agree with it."""
    topology = discovery.read_topology()
    demands = [replace(lease.demand, held=_held(lease, before)) for lease in wanted.leases]
    result = plan(topology, demands)
    leases = []
    for lease, cores in zip(wanted.leases, result.slices, strict=True):
        known = before.lease_of(lease.pid)
        moved = known is not None and not set(known.slice.numa_nodes) & set(cores.numa_nodes)
        leases.append(replace(lease, slice=cores, moves=lease.moves + moved))
    after = replace(wanted, leases=tuple(leases), reserved=result.reserved, notes=result.notes)
    on_disk = ledger.read_all()
    if replace(after, generation=on_disk.generation) != on_disk:
        after = replace(after, generation=before.generation + 1)
        ledger.write(after)
    _enforce(before, after)
    return after


def _held(lease: Lease, before: State) -> frozenset[int]:
    known = before.lease_of(lease.pid)
    return frozenset() if known is None or not known.slice.pinned else frozenset(known.slice.cpus)


def _enforce(before: State, after: State) -> None:
    """Bind every worker: those who only lose cores first, then those who gain some, newcomers last."""
    changes = []
    for lease in after.leases:
        known = before.lease_of(lease.pid)
        gains = known is None or not set(lease.slice.cpus) <= set(known.slice.cpus)
        changes.append((known is None, gains, lease, None if known is None else known.slice.cpus))
    for _, _, lease, held in sorted(changes, key=lambda change: change[:2]):
        with contextlib.suppress(OSError):  # it ended, or its cpuset changed: its own follower sees that and says so
            binding.bind_tree(lease.pid, lease.slice.cpus, before=held or os.sched_getaffinity(lease.pid))
    for server in after.servers:
        _move_frontend(server, after)


def _move_frontend(server: Server, state: State) -> None:
    """Keep the frontend's own threads off the slices where they can go elsewhere: reserved cores, idle SMT siblings."""
    held = {cpu for lease in state.leases if lease.slice.pinned for cpu in lease.slice.cpus}
    free = (server.allowed & state.reserved) or (server.allowed - held)
    with contextlib.suppress(OSError):  # gone already
        binding.bind_process(server.pid, free or server.allowed, before=os.sched_getaffinity(server.pid))
