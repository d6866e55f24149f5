"""Handler of a model with long requests: the forward pass of a real one, as often as fills two seconds of one core.

How often is measured when the model is loaded, in CPU time on one thread, so that a busy machine changes nothing. The
body of a request does not matter.
"""

import time
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler as Base

CORE_SECONDS = 2.0  # of one request


class SlowHandler(Base):  # type: ignore[misc]
    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.picture = torch.rand(1, 3, 224, 224)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.passes = max(round(CORE_SECONDS / self._seconds_of_a_pass()), 1)
        finally:
            torch.set_num_threads(threads)

    def _seconds_of_a_pass(self) -> float:
        """Return the mean of five, after three in which TorchScript optimises."""
        with torch.inference_mode():
            for _ in range(3):
                self.model(self.picture)
            begun = time.thread_time()
            for _ in range(5):
                self.model(self.picture)
            return (time.thread_time() - begun) / 5

    def preprocess(self, data: list[dict[str, Any]]) -> int:
        return len(data)

    def inference(self, data: int, *args: Any, **kwargs: Any) -> list[int]:
        with torch.inference_mode():
            for _ in range(self.passes):
                self.model(self.picture)
        return [self.passes] * data

    def postprocess(self, data: list[int]) -> list[int]:
        return data
