"""Inside a worker: follows its slice while it serves.

A thread waits for the death of any other worker (pidfd) and for a new ledger (one stat every half second). Then it
makes one pass (``_follow``): it tells the ledger what this worker knows of itself, takes over its slice from there, and
binds this process to it. Every few seconds a pass begins with what the process may use by now, and ends with a
read-back. What belongs to the thread that computes, such as its number of threads, ``requests`` sets there, at request
boundaries.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ts_plugin.kernel import affinity, memory
from ts_plugin.ledger import coordinator
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease
from ts_plugin.lending.words import Status
from ts_plugin.log import debug, say
from ts_plugin.machine import discovery
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.worker import hooks, readback
from ts_plugin.worker.archive import GUESS
from ts_plugin.worker.onnx_threads import OnnxThreads
from ts_plugin.worker.requests import Requests

INTERVAL = 0.5  # seconds between two stats of the ledger; a death is seen at once
LOOK_INTERVAL = 5.0  # seconds between two read-backs
THOROUGH = 12  # every so many read-backs also memory and libraries are looked at
NOT_BOUND = "NOT BOUND to its slice"  # the start of a note that lasts as long as this is so


class Follower(hooks.Hook):
    """Keeps this process on the slice of ``lease``, which it must already be bound to."""

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self._ledger = ledger
        self._lease = self._entered = lease  # what this worker knows of itself, and what the ledger says of it
        self._mutex = threading.RLock()  # the watching thread against the one that loads the model
        self._version: tuple[int, int] | None = None  # of the ledger that is followed; None: look again
        self._left: tuple[int, ...] | None = None  # the CPUs of the slice before, for one more pass
        self._peers: tuple[Lease, ...] = ()
        self._pidfds: dict[int, int] = {}
        self._blind = False  # no pidfds: deaths are looked for
        self._readback = readback.ReadBack()
        self._metrics: Any = None
        self._looks = 0
        self._resizes = 0
        self._exported = Status()
        self._reported: set[str] = set()
        self.requests = Requests(ledger, lease, self._report)
        self._onnx = OnnxThreads(lambda: self._lease.slice.threads, self._report)

    @property
    def lease(self) -> Lease:
        return self._lease

    def start(self) -> None:
        """Start to follow; the thread never keeps the process alive."""
        self._onnx.patch()
        threading.Thread(target=self._watch, name="ts-cores", daemon=True).start()

    def on_load(self, context: Any) -> None:
        """Take over what TorchServe says at load time: the registered name, whether a GPU does the work, the metrics.

        A GPU worker keeps one core, which feeds the device.
        """
        gpu = context.system_properties.get("gpu_id") is not None
        with self._mutex:
            lease = self._lease
            demand = replace(lease.demand, cores=1) if gpu and lease.demand.cores != 0 else lease.demand
            notes = tuple(note for note in lease.notes if not note.endswith(GUESS))
            self._lease = replace(lease, model=context.model_name, demand=demand, notes=notes)
            debug("TorchServe loads %s, %s a GPU", context.model_name, "on" if gpu else "without")
            try:
                self._follow()
            except Exception as error:  # noqa: BLE001 - the model loads all the same, and the next pass may succeed
                self._report(str(error))
            self._metrics = context.metrics

    def _watch(self) -> None:
        poll = select.poll()
        next_look = time.monotonic() + LOOK_INTERVAL
        while True:
            try:
                self.requests.publish()
                if self._blind and not all(lease.identity.alive() for lease in self._peers):
                    self._version = None
                now = self._ledger.version()
                look = time.monotonic() >= next_look
                if look:
                    next_look = time.monotonic() + LOOK_INTERVAL
                untold = self._lease != self._entered or self._left is not None
                if look or untold or now != self._version or self.requests.outdated:
                    self._version = now
                    with self._mutex:
                        if look:
                            self._look()
                        else:
                            self._follow()
                        self._observe(poll)
                for descriptor, _ in poll.poll(INTERVAL * 1000):
                    self._version = None  # somebody died
                    poll.unregister(descriptor)
                    os.close(descriptor)
                    self._pidfds = {pid: fd for pid, fd in self._pidfds.items() if fd != descriptor}
            except Exception as error:  # noqa: BLE001 - a disk that is full today may be fine tomorrow; never stop
                self._version = None  # what failed half-way is done again
                self._report(str(error) or type(error).__name__)
                time.sleep(INTERVAL)

    def _follow(self) -> int:
        """Tell the ledger what this worker knows of itself, take over its slice from there, and bind this process.

        Return how many threads had a mask outside of a slice that has not changed, or that could not be bound to.
        """
        before = self._lease
        state, refused = coordinator.enter(self._ledger, before)
        lease = self._lease = self._entered = state.lease_of(before.pid) or before
        self._peers = tuple(other for other in state.leases if other.pid != lease.pid)
        moved = lease.slice != before.slice
        debug("plan %s: %s; neighbours %s", state.generation, lease, [str(other) for other in state.neighbours(lease)])
        if moved:
            say(lease.describe())
            self._resizes += 1
        self.requests.adopt(lease, state)  # even if the kernel says no: the threads, at least, are ours to count
        if self.requests.unannounced:  # there is a new file of words, or whoever planned died before it told
            self._ledger.announce()
        settled = not moved and self._left is None
        outside = self._bind(refused, None if moved else self._left)
        self._left = before.slice.cpus if moved else None
        if moved and lease.slice.pinned and (nodes := set(before.slice.numa_nodes) - set(lease.slice.numa_nodes)):
            self._move_pages(nodes)
        return outside if settled else 0

    def _bind(self, refused: OSError | None, left: Iterable[int] | None) -> int:
        """Bind this process, unless that was just ``refused``; return how many threads had a mask outside the slice.

        Threads that span what was ``left`` follow: ``regions.c`` may have set one to the slice of the plan before in
        the very moment in which it changed. If the kernel refuses, the log says so, and the ledger from the next pass
        on, as long as it is so.
        """
        lease = self._lease
        notes = tuple(note for note in lease.notes if not note.startswith(NOT_BOUND))
        # While it is NOT BOUND its masks are leftovers, which follow.
        before = left if notes == lease.notes else os.sched_getaffinity(lease.pid)
        try:
            if refused is not None:
                raise refused
            changed, children = self.requests.bind(before=before)
        except OSError as error:
            note = f"{NOT_BOUND}: {readback.refusal(lease, error)}"
            self._report(note)
            notes = (*notes, note)
            changed = affinity.outside(lease.pid, self.requests.cpus)
        else:
            for child in children:
                self._report(readback.foreign_child(child))
        self._lease = replace(lease, notes=notes)
        return changed

    def _move_pages(self, nodes: set[int]) -> None:
        """Let the pages follow; outside the ledger's lock, since gigabytes take seconds."""
        note = memory.move_pages(self._lease.pid, nodes, self._lease.slice.numa_nodes)
        if note is not None and note not in self._lease.notes:
            self._report(note)
            self._lease = replace(self._lease, notes=(*self._lease.notes, note))

    def _look(self) -> None:
        """Make a pass with what this process may use by now, compare reality with the slice, and export that."""
        allowance = discovery.read_bounds().within(self._lease.limit)
        if allowance.cpus != self._lease.demand.allowed or allowance.quota != self._lease.demand.quota:
            debug("allowed by now: CPUs %s, quota %s", allowance.cpus, allowance.quota)
        demand = replace(self._lease.demand, allowed=allowance.cpus, quota=allowance.quota)
        self._lease = replace(self._lease, demand=demand)
        outside = self._follow()
        bound = not any(note.startswith(NOT_BOUND) for note in self._lease.notes)
        if outside and bound:
            where = format_cpulist(self.requests.cpus)
            self._report(f"{outside} threads had a mask outside the slice (CPUs {where}); put back")
        self._looks += 1
        reading = self._readback.read(self._lease, self.requests.threads, thorough=self._looks % THOROUGH == 1)
        for problem in reading.problems:
            self._report(problem)
        if self._metrics is not None and (export := readback.exporter(self._metrics, self._lease)):
            self._export(export, reading, outside)

    def _export(self, export: Callable[[str, float], None], reading: readback.Reading, outside: int) -> None:
        export("SliceCores", self._lease.slice.threads)
        export("ThreadsOutsideSlice", outside)
        if reading.remote_pages is not None:
            export("RemoteMemoryPages", reading.remote_pages)
        if reading.migrations:
            export("CpuMigrations", reading.migrations)
        if self._resizes:
            export("Resizes", self._resizes)
            self._resizes = 0
        status = self.requests.status
        for name, value in readback.lending(self._exported, status).items():
            export(name, value)
        self._exported = status

    def _observe(self, poll: select.poll) -> None:
        """Hold a pidfd of every other worker, which becomes readable when that worker ends."""
        others = {lease.pid for lease in self._peers}
        for pid in set(self._pidfds) - others:
            poll.unregister(self._pidfds[pid])
            os.close(self._pidfds.pop(pid))
        for pid in others - set(self._pidfds):
            try:
                self._pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                self._version = None  # it ended just now
            except (OSError, AttributeError):  # an old kernel, a sandbox, too many files: look at /proc instead
                self._blind = True
            else:
                poll.register(self._pidfds[pid], select.POLLIN)

    def _report(self, trouble: str) -> None:
        if trouble not in self._reported:  # once: the log is no place for a clock
            say(f"{self._lease}: {trouble}", problem=True)
            self._reported.add(trouble)


def follow(lease: Lease) -> Follower:
    """Follow ``lease`` in this process from now on; the caller tells its ``requests`` of them."""
    global _current
    following = _current = Follower(Ledger(), lease)
    try:
        following.requests.hold()
    except OSError as error:
        following._report(str(error))
    following.start()
    return following


def attach(lease: Lease) -> Follower:
    """Do what ``follow`` does, at the request boundaries of whatever handler this process runs."""
    following = follow(lease)  # before TorchServe is imported, which takes seconds
    hook([following, following.requests])
    following.requests.hold()  # TorchServe has imported torch by now: what differs later is the handler's doing
    return following


def hook(called: Sequence[hooks.Hook]) -> None:
    """Call these at TorchServe's request boundaries from now on, or say why that cannot be."""
    try:
        hooks.install(called)
    except Exception as error:  # noqa: BLE001 - it is bound already, or may be later; it must serve anyway
        say(f"threads will not follow the slice: {type(error).__name__}: {error}", problem=True)


_current: Follower | None = None


def current() -> Follower | None:
    """Return the follower of this process, if it has one."""
    return _current
