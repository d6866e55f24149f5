"""The base handler: makes sure of the slice before the model loads."""

from __future__ import annotations

import os
import sys
from typing import Any

from ts.torch_handler.base_handler import BaseHandler

from ts_plugin.leases import claim
from ts_plugin.leases.environment import collapsing
from ts_plugin.leases.ledger import Lease
from ts_plugin.worker import follower
from ts_plugin.worker.start import start

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
        own = follower.current() or _start(context)
        if own is not None:
            own.hold()
        super().initialize(context)  # type: ignore[misc]


class CoreSliceHandler(CoreSliceMixin, BaseHandler):  # type: ignore[misc]
    """TorchServe's BaseHandler on its own physical cores: subclass it as you would subclass BaseHandler."""


def _start(context: Any) -> follower.Follower | None:
    directory = context.system_properties.get("model_dir")
    worker = claim.worker_id(sys.argv)
    lease, _ = start(worker=worker, archive=directory, prepare=_traps)
    if lease is None:
        return None
    own = follower.attach(lease)
    own.on_load(context)  # came before this
    own.elastic.on_load(context)
    return own


def _traps(lease: Lease) -> list[str]:
    return [
        f"{name} is set, and shrank the affinity mask at `import torch`; unset it" for name in collapsing(os.environ)
    ]
