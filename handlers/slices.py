"""The base handler: makes sure of the slice before the model loads."""

from __future__ import annotations

import os
import sys
from typing import Any

from ts.torch_handler.base_handler import BaseHandler

from ts_plugin import binding, claim, follower
from ts_plugin.launcher import say
from ts_plugin.ledger import Ledger
from ts_plugin.planner import PlanError

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
        # torch is here already, and so are its threads: all move, and masks that OMP_PROC_BIND shrank are repaired.
        repaired = binding.bind_tree(lease.pid, lease.slice.cpus, before=os.sched_getaffinity(0))
        binding.bind_memory(lease.demand.policy.memory, lease.slice.numa_nodes)
    except (OSError, PlanError, claim.CannotBind) as error:
        say(f"worker {worker} serves UNBOUND: {error}", problem=True)
        return None
    own = follower.attach(ledger, lease)
    own.loaded(context)
    say(f"{claim.describe(lease)} (claimed by the handler, {repaired} masks set)")
    for name in binding.collapsing(os.environ):
        say(f"worker {worker}: {name} is set, and shrank the affinity mask at `import torch`; unset it", problem=True)
    return own
