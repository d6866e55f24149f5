"""The TorchServe workers that have no slice, and why."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ts_plugin.ledger.codec import LEASE_VARIABLE
from ts_plugin.ledger.coordinator import server_of
from ts_plugin.ledger.directory import state_directory
from ts_plugin.ledger.model import State
from ts_plugin.machine import process

UNBOUND_VARIABLE = "TS_CORES_UNBOUND"  # in a worker's environment: why the launcher could not bind it
JAR = "ts-cores.jar"  # the frontend keeps it open where the plug-in is loaded
WORKER_SCRIPT = "/ts/model_service_worker.py"
PAST_LAUNCHER = (
    "started past the launcher, and its handler does not claim a slice; use CoreSliceMixin "
    "(if it does use it, the claim failed before the ledger could be written: the worker's log says why)"
)


@dataclass(frozen=True, slots=True)
class Unbound:
    """A TorchServe worker without a slice in this user's ledger, and why.

    ``elsewhere`` names its user, container, ledger or server if it is not one of this ledger's; it may own cores there,
    so ``reason`` does not count then.
    """

    pid: int
    reason: str
    server_pid: int | None = None
    elsewhere: str = ""


def unbound_workers(state: State, directory: str | None = None) -> list[Unbound]:
    """Return the TorchServe workers of this machine that hold no lease in ``state``, as far as /proc shows them.

    ``state`` is that of the ledger in ``directory``, by default this process's own.
    """
    directory = directory or state_directory()
    bound = {lease.pid for lease in state.leases}
    reasons = {refusal.pid: refusal.reason for refusal in state.refusals}
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
        reason = reasons.get(pid) or environment.get(UNBOUND_VARIABLE) or PAST_LAUNCHER  # the ledger's is newer
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
