"""Handler of a model that computes for long enough that more cores pay, and forks while it does, as some handlers do.

The body of a request is JSON, all of it optional: ``{"rounds": 3, "fork": 10}`` computes three times, some 50 ms each
on one core, and in between forks a child that lives for 10 seconds. The answer is the PID of the worker.
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
        rounds = int(asked.get("rounds", 1))
        with torch.inference_mode():
            for done in range(rounds):
                self.model(torch.ones(8, 32, 64, 64))
                if asked.get("fork") and done == rounds // 2:
                    fork(float(asked["fork"]))
        return os.getpid()


def fork(seconds: float) -> None:
    """Start a child that lives for ``seconds``, whatever becomes of this process."""
    if not os.fork():
        os.closerange(0, 4096)  # the socket to the frontend, which must see the worker die
        time.sleep(seconds)
        os._exit(0)
