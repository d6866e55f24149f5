"""A process with torch that lends and borrows by the words of a state directory, without ledger and TorchServe.

It reads orders, JSON lists, and answers each with a JSON object. ``Borrower`` starts one and talks to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import CHECKOUT
from ts_plugin.machine import process

FIELDS = ("began", "ended", "handed_back", "lost", "late", "stale", "regions", "forced", "why", "borrowed", "waited")


class Borrower:
    """The process, seen from the test."""

    def __init__(self, state: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.borrower", str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        self.pid = self.process.pid
        self.slot = -1  # not known yet

    def wait(self) -> Borrower:
        """Wait until it has loaded torch and has a slot."""
        self.slot = self.answer()["slot"]
        return self

    def send(self, *order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(order)}\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the borrower ended"
        return json.loads(line)

    def ask(self, *order: Any) -> Any:
        self.send(*order)
        return self.answer()

    def masks(self) -> set[frozenset[int]]:
        """Return the distinct masks of all threads but the one that runs the model."""
        found = set()
        for tid in set(process.threads(self.pid)) - {self.pid}:
            with contextlib.suppress(ProcessLookupError):
                found.add(frozenset(os.sched_getaffinity(tid)))
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def main(state: str) -> None:
    from ts_plugin.ledger.file import Ledger
    from ts_plugin.lending import library
    from ts_plugin.lending.words import Words
    from ts_plugin.worker import openmp

    openmp.load()
    import torch

    identity = process.identify(os.getpid())
    assert identity is not None
    words = Words(Ledger(state))
    worker = library.Worker(words.memory, words.locks, words.slot, pid=identity.pid, start_time=identity.start_time)
    torch.set_num_threads(1)
    assert library.what_keeps_from_borrowing() == ""
    ones = torch.ones(1 << 18)

    def compute(times: int) -> dict[str, Any]:
        for _ in range(times):
            ones.add_(1)
        return {"threads": torch.get_num_threads(), "mask": sorted(os.sched_getaffinity(0))}

    def in_child() -> dict[str, Any]:
        """Compute in a forked child, which must neither reach borrowed CPUs nor touch the words."""
        reader, writer = os.pipe()
        if not (child := os.fork()):
            mask = sorted(os.sched_getaffinity(0))
            ones.add_(1)
            os.write(writer, json.dumps({"threads": torch.get_num_threads(), "mask": mask}).encode())
            os._exit(0)
        found: dict[str, Any] = json.loads(os.read(reader, 1 << 16))
        os.waitpid(child, 0)
        return found

    print(json.dumps({"slot": words.slot}), flush=True)
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        answer: dict[str, Any] = {}
        if order == "plan":
            torch.set_num_threads(arguments[1])
            if arguments[2] is not None:
                os.sched_setaffinity(0, arguments[2])
            worker.plan(*arguments)
        elif order == "begin":
            answer = {"threads": worker.begin(*arguments), "forced": worker.forced()}
        elif order == "compute":
            answer = compute(*arguments)
        elif order == "compute until":
            end = time.monotonic() + 60
            while torch.get_num_threads() > arguments[0] and time.monotonic() < end:
                compute(1)
            answer = compute(0)
        elif order == "long region":
            big = torch.ones(arguments[0], arguments[0])
            answer = {"sum": float((big @ big)[0, 0])}
        elif order == "fork":
            answer = in_child()
        elif order == "subprocess":
            code = "import os; print(sorted(os.sched_getaffinity(0)))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            answer = {"mask": json.loads(done.stdout)}
        elif order == "typical":
            worker.typical(*arguments)
        elif order == "reset":
            worker.end()
            worker.plan(0, 1, None, [])
            worker.typical(0.0)
            worker.begin(1, 0.0)
        elif order == "end":
            ended = worker.end()
            answer = {name: getattr(ended, name) for name in FIELDS}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
