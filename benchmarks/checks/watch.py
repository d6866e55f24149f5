"""Workers seen from outside: masks, states and CPU time from /proc, and the words through which they lend.

Shares no code with ts_plugin. What it knows of it is the file of words (ts_plugin/lending/regions.c): for each worker
its PID, its start time, and who computes on its slice (``user``). A worker that is the user of another's slice has
borrowed that slice: it is wide.

``Look.complaints`` are violations once they last, not for a moment, since nothing here is read at one instant:

- The slice of a worker is what all its threads may run on; the team of a wide worker may also use what it has
  borrowed, and nothing else may. Slices are disjoint and cover every core. With more workers than cores each has one,
  and they are equally crowded.
- No child of a worker may run outside of the worker's slice.

``Meetings`` finds two workers that compute on one CPU. A worker computes on a CPU without leave if one of its threads
is in state R with that CPU in its mask, while the words call somebody else the user of that slice. Two workers meet on
a CPU if, in every look for at least MEETING seconds and MEETING_LOOKS looks, one computes there without leave and the
other has a thread in state R that may run there, with or without leave; and both got at least COMPUTES of that time as
CPU time. So a worker that parses a message computes on nothing, and the team of a borrower whose slice was taken
between two regions may spin there as long as libgomp lets it, some 20 ms. A worker that has no words yet is the user of
its slice. Not counted: children (they have no requests), and more workers than cores.
"""

from __future__ import annotations

import contextlib
import os
import struct
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
    "look",
    "physical_cores",
    "words",
]

HEAD, SLOTS, SLOT = 64, 1024, struct.Struct("=I8xiQ40x")  # of the words: user, PID, start time
SLOT_OF_USER = (1 << 31) - 1  # the rest of ``user`` says whether it is inside a parallel region
MEETING, MEETING_LOOKS, COMPUTES = 0.15, 4, 0.2  # seconds; looks; part of the time
TICKS = os.sysconf("SC_CLK_TCK")

IDLE = "idle cores"
UNFAIR = "more workers than cores, but not shared fairly"
STRAY = "a thread outside of its worker's slice and of what is borrowed"
CHILD = "a child outside of its worker's slice"


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker at one moment. ``users`` of its slice, PIDs; ``running``: where its threads in state R may run."""

    pid: int
    slice: frozenset[int]  # the CPUs that all its threads may run on
    reach: frozenset[int]  # that some thread may run on, stopped ones left out
    users: frozenset[int]
    running: frozenset[int] = frozenset()
    children: frozenset[int] = frozenset()  # the CPUs that they may run on
    seconds: float = 0.0  # of CPU time since it started


@dataclass(frozen=True, slots=True)
class Look:
    """All workers of a machine at about one moment, and the CPUs that they are meant to divide."""

    at: float  # seconds, time.monotonic
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
            if worker.reach - worker.slice - self.borrowed(worker.pid):
                found[STRAY] = f"{worker}, borrowed {sorted(self.borrowed(worker.pid))}"
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

    _open: dict[tuple[int, int, int], _Meeting] = field(default_factory=dict)

    def next(self, look: Look) -> list[str]:
        """Take one more look; return the meetings that it proves, each once."""
        self._open = {pair: self._open.get(pair) or _Meeting(look) for pair in look.meeting()}
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
    return text + "; ".join(map(str, look.workers.values()))


def look(pids: Iterable[int], file: Path | None, *, allowed: frozenset[int], at: float) -> Look:
    """Read everything about the workers ``pids`` now; those that have ended are left out.

    ``file`` has the words. The users of a slice are those of before and of after its threads are read.
    """
    before = words(file)
    seen = {pid: worker for pid in pids if (worker := _worker(pid))}
    after = words(file)
    workers = {}
    for pid, (slice_, reach, running) in seen.items():
        users = frozenset({before.get(pid, pid), after.get(pid, pid)}) - {0}
        workers[pid] = Worker(pid, slice_, reach, users, running, _children(pid), _seconds(pid))
    return Look(at, workers, allowed)


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
        stat = _stat(pid) if pid else []
        lives = bool(stat) and int(stat[19]) == start and stat[0] not in ("Z", "X")
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


def _worker(pid: int) -> tuple[frozenset[int], frozenset[int], frozenset[int]] | None:
    """Return the CPUs that all threads may run on, those that some may that is not stopped, and those in state R."""
    masks = []
    with contextlib.suppress(OSError):
        masks = [_thread(f"/proc/{pid}/task/{tid}/status") for tid in os.listdir(f"/proc/{pid}/task")]
    living = [(state, mask) for state, mask in masks if mask]
    if not living:
        return None
    every = frozenset.intersection(*(mask for _, mask in living))
    reach = frozenset().union(every, *(mask for state, mask in living if state not in "Tt"))
    return every, reach, frozenset().union(*(mask for state, mask in living if state == "R"))


def _thread(status: str) -> tuple[str, frozenset[int]]:
    """Return the state and the mask in the file ``status``; no mask for a thread that has ended."""
    state = ""
    for line in _read(status).splitlines():
        if line.startswith("State:"):
            state = line.split()[1]
        elif line.startswith("Cpus_allowed_list:") and state not in "ZX":
            return state, _cpus(line.partition(":")[2])
    return state, frozenset()


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
        found |= _thread(f"/proc/{child}/status")[1]
    return found


def _seconds(pid: int) -> float:
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / TICKS if stat else 0.0  # utime, stime


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name, the state first; none where the process has ended."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    """Return the text of a file of the kernel's, empty where its process has ended."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
