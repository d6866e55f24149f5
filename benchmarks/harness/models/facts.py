"""Handler that answers with facts about its own process, for tests that must look inside a worker.

The body of a request is JSON, all of it optional: ``{"work": 256, "rounds": 1, "sleep": 0.5, "spin": 0.5}`` multiplies
two matrices of that order so often (so that the OpenMP threads exist), then sleeps and computes for that many seconds.
``{"child": 600}`` starts a child process that sleeps for that long.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler as Base


class FactsHandler(Base):  # type: ignore[misc]
    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.threads_at_start = torch.get_num_threads()

    def _load_torchscript_model(self, model_pt_path: str) -> Any:
        self.threads_at_load = torch.get_num_threads()
        return super()._load_torchscript_model(model_pt_path)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        return [self.facts(row, context) for row in data]

    def facts(self, row: dict[str, Any], context: Any) -> dict[str, Any]:
        body = row.get("body") or row.get("data") or b"{}"
        asked = body if isinstance(body, dict) else json.loads(bytes(body) or b"{}")
        order = int(asked.get("work", 256))
        for _ in range(int(asked.get("rounds", 1))):
            torch.mm(torch.ones(order, order), torch.ones(order, order)).relu_()
        time.sleep(float(asked.get("sleep", 0)))
        end = time.monotonic() + float(asked.get("spin", 0))
        while time.monotonic() < end:
            torch.mm(torch.ones(order, order), torch.ones(order, order))
        child = subprocess.Popen(["sleep", str(asked["child"])]).pid if asked.get("child") else None
        return {
            "pid": os.getpid(),
            "asked_by": asked.get("pid"),  # the step before in a workflow, whose answer is our request
            "child": child,
            "ppid": os.getppid(),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "threads_at_load": self.threads_at_load,
            "threads_at_start": self.threads_at_start,
            "affinity": sorted(os.sched_getaffinity(0)),
            "masks": masks(),
            "executable": sys.executable,
            "argv": sys.argv,
            "cwd": str(Path.cwd()),
            "model_dir": context.system_properties.get("model_dir"),
            "environment": {
                name: value
                for name, value in os.environ.items()
                if name.startswith(("OMP_", "KMP_", "GOMP_", "MKL_", "TORCH", "TS_", "LD_PRELOAD", "PYTHON"))
            },
        }


def masks() -> dict[str, str]:
    """Return thread id -> the kernel's list of CPUs that the thread may use; a thread that just ended is left out."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            for line in (task / "status").read_text().splitlines():
                if line.startswith("Cpus_allowed_list:"):
                    found[task.name] = line.split(":", 1)[1].strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
