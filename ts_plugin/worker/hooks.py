"""The only patches of TorchServe: when its worker loads a model, and when a request starts and ends.

Source, TorchServe 0.12: ts/model_loader.py calls ts.service.Service(...) right before the handler's `initialize`, and
ts/model_service_worker.py `Service.predict` for each batch, in the thread that runs the model. With asyncCommunication
ts/async_service.py puts its own coroutine `predict` into the service's place. Both send what a handler streams from
inside, turn a handler's exceptions into answers, and return the answer without sending it.
ts/handler_utils/micro_batching.py lets `execute_call` compute in threads of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ts_plugin.log import say


class Hook:
    """What ``install`` calls; a method that is not overridden does nothing.

    An exception is logged once and never reaches TorchServe.
    """

    def on_load(self, context: Any) -> None:
        """Called before a model is loaded, in the thread that loads it; ``context`` is ts.context.Context."""

    def on_loaded(self) -> None:
        """Called in the same thread when the handler's `initialize` is done."""

    def on_request_start(self) -> None:
        """Called with a batch in hand, before the handler sees it, in the thread that runs the model.

        The requests of an asynchronous handler overlap; every start has its end.
        """

    def on_compute(self) -> None:
        """Called in a thread that the handler started, before it computes a part of a request."""

    def on_request_end(self) -> None:
        """Called in the same thread when the answer is computed, whatever the handler did; it is sent after that."""


def install(hooks: Sequence[Hook]) -> None:
    """Patch TorchServe for the rest of this process: ``hooks`` are called in order, in reverse at a request's end.

    ``hooks`` may grow later. One that is added in the middle of a request hears of the next one first.

    Raises:
        ImportError, AttributeError: this TorchServe is built otherwise; nothing is patched then.
    """
    from ts import async_service
    from ts.handler_utils import micro_batching
    from ts.model_loader import TsModelLoader
    from ts.service import Service

    call = _caller()
    construct, predict, predict_later = Service.__init__, Service.predict, async_service.predict
    load, execute = TsModelLoader.load, micro_batching.execute_call

    @functools.wraps(construct)
    def construct_and_tell(self: Any, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **options)
        call(hooks, "on_load", self.context)

    @functools.wraps(load)
    def load_and_tell(*arguments: Any, **options: Any) -> Any:
        service = load(*arguments, **options)
        call(hooks, "on_loaded")
        return service

    @functools.wraps(predict)
    def predict_and_tell(self: Any, batch: Any) -> Any:
        present = tuple(hooks)
        call(present, "on_request_start")
        try:
            return predict(self, batch)
        finally:
            call(present[::-1], "on_request_end")

    @functools.wraps(execute)
    def execute_and_tell(incoming: Any, outgoing: Any, handle: Callable[[Any], Any], *others: Any) -> None:
        def tell_and_handle(data: Any) -> Any:
            call(hooks, "on_compute")
            return handle(data)

        execute(incoming, outgoing, tell_and_handle, *others)

    @functools.wraps(predict_later)
    async def predict_later_and_tell(self: Any, batch: Any) -> Any:
        present = tuple(hooks)
        call(present, "on_request_start")
        try:
            return await predict_later(self, batch)
        finally:
            call(present[::-1], "on_request_end")

    Service.__init__, Service.predict = construct_and_tell, predict_and_tell
    async_service.predict = predict_later_and_tell
    TsModelLoader.load = load_and_tell
    micro_batching.execute_call = execute_and_tell


def _caller() -> Callable[..., None]:
    said: set[str] = set()

    def call(hooks: Sequence[Hook], name: str, *arguments: Any) -> None:
        for hook in hooks:
            try:
                getattr(hook, name)(*arguments)
            except Exception as error:  # noqa: BLE001 - a request is answered whatever happens to the slice
                trouble = f"{name}: {type(error).__name__}: {error}"
                if trouble not in said:
                    said.add(trouble)
                    say(trouble, problem=True)

    return call
