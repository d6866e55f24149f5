"""Figures about running processes from /proc, and a thread that samples them while a load runs."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ts_plugin.machine import process

__all__ = ["Sampler", "Snapshot", "Trace", "pages", "pss_mib", "remote_share", "snapshot", "thread_masks"]

PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
GONE = (FileNotFoundError, ProcessLookupError)  # a thread or process that ended while it was being read


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counters of a set of processes at one moment; ``after.since(before)`` is what happened between.

    ``cpu_seconds`` includes the ended and reaped children of the processes. The other counters are per thread id, so
    that a thread which ended in between takes only its own count with it. ``migrations`` is None without SCHED_DEBUG.
    """

    cpu_seconds: float
    threads: int
    switches: Mapping[int, int]
    preemptions: Mapping[int, int]
    migrations: Mapping[int, int] | None

    def since(self, before: Snapshot) -> tuple[float, int, int, int | None]:
        """Return CPU seconds, voluntary switches, involuntary switches and CPU migrations."""
        return (
            self.cpu_seconds - before.cpu_seconds,
            _grown(self.switches, before.switches),
            _grown(self.preemptions, before.preemptions),
            None
            if self.migrations is None or before.migrations is None
            else _grown(self.migrations, before.migrations),
        )


def snapshot(pids: Iterable[int], *, proc: Path = PROC) -> Snapshot:
    """Read the counters of the processes; one that is gone counts nothing.

    Source: man 5 proc (stat fields 14-17, status); Documentation/scheduler/sched-debug.rst (se.nr_migrations).
    """
    ticks = 0
    switches: dict[int, int] = {}
    preemptions: dict[int, int] = {}
    migrations: dict[int, int] | None = {}
    for pid in pids:
        try:
            ticks += sum(int(number) for number in _stat(proc / str(pid) / "stat")[11:15])
        except GONE:
            continue
        for task in _tasks(pid, proc):
            try:
                status = (task / "status").read_text()
                switches[int(task.name)] = _field(status, "voluntary_ctxt_switches")
                preemptions[int(task.name)] = _field(status, "nonvoluntary_ctxt_switches")
            except GONE:
                continue
            if migrations is not None:
                migrations = _add_migrations(migrations, task)
    return Snapshot(ticks / TICKS_PER_SECOND, len(switches), switches, preemptions, migrations)


def pss_mib(pids: Iterable[int]) -> float:
    """Return the proportional set size of all the processes together, in MiB: what ending them would free."""
    return sum(memory[0] for pid in pids if (memory := process.memory(pid))) / 2**20


def pages(pid: int, *, proc: Path = PROC) -> dict[int, int]:
    """Return NUMA node -> KiB of the process's mapped memory that lies there; empty on a kernel without NUMA.

    Source: man 5 proc, numa_maps (counts are in units of kernelpagesize_kB).
    """
    found: dict[int, int] = {}
    try:
        text = (proc / str(pid) / "numa_maps").read_text()
    except GONE:
        return found
    for line in text.splitlines():
        size = re.search(r"\bkernelpagesize_kB=(\d+)", line)
        for node, number in re.findall(r"\bN(\d+)=(\d+)", line):
            found[int(node)] = found.get(int(node), 0) + int(number) * int(size[1] if size else 4)
    return found


def remote_share(resident: Mapping[int, int], ran: Mapping[int, float]) -> float | None:
    """Return the chance that an access from where the process ran meets memory of another node.

    ``resident`` is node -> memory, ``ran`` node -> CPU time, in any unit: 1 - sum of the products of their shares.
    None if either is unknown.
    """
    memory, seconds = sum(resident.values()), sum(ran.values())
    if not memory or not seconds:
        return None
    return 1 - sum(resident.get(node, 0) / memory * (time / seconds) for node, time in ran.items())


def thread_masks(pid: int, *, proc: Path = PROC) -> dict[int, str]:
    """Return thread id -> the kernel's list of the CPUs that it may use."""
    masks = {}
    for task in _tasks(pid, proc):
        try:
            found = re.search(r"^Cpus_allowed_list:\s*(\S+)", (task / "status").read_text(), re.MULTILINE)
        except GONE:
            continue
        if found:
            masks[int(task.name)] = found[1]
    return masks


