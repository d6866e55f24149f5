"""The handler of an archive in bare processes, without HTTP or Java: the ceiling, and the single-process exercises.

``python -m benchmarks.measurement.bare`` is one such process: it binds itself, loads the archive as a TorchServe worker
would, and then does what each line on its stdin says (JSON: ``{"work": "handle", "seconds": 5}``), answering with one
line each.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

from benchmarks.harness import CHECKOUT
from ts_plugin.machine.topology import Core

__all__ = ["Bare", "BareError", "Binding", "divide"]


class BareError(RuntimeError):
    """A bare process ended by itself; the message has what it wrote."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The CPUs that a process may use (None: all, unbound) and its intra-op threads."""

    cpus: tuple[int, ...] | None
    threads: int


def divide(cores: Sequence[Core], workers: int) -> list[Binding]:
    """Return what a careful person would write after ``taskset -c``: neighbouring whole cores, one CPU of each.

    Independent of the product's planner on purpose: the ceiling must not inherit its mistakes. More workers than cores
    share cores, one thread each.
    """
    ordered = sorted(cores, key=lambda core: (core.kind, core.package, core.node, core.l3, core.number))
    if workers >= len(ordered):
        return [Binding((ordered[worker % len(ordered)].number,), 1) for worker in range(workers)]
    bounds = [worker * len(ordered) // workers for worker in range(workers + 1)]
    slices = [ordered[low:high] for low, high in pairwise(bounds)]
    return [Binding(tuple(core.number for core in part), len(part)) for part in slices]


class Bare:
    """One process per binding, from ``with`` to its end; every one has loaded the model when ``with`` begins."""

    def __init__(self, archive: Path, body: bytes, bindings: Sequence[Binding]) -> None:
        self._archive = archive
        self._body = body
        self._bindings = bindings
        self._processes: list[subprocess.Popen[str]] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="ts-cores-")
        self._errors = Path(self._scratch.name) / "errors.log"
        self.ready_seconds = 0.0

    def __enter__(self) -> Self:
        try:
            begun = time.monotonic()
            model = Path(self._scratch.name) / "model"
            with zipfile.ZipFile(self._archive) as parts:
                parts.extractall(model)
            body = Path(self._scratch.name) / "body"
            body.write_bytes(self._body)
            with self._errors.open("w") as errors:
                for binding in self._bindings:
                    order = {"model": str(model), "body": str(body), "cpus": binding.cpus, "threads": binding.threads}
                    process = subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.measurement.bare", json.dumps(order)],
                        cwd=CHECKOUT,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        start_new_session=True,  # Ctrl-C is ours
                    )
                    self._processes.append(process)
            for process in self._processes:
                self._read(process)
            self.ready_seconds = time.monotonic() - begun
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._scratch.cleanup()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def work(self, seconds: float, *, what: str = "handle") -> list[float]:
        """Let all processes work at once for that long and return the seconds that each piece of work took.

        ``what`` is "handle" (all that a worker does for a request except reading and writing its socket) or "forward"
        (its ``inference`` on input that was preprocessed once; no seconds at all for a handler without that method).

        Raises:
            BareError: a process failed.
        """
        for process in self._processes:
            print(json.dumps({"work": what, "seconds": seconds}), file=process.stdin, flush=True)
        return [took for process in self._processes for took in self._read(process)]

    def _read(self, process: subprocess.Popen[str]) -> list[float]:
        line = cast(IO[str], process.stdout).readline()
        if not line:
            raise BareError(f"a bare process ended: {self._errors.read_text()[-3000:]}")
        answer: list[float] = json.loads(line)
        return answer


def main() -> None:
    order = json.loads(sys.argv[1])
    if order["cpus"] is not None:
        os.sched_setaffinity(0, order["cpus"])  # before torch: its OpenMP threads inherit the mask
    answers = os.fdopen(os.dup(1), "w")  # what the handler prints goes to stderr
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(order["threads"])
    work = _load(Path(order["model"]), Path(order["body"]).read_bytes())
    print(json.dumps([]), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        took: list[float] = []
        end = time.perf_counter() + asked["seconds"]
        while asked["work"] in work and (begun := time.perf_counter()) < end:
            work[asked["work"]]()
            took.append(time.perf_counter() - begun)
        print(json.dumps(took), file=answers, flush=True)


def _load(model: Path, body: bytes) -> dict[str, Callable[[], object]]:
    """Load the handler as ts/model_service_worker.py does and return the kinds of work that it can do."""
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.model_loader import ModelLoaderFactory

    sys.path.insert(0, str(model))
    os.chdir(model)
    manifest = json.loads((model / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = manifest["modelName"]
    loader = ModelLoaderFactory.get_model_loader()
    service = loader.load(manifest["modelName"], str(model), manifest["handler"], None, 1, None, True, metrics)
    service.set_cl_socket(None)
    message = [{"requestId": b"bare", "parameters": [{"name": "body", "contentType": "", "value": bytearray(body)}]}]

    def handle() -> None:
        status: int = struct.unpack("!i", service.predict(message)[:4])[0]
        if status != 200:
            raise BareError(f"the handler answered {status}")

    work: dict[str, Callable[[], object]] = {"handle": handle}
    handler = getattr(service._entry_point, "__self__", None)
    if handler is not None and hasattr(handler, "preprocess") and hasattr(handler, "inference"):
        handle()  # BaseHandler learns its context from the first request
        prepared = handler.preprocess([{"body": bytearray(body)}])
        work["forward"] = lambda: handler.inference(prepared)
    return work


if __name__ == "__main__":
    main()
