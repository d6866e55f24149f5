"""A handler's own torch.set_num_threads: the next request has the slice's number again, and the log says so once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from ts_plugin.worker.hooks import Hook

__all__ = ["Overruled"]


class Overruled:
    """Notices that a thread's number of intra-op threads is not the one that it was given.

    ``before`` and ``behind`` are hooks, to be installed around those that give the number; each reads it in less than a
    microsecond.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report: Callable[[str], None] | None = report
        self._given = threading.local()  # OpenMP has a number for each thread that starts others
        self.before, self.behind = _Each(self._check), _Each(self.remember)

    def remember(self) -> None:
        """Take the number that the calling thread has now for the one that it was given."""
        torch = sys.modules.get("torch")
        if torch is not None:
            self._given.number = torch.get_num_threads()

    def _check(self) -> None:
        torch, given = sys.modules.get("torch"), getattr(self._given, "number", None)
        if torch is None or given is None or self._report is None or (found := torch.get_num_threads()) == given:
            return
        self._report(
            f"torch.set_num_threads({found}), called by the handler or a library, is overruled: the slice's number is "
            f"{given}; `cpu: {{cores: N}}` in the archive's model-config.yaml asks for another"
        )
        self._report = None


class _Each(Hook):
    """Calls ``act`` when a model is about to load and when a request starts."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_load(self, context: Any) -> None:
        self._act()

    def on_request_start(self) -> None:
        self._act()
