"""Workers seen from outside: masks, states and CPU time from /proc, locks from the kernel's table (/proc/locks).

Shares no code with ts_plugin. What it knows of it is where the locks lie in the board's file (leases/board.py): byte N
says who computes on CPU N (``use``), byte 2^24 + N that the owner of CPU N wants it or has it (``right``). A worker
that holds the use of a CPU without the right to it has borrowed it: it is wide.

``Look.complaints`` are violations once they last, not for a moment, since nothing here is read at one instant:

- The slice of a worker is what its threads may run on, all of them the same; for a wide worker, what it has the right
  to. Slices are disjoint and cover every core. With more workers than cores each has one, and they are equally crowded.
- No thread of a wide worker may run on a CPU that the worker does not hold.
- No child of a worker may run outside of the worker's slice, unless the worker is wide.

``Meetings`` finds two workers that compute on one CPU. A worker computes on CPU N without leave if one of its threads
is in state R with N in its mask while it does not hold the use of N. Two workers meet on N if, in every look for at
least MEETING seconds and MEETING_LOOKS looks, one computes there without leave and the other has a thread in state R
that may run there, with or without leave; and both got at least COMPUTES of that time as CPU time. So a worker that
parses a message, or polls for its slice, computes on nothing. Not counted: a worker that has never held a lock (it
starts, and counts as soon as it has reached the board), children (they have no requests), and more workers than cores.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "CHILD",
    "IDLE",
    "UNFAIR",
    "Look",
    "Meetings",
    "Worker",
    "locks",
    "look",
    "physical_cores",
]

RIGHT, END_OF_CPUS = 1 << 24, 1 << 16
MEETING, MEETING_LOOKS, COMPUTES = 0.15, 4, 0.2  # seconds; looks; part of the time
TICKS = os.sysconf("SC_CLK_TCK")

IDLE = "idle cores"
UNFAIR = "more workers than cores, but not shared fairly"
CHILD = "a child outside of its worker's slice"


@dataclass(frozen=True, slots=True)
class Held:
    """What one process has locked on the board, CPU numbers."""

    use: frozenset[int] = frozenset()
    right: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker at one moment. ``running`` are the CPUs that its threads in state R may run on."""

    pid: int
    masks: frozenset[frozenset[int]]
    running: frozenset[int] = frozenset()
    children: frozenset[int] = frozenset()  # the CPUs that they may run on
    seconds: float = 0.0  # of CPU time since it started
    held: Held = Held()

    @property
    def wide(self) -> bool:
        return bool(self.held.use - self.held.right)

    @property
    def reach(self) -> frozenset[int]:
        return frozenset().union(*self.masks)

    @property
    def slice(self) -> frozenset[int]:
        return self.held.right if self.wide else self.reach


@dataclass(frozen=True, slots=True)
class Look:
    """All workers of a machine at about one moment, and the CPUs that they are meant to divide."""

    at: float  # seconds, time.monotonic
    workers: Mapping[int, Worker]
    allowed: frozenset[int]

    @property
    def crowded(self) -> bool:
        return len(self.workers) > len(physical_cores(self.allowed))

    def complaints(self) -> dict[str, str]:
        """Return what is wrong: kind -> details."""
        if not self.workers:
            return {}
        found = {}
        for worker in self.workers.values():
            masks = sorted(map(sorted, worker.masks))
            if worker.wide:
                if worker.reach - worker.held.use - worker.held.right:
                    found["a thread outside of what its worker holds"] = f"{worker.pid}: {masks} but {worker.held}"
                continue
            if len(worker.masks) > 1:
                found["threads of one worker with different masks"] = f"{worker.pid}: {masks}"
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
    since: Look
    looks: int = 0
    told: bool = False


@dataclass(slots=True)
class Meetings:
    """Finds, over successive looks, two workers that compute on one CPU."""

    _joined: set[int] = field(default_factory=set)
    _open: dict[tuple[int, int, int], _Meeting] = field(default_factory=dict)

    def next(self, look: Look) -> list[str]:
        """Take one more look; return the meetings that it proves, each once."""
        workers = look.workers.values()
        self._joined |= {worker.pid for worker in workers if worker.held != Held()}
        pairs = set()
        if not look.crowded:
            for one in workers:
                without_leave = one.running - one.held.use if one.pid in self._joined else frozenset()
                for other in workers:
                    if other is not one:
                        pairs |= {(one.pid, other.pid, cpu) for cpu in without_leave & other.running}
        self._open = {pair: self._open.get(pair) or _Meeting(look) for pair in pairs}
        found = []
        for pair, meeting in self._open.items():
            meeting.looks += 1
            seconds = look.at - meeting.since.at
            gains = [look.workers[pid].seconds - meeting.since.workers[pid].seconds for pid in pair[:2]]
            long = seconds >= MEETING and meeting.looks >= MEETING_LOOKS
            if long and not meeting.told and min(gains) >= COMPUTES * seconds:
                meeting.told = True
                found.append(_describe(look, pair, seconds, gains))
        return found


