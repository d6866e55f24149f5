"""The base handler: makes sure of the slice before the model loads."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from ts.torch_handler.base_handler import BaseHandler

from ts_plugin.leases import binding, claim, coordinator
from ts_plugin.leases.environment import collapsing
from ts_plugin.leases.ledger import Ledger
from ts_plugin.worker import follower
from ts_plugin.worker.launcher import say

__all__ = ["CoreSliceHandler", "CoreSliceMixin"]


class CoreSliceMixin:
    """Put it before any TorchServe handler: ``class MyHandler(CoreSliceMixin, ImageClassifier): ...``.

    It works wherever the worker came from: bound by the launcher, or started past it (no plug-in, ``useVenv``,
    torchrun), in which case it claims its slice here. A worker that cannot be bound serves unbound and says why.
    """

    def initialize(self, context: Any) -> None:
        """Bind this worker and set its intra-op threads, then let the handler load the model.

        ``context`` is TorchServe's ts.context.Context.
        """
        own = follower.current() or _claim(context)
        if own is not None:
            own.follow()
        super().initialize(context)  # type: ignore[misc]


class CoreSliceHandler(CoreSliceMixin, BaseHandler):  # type: ignore[misc]
    """TorchServe's BaseHandler on its own physical cores: subclass it as you would subclass BaseHandler."""


def _claim(context: Any) -> follower.Follower | None:
    properties = context.system_properties
    worker = claim.worker_id(sys.argv)
    try:
        ledger = Ledger()
        archive = claim.read_archive(properties.get("model_dir"))
        lease = claim.claim(ledger, archive=archive, worker=worker)
        note = binding.bind_memory(lease.demand.policy.memory, lease.slice.numa_nodes) if lease.slice.pinned else None
        own = follower.attach(ledger, lease)
        own.loaded(context)
    except Exception as error:  # noqa: BLE001 - a pinning plug-in never takes serving down, whatever went wrong
        say(f"worker {worker} serves UNBOUND: {' '.join(str(error).split())}", problem=True)
        with contextlib.suppress(Exception):
            coordinator.leave(Ledger(), os.getpid())
        return None
    say(f"{claim.describe(lease)} (claimed by the handler)")
    traps = [
        f"{name} is set, and shrank the affinity mask at `import torch`; unset it" for name in collapsing(os.environ)
    ]
    for problem in [*lease.notes, *([note] if note else []), *traps]:
        say(f"worker {worker}: {problem}", problem=True)
    return own
