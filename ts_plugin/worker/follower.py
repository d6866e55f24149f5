"""Inside a worker: follows its slice while it serves.

A thread waits for the death of any other worker (pidfd) and for a new ledger (one stat every half second), and binds
this process; every few seconds it reads back whether reality agrees. What belongs to the thread that computes, such as
its thread count, ``requests`` sets there, at request boundaries.
"""

from __future__ import annotations

import os
import select
import threading
import time
from dataclasses import replace
from typing import Any

from ts_plugin.leases import binding, claim, coordinator
from ts_plugin.leases.ledger import Lease, Ledger, State
from ts_plugin.lending.words import Status
from ts_plugin.machine import discovery
from ts_plugin.worker import hooks, readback
from ts_plugin.worker.log import say
from ts_plugin.worker.onnx_threads import OnnxThreads
from ts_plugin.worker.requests import Requests

__all__ = ["Follower", "attach", "current", "follow", "hook"]

INTERVAL = 0.5  # seconds between two stats of the ledger; a death is seen at once
LOOK_INTERVAL = 5.0  # seconds between two read-backs
THOROUGH = 12  # every so many read-backs also memory and libraries are looked at
NOT_BOUND = "NOT BOUND to its slice"  # the start of a note that lasts as long as this is so


class Follower(hooks.Hook):
    """Keeps this process on the slice of ``lease``, which it must already be bound to."""

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self._ledger = ledger
        self._lease = lease
        self._mutex = threading.RLock()  # the watching thread against the one that loads the model
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
            notes = tuple(note for note in lease.notes if not note.endswith(claim.GUESS))
            try:
                self._tell(replace(lease, model=context.model_name, demand=demand, notes=notes))
            except Exception as error:  # noqa: BLE001 - the model loads all the same
                self._report(str(error))
            self._metrics = context.metrics

    def _tell(self, lease: Lease) -> None:
        """Enter what has changed about this worker; remembered, so that a rebuilt ledger learns it again."""
        if lease == self._lease:
            return
        coordinator.update_demand(self._ledger, lease)
        self._lease = replace(self._lease, model=lease.model, demand=lease.demand, notes=lease.notes)
        self._adopt(self._ledger.read())

    def _watch(self) -> None:
        poll = select.poll()
        version = None
        next_look = time.monotonic() + LOOK_INTERVAL
        while True:
            try:
                self.requests.publish()
                if self._blind and not all(lease.identity.alive() for lease in self._peers):
                    version = None
                now = self._ledger.version()
                if now != version or self.requests.outdated:
                    with self._mutex:
                        self._catch_up(poll)
                    version = now  # only now: what failed half-way is done again
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + LOOK_INTERVAL
                    with self._mutex:
                        self._look()
                for descriptor, _ in poll.poll(INTERVAL * 1000):
                    version = None  # somebody died
                    poll.unregister(descriptor)
                    os.close(descriptor)
                    self._pidfds = {pid: fd for pid, fd in self._pidfds.items() if fd != descriptor}
            except Exception as error:  # noqa: BLE001 - a disk that is full today may be fine tomorrow; never stop
                version = None
                self._report(str(error) or type(error).__name__)
                time.sleep(INTERVAL)

    def _catch_up(self, poll: select.poll) -> None:
        """Divide what a death left behind, take over what the ledger says, and watch who is in it."""
        written = self._ledger.read_all()
        state = written.living()
        refused: dict[int, OSError] = {}
        if state.leases != written.leases:
            state, refused = coordinator.divide_freed(self._ledger)
        self._adopt(state, refused.get(self._lease.pid))
        if self.requests.unannounced:  # there is a new file of words, or whoever planned died before it told
            self._adopt(coordinator.divide_freed(self._ledger)[0])
        self._observe(poll, state)

    def _look(self) -> None:
        """Compare what this process may use now with what it could use before, and reality with the slice."""
        allowance = discovery.read_bounds().within(self._lease.limit)
        demand = replace(self._lease.demand, allowed=allowance.cpus, quota=allowance.quota)
        self._tell(replace(self._lease, demand=demand))
        self._looks += 1
        reading = self._readback.read(self._lease, self.requests, thorough=self._looks % THOROUGH == 1)
        for problem in reading.problems:
            self._report(problem)
        if reading.refusal is not None or any(note.startswith(NOT_BOUND) for note in self._lease.notes):
            self._bind(refused=reading.refusal)  # else the look has bound what there is to bind
        if self._metrics is None:
            return
        export = readback.exporter(self._metrics, self._lease)
        if export is None:
            return
        export("SliceCores", self._lease.slice.threads)
        export("ThreadsOutsideSlice", reading.outside)
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

    def _adopt(self, state: State, refused: OSError | None = None) -> None:
        """Take over what ``state`` says of this worker; ``refused``: the kernel has said already that it does not."""
        own = self._lease
        lease = state.lease_of(own.pid)
        if lease is None:  # somebody deleted or damaged the ledger: enter again what is ours
            lease = coordinator.restore(self._ledger, own).lease_of(own.pid) or own
        elif (lease.model, lease.demand) != (own.model, own.demand):  # rebuilt from what we were at the start
            coordinator.update_demand(self._ledger, own)
            lease = self._ledger.read().lease_of(own.pid) or own
        if lease.slice != own.slice:
            say(claim.describe(lease))
        self._lease = lease  # even if the kernel says no: the threads, at least, are ours to count
        self.requests.adopt(lease, state)
        self._bind(refused=refused)
        lease = self._lease  # may have changed on the way
        if lease.slice != own.slice:
            self._resizes += 1
            if lease.slice.pinned and (left := set(own.slice.numa_nodes) - set(lease.slice.numa_nodes)):
                self._move_pages(left)

    def _bind(self, *, refused: OSError | None = None) -> None:
        """Bind this process; say in the log and in the ledger that it is not bound, as long as that is so."""
        lease = self._lease
        notes = tuple(note for note in lease.notes if not note.startswith(NOT_BOUND))
        # While it is NOT BOUND its masks are leftovers, which follow.
        before = None if notes == lease.notes else os.sched_getaffinity(lease.pid)
        try:
            if refused is not None:
                raise refused
            children = self.requests.bind(before=before).refused
        except OSError as error:
            note = f"{NOT_BOUND}: {readback.refusal(lease, error)}"
            self._report(note)
            notes = (*notes, note)
        else:
            for child in children:
                self._report(readback.foreign_child(child))
        self._tell(replace(lease, notes=notes))

    def _move_pages(self, left: set[int]) -> None:
        """Let the pages follow; outside the ledger's lock, since gigabytes take seconds."""
        note = binding.move_pages(self._lease.pid, left, self._lease.slice.numa_nodes)
        if note is not None and note not in self._lease.notes:
            self._report(note)
            self._tell(replace(self._lease, notes=(*self._lease.notes, note)))

    def _observe(self, poll: select.poll, state: State) -> None:
        """Hold a pidfd of every other worker, which becomes readable when that worker ends."""
        self._peers = tuple(lease for lease in state.leases if lease.pid != self._lease.pid)
        others = {lease.pid for lease in self._peers}
        for pid in set(self._pidfds) - others:
            poll.unregister(self._pidfds[pid])
            os.close(self._pidfds.pop(pid))
        for pid in others - set(self._pidfds):
            try:
                self._pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:  # just now
                coordinator.divide_freed(self._ledger)
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
    own = _current = Follower(Ledger(), lease)
    try:
        own.requests.hold()
    except OSError as error:
        own._report(str(error))
    own.start()
    return own


def attach(lease: Lease) -> Follower:
    """Do what ``follow`` does, at the request boundaries of whatever handler this process runs."""
    own = follow(lease)  # before TorchServe is imported, which takes seconds
    hook(own, own.requests)
    own.requests.hold()  # TorchServe has imported torch by now: what differs later is the handler's doing
    return own


def hook(*called: hooks.Hook) -> None:
    """Call these at TorchServe's request boundaries from now on, or say why that cannot be."""
    try:
        hooks.install(called)
    except Exception as error:  # noqa: BLE001 - it is bound already, or may be later; it must serve anyway
        say(f"threads will not follow the slice: {type(error).__name__}: {error}", problem=True)


_current: Follower | None = None


def current() -> Follower | None:
    """Return the follower of this process, if it has one."""
    return _current
