"""The file through which workers lend: a few words for each worker, which regions.c changes, and what it tells people.

Every worker maps the words. A worker's place in the file, its slot, is its own as long as it holds a record lock on the
slot's byte in a second file: the kernel releases it when the process ends, whatever ended it.

Source: man 2 fcntl_locking, "Advisory record locking"; regions.c has the layout of the words.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ts_plugin.ledger.directory import LedgerError, try_lock
from ts_plugin.ledger.file import Ledger
from ts_plugin.machine.process import Identity

SLOTS = 1024
HEAD = struct.Struct("=QQ48x")  # the generation of the plan, which Ledger.write keeps; how many workers ever joined
SLOT = struct.Struct("=IIIiQQQQ16x")  # user, wanted, asked, PID, start time, idle since, lent at, request
SIZE = HEAD.size + SLOTS * SLOT.size
BUSY = 1 << 31
NO_PLAN = (1 << 64) - 1  # a generation that no plan has
STATUS_START, STATUS_SIZE = 1 << 17, 1024  # behind the words: one JSON text for each slot


@dataclass(frozen=True, slots=True)
class Status:
    """What a worker tells about its lending since it started. Times are in seconds.

    ``wide`` of its ``requests`` began on borrowed cores, ``borrowed`` core-seconds in all; ``handed_back`` of them gave
    some back before they ended. ``waited`` requests had to wait for the worker's own slice: ``wait`` seconds in all,
    ``longest`` at most, and it was taken by force ``forced`` times. ``times`` are mean service times by threads, the
    slice's own first. ``why`` says what keeps it from borrowing, if anything does; ``keeps``: it does not lend either.
    """

    requests: int = 0
    wide: int = 0
    borrowed: float = 0.0
    handed_back: int = 0
    waited: int = 0
    wait: float = 0.0
    longest: float = 0.0
    forced: int = 0
    times: Mapping[int, float] = field(default_factory=dict)
    why: str = ""
    keeps: bool = False

    def pack(self) -> bytes:
        """Return this as text of STATUS_SIZE bytes; what does not fit is left out."""
        values = asdict(self)
        text = json.dumps(values, separators=(",", ":")).encode()
        if len(text) > STATUS_SIZE:
            text = json.dumps({**values, "times": {}, "why": self.why[:200]}, separators=(",", ":")).encode()
        return text.ljust(STATUS_SIZE)

    @classmethod
    def unpack(cls, text: bytes) -> Status | None:
        """Return what ``pack`` packed; None for anything else, such as a text that is just being written."""
        try:
            values: dict[str, Any] = json.loads(text)
            times = {int(threads): float(seconds) for threads, seconds in values.pop("times").items()}
            return cls(**values, times=times)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class Words:
    """This process's mapping of the words, and its slot.

    Nothing else in this process may open the file of slots: closing any descriptor of it drops the lock.

    Raises:
        LedgerError: the directory cannot be used, there is no room in it, or all slots are taken.
    """

    def __init__(self, ledger: Ledger) -> None:
        directory, name = ledger.beside("lending")
        self._file = directory.open(name, os.O_RDWR | os.O_CREAT)
        self.locks = -1
        try:
            # A full /dev/shm is told of here, and not by a signal when a word is touched.
            os.posix_fallocate(self._file, 0, STATUS_START)
            self.memory = mmap.mmap(self._file, SIZE)
            directory, name = ledger.beside("slots")
            self.locks = directory.open(name, os.O_RDWR | os.O_CREAT)
            self.slot = self._take_slot(directory.path)
        except OSError as error:
            self.close()
            raise error if isinstance(error, LedgerError) else directory.error(error) from error

    def _take_slot(self, path: str) -> int:
        for slot in range(SLOTS):
            if try_lock(self.locks, slot, 1):
                return slot
        raise LedgerError(f"{path}: {SLOTS} workers lend cores already; this one neither lends nor borrows")

    def close(self) -> None:
        """Give the slot back. The mapping stays: another thread may be looking at it."""
        for file in (self._file, self.locks):
            if file >= 0:
                os.close(file)

    @property
    def lost(self) -> bool:
        """Whether the files were deleted, so that others use new ones by now."""
        return not (os.fstat(self._file).st_nlink and os.fstat(self.locks).st_nlink)

    def poison(self) -> None:
        """Let everybody who uses the lost file give back what is borrowed."""
        HEAD.pack_into(self.memory, 0, NO_PLAN, 0)

    @property
    def generation(self) -> int:
        return int(HEAD.unpack_from(self.memory)[0])

    @property
    def joined(self) -> int:
        """How many workers ever took part; one more may be a new lender."""
        return int(HEAD.unpack_from(self.memory)[1])

    def slots(self) -> dict[Identity, int]:
        """Return the slot of every worker that has one; some have ended."""
        return {identity: slot for slot, (_, _, identity) in _slots(self.memory).items()}

    def publish(self, status: Status) -> None:
        """Let people read ``status``; it stays as it was where there is no room."""
        with contextlib.suppress(OSError):
            os.pwrite(self._file, status.pack(), STATUS_START + self.slot * STATUS_SIZE)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a reader sees of one worker. ``user`` is who computes on its slice now; ``wanted``: its owner needs it."""

    user: Identity | None
    wanted: bool
    status: Status | None


def look(ledger: Ledger) -> dict[Identity, Seen] | None:
    """Return what the words say of every living worker; None where there are none. Makes no file, takes no lock."""
    directory, name = ledger.beside("lending")
    try:
        file = directory.open(name, os.O_RDONLY)
    except OSError:
        return None
    try:
        memory = os.pread(file, SIZE, 0)
        if len(memory) < SIZE:
            return None  # it is just being made
        slots = {slot: entry for slot, entry in _slots(memory).items() if entry[2].alive()}
        found = {}
        for slot, (user, wanted, identity) in slots.items():
            who = slots[user - 1][2] if user - 1 in slots else None
            text = os.pread(file, STATUS_SIZE, STATUS_START + slot * STATUS_SIZE)
            found[identity] = Seen(who, wanted, Status.unpack(text))
        return found
    except OSError:
        return None
    finally:
        os.close(file)


def _slots(memory: bytes | mmap.mmap) -> dict[int, tuple[int, bool, Identity]]:
    """Return slot -> (slot + 1 of its user or 0, wanted, whose it is)."""
    found = {}
    for slot in range(SLOTS):
        user, wanted, _, pid, start_time, *_ = SLOT.unpack_from(memory, HEAD.size + slot * SLOT.size)
        if pid:
            found[slot] = (user & ~BUSY, bool(wanted), Identity(pid, start_time))
    return found
