"""Who computes on which CPUs now, and what workers know of their requests. (The ledger says who owns the CPUs.)

``Board`` is a file of record locks, with bytes for each CPU. A worker holds those of all CPUs that it computes on, from
the start of a request to its end. The kernel releases them when the process ends, whatever ended it, and a forked
child does not hold them: nothing is left to recover.

A CPU has two bytes. ``USE`` is held by the worker that computes there. ``RIGHT`` is held by the owner from the moment
it wants to compute until it is done. No CPU is borrowed while its owner holds the right to it: an owner waits for one
borrower at most, and an owner that took its CPUs back by force is safe from the next one.

Places behind those of the CPUs stand for threads. Where a CFS quota bounds threads and CPUs are not pinned, a worker's
threads are lent like cores (``thread_places``).

``Records`` is a file that every worker maps: one record for each (``planning.width.Record``), written by its worker.

Source: man 2 fcntl_locking, "Advisory record locking".
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ts_plugin.leases.directory import Directory, StateError, holder, try_lock
from ts_plugin.machine.process import Identity
from ts_plugin.planning.width import Measured, Record

__all__ = ["Board", "Entry", "Records", "Totals", "thread_places"]

USE, RIGHT, SLOT = 0, 1 << 24, 1 << 25  # where the bytes of each kind of lock start
THREADS = 1 << 16  # the first place that is no CPU
MOST_THREADS = 1 << 10  # of one worker
FIRST_PAUSE, LONGEST_PAUSE = 0.0001, 0.002  # seconds between two tries for a lock

SLOTS = 1 << 12  # the most workers; a record that nobody has written takes no memory
SIZE = 512  # bytes of a record
HEAD = struct.Struct("=QIQQIIdddddQQddI")
OWNER = struct.Struct("=QIQ")  # its first fields: version, PID, start time
IDLE_SINCE, IDLE_OFFSET = struct.Struct("=d"), struct.calcsize("=QIQQIIdddd")
MEASURED = struct.Struct("=Idd")
WIDTHS = (SIZE - HEAD.size) // MEASURED.size  # the most service times that a record holds
TRIES = 16  # a record that is just being written is read again


def thread_places(slot: int, threads: int) -> range:
    """Return the places of the threads of the worker whose record is in ``slot``."""
    start = THREADS + slot * MOST_THREADS
    return range(start, start + min(threads, MOST_THREADS))


class Board:
    """The locks of this process on the file ``name`` in ``directory``.

    Nothing else may open that file in this process: closing any descriptor of it drops all locks. With ``reading`` it
    only tells who holds which, and the file is not made.

    Raises:
        StateError: the directory or the file cannot be used.
        FileNotFoundError: ``reading``, and there is none.
    """

    def __init__(self, directory: Directory, name: str, *, reading: bool = False) -> None:
        self._file = directory.open(name, os.O_RDONLY if reading else os.O_RDWR | os.O_CREAT)

    @property
    def lost(self) -> bool:
        """Whether the file was deleted, so that others lock another one by now."""
        return os.fstat(self._file).st_nlink == 0

    def close(self) -> None:
        """Release everything."""
        os.close(self._file)

    def take(self, places: Iterable[int], *, patience: float) -> bool:
        """Take this worker's own ``places``; wait at most ``patience`` seconds for another one that computes there.

        Returns False where it still does. The right to the places is held in any case, so that no other worker
        borrows them.
        """
        own = list(_ranges(places))
        deadline = 0.0
        pause = FIRST_PAUSE
        while not (self._lock(RIGHT, own) and self._lock(USE, own)):
            now = time.monotonic()
            deadline = deadline or now + patience
            if now >= deadline:
                return False
            time.sleep(min(pause, deadline - now))
            pause = min(pause * 1.25, LONGEST_PAUSE)
        return True

    def borrow(self, places: Iterable[int]) -> bool:
        """Take another worker's ``places``, if none computes there and their owner does not want them."""
        wanted = list(_ranges(places))
        if not self._lock(USE, wanted):
            return False
        if any(holder(self._file, RIGHT + start, length) for start, length in wanted):
            self._unlock(USE, wanted)
            return False
        return True

    def give_back(self, places: Iterable[int]) -> None:
        """Release borrowed ``places``."""
        self._unlock(USE, _ranges(places))

    def release(self) -> None:
        """Release all CPUs that this process holds; one system call."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, SLOT, 0)

    def take_slot(self) -> int:
        """Take the first free slot for a record; it is this process's as long as it lives.

        Raises:
            StateError: there is none.
        """
        for slot in range(SLOTS):
            if self._lock(SLOT, [(slot, 1)]):
                return slot
        raise StateError(f"{SLOTS} workers have a record: this one cannot lend cores or borrow any")

    def users(self, places: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """Return the PIDs of the other processes that compute on some of ``places``, and on which."""
        found: dict[int, list[int]] = {}
        for place in places:
            if pid := holder(self._file, USE + place, 1):
                found.setdefault(pid, []).append(place)
        return {pid: tuple(held) for pid, held in found.items()}

    def _lock(self, kind: int, ranges: list[tuple[int, int]]) -> bool:
        for i, (start, length) in enumerate(ranges):
            if not try_lock(self._file, kind + start, length):
                if kind == USE:  # a part is of no use; rights are kept, so that no new borrower comes
                    self._unlock(USE, ranges[:i])
                return False
        return True

    def _unlock(self, kind: int, ranges: Iterable[tuple[int, int]]) -> None:
        for start, length in ranges:
            fcntl.lockf(self._file, fcntl.LOCK_UN, length, kind + start)


def _ranges(places: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of every run of consecutive places."""
    start = following = -1
    for place in sorted(places):
        if place != following:
            if start != following:
                yield start, following - start
            start = place
        following = place + 1
    if start != following:
        yield start, following - start


