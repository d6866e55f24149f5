"""A worker's claim: who it is, and what it may use; the coordinator gives the lease."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

from ts_plugin.ledger import coordinator, registration
from ts_plugin.ledger.coordinator import Applicant, NotRegistered
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease
from ts_plugin.machine import discovery, process
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Allowance
from ts_plugin.worker.archive import Archive
from ts_plugin.worker.environment import collapsing

__all__ = ["claim", "describe", "own_limit", "worker_id"]


def claim(ledger: Ledger, *, archive: Archive, worker: str, hooked: bool = False) -> Lease:
    """Enter this process into the ledger, which binds it, and return its lease.

    ``hooked``: see ``Applicant``; a frontend whose entry is gone is asked for it.

    Raises:
        CannotBind, NotRegistered, LedgerError, PlanError: see ``coordinator.join``.
    """
    pid = os.getpid()
    identity = process.identify(pid)
    bounds = discovery.read_bounds()
    applicant = Applicant(
        pid=pid,
        start_time=identity.start_time if identity else 0,
        model=archive.model,
        version=archive.version,
        worker_id=worker,
        bounds=bounds,
        limit=own_limit(bounds),
        cores=archive.cores,
        share=archive.share,
        notes=archive.notes,
        hooked=hooked,
    )
    try:
        return coordinator.join(ledger, applicant)
    except NotRegistered:
        registration.ensure_registered(ledger)
        return coordinator.join(ledger, applicant)


def own_limit(bounds: Allowance) -> frozenset[int] | None:
    """Return the CPUs that this process was held to when it started, inside ``bounds``; None for all of them.

    Not the one CPU that an OpenMP runtime which was told to bind its threads left to the main thread at `import torch`.
    """
    limit = bounds.limit(discovery.read_mask(os.getpid()))
    if limit is not None and len(limit) == 1 and "torch" in sys.modules and collapsing(os.environ):
        return bounds.limit(discovery.read_mask(os.getppid()))
    return limit


def worker_id(arguments: Sequence[str]) -> str:
    """Return TorchServe's number for a worker, which survives its restarts, from the arguments it starts with.

    Source: org.pytorch.serve.wlm.WorkerLifeCycle; ts/model_service_worker.py adds LOCAL_RANK under torchrun.
    """
    options = dict(pairwise(arguments))
    number = options.get("--port") or options.get("--sock-name", "").rpartition(".")[2]
    rank = os.environ.get("LOCAL_RANK", "0")
    return str(int(number) + int(rank)) if number.isdigit() and rank.isdigit() else number or "?"


def describe(lease: Lease) -> str:
    """Return one line for a log: who, which CPUs, how many threads, where."""
    cores = lease.slice
    kind = "CPUs" if cores.pinned else "not pinned, any of CPUs"
    return (
        f"{lease}: {kind} {format_cpulist(cores.cpus)}, intra-op threads {cores.threads}, "
        f"NUMA nodes {format_cpulist(cores.numa_nodes) or 'unknown'}"
    )
