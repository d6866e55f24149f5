"""The core map as JSON values, for `GET /cores` and `ts-cores show --json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ts_plugin.ledger.model import Lease, State
from ts_plugin.ledger.unbound import unbound_workers
from ts_plugin.lending import status
from ts_plugin.lending.words import Seen
from ts_plugin.machine.process import Identity
from ts_plugin.planning.planner import Slice


def core_map(
    state: State, seen: Mapping[Identity, Seen] | None = None, *, server_pid: int | None = None
) -> dict[str, Any]:
    """Return who holds what as JSON values; only the workers of one frontend if ``server_pid`` is given.

    ``seen`` is what ``lending.words.look`` returned.
    """

    def wanted(owner: int | None) -> bool:
        return server_pid is None or owner == server_pid

    users = status.computing(seen, state)
    workers = [worker for worker in unbound_workers(state) if wanted(worker.server_pid)]
    return {
        "slices": [lease_document(lease, users, seen) for lease in state.leases if wanted(lease.server_pid)],
        "unbound": [{"pid": worker.pid, "reason": worker.reason} for worker in workers if not worker.elsewhere],
        "elsewhere": [{"pid": worker.pid, "whose": worker.elsewhere} for worker in workers if worker.elsewhere],
        "reserved_cpus": sorted(state.reserved),
        "notes": list(state.notes),
    }


def slice_document(cores: Slice) -> dict[str, Any]:
    """Return a slice, planned or held, as JSON values."""
    return {
        "cpus": list(cores.cpus),
        "threads": cores.threads,
        "numa_nodes": list(cores.numa_nodes),
        "l3_domains": list(cores.l3_domains),
        "packages": list(cores.packages),
        "pinned": cores.pinned,
    }


def lease_document(
    lease: Lease, users: Mapping[int, int] | None, seen: Mapping[Identity, Seen] | None
) -> dict[str, Any]:
    """Return a worker and its slice as JSON values, who computes there now, and what lending has done for it."""
    now = status.computes_on(lease.pid, lease.slice, users)
    lent = [cpu for cpu in lease.slice.cpus if (users or {}).get(cpu, lease.pid) != lease.pid]
    return {
        "pid": lease.pid,
        "model": lease.model,
        "version": lease.version,
        "worker_id": lease.worker_id,
        "server_pid": lease.server_pid,
        **slice_document(lease.slice),
        "computes_on": now,
        "lent_cpus": None if now is None else lent,
        "lending": status.document(lease, seen) if lease.slice.reach else None,
        "moves": lease.moves,
        "notes": list(lease.notes),
    }
