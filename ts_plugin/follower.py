"""Inside a worker: follows its slice while it serves.

A thread waits for the death of any other worker (pidfd) and for a new ledger (one stat every half second), and binds
this process; every few seconds it reads back whether reality agrees. The thread count belongs to the thread that
computes, so `follow` sets it there, at request boundaries.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from ts_plugin import binding, claim, coordinator, discovery, readback
from ts_plugin.launcher import say
from ts_plugin.ledger import Lease, Ledger, State
from ts_plugin.planner import PlanError, Slice

__all__ = ["Follower", "current"]

INTERVAL = 0.5  # seconds between two stats of the ledger; a death is seen at once
LOOK_INTERVAL = 5.0  # seconds between two read-backs
THOROUGH = 12  # every so many read-backs also memory and libraries are looked at


class Follower:
    """Keeps this process on the slice of ``lease``, which it must already be bound to."""

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self._ledger = ledger
        self._lease = lease
        self._wanted: Slice = lease.slice
        self._applied: Slice | None = None
        self._allowed = lease.demand.allowed
        self._pidfds: dict[int, int] = {}
        self._readback = readback.ReadBack()
        self._metrics: Any = None
        self._looks = 0
        self._resizes = 0
        self._reported: set[str] = set()

    @property
    def lease(self) -> Lease:
        return self._lease

    def start(self) -> None:
        """Start to follow; the thread never keeps the process alive."""
        threading.Thread(target=self._watch, name="ts-cores", daemon=True).start()

    def follow(self) -> None:
        """Make the calling thread compute with the slice's threads; costs nothing while the slice stays.

        Call it before a model is loaded and at every request boundary, from the thread that runs the model.
        """
        wanted = self._wanted
        if wanted is self._applied:
            return
        binding.set_thread_count(os.environ, wanted.threads)
        torch = sys.modules.get("torch")
        if torch is not None and torch.get_num_threads() != wanted.threads:
            torch.set_num_threads(wanted.threads)
        if self._applied is not None and self._applied.numa_nodes != wanted.numa_nodes and wanted.pinned:
            binding.bind_memory(self._lease.demand.policy.memory, wanted.numa_nodes)
        self._applied = wanted

    def loaded(self, context: Any) -> None:
        """Take over what TorchServe says at load time: the registered name, whether a GPU does the work, the metrics.

        ``context`` is its ts.context.Context. A GPU worker keeps one core, which feeds the device.
        """
        gpu = context.system_properties.get("gpu_id") is not None
        lease = self._lease
        demand = replace(lease.demand, cores=1) if gpu else lease.demand
        self._amend(replace(lease, model=context.model_name, demand=demand))
        self._metrics = context.metrics

    def _amend(self, lease: Lease) -> None:
        if (lease.model, lease.demand) == (self._lease.model, self._lease.demand):
            return
        try:
            coordinator.amend(self._ledger, lease)
            self._adopt(self._ledger.read())
        except (OSError, PlanError) as error:
            self._report(str(error))

    def _watch(self) -> None:
        poll = select.poll()
        version = None
        next_look = time.monotonic() + LOOK_INTERVAL
        while True:
            try:
                now = self._ledger.version()
                if now != version:
                    version = now
                    written = self._ledger.read_all()
                    state = written.living()
                    if state.leases != written.leases:  # somebody died before this process could watch it
                        state = coordinator.settle(self._ledger)
                    self._adopt(state)
                    self._observe(poll, state)
                if time.monotonic() >= next_look:
                    next_look += LOOK_INTERVAL
                    self._look()
                dead = poll.poll(INTERVAL * 1000)
                if dead:
                    for descriptor, _ in dead:
                        poll.unregister(descriptor)
                        os.close(descriptor)
                        self._pidfds = {pid: fd for pid, fd in self._pidfds.items() if fd != descriptor}
                    coordinator.settle(self._ledger)
            except (OSError, PlanError) as error:  # a disk that is full today may be fine tomorrow
                self._report(str(error))
                poll.poll(INTERVAL * 1000)

    def _look(self) -> None:
        """Compare reality with the slice, and what this process may use with what it could use before."""
        allowance = discovery.read_allowance(affinity=self._allowed)
        demand = replace(self._lease.demand, allowed=allowance.cpus, quota=allowance.quota)
        self._amend(replace(self._lease, demand=demand))
        self._looks += 1
        reading = self._readback.read(self._lease, thorough=self._looks % THOROUGH == 1)
        for problem in reading.problems:
            self._report(problem)
        if self._metrics is None:
            return
        export = readback.exporter(self._metrics, self._lease)
        if export is None:
            return
        export("SliceCores", len(self._lease.slice.cpus))
        export("ThreadsOutsideSlice", reading.outside)
        if reading.remote_pages is not None:
            export("RemoteMemoryPages", reading.remote_pages)
        if reading.migrations:
            export("CpuMigrations", reading.migrations)
        if self._resizes:
            export("Resizes", self._resizes)
            self._resizes = 0

    def _adopt(self, state: State) -> None:
        lease = state.lease_of(os.getpid())
        if lease is None:  # somebody deleted or damaged the ledger: enter again what is ours
            lease = coordinator.join(self._ledger, self._lease)
        if lease.slice != self._lease.slice:
            say(claim.describe(lease))
        binding.bind_tree(lease.pid, lease.slice.cpus, before=self._lease.slice.cpus)
        if lease.slice != self._wanted:
            self._wanted = lease.slice
            self._resizes += 1
        self._lease = lease

    def _observe(self, poll: select.poll, state: State) -> None:
        """Hold a pidfd of every other worker, which becomes readable when that worker ends."""
        others = {lease.pid for lease in state.leases} - {os.getpid()}
        for pid in set(self._pidfds) - others:
            poll.unregister(self._pidfds[pid])
            os.close(self._pidfds.pop(pid))
        for pid in others - set(self._pidfds):
            try:
                self._pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:  # just now
                coordinator.settle(self._ledger)
                continue
            poll.register(self._pidfds[pid], select.POLLIN)

    def _report(self, trouble: str) -> None:
        if trouble not in self._reported:  # once: the log is no place for a clock
            say(f"{self._lease}: {trouble}", problem=True)
            self._reported.add(trouble)


def attach(ledger: Ledger, lease: Lease) -> Follower:
    """Follow ``lease`` in this process from now on, at the request boundaries of whatever handler it runs.

    Source: ts/service.py, ts/async_service.py: the synchronous and the asynchronous `predict` both begin with
    `Service.retrieve_data_for_inference`, in the thread that runs the model.
    """
    global _current
    from ts.service import Service

    own = _current = Follower(ledger, lease)
    receive = Service.retrieve_data_for_inference

    def follow_and_receive(batch: Any) -> Any:
        own.follow()
        return receive(batch)

    Service.retrieve_data_for_inference = staticmethod(follow_and_receive)
    own.start()
    return own


_current: Follower | None = None


def current() -> Follower | None:
    """Return the follower of this process, if it has one."""
    return _current
