"""Workers seen from outside: masks, states and CPU time from /proc, and the words through which they lend.

Shares no code with ts_plugin. What it knows of it is the file of words (ts_plugin/lending/regions.c): for each worker
its PID, its start time, and who computes on its slice (``user``). A worker that is the user of another's slice has
borrowed that slice: it is wide.

``Look.complaints`` are violations once they last, not for a moment, since nothing here is read at one instant:

- The slice of a worker is what the thread that runs the model may run on. Its other threads run there, too; those of
  the team of a wide worker also on what it has borrowed. Slices are disjoint and cover every core. With more workers
  than cores each has one, and they are equally crowded.
- No child of a worker may run outside of the worker's slice.

``Meetings`` finds two workers that compute on one CPU. A worker runs on a CPU without leave if one of its threads is in
state R with that CPU in its mask, while the words call somebody else the user of that slice. Two workers meet on a CPU
if, in at least MEETING looks in a row, one runs there without leave and the other runs there too, with or without
leave, and the threads in question of both have got COMPUTES seconds of CPU time meanwhile. So a worker that parses a
message does not count, nor the team of a borrower whose slice was taken between two regions: it may spin there as long
as libgomp lets it, some 20 ms. A worker that has no words yet is the user of its slice. Not counted: children and
workers whose frontend was killed (they have no requests; to end costs some CPU time), and more workers than cores.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HEAD, SLOTS, SLOT = 64, 1024, struct.Struct("=I8xiQ40x")  # of the words: user, PID, start time
SLOT_OF_USER = (1 << 31) - 1  # the rest of ``user`` says whether it is inside a parallel region
MEETING, COMPUTES = 4, 0.05  # looks; seconds
TICKS = os.sysconf("SC_CLK_TCK")

IDLE = "idle cores"
UNFAIR = "more workers than cores, but not shared fairly"
STRAY = "a thread outside of its worker's slice and of what its team has borrowed"
CHILD = "a child outside of its worker's slice"


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread at one moment, its state as in /proc; ``seconds`` of CPU time since it started."""

    mask: frozenset[int]
    state: str = "S"
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker at one moment: its threads by their number, and the PIDs of the ``users`` of its slice."""

    pid: int
    threads: Mapping[int, Thread]
    users: frozenset[int]
    children: frozenset[int] = frozenset()  # the CPUs that they may run on
    parent: int = 0  # PID

    @property
    def slice(self) -> frozenset[int]:
        """The CPUs of the thread that runs the model, the process's first."""
        return self.threads[self.pid].mask

    @property
    def running(self) -> frozenset[int]:
        """The CPUs that threads in state R may run on."""
        return frozenset().union(*(thread.mask for thread in self.threads.values() if thread.state == "R"))

    def strays(self, borrowed: frozenset[int]) -> frozenset[int]:
        """Return where threads may run besides the slice and what is ``borrowed``; stopped ones run nowhere."""
        masks = (thread.mask for thread in self.threads.values() if thread.state not in "Tt")
        return frozenset().union(*masks) - self.slice - borrowed

    def seconds(self, cpu: int, before: Worker) -> float:
        """Return the CPU time since ``before`` of the threads that run and may run on ``cpu``."""
        return sum(
            thread.seconds - (before.threads[tid].seconds if tid in before.threads else 0.0)
            for tid, thread in self.threads.items()
            if thread.state == "R" and cpu in thread.mask
        )


@dataclass(frozen=True, slots=True)
class Look:
    """All workers of a machine at about one moment, and the CPUs that they are meant to divide."""

    workers: Mapping[int, Worker]
    allowed: frozenset[int]

    @property
    def crowded(self) -> bool:
        return len(self.workers) > len(physical_cores(self.allowed))

    @property
    def wide(self) -> set[int]:
        """The PIDs of those that have borrowed."""
        return {pid for pid in self.workers if self.borrowed(pid)}

    def borrowed(self, pid: int) -> frozenset[int]:
        """Return the CPUs of the slices that the worker ``pid`` has borrowed."""
        return frozenset(cpu for other in self._others(pid) if pid in other.users for cpu in other.slice)

    def without_leave(self, pid: int) -> frozenset[int]:
        """Return the CPUs on which a thread of the worker ``pid`` runs or could while others use that slice."""
        used = (worker.slice for worker in self.workers.values() if pid not in worker.users)
        return self.workers[pid].running & frozenset().union(*used)

    def meeting(self) -> set[tuple[int, int, int]]:
        """Return who computes somewhere without leave, who else runs there, and the CPU."""
        if self.crowded:
            return set()
        return {
            (pid, other.pid, cpu)
            for pid in self.workers
            for other in self._others(pid)
            for cpu in self.without_leave(pid) & other.running
        }

    def _others(self, pid: int) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.pid != pid]

    def complaints(self) -> dict[str, str]:
        """Return what is wrong: kind -> details."""
        if not self.workers:
            return {}
        found = {}
        for worker in self.workers.values():
            borrowed = self.borrowed(worker.pid)
            if worker.strays(borrowed):
                found[STRAY] = f"{_describe(worker)}, borrowed {sorted(borrowed)}"
            if worker.children - worker.slice:
                found[CHILD] = f"{worker.pid}: {sorted(worker.children)} but {sorted(worker.slice)}"
        slices = {pid: worker.slice for pid, worker in self.workers.items()}
        picture = str({pid: sorted(cpus) for pid, cpus in slices.items()})
        load = Counter(cpu for cpus in slices.values() for cpu in cpus)
        if set(load) - self.allowed:
            found["CPUs that are not allowed"] = picture
        elif self.crowded:
            if any(len(cpus) != 1 for cpus in slices.values()) or max(load.values()) - min(load.values()) > 1:
                found[UNFAIR] = picture
        else:
            if any(count > 1 for count in load.values()):
                found["overlap"] = picture
            if any(not core & set(load) for core in physical_cores(self.allowed)):
                found[IDLE] = picture
        return found


