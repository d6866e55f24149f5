"""Inside a worker: with how many threads it computes, while it starts, in a request, and between requests.

A worker that lends holds its slice while it starts and in its requests; between them its slice may be borrowed. A
worker whose requests have no clear boundaries (asynchronous handlers, torchrun, threads of its own) keeps its slice.
``lending`` has the rest: what is borrowed, and how it comes back.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

from ts_plugin.kernel import affinity, memory
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease, State
from ts_plugin.lending.lender import Lender, Plan
from ts_plugin.lending.library import LibraryError
from ts_plugin.lending.words import Status
from ts_plugin.planning.planner import Slice
from ts_plugin.worker import hooks, openmp
from ts_plugin.worker.archive import read_profile
from ts_plugin.worker.environment import set_thread_count


class Phase(StrEnum):
    STARTS = "starts"  # computes outside of any request: imports, loads the model
    WAITS = "waits"  # for a request
    COMPUTES = "computes"  # one request, or several at once


class Requests(hooks.Hook):
    """Sets the threads of this process, which computes on the slice of ``lease``, and lends what it does not use.

    The follower's thread calls ``adopt``, ``bind``, ``publish`` and the properties; the thread that loads and runs the
    model calls everything else. ``report`` writes a line into the log, once.
    """

    def __init__(self, ledger: Ledger, lease: Lease, report: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._report = report
        self._mutex = threading.Lock()  # between the two threads; nobody waits for a slice while holding it
        self._phase = Phase.STARTS
        self._open = 0  # requests under way
        self._keeps = ""  # why this worker neither lends nor borrows
        self._plan = self._followed = Plan(0, lease)
        self._lender: Lender | None = None
        self._began: Lender | None = None  # what the present request began with
        self._applied: Slice | None = None
        self._counted: tuple[Slice, int] | None = None  # whose number of threads which thread was given last
        self._bound: Iterable[int] = lease.slice.cpus
        self._published = Status()
        self._join()

    # ---- the follower's thread -------------------------------------------------------------------------

    def adopt(self, lease: Lease, state: State) -> None:
        """Compute on the slice of ``lease`` from the next request on; ``state`` tells the neighbours."""
        with self._mutex:
            self._plan = Plan(state.generation, lease, state.neighbours(lease))
            if self._phase is not Phase.COMPUTES:
                self._join()

    def bind(self, *, before: Iterable[int] | None = None) -> affinity.Outcome:
        """Keep this process and its children on the slice; threads of a wide request may be on borrowed CPUs.

        ``before``: what threads span that should follow, if not what they were bound to last.

        Raises:
            OSError: the kernel refuses it.
        """
        with self._mutex:
            lease = self._plan.lease
            old, self._bound = self._bound if before is None else before, lease.slice.cpus
            return affinity.bind_tree(lease.pid, lease.slice.cpus, before=old, borrows=self._cpus())

    def publish(self) -> None:
        """Tell people what has happened since the last call."""
        with self._mutex:
            if self._lender is not None and self._lender.status is not self._published:
                self._published = self._lender.status
                self._lender.publish()

    @property
    def cpus(self) -> frozenset[int]:
        """The CPUs on which threads of this process may be now."""
        with self._mutex:
            return self._cpus()

    @property
    def threads(self) -> int:
        """How many threads compute now, or would."""
        with self._mutex:
            return self._threads()

    @property
    def status(self) -> Status:
        """What there is to tell about lending."""
        lender = self._lender
        return Status() if lender is None else lender.status

    @property
    def outdated(self) -> bool:
        """Whether the follower should read the ledger again: there is another plan, or a neighbour that lends."""
        with self._mutex:
            return self._waiting_lender is not None and self._waiting_lender.outdated

    @property
    def unannounced(self) -> bool:
        """Whether others do not know of the plan that is followed here: then nobody borrows."""
        with self._mutex:
            return self._waiting_lender is not None and self._waiting_lender.unannounced

    @property
    def _waiting_lender(self) -> Lender | None:
        """What could follow another plan now."""
        return None if self._phase is Phase.COMPUTES or self._keeps else self._lender

    def _threads(self) -> int:
        computes = self._lender is not None and self._phase is Phase.COMPUTES
        own = self._plan.lease.slice.threads
        return max(own, self._lender.width) if computes and self._lender is not None else own

    def _cpus(self) -> frozenset[int]:
        own = self._plan.lease.slice
        return own.reach.union(own.cpus) if self._threads() > own.threads else frozenset(own.cpus)

    def _join(self) -> None:
        """Lend and borrow as the plan says from now on; not while a request computes."""
        plan = self._plan
        if self._lender is not None and (not plan.lease.slice.reach or self._lender.lost):
            self._lender.close()
            self._lender = None
        if not plan.lease.slice.reach:
            return
        try:
            if self._lender is None:
                self._lender = Lender(self._ledger, plan)
                if self._keeps:
                    self._lender.keep(self._keeps)
                elif self._phase is Phase.WAITS:
                    self._lender.end(request=False)
            elif plan is not self._followed:
                self._lender.follow(plan)
            self._followed = plan
        except (OSError, LibraryError) as error:
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
            profile = read_profile(settings.get("cpu"))
            if profile and self._lender is not None:
                self._lender.prime(profile)
        self.hold()

    def hold(self) -> None:
        """Compute on the slice alone, outside of any request: the start of a worker."""
        with self._mutex:
            lender = self._lender if self._phase is Phase.WAITS and not self._keeps else None
            self._phase = Phase.STARTS
        if lender is not None:
            lender.hold()
        self._apply(self._plan.lease)

    def on_loaded(self) -> None:
        """Wait for the first request: the slice may be borrowed from now on."""
        with self._mutex:
            self._phase = Phase.WAITS
            if self._lender is not None and not self._keeps:
                self._lender.end(request=False)

    def on_request_start(self) -> None:
        with self._mutex:
            self._open += 1
            if self._open == 1:
                self._join()
                self._phase = Phase.COMPUTES
                self._began = None if self._keeps else self._lender
            began, plan = self._began, self._plan
        if self._open > 1:
            self._keep("its requests overlap")
            began = None
        self._apply(plan.lease)
        if began is not None:
            began.begin(plan)

    def on_compute(self) -> None:
        """Let the calling thread, one of the handler's own, compute with the slice's threads."""
        self._keep("its handler computes in threads of its own")
        _set_threads(self._plan.lease.slice.threads)

    def on_request_end(self) -> None:
        with self._mutex:
            self._open -= 1
            if self._open:
                return
            self._phase = Phase.WAITS
            began, self._began = self._began, None
            if began is not None:
                began.end(request=not self._keeps)
                if self._keeps:
                    began.hold()
            elif self._lender is not None and not self._keeps:
                self._lender.end(request=False)  # it came in the midst of the request
            self._join()

    def _apply(self, lease: Lease) -> None:
        """Set the threads and the memory policy of the calling thread as ``lease`` says, where they have changed."""
        own = lease.slice
        if own is not self._applied:
            set_thread_count(os.environ, own.threads)
            if self._applied is not None and self._applied.numa_nodes != own.numa_nodes and own.pinned:
                if note := memory.bind_memory(lease.demand.policy.memory, own.numa_nodes):
                    self._report(note)
                openmp.end_team()  # its threads keep the policy of the nodes that were left
            self._applied = own
        found, here = _set_threads(own.threads), (own, threading.get_ident())
        if here == self._counted and found not in (None, own.threads):
            self._report(
                f"torch.set_num_threads({found}), called by the handler or a library, is overruled: the slice's number "
                f"is {own.threads}; `cpu: {{cores: N}}` in the archive's model-config.yaml asks for another"
            )
        self._counted = here if found is not None else None

    def _keep(self, why: str) -> None:
        """Neither lend nor borrow from now on; what the present request has borrowed goes back when it ends."""
        with self._mutex:
            if not self._keeps:
                self._keeps = why
                if self._lender is not None:
                    self._report(f"neither lends cores nor borrows any: {why}")
                    self._lender.keep(why)


def _set_threads(threads: int) -> int | None:
    """Set the intra-op threads of the calling thread, and of those that compute for the first time after this.

    Returns the number that it had; None where torch is not loaded.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    found: int = torch.get_num_threads()
    if found != threads:
        torch.set_num_threads(threads)
    return found