def _describe(look: Look, pair: tuple[int, int, int], seconds: float, gains: list[float]) -> str:
    one, other, cpu = pair
    text = f"two compute on CPU {cpu} for {seconds:.2f} s: {one} without leave ({gains[0]:.2f} s of CPU time)"
    text += f" and {other} ({gains[1]:.2f} s); "
    return text + "; ".join(
        f"{worker.pid}: masks {sorted(map(sorted, worker.masks))}, use {sorted(worker.held.use)}, "
        f"right {sorted(worker.held.right)}"
        for worker in look.workers.values()
    )


def look(pids: Iterable[int], board: Path | None, *, allowed: frozenset[int], at: float) -> Look:
    """Read everything about the workers ``pids`` now; those that have ended are left out.

    What a worker holds is what it holds before or after its threads are read.
    """
    before = locks(board)
    seen = {pid: worker for pid in pids if (worker := _worker(pid))}
    after = locks(board)
    workers = {}
    for pid, (masks, running) in seen.items():
        first, last = before.get(pid, Held()), after.get(pid, Held())
        held = Held(first.use | last.use, first.right | last.right)
        workers[pid] = Worker(pid, masks, running, _children(pid), _seconds(pid), held)
    return Look(at, workers, allowed)


def locks(board: Path | None, table: str | None = None) -> dict[int, Held]:
    """Return PID -> what it holds of the file ``board``, from the kernel's table of locks.

    Source: man 5 proc, /proc/locks: "1: POSIX  ADVISORY  WRITE 4711 00:1a:25 16777216 16777217", device:inode, first
    and last byte; "->" stands before those who wait.
    """
    try:
        inode = "" if board is None else str(board.stat().st_ino)
    except OSError:
        return {}
    text = _read("/proc/locks") if table is None else table
    found: dict[int, Held] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) != 8 or words[1] != "POSIX" or words[5].rpartition(":")[2] != inode or words[7] == "EOF":
            continue
        pid, first, last = int(words[4]), int(words[6]), int(words[7])
        held = found.get(pid, Held())
        if last < END_OF_CPUS:
            held = Held(held.use | set(range(first, last + 1)), held.right)
        elif first >= RIGHT and last < RIGHT + END_OF_CPUS:
            held = Held(held.use, held.right | set(range(first - RIGHT, last - RIGHT + 1)))
        found[pid] = held
    return found


def physical_cores(allowed: frozenset[int]) -> list[frozenset[int]]:
    """Return the CPUs of each core that has some in ``allowed``."""
    found = set()
    for cpu in allowed:
        text = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").replace(",", "")
        found.add(frozenset(bit for bit in range(int(text, 16).bit_length()) if int(text, 16) >> bit & 1) & allowed)
    return list(found)


def _worker(pid: int) -> tuple[frozenset[frozenset[int]], frozenset[int]] | None:
    """Return the masks of all threads, and the CPUs that those in state R may run on."""
    masks: set[frozenset[int]] = set()
    running: set[int] = set()
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            if mask := _mask(f"/proc/{pid}/task/{tid}/status", running):
                masks.add(mask)
    return (frozenset(masks), frozenset(running)) if masks else None


def _mask(status: str, running: set[int]) -> frozenset[int]:
    """Return the mask in the file ``status``; add it to ``running`` if that thread runs or could."""
    state, mask = "", frozenset[int]()
    for line in _read(status).splitlines():
        if line.startswith("State:"):
            state = line.split()[1]
        elif line.startswith("Cpus_allowed_list:"):
            mask = _cpus(line.partition(":")[2])
            break
    if state == "R":
        running |= mask
    return frozenset() if state in "ZX" else mask


def _cpus(text: str) -> frozenset[int]:
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _children(pid: int) -> frozenset[int]:
    """Return what the children of the thread that runs the model may run on."""
    found = frozenset[int]()
    for child in _read(f"/proc/{pid}/task/{pid}/children").split():
        found |= _mask(f"/proc/{child}/status", set())
    return found


def _seconds(pid: int) -> float:
    words = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS if words else 0.0  # utime, stime


def _read(path: str) -> str:
    """Return the text of a file of the kernel's, empty where its process has ended."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
