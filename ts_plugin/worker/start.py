"""A worker's start, for the launcher and the handlers alike: claim a slice, say so, or serve unbound and say why."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import MutableMapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ts_plugin.kernel import affinity, memory
from ts_plugin.ledger import coordinator, registration
from ts_plugin.ledger.coordinator import Applicant
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease
from ts_plugin.log import debug, say
from ts_plugin.machine import discovery, process
from ts_plugin.machine.topology import Allowance
from ts_plugin.worker.archive import Wishes, read_archive
from ts_plugin.worker.environment import collapsing, prepare_environment

OFF_VARIABLE = "TS_CORES_OFF"  # in a worker's environment: it stays as TorchServe started it, whatever its handler is


class Start(NamedTuple):
    """A worker's lease, or None and the reason why it serves unbound."""

    lease: Lease | None
    reason: str = ""


def start(
    *,
    worker: str,
    archive: str,
    environment: MutableMapping[str, str] | None = None,
    hooked: bool = False,
    said: str = "",
) -> Start:
    """Claim a slice for this process, which binds it, and set the memory policy of the calling thread.

    ``worker`` is TorchServe's number for it, ``archive`` the directory of its model. ``environment``: the variables of
    the interpreter that this process will become, which are changed to fit the slice; None where torch is loaded
    already. ``hooked``: the frontend has our hook, so its entry in the ledger, which says what this worker may use, is
    worth a wait. ``said``: the reason that the log has already.

    Whatever goes wrong, the worker serves: unbound, on the CPUs that it had, with its lease given back. With
    TS_CORES_OFF it does so without a word.
    """
    if OFF_VARIABLE in os.environ:
        return Start(None, f"{OFF_VARIABLE} is set")
    had: frozenset[int] = frozenset()
    try:
        had = frozenset(os.sched_getaffinity(0))
        debug("worker %s of %s, process %s, child of %s, mask %s", worker, archive, os.getpid(), os.getppid(), had)
        lease = claim(Ledger(), wishes=read_archive(archive), worker=worker, hooked=hooked)
        policy = lease.demand.policy
        notes = [*lease.notes, *policy.notes]
        if lease.slice.pinned and (note := memory.bind_memory(policy.memory, lease.slice.numa_nodes)):
            notes.append(note)
        if environment is None:
            notes += [f"{name} is set, and shrank the affinity mask at `import torch`; unset it" for name in _shrank()]
        else:
            notes += prepare_environment(environment, lease.slice, policy, library_roots=(sys.prefix,))
    except Exception as error:  # noqa: BLE001 - a pinning plug-in never takes serving down, whatever went wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason != said:
            say(f"worker {worker} serves UNBOUND: {reason}", problem=True)
        with contextlib.suppress(Exception):  # what failed above may fail here
            _give_back(reason, had)
        return Start(None, reason)
    say(lease.describe() if hooked else f"{lease.describe()} (claimed by the handler)")
    for note in notes:
        say(f"worker {worker}: {note}", problem=True)
    if environment is not None:
        changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        debug("memory policy %s; the interpreter starts with %s", policy.memory.value, changed)
    return Start(lease)


def claim(ledger: Ledger, *, wishes: Wishes, worker: str, hooked: bool = False) -> Lease:
    """Enter this process into the ledger, which binds it, and return its lease; the arguments are those of ``start``.

    Raises:
        CannotBind, LedgerError, PlanError: see ``coordinator.join``.
    """
    if hooked:
        registration.wait_for_server(ledger)
    pid = os.getpid()
    identity = process.identify(pid)
    bounds = discovery.read_bounds()
    limit = own_limit(bounds)
    debug("%s; cgroups and cpuset leave %s; the mask leaves CPUs %s", wishes, bounds, "all" if limit is None else limit)
    applicant = Applicant(
        pid=pid,
        start_time=identity.start_time if identity else 0,
        model=wishes.model,
        version=wishes.version,
        worker_id=worker,
        bounds=bounds,
        limit=limit,
        cores=wishes.cores,
        share=wishes.share,
        notes=wishes.notes,
        hooked=hooked,
    )
    return coordinator.join(ledger, applicant)


def own_limit(bounds: Allowance) -> frozenset[int] | None:
    """Return the CPUs that this process was held to when it started, inside ``bounds``; None for all of them.

    Not the one CPU that an OpenMP runtime which was told to bind its threads left to the main thread at `import torch`.
    """
    limit = bounds.limit(discovery.read_mask(os.getpid()))
    if limit is not None and len(limit) == 1 and _shrank():
        return bounds.limit(discovery.read_mask(os.getppid()))
    return limit


def _shrank() -> list[str]:
    """Return the variables that made torch's OpenMP runtime shrink the main thread's mask in this process."""
    return collapsing(os.environ) if "torch" in sys.modules else []


def worker_id(arguments: Sequence[str]) -> str:
    """Return TorchServe's number for a worker, which survives its restarts, from the arguments it starts with.

    Source: org.pytorch.serve.wlm.WorkerLifeCycle; ts/model_service_worker.py adds LOCAL_RANK under torchrun.
    """
    options = dict(pairwise(arguments))
    number = options.get("--port") or options.get("--sock-name", "").rpartition(".")[2]
    rank = os.environ.get("LOCAL_RANK", "0")
    return str(int(number) + int(rank)) if number.isdigit() and rank.isdigit() else number or "?"


def _give_back(reason: str, had: frozenset[int]) -> None:
    """End the lease, and use what the frontend could use before it was moved aside, or else what this process had."""
    pid = os.getpid()
    held = os.sched_getaffinity(0)
    with contextlib.suppress(Exception):
        server = coordinator.server_of(Ledger().read(), pid)
        had = had if server is None else server.allowed
    with contextlib.suppress(Exception):
        coordinator.leave(Ledger(), pid, reason)
    affinity.bind_tree(pid, had, before=held)
