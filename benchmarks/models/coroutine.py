"""Mix-in that makes a handler a coroutine, as TorchServe's asyncCommunication needs it."""

from typing import Any


class CoroutineMixin:
    async def handle(self, data: Any, context: Any) -> Any:
        return super().handle(data, context)  # type: ignore[misc]
