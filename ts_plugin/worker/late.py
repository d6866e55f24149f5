"""For a worker that could not be bound: it serves unbound, and tries again every minute to get a slice."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from ts_plugin.worker import claim, follower, hooks
from ts_plugin.worker.follower import Follower
from ts_plugin.worker.log import say
from ts_plugin.worker.start import OFF_VARIABLE, collapsed, start

__all__ = ["Late", "attempt", "begin"]

PAUSE = 60.0  # seconds between two attempts


class Late(hooks.Hook):
    """Claims a slice in this process, and passes on to the follower what TorchServe does from then on.

    ``reason``: why the launcher could not bind it, which the log has already.
    """

    def __init__(self, *, worker: str, archive: str, hooked: bool, reason: str = "") -> None:
        self._worker, self._archive, self._hooked, self._reason = worker, archive, hooked, reason
        self._mutex = threading.Lock()  # the thread that loads the model against the one that tries again
        self._context: Any = None
        self._own: Follower | None = None
        self._unheard = 0  # requests under way that began before there was a follower, which must not hear of their end

    def start(self) -> None:
        """Try every minute from now on; the thread never keeps the process alive."""
        threading.Thread(target=self._keep_trying, name="ts-cores-late", daemon=True).start()

    def _keep_trying(self) -> None:
        while self._own is None:
            time.sleep(PAUSE)
            try:
                self.attempt()
            except Exception as error:  # noqa: BLE001 - the worker serves on, and the next attempt may succeed
                if (reason := f"{type(error).__name__}: {error}") != self._reason:
                    self._reason = reason
                    say(f"worker {self._worker}: {reason}", problem=True)

    def attempt(self) -> Follower | None:
        """Claim a slice now if there is none; return its follower. The model may be computing in another thread."""
        with self._mutex:
            if self._own is None:
                lease, self._reason = start(
                    worker=self._worker,
                    archive=self._archive,
                    prepare=collapsed,
                    hooked=self._hooked,
                    said=self._reason,
                )
                if lease is not None:
                    own = follower.follow(lease)
                    if self._context is not None:
                        _tell_context(own, self._context)
                    self._own = own  # last: the thread that runs the model takes over here
            return self._own

    def on_load(self, context: Any) -> None:
        with self._mutex:
            self._context = context
            if self._own is not None:
                _tell_context(self._own, context)

    def on_loaded(self) -> None:
        if self._own is not None:
            self._own.requests.on_loaded()

    def on_request_start(self) -> None:
        if self._own is None:
            self._unheard += 1
        else:
            self._own.requests.on_request_start()

    def on_compute(self) -> None:
        if self._own is not None:
            self._own.requests.on_compute()

    def on_request_end(self) -> None:
        if self._unheard:
            self._unheard -= 1
        elif self._own is not None:
            self._own.requests.on_request_end()


def _tell_context(own: Follower, context: Any) -> None:
    own.on_load(context)
    own.requests.on_load(context)


def begin(*, worker: str, archive: str, hooked: bool, reason: str = "") -> Late:
    """Keep trying in this process, at the request boundaries of whatever handler it runs; see ``Late``."""
    global _current
    one = _current = Late(worker=worker, archive=archive, hooked=hooked, reason=reason)
    one.start()
    follower.hook(one)
    return one


def attempt(context: Any) -> Follower | None:
    """Return this process's follower; claim a slice if it has none. A failure is said, and tried again every minute.

    For handlers; ``context`` is TorchServe's ts.context.Context.
    """
    if (own := follower.current()) is not None:
        return own
    if OFF_VARIABLE in os.environ:
        return None
    one = _current
    if one is None:  # it was started past the launcher
        one = begin(worker=claim.worker_id(sys.argv), archive=context.system_properties.get("model_dir"), hooked=False)
        one.on_load(context)  # came before this
    return one.attempt()


_current: Late | None = None
