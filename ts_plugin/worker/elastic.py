"""Inside a worker, at the boundaries of its requests: which cores and how many threads each one computes with.

Between requests a worker computes on nothing, and its slice may be borrowed. A request waits for the worker's own
slice, takes idle neighbours' slices up to the width that pays (``planning.width``), computes, and gives all of it back.
Two workers never compute on one core at the same time: the board's locks say who does, and end with their process.

A worker whose requests have no clear boundaries (asynchronous handlers, torchrun, threads of its own) keeps its slice.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from ts_plugin.leases import binding, claim, masks
from ts_plugin.leases.board import Totals
from ts_plugin.leases.environment import set_thread_count
from ts_plugin.leases.ledger import Lease, Ledger, State
from ts_plugin.planning.planner import Slice
from ts_plugin.worker import hooks, openmp
from ts_plugin.worker.exchange import START_PATIENCE, Exchange, Ground

__all__ = ["Elastic"]


class Elastic(hooks.Hook):
    """The masks and the thread count of this process, which computes on the slice of ``lease`` until ``on_loaded``.

    The follower's thread calls ``adopt`` and ``bind``; the thread that loads and runs the model calls everything else.
    ``report`` writes a line into the log, once.
    """

    def __init__(self, ledger: Ledger, lease: Lease, report: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._report = report
        self._mutex = threading.Lock()  # one thread's ground and masks against the other's
        self._ground = Ground(lease)
        self._exchange: Exchange | None = None
        self._keeps: str | None = None  # why this worker neither lends nor borrows
        self._starts = True  # computes outside of any request
        self._requests = 0  # under way: at most one, or boundaries mean nothing
        self._cpus = self._bound = frozenset(lease.slice.cpus)  # of the thread that computes; of all others
        self._threads = 0
        self._applied: Slice | None = None
        self._join(lease)
        os.register_at_fork(after_in_child=self._narrow_child)

    @property
    def totals(self) -> Totals:
        return Totals() if self._exchange is None else self._exchange.totals

    # ---- the follower's thread -------------------------------------------------------------------------

    def adopt(self, lease: Lease, state: State) -> None:
        """Compute on the slice of ``lease`` from the next request on; ``state`` tells the neighbours."""
        with self._mutex:
            moved = lease.slice.cpus != self._ground.own.cpus
            self._ground = Ground(lease, state.neighbours(lease))
            self._join(lease)
            if self._exchange is not None:
                self._exchange.forget_decision()
                if moved and (self._starts or self._keeps is not None):
                    self._exchange.release()
                    self._exchange.take_own(self._ground, START_PATIENCE)
                elif not self._requests:
                    self._exchange.reopen()

    def bind(self, *, before: Iterable[int] | None = None) -> binding.Outcome:
        """Keep every thread of this process and of its children on what it computes with now, or else on its slice.

        ``before``: what threads span that should follow, if not what they were bound to last.

        Raises:
            OSError: the kernel refuses it.
        """
        with self._mutex:
            lease = self._ground.lease
            lent = self._requests and self._exchange is not None and self._keeps is None
            target = self._cpus if lent else frozenset(lease.slice.cpus)
            old, self._bound = self._bound if before is None else before, target
            self._cpus = target
            return masks.enforce(lease, target, before=old)

    @property
    def cpus(self) -> frozenset[int]:
        """The CPUs that ``bind`` keeps this process on."""
        return self._bound

    def _join(self, lease: Lease) -> None:
        """Lend and borrow from now on, or stop doing so, as the plan says."""
        if not lease.slice.reach:
            if self._exchange is not None and not self._requests:
                self._exchange.close()
                self._exchange = None
        elif self._exchange is None:
            try:
                self._exchange = Exchange(self._ledger, lease)
            except OSError as error:
                self._report(f"neither lends cores nor borrows any: {error}")

    # ---- the thread that loads and runs the model ------------------------------------------------------

    def on_load(self, context: Any) -> None:
        """Hold the slice while the model loads, which computes; ``context`` is TorchServe's ts.context.Context."""
        settings = getattr(context, "model_yaml_config", None) or {}
        if settings.get("asyncCommunication"):
            self._keep("its handler is asynchronous, so its requests overlap")
        elif int(os.environ.get("WORLD_SIZE") or 1) > 1:
            self._keep("it is one of several ranks of torchrun, which wait for each other")
        elif context.system_properties.get("gpu_id") is not None:
            self._keep("its core feeds a GPU")
        with contextlib.suppress(ValueError):  # the claim has said so
            profile = claim.read_profile(settings.get("cpu"))
            if profile and self._exchange is not None:
                self._exchange.prime(profile)
        self.hold()

    def hold(self) -> None:
        """Compute on the slice alone, outside of any request: the start of a worker."""
        with self._mutex:
            self._starts = True
        ground, exchange = self._what_there_is()
        if exchange is not None:
            exchange.take_own(ground, START_PATIENCE)
        self._compute_on(ground.own, ground.own.cpus, ground.own.threads)

    def on_loaded(self) -> None:
        """Compute on nothing until the first request."""
        self._finish()

    def on_request_start(self) -> None:
        with self._mutex:
            self._requests += 1
        if self._requests > 1:
            self._keep("its requests overlap")
        ground, exchange = self._what_there_is()
        if exchange is None or self._keeps is not None:
            self._compute_on(ground.own, ground.own.cpus, ground.own.threads)
        else:
            self._compute_on(ground.own, *exchange.take(ground))
            exchange.begin()

    def _what_there_is(self) -> tuple[Ground, Exchange | None]:
        with self._mutex:
            return self._ground, self._exchange if self._ground.own.reach else None

    def on_compute(self) -> None:
        """Let the calling thread, one of the handler's own, compute with the slice's threads."""
        self._keep("its handler computes in threads of its own")
        _set_threads(self._ground.own.threads)

    def on_request_end(self) -> None:
        with self._mutex:
            self._requests -= 1
        if self._exchange is not None and self._keeps is None:
            evicted = self._ground.own.pinned and os.sched_getaffinity(0) != self._cpus
            self._exchange.end(self._threads, undisturbed=not evicted)
        if not self._requests:
            self._finish()

    def _compute_on(self, own: Slice, cpus: tuple[int, ...], threads: int) -> None:
        """Bind the calling thread, whose threads inherit its mask, and set the number of intra-op threads."""
        if own is not self._applied:
            set_thread_count(os.environ, own.threads)
            if self._applied is not None and self._applied.numa_nodes != own.numa_nodes and own.pinned:
                if note := binding.bind_memory(self._ground.lease.demand.policy.memory, own.numa_nodes):
                    self._report(note)
                openmp.end_team()  # its threads keep the policy of the nodes that were left
            self._applied = own
        if own.pinned and self._exchange is not None:
            try:
                self._move(frozenset(cpus))
            except OSError:  # the kernel refuses it, which the follower sees and says
                threads = own.threads
        self._threads = threads
        _set_threads(threads)

    def _move(self, cpus: frozenset[int]) -> None:
        if self._cpus == cpus == os.sched_getaffinity(0):
            return
        with self._mutex:
            self._cpus = cpus
            if not openmp.end_team():  # another runtime: its threads live on, and must follow
                masks.enforce(self._ground.lease, cpus, before=self._bound)
                self._bound = cpus
            masks.bind_thread(cpus)

    def _finish(self) -> None:
        """Compute on nothing. The team ends where others may want its cores: its threads would spin there."""
        with self._mutex:
            self._starts = False
            exchange, own = self._exchange, frozenset(self._ground.own.cpus)
            if exchange is None or self._keeps is not None:
                return
            try:
                if self._cpus != own or exchange.lent:
                    openmp.end_team()
                if self._ground.own.pinned and self._cpus != own:
                    self._cpus = own
                    masks.bind_thread(own)
                    if self._bound != own or masks.outside(os.getpid(), own):
                        masks.enforce(self._ground.lease, own, before=self._bound)
                    self._bound = own
            finally:
                exchange.release()

    def _keep(self, why: str) -> None:
        """Neither lend nor borrow from now on."""
        with self._mutex:
            if self._keeps is None:
                self._keeps = why
                if self._exchange is not None:
                    self._report(f"neither lends cores nor borrows any: {why}")
                    self._exchange.keep(self._ground.lease)

    def _narrow_child(self) -> None:
        """In a forked child: it may live longer than the request that computes on borrowed cores now."""
        own = self._ground.own
        if own.pinned and self._cpus != frozenset(own.cpus):
            masks.bind_thread(own.cpus)


def _set_threads(threads: int) -> None:
    """Set the intra-op threads of the calling thread, and of those that compute for the first time after this."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
