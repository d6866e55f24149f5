"""Read-back: what this process does on its slice: moves between CPUs, memory, libraries; and its metrics."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from ts_plugin.ledger.model import Lease
from ts_plugin.lending.words import Status
from ts_plugin.machine import discovery, process
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.worker import openmp

PATIENCE = 3  # readings in a row before an overload is worth a line in the log

METRICS = {  # name in metrics.yaml -> (unit, kind); all with the dimensions ModelName and WorkerName
    "SliceCores": ("Count", "gauge"),
    "ThreadsOutsideSlice": ("Count", "gauge"),
    "RemoteMemoryPages": ("Count", "gauge"),
    "CpuMigrations": ("Count", "counter"),
    "Resizes": ("Count", "counter"),
    "WideRequests": ("Count", "counter"),
    "BorrowedCoreSeconds": ("Seconds", "counter"),
    "HandBacks": ("Count", "counter"),
    "SliceWaitSeconds": ("Seconds", "counter"),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What one look at this worker found.

    ``migrations``: moves of its threads between CPUs since the last reading; None where the kernel does not count.
    ``remote_pages``: pages (of the kernel's page size) on NUMA nodes that are not the slice's; None where it was not
    looked at this time.
    """

    migrations: int | None
    remote_pages: int | None
    problems: tuple[str, ...] = ()


class ReadBack:
    """Looks at this process; keeps the counters that need two readings."""

    def __init__(self) -> None:
        self._migrations: dict[int, int] = {}
        self._crowded = 0

    def read(self, lease: Lease, threads: int, *, thorough: bool) -> Reading:
        """Check what this process does on the slice of ``lease``, where ``threads`` compute now.

        ``thorough`` also looks at memory and libraries: it reads numa_maps, which takes milliseconds. Otherwise it
        costs about 20 microseconds a thread.
        """
        pid = os.getpid()
        problems = []
        if lease.slice.pinned and (crowd := self._crowd(pid, threads)):
            problems.append(crowd)
        remote = None
        if thorough:
            remote = _remote_pages(lease.slice.numa_nodes)
            if len(runtimes := openmp.runtimes()) > 1:
                problems.append(
                    f"two OpenMP runtimes in one process ({', '.join(runtimes)}): each starts its own threads; "
                    "remove one from LD_PRELOAD or from the model's requirements"
                )
        return Reading(self._moves(pid), remote, tuple(problems))

    def _crowd(self, pid: int, threads: int) -> str | None:
        """Return a complaint once more threads than cores were runnable in PATIENCE readings in a row."""
        runnable = sum(1 for tid in process.threads(pid) if process.state(pid, tid) == "R")
        self._crowded = self._crowded + 1 if runnable > threads + 1 else 0  # this thread itself is running
        if self._crowded != PATIENCE:
            return None
        return f"{runnable} runnable threads on {threads} cores: the handler starts threads of its own beside torch's"

    def _moves(self, pid: int) -> int | None:
        """Return how often threads changed their CPU since the last call."""
        counts = {tid: count for tid in process.threads(pid) if (count := process.migrations(pid, tid)) is not None}
        if not counts:
            return None
        moves = sum(count - self._migrations.get(tid, 0) for tid, count in counts.items())
        first, self._migrations = not self._migrations, counts
        return 0 if first else max(0, moves)


def lending(before: Status, after: Status) -> dict[str, float]:
    """Return what to add to the counters of lending, by metric; a worker that joined anew counts from nothing."""
    if after.requests < before.requests:
        before = Status()
    added = {
        "WideRequests": after.wide - before.wide,
        "BorrowedCoreSeconds": after.borrowed - before.borrowed,
        "HandBacks": after.handed_back - before.handed_back,
        "SliceWaitSeconds": after.wait - before.wait,
    }
    return {name: value for name, value in added.items() if value > 0}


def refusal(lease: Lease, error: OSError) -> str:
    """Return what it means that the kernel did not bind the worker itself."""
    remedy = "its cpuset has none of them" if error.errno == errno.EINVAL else "a seccomp filter must let it pass"
    return (
        f"its own are CPUs {format_cpulist(lease.slice.cpus)}, it runs on {format_cpulist(os.sched_getaffinity(0))}; "
        f"sched_setaffinity: {error.strerror}; {remedy}"
    )


def foreign_child(pid: int) -> str:
    """Return what it means that the kernel did not bind a child."""
    return (
        f"its child {pid} (user {process.owner(pid)}) runs outside the slice: "
        "only that user or root may bind it; start it as the worker's user"
    )


def _remote_pages(nodes: tuple[int, ...]) -> int | None:
    """Return the pages of this process that lie on other nodes; None where that is not known."""
    if not nodes:
        return None
    if len(discovery.memory_nodes()) < 2:
        return 0  # and no walk through all pages
    pages = process.numa_pages(os.getpid())
    return None if pages is None else sum(number for node, number, _ in pages if node not in nodes)


def exporter(cache: object, lease: Lease) -> Callable[[str, float], None] | None:
    """Return a function that sends one of METRICS to TorchServe, or None where its metrics.yaml does not list them.

    ``cache`` is TorchServe's ts.metrics.metric_cache_yaml_impl.MetricsCacheYamlImpl.
    """
    from ts.metrics.metric_type_enum import MetricTypes

    metrics = {}
    for name, (_, kind) in METRICS.items():
        known = getattr(cache, "cache", {}).get(MetricTypes(kind), {}).get(name)
        if known is not None:
            metrics[name] = known
    if not metrics:
        return None
    dimensions = [lease.model, f"W-{lease.worker_id}-{lease.model}_{lease.version}"]

    def export(name: str, value: float) -> None:
        if name in metrics:
            metrics[name].add_or_update(value, dimensions)

    return export
