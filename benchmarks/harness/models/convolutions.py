"""Handler of a model that computes, for half the time on twice the cores, however busy the machine is.

So a worker learns soon that more cores pay. The body of a request is JSON, all of it optional: ``{"rounds": 3, "fork":
10}`` computes for 3 x 50 ms divided by the number of threads, and half-way forks a child that lives for 10 seconds, as
some handlers do. The answer is the PID of the worker.
"""

import json
import os
import time
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler as Base


class ConvolutionsHandler(Base):  # type: ignore[misc]
    def handle(self, data: list[dict[str, Any]], context: Any) -> list[int]:
        return [self.compute(row) for row in data]

    def compute(self, row: dict[str, Any]) -> int:
        body = row.get("body") or row.get("data") or b"{}"
        asked = body if isinstance(body, dict) else json.loads(bytes(body) or b"{}")
        half = 0.025 * int(asked.get("rounds", 1)) / torch.get_num_threads()
        self.compute_for(half)
        if asked.get("fork"):
            fork(float(asked["fork"]))
        self.compute_for(half)
        return os.getpid()

    def compute_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        image = torch.ones(1, 32, 64, 64)
        with torch.inference_mode():
            while time.monotonic() < end:
                self.model(image)


def fork(seconds: float) -> None:
    """Start a child that lives for ``seconds``, whatever becomes of this process."""
    if not os.fork():
        os.closerange(0, 4096)  # the socket to the frontend, which must see the worker die
        time.sleep(seconds)
        os._exit(0)
