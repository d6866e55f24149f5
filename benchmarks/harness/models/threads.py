"""Class in front of any handler: the tutorial's first remedy, ``torch.set_num_threads`` and nothing else."""

import os
from typing import Any

import torch


class ThreadsMixin:
    def initialize(self, context: Any) -> None:
        torch.set_num_threads(int(os.environ["TS_BENCHMARK_THREADS"]))
        super().initialize(context)  # type: ignore[misc]