@dataclass(frozen=True, slots=True)
class Totals:
    """What a worker has counted since it started, for metrics and people.

    ``wide`` requests computed on borrowed cores, ``borrowed`` core-seconds of them in all. ``waited`` is the time, in
    seconds, that requests waited for the worker's own slice.
    """

    requests: int = 0
    wide: int = 0
    borrowed: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One worker's record, with its identity: a slot may still hold that of a worker that has ended."""

    worker: Identity
    record: Record
    totals: Totals = Totals()


class Records:
    """The mapped file ``name`` in ``directory``; with ``reading`` nothing is made or changed.

    Raises:
        StateError: the directory or the file cannot be used.
        FileNotFoundError: ``reading``, and there is none, or one that is just being made.
    """

    def __init__(self, directory: Directory, name: str, *, reading: bool = False) -> None:
        file = directory.open(name, os.O_RDONLY if reading else os.O_RDWR | os.O_CREAT)
        try:
            if os.fstat(file).st_size < SLOTS * SIZE:
                if reading:
                    raise FileNotFoundError(f"{directory.path}/{name}: nobody has written a record yet")
                os.ftruncate(file, SLOTS * SIZE)
            self._memory = mmap.mmap(file, SLOTS * SIZE, prot=mmap.PROT_READ | (0 if reading else mmap.PROT_WRITE))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise directory.error(error) from error
        finally:
            os.close(file)
        self._version = 0

    def slots(self) -> dict[Identity, int]:
        """Return the slot of every worker that has written a record; some have ended."""
        found: dict[Identity, int] = {}
        for slot in range(SLOTS):
            _, pid, start_time = OWNER.unpack_from(self._memory, slot * SIZE)
            if not pid:
                break  # slots are taken from the first on
            found.setdefault(Identity(pid, start_time), slot)  # one that left and came again took the lower slot
        return found

    def idle_since(self, slot: int) -> float | None:
        """Return ``idle_since`` of the record in ``slot``."""
        since: float = IDLE_SINCE.unpack_from(self._memory, slot * SIZE + IDLE_OFFSET)[0]
        return None if math.isnan(since) else since

    def write(self, slot: int, entry: Entry) -> None:
        """Write the record of the calling worker."""
        record, totals = entry.record, entry.totals
        measured = record.measured[:WIDTHS]
        idle_since = math.nan if record.idle_since is None else record.idle_since
        text = HEAD.pack(
            self._version + 2,
            entry.worker.pid,
            entry.worker.start_time,
            record.model,
            record.cores,
            record.width,
            record.rate,
            record.seen,
            record.at,
            record.born,
            idle_since,
            totals.requests,
            totals.wide,
            totals.borrowed,
            totals.waited,
            len(measured),
        ) + b"".join(MEASURED.pack(one.cores, one.seconds, one.weight) for one in measured)
        start = slot * SIZE
        # Readers ignore a record while its version is odd, and read it again if the version has changed meanwhile.
        struct.pack_into("=Q", self._memory, start, self._version + 1)
        self._memory[start + 8 : start + len(text)] = text[8:]
        self._version += 2
        struct.pack_into("=Q", self._memory, start, self._version)

    def read(self, slot: int) -> Entry | None:
        """Return the content of ``slot``; None where there is none, or where its worker was killed while it wrote."""
        start = slot * SIZE
        for _ in range(TRIES):
            text = self._memory[start : start + SIZE]
            version, pid, start_time, model, cores, width, rate, seen, at, born, idle, *rest = HEAD.unpack_from(text)
            requests, wide, borrowed, waited, count = rest
            if version % 2 or struct.unpack_from("=Q", self._memory, start)[0] != version:
                continue
            if not pid or count > WIDTHS:
                return None
            measured = tuple(Measured(*MEASURED.unpack_from(text, HEAD.size + i * MEASURED.size)) for i in range(count))
            idle_since = None if math.isnan(idle) else idle
            record = Record(model, cores, width, measured, rate, seen, at, born, idle_since)
            return Entry(Identity(pid, start_time), record, Totals(requests, wide, borrowed, waited))
        return None
