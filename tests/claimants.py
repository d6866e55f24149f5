"""Processes that claim slices like workers, without TorchServe around them: see claimant.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import CHECKOUT
from benchmarks.harness.cpuset import Cpuset
from ts_plugin.machine import discovery, process

TOPOLOGY = discovery.read_topology()
ALLOWED = frozenset(os.sched_getaffinity(0))
CORES = len(TOPOLOGY.cores_of(ALLOWED))


class Claimant:
    """A process that claimed a slice like a worker; see claimant.py."""

    def __init__(self, state: Path, cpuset: Cpuset | None = None, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("claimant.py")), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TS_CORES_STATE_DIR": str(state), "PYTHONPATH": str(CHECKOUT)},
            preexec_fn=None if cpuset is None else cpuset.enter,
        )
        self.pid = self.process.pid
        self.log: list[str] = []

    def facts(self) -> dict[str, Any]:
        """Return the next line of facts; lines of the log in between are passed over."""
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("{"):
            assert line, "the claimant ended"
            self.log.append(line)
        facts: dict[str, Any] = json.loads(line)
        return facts

    def follow(self, order: str = "") -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return self.facts()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wakes(self) -> int:
        """Return how often its threads have gone to sleep and woken: its follower does at each of its looks."""
        found = 0
        for tid in process.threads(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{self.pid}/task/{tid}/status").read_text()
                found += int(status.partition("nonvoluntary_ctxt_switches")[0].rpartition("\t")[2])
        return found

    def masks(self) -> set[frozenset[int]]:
        """Return the distinct masks of all threads, as the kernel has them."""
        found = set()
        for tid in process.threads(self.pid):
            try:
                found.add(frozenset(os.sched_getaffinity(tid)))
            except ProcessLookupError:
                continue
        return found
