"""For a worker that could not be bound: it serves unbound, and tries again every minute to get a slice."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from ts_plugin.log import say
from ts_plugin.worker import follower, hooks
from ts_plugin.worker.follower import Follower
from ts_plugin.worker.start import OFF_VARIABLE, start, worker_id

PAUSE = 60.0  # seconds between two attempts


class Late(hooks.Hook):
    """Claims a slice in this process; ``hooks`` are this one and, from then on, the follower's.

    ``reason``: why the launcher could not bind it, which the log has already.
    """

    def __init__(self, *, worker: str, archive: str, hooked: bool, reason: str = "") -> None:
        self._worker, self._archive, self._hooked, self._reason = worker, archive, hooked, reason
        self._mutex = threading.Lock()  # the thread that loads the model against the one that tries again
        self._context: Any = None
        self._follower: Follower | None = None
        self.hooks: list[hooks.Hook] = [self]

    def start(self) -> None:
        """Try every minute from now on; the thread never keeps the process alive."""
        threading.Thread(target=self._keep_trying, name="ts-cores-late", daemon=True).start()

    def _keep_trying(self) -> None:
        while self._follower is None:
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
            if self._follower is None:
                lease, self._reason = start(
                    worker=self._worker, archive=self._archive, hooked=self._hooked, said=self._reason
                )
                if lease is not None:
                    following = follower.follow(lease)
                    if self._context is not None:
                        following.on_load(self._context)
                        following.requests.on_load(self._context)
                    self.hooks += [following, following.requests]  # they hear of the next request
                    self._follower = following
            return self._follower

    def on_load(self, context: Any) -> None:
        with self._mutex:  # if a slice was just claimed, the follower comes next in ``hooks``
            self._context = context


def begin(*, worker: str, archive: str, hooked: bool, reason: str = "") -> Late:
    """Keep trying in this process, at the request boundaries of whatever handler it runs; see ``Late``."""
    global _current
    late = _current = Late(worker=worker, archive=archive, hooked=hooked, reason=reason)
    late.start()
    follower.hook(late.hooks)
    return late


def attempt(context: Any) -> Follower | None:
    """Return this process's follower; claim a slice if it has none. A failure is said, and tried again every minute.

    For handlers; ``context`` is TorchServe's ts.context.Context.
    """
    if (following := follower.current()) is not None:
        return following
    if OFF_VARIABLE in os.environ:
        return None
    late = _current
    if late is None:  # it was started past the launcher
        late = begin(worker=worker_id(sys.argv), archive=context.system_properties.get("model_dir"), hooked=False)
        late.on_load(context)  # came before this
    return late.attempt()


_current: Late | None = None
