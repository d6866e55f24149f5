"""regions.c from Python: found, loaded, and tried out before a worker relies on it.

Nothing here is loaded under ``--lend never``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ts_plugin.lending.words import HEAD, SIZE, SLOT

NO_HOOK = {
    0: "torch's calls of its OpenMP runtime were not found",
    -1: "torch computes with another OpenMP runtime than libgomp, which cannot hand cores back",
    -2: "torch's libgomp lacks omp_pause_resource_all, which GCC has since version 9",
    -3: "a library of its handler starts parallel regions in a way that cannot be watched (GOMP_parallel_*)",
}


class LibraryError(RuntimeError):
    """The compiled library is missing or cannot be loaded here; the message says which and why."""


class Answer(ctypes.Structure):
    """What one request did: ``struct answer`` of regions.c. Times are in nanoseconds."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("took", "waited", "longest_region", "borrowed")),
        *((name, ctypes.c_int32) for name in ("began", "ended", "handed_back", "lost", "late", "stale")),
        *((name, ctypes.c_int32) for name in ("regions", "forced", "why")),
    )
    took: int
    waited: int
    longest_region: int
    borrowed: int
    began: int
    ended: int
    handed_back: int
    lost: int
    late: int
    stale: int
    regions: int
    forced: int
    why: int

    @property
    def undisturbed(self) -> bool:
        """Whether it computed with as many threads to its end, or gave some back because its budget was used up."""
        return bool(self.late) or not (self.lost or self.handed_back or self.stale)


def path() -> Path:
    """Return where the library for this processor lies, if it was built."""
    return Path(__file__).with_name(f"regions-{os.uname().machine}.so")


@cache
def load() -> Any:
    """Return the library.

    Raises:
        LibraryError: it cannot be loaded.
    """
    file = path()
    if not file.is_file():
        raise LibraryError(f"{file.name} is not there: ts-cores was installed without it, or for another processor")
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:  # another libc, for example
        raise LibraryError(f"{file.name} cannot be loaded: {error}") from error
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
    for name, result, arguments in (
        ("regions_hook", number, ()),
        ("worker_open", pointer, (pointer, number, number, number, long)),
        ("worker_plan", number, (pointer, long, number, number, pointer, pointer, number, pointer)),
        ("worker_begin", number, (pointer, number, long)),
        ("worker_forced", number, (pointer,)),
        ("worker_end", None, (pointer, ctypes.POINTER(Answer))),
        ("worker_typical", None, (pointer, long)),
        ("worker_width", number, (pointer,)),
        ("worker_close", None, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Worker:
    """``struct worker`` of regions.c: for the thread that runs the model, but for ``width``, which any may ask.

    ``memory`` are the mapped words, ``locks`` is the descriptor of the file of slots. Its slice is its own
    until ``end``.

    Raises:
        LibraryError: the library cannot be loaded.
    """

    def __init__(self, memory: mmap.mmap, locks: int, slot: int, *, pid: int, start_time: int) -> None:
        self._library = load()
        self._words = ctypes.c_char.from_buffer(memory)  # keeps the mapping
        self._self = self._library.worker_open(ctypes.addressof(self._words), locks, slot, pid, start_time)
        if not self._self:
            raise LibraryError("no memory for what lends cores")
        self._answer = Answer()

    def plan(
        self,
        generation: int,
        threads: int,
        cpus: Sequence[int] | None,
        lenders: Sequence[tuple[int, int, Sequence[int] | None]],
    ) -> None:
        """Take over a plan: own threads and CPUs (None: not pinned), and (slot, threads, CPUs) of each lender."""
        masks = [cpus, *(mask for _, _, mask in lenders)]
        size = 0 if cpus is None else 8 * (max(cpu for mask in masks for cpu in mask or ()) // 64 + 1)
        text = b"".join(sum(1 << cpu for cpu in mask or ()).to_bytes(size, sys.byteorder) for mask in masks)
        array = ctypes.c_int * max(1, len(lenders))
        slots, lent = array(*(slot for slot, _, _ in lenders)), array(*(count for _, count, _ in lenders))
        if self._library.worker_plan(self._self, generation, threads, len(lenders), slots, lent, size, text):
            raise LibraryError("no memory for what lends cores")

    def begin(self, most: int, budget: float) -> int:
        """Start a request: wait for the own slice, then take idle ones up to ``most`` threads; return the threads.

        After ``budget`` seconds, unless that is 0, what is borrowed goes back.
        """
        return int(self._library.worker_begin(self._self, most, int(1e9 * budget)))

    def forced(self) -> int:
        """Return the slot of the worker that still computes on the slice, which ``begin`` has taken by force, or -1."""
        return int(self._library.worker_forced(self._self))

    def end(self) -> Answer:
        """End the request; the slice is idle from now on, and may be borrowed. The answer holds until the next end."""
        self._library.worker_end(self._self, self._answer)
        return self._answer

    def typical(self, seconds: float) -> None:
        """Tell how long a request takes on the slice alone: a worker with long regions borrows from somebody else."""
        self._library.worker_typical(self._self, int(1e9 * seconds))

    def width(self) -> int:
        """Return how many threads compute the present request."""
        return int(self._library.worker_width(self._self))

    def close(self) -> None:
        """Lend no more."""
        self._library.worker_close(self._self)


def what_keeps_from_borrowing() -> str:
    """Stand before torch's OpenMP runtime, once torch is loaded, and try it out; return what is wrong, or nothing.

    Asked again, it only sees to libraries that have been loaded since; without any that takes a microsecond.

    Raises:
        LibraryError: the library cannot be loaded.
    """
    hooked = load().regions_hook()
    return _tried() if hooked > 0 else NO_HOOK[hooked]


@cache
def _tried() -> str:
    """Compute a little, once, with words of its own: regions must be seen, and threads go away in their midst."""
    import torch

    memory = mmap.mmap(-1, SIZE)
    worker = Worker(memory, -1, 0, pid=os.getpid(), start_time=0)
    own = torch.get_num_threads()
    worker.plan(0, own, None, [(1, own, None)])
    worker.end()
    ones = torch.ones(1 << 16)
    worker.begin(2 * own, 0.0)
    try:
        began = torch.get_num_threads()
        ones.add_(1)
        SLOT.pack_into(memory, HEAD.size + SLOT.size, 1, 1, 0, 0, 0, 0, 0, 0)  # the lender wants its slice
        ones.add_(1)
        ended = torch.get_num_threads()
    finally:
        answer = worker.end()
    worker.close()
    right = bool((ones == 3).all())
    seen = answer.regions > 0 and answer.handed_back == 1
    if right and seen and (began, ended, torch.get_num_threads()) == (2 * own, own, own):
        return ""
    return (
        f"the self-test did not come out: {answer.regions} regions seen, {answer.handed_back} slices handed back, "
        f"{began} and then {ended} threads for {2 * own} and {own}, results {'right' if right else 'WRONG'}"
    )