@dataclass(slots=True)
class Trace:
    """What a Sampler saw. ``times`` are seconds since it began, the middle of each interval.

    ``usage``: CPU -> share of each interval that it was busy (0 to 1). ``where``: (pid, thread) -> for each interval
    the CPU that the thread was last on and its CPU seconds in it; None where the thread did not exist or did not run.
    """

    times: list[float] = field(default_factory=list)
    usage: dict[int, list[float]] = field(default_factory=dict)
    where: dict[tuple[int, int], list[tuple[int, float] | None]] = field(default_factory=dict)

    def node_seconds(self, pid: int, node_of: Mapping[int, int]) -> dict[int, float]:
        """Return NUMA node -> CPU seconds that the process's threads were seen running there."""
        found: dict[int, float] = {}
        for (owner, _), places in self.where.items():
            for place in places if owner == pid else ():
                if place and place[0] in node_of:
                    found[node_of[place[0]]] = found.get(node_of[place[0]], 0.0) + place[1]
        return found

    def moves(self, place_of: Mapping[int, int]) -> int:
        """Return how often a thread was seen in another place (a node, say) than before: a lower bound."""
        number = 0
        for places in self.where.values():
            seen = [place_of[place[0]] for place in places if place and place[0] in place_of]
            number += sum(left != right for left, right in pairwise(seen))
        return number


class Sampler:
    """Samples every CPU, and every thread of ``pids``, each ``interval`` seconds between ``with`` and its end."""

    def __init__(self, pids: Iterable[int], *, interval: float = 0.2, proc: Path = PROC) -> None:
        self.trace = Trace()
        self._pids = tuple(pids)
        self._interval = interval
        self._proc = proc
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Trace:
        self._thread.start()
        return self.trace

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        began = last = time.monotonic()
        usage, work = cpu_ticks(proc=self._proc), dict(self._work())
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            usage_now, work_now = cpu_ticks(proc=self._proc), dict(self._work())
            self._add((last + now) / 2 - began, usage, usage_now, work, work_now)
            last, usage, work = now, usage_now, work_now

    def _add(
        self,
        moment: float,
        usage: Mapping[int, tuple[int, int]],
        usage_now: Mapping[int, tuple[int, int]],
        work: Mapping[tuple[int, int], tuple[int, int]],
        work_now: Mapping[tuple[int, int], tuple[int, int]],
    ) -> None:
        number = len(self.trace.times)
        self.trace.times.append(moment)
        for cpu, (busy, total) in usage_now.items():
            before = usage.get(cpu, (busy, total))
            share = (busy - before[0]) / max(total - before[1], 1)
            self.trace.usage.setdefault(cpu, [0.0] * number).append(share)
        for thread in self.trace.where.keys() | work_now.keys():
            places = self.trace.where.setdefault(thread, [None] * number)
            cpu, ticks = work_now.get(thread, (-1, 0))
            ran = ticks - work.get(thread, (cpu, 0))[1]
            places.append((cpu, ran / TICKS_PER_SECOND) if ran > 0 else None)

    def _work(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        for pid in self._pids:
            for task in _tasks(pid, self._proc):
                try:
                    fields = _stat(task / "stat")
                except GONE:
                    continue
                yield (pid, int(task.name)), (int(fields[36]), int(fields[11]) + int(fields[12]))


def cpu_ticks(*, proc: Path = PROC) -> dict[int, tuple[int, int]]:
    """Return CPU -> (busy, all) clock ticks since boot; guests' time is already part of user time.

    Source: man 5 proc, /proc/stat (idle and iowait are not busy, steal is).
    """
    found = {}
    for line in (proc / "stat").read_text().splitlines():
        name, _, numbers = line.partition(" ")
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(number) for number in numbers.split()[:8]]
            found[int(name[3:])] = (sum(ticks) - ticks[3] - ticks[4], sum(ticks))
    return found


def _stat(file: Path) -> list[str]:
    """Return the fields of a stat file from field 3 (state) on; field 2, the name, may hold blanks and brackets."""
    return file.read_text().rpartition(")")[2].split()


def _tasks(pid: int, proc: Path) -> list[Path]:
    try:
        return list((proc / str(pid) / "task").iterdir())
    except GONE:
        return []


def _field(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _add_migrations(migrations: dict[int, int], task: Path) -> dict[int, int] | None:
    try:
        text = (task / "sched").read_text()
    except GONE:
        # The kernel has no such file at all, or the thread ended; then its directory is gone too.
        return None if task.exists() else migrations
    except PermissionError:
        return None
    found = re.search(r"^se\.nr_migrations\s*:\s*(\d+)", text, re.MULTILINE)
    return migrations | {int(task.name): int(found[1])} if found else None


def _grown(after: Mapping[int, int], before: Mapping[int, int]) -> int:
    return sum(count - before.get(thread, 0) for thread, count in after.items())
