"""The base handler: makes sure of the slice before the model loads."""

from __future__ import annotations

from typing import Any

from ts.torch_handler.base_handler import BaseHandler

from ts_plugin.log import say
from ts_plugin.worker import late


class CoreSliceMixin:
    """Put it before any TorchServe handler: ``class MyHandler(CoreSliceMixin, ImageClassifier): ...``.

    It works wherever the worker came from: bound by the launcher, or started past it (no plug-in, ``useVenv``,
    torchrun), in which case it claims its slice here. A worker that cannot be bound serves unbound and says why.
    """

    def initialize(self, context: Any) -> None:
        """Bind this worker and set its intra-op threads, then let the handler load the model.

        ``context`` is TorchServe's ts.context.Context.
        """
        try:
            if (following := late.attempt(context)) is not None:
                following.requests.hold()
        except Exception as error:  # noqa: BLE001 - the model loads whatever happens to the slice
            say(f"this worker does not hold its slice: {type(error).__name__}: {error}", problem=True)
        super().initialize(context)  # type: ignore[misc]


class CoreSliceHandler(CoreSliceMixin, BaseHandler):  # type: ignore[misc]
    """TorchServe's BaseHandler on its own physical cores: subclass it as you would subclass BaseHandler."""