@dataclass(slots=True)
class _Meeting:
    looks: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    told: bool = False


@dataclass(slots=True)
class Meetings:
    """Finds, over successive looks, two workers that compute on one CPU."""

    _last: Look | None = None
    _parents: dict[int, int] = field(default_factory=dict)  # of each worker, when it was seen first
    _open: dict[tuple[int, int, int], _Meeting] = field(default_factory=dict)

    def next(self, look: Look) -> list[str]:
        """Take one more look; return the meetings that it proves, each once."""
        last, self._last = self._last, look
        self._parents = {pid: self._parents.get(pid, worker.parent) for pid, worker in look.workers.items()}
        orphans = {pid for pid, worker in look.workers.items() if worker.parent != self._parents[pid]}
        pairs = [pair for pair in look.meeting() if not orphans & set(pair[:2])]
        self._open = {pair: self._open.get(pair) or _Meeting() for pair in pairs}
        found = []
        for (one, other, cpu), meeting in self._open.items():
            meeting.looks += 1
            if meeting.looks == 1 or last is None:
                continue
            first, second = (look.workers[pid].seconds(cpu, last.workers[pid]) for pid in (one, other))
            meeting.seconds = meeting.seconds[0] + first, meeting.seconds[1] + second
            if meeting.looks >= MEETING and min(meeting.seconds) >= COMPUTES and not meeting.told:
                meeting.told = True
                text = f"two compute on CPU {cpu} in {meeting.looks} looks: {one} without leave and {other} got "
                text += " and ".join(f"{seconds:.2f} s of CPU time" for seconds in meeting.seconds)
                found.append("; ".join([text, *map(_describe, look.workers.values())]))
        return found


def _describe(worker: Worker) -> str:
    masks = Counter((tuple(sorted(thread.mask)), thread.state) for thread in worker.threads.values())
    threads = ", ".join(f"{count} in {state} on {list(mask)}" for (mask, state), count in masks.items())
    return f"{worker.pid}: {threads}, slice used by {sorted(worker.users)}"


def look(pids: Iterable[int], file: Path | None, *, allowed: frozenset[int]) -> Look:
    """Read everything about the workers ``pids`` now; those that have ended are left out.

    ``file`` has the words. The users of a slice are those of before and of after its threads are read.
    """
    before = words(file)
    seen = {pid: threads for pid in pids if pid in (threads := _threads(pid))}
    after = words(file)
    workers = {}
    for pid, threads in seen.items():
        users = frozenset({before.get(pid, pid), after.get(pid, pid)}) - {0}
        if stat := _stat(f"/proc/{pid}"):
            workers[pid] = Worker(pid, threads, users, _children(pid), parent=int(stat[1]))
    return Look(workers, allowed)


def words(file: Path | None) -> dict[int, int]:
    """Return the PID of each living worker -> the PID of who computes on its slice, 0 if that is nobody alive.

    The words of a worker that was killed stay until somebody takes its slot.
    """
    memory = b""
    if file is not None:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            memory = opened.read(HEAD + SLOTS * SLOT.size)
    owners, users = [0], {}  # the user 0 is nobody
    for user, pid, start in SLOT.iter_unpack(memory[HEAD:]):
        stat = _stat(f"/proc/{pid}") if pid else []
        lives = bool(stat) and int(stat[19]) == start
        owners.append(pid if lives else 0)
        if lives:
            users[pid] = user & SLOT_OF_USER
    return {pid: owners[user] for pid, user in users.items()}


def physical_cores(allowed: frozenset[int]) -> list[frozenset[int]]:
    """Return the CPUs of each core that has some in ``allowed``."""
    found = set()
    for cpu in allowed:
        text = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").replace(",", "")
        found.add(frozenset(bit for bit in range(int(text, 16).bit_length()) if int(text, 16) >> bit & 1) & allowed)
    return list(found)


def _threads(pid: int) -> dict[int, Thread]:
    found = {}
    with contextlib.suppress(OSError):
        for tid in map(int, os.listdir(f"/proc/{pid}/task")):
            if stat := _stat(f"/proc/{pid}/task/{tid}"):
                seconds = (int(stat[11]) + int(stat[12])) / TICKS  # utime, stime
                found[tid] = Thread(frozenset(os.sched_getaffinity(tid)), stat[0], seconds)
    return found


def _children(pid: int) -> frozenset[int]:
    """Return what the children of the thread that runs the model may run on."""
    found = frozenset[int]()
    for child in _read(f"/proc/{pid}/task/{pid}/children").split():
        with contextlib.suppress(OSError):
            found |= os.sched_getaffinity(int(child))
    return found


def _stat(process: str) -> list[str]:
    """Return the fields of the file "stat" behind the name, the state first; none where the process has ended."""
    fields = _read(f"{process}/stat").rpartition(")")[2].split()
    return [] if fields and fields[0] in "ZX" else fields


def _read(path: str) -> str:
    """Return the text of a file of the kernel's, empty where its process has ended."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
