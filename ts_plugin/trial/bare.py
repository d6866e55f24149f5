"""The handler of an archive in bare processes, without HTTP or Java: what one batch costs on so many cores.

``python -P -m ts_plugin.trial.bare`` is one such process: it binds itself, loads the archive as a TorchServe worker
would, and then does what each line on its stdin says (JSON: ``{"seconds": 5, "batch": 1, "fewest": 1}``), answering
with one line each: ``{"took": [0.1, 0.1]}``, or ``{"stage": "handle", "reason": "..."}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import IO, Any, Self, cast

from ts_plugin.trial.archive import Archive
from ts_plugin.trial.load import CONTENT_TYPE
from ts_plugin.worker.start import OFF_VARIABLE

OPTIMIZE = "optimize_for_inference"  # what may be done to a model after it was loaded
BFLOAT16 = "bfloat16"


class BareError(RuntimeError):
    """A bare process failed. ``stage`` is "load" or "handle"; ``reason`` the handler's exception, in one line."""

    def __init__(self, stage: str, reason: str, log: str = "") -> None:
        super().__init__(f"{stage}: {reason}{f': {log}' if log else ''}")
        self.stage = stage
        self.reason = reason


def explained(archive: Archive, error: BareError) -> str:
    """Return what a failed bare process means for the user."""
    reason = error.reason
    lower = reason.lower()
    if any(word in lower for word in ("cuda", "nvidia", "gpu_id", "hip ")):
        return (
            f"{archive.path}: its handler needs a GPU ({reason}); cores are measured here, without a GPU: let the "
            "handler take device 'cpu' when system_properties has no gpu_id"
        )
    if error.stage == "load":
        missing = reason.startswith(("ModuleNotFoundError", "ImportError"))
        remedy = "install it here" if missing else "a TorchServe worker would fail with it too"
        return f"{archive.path}: its handler cannot be loaded: {reason}; {remedy}"
    return f"{archive.path}: its handler rejects the body: {reason}; give one that the model takes: --body FILE"


@dataclass(frozen=True, slots=True)
class Binding:
    """The CPUs that a process may use (None: all, unbound) and its intra-op threads."""

    cpus: tuple[int, ...] | None
    threads: int


@dataclass
class Bare:
    """One process per binding, from ``with`` to its end; every one has loaded the model when ``with`` begins.

    ``archive`` is a .mar file, or the directory that one was extracted into. ``environment`` is what the processes
    start with instead of this one's; ``change`` is OPTIMIZE or BFLOAT16.
    """

    archive: Path
    body: bytes
    bindings: Sequence[Binding]
    _: KW_ONLY
    content_type: str = CONTENT_TYPE
    environment: Mapping[str, str] | None = None
    change: str | None = None
    _processes: list[subprocess.Popen[str]] = field(default_factory=list, init=False)
    _scratch: tempfile.TemporaryDirectory[str] = field(init=False)

    def __post_init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="ts-cores-")

    def __enter__(self) -> Self:
        """Load the model in every process.

        Raises:
            BareError: it cannot be loaded.
        """
        try:
            scratch, model = Path(self._scratch.name), self.archive
            if not model.is_dir():
                model = scratch / "model"
                with zipfile.ZipFile(self.archive) as parts:
                    parts.extractall(model)
            body = scratch / "body"
            body.write_bytes(self.body)
            temporary = scratch / "tmp"  # torch leaves a directory there
            temporary.mkdir()
            environment = dict(os.environ if self.environment is None else self.environment)
            environment["TMPDIR"] = str(temporary)
            order = {"model": str(model.resolve()), "body": str(body), "type": self.content_type, "change": self.change}
            with self._errors.open("w") as errors:
                for binding in self.bindings:
                    bound = {**order, "cpus": binding.cpus, "threads": binding.threads}
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-m", "ts_plugin.trial.bare", json.dumps(bound)],
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        start_new_session=True,  # Ctrl-C is ours
                    )
                    self._processes.append(process)
            for process in self._processes:
                _took(self._answer(process, "load"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._scratch.cleanup()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def work(self, seconds: float, *, batch: int = 1, fewest: int = 1, processes: int | None = None) -> list[float]:
        """Let processes work at once for that long and return the seconds that each piece of work took.

        That is all that a worker does for a request, except reading and writing its socket.
        A piece of work is ``batch`` requests; every process does ``fewest`` pieces at least. ``processes``: only the
        first so many, by default all.

        Raises:
            BareError: a process failed.
        """
        order = json.dumps({"seconds": seconds, "batch": batch, "fewest": fewest})
        asked = self._processes[:processes]
        for process in asked:
            with contextlib.suppress(BrokenPipeError):  # it ended: reading says so
                print(order, file=process.stdin, flush=True)
        answers = [self._answer(process, "handle") for process in asked]
        return [took for answer in answers for took in _took(answer)]

    @property
    def _errors(self) -> Path:
        return Path(self._scratch.name) / "errors.log"

    def _answer(self, process: subprocess.Popen[str], stage: str) -> dict[str, Any]:
        line = cast(IO[str], process.stdout).readline()
        if not line:
            raise BareError(stage, "a bare process ended", self._errors.read_text(errors="replace")[-3000:])
        answer: dict[str, Any] = json.loads(line)
        return answer


def _took(answer: Mapping[str, Any]) -> list[float]:
    if "reason" in answer:
        raise BareError(answer["stage"], answer["reason"])
    took: list[float] = answer["took"]
    return took


class _Refused(RuntimeError):
    """The handler answered something else than 200 OK."""


def main() -> None:
    order = json.loads(sys.argv[1])
    if order["cpus"] is not None:
        os.sched_setaffinity(0, order["cpus"])  # before torch: its OpenMP threads inherit the mask
    answers = os.fdopen(os.dup(1), "w")  # what the handler prints goes to stderr
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        import torch

        torch.set_num_threads(order["threads"])
        handle = _load(Path(order["model"]), Path(order["body"]).read_bytes(), order["type"], order["change"])
        torch.set_num_threads(order["threads"])  # whatever the handler set
    except BaseException as error:
        answer(stage="load", reason=_one_line(error))
        raise
    answer(took=[])
    for line in sys.stdin:
        asked = json.loads(line)
        took: list[float] = []
        end = time.perf_counter() + asked["seconds"]
        try:
            while (begun := time.perf_counter()) < end or len(took) < asked["fewest"]:
                handle(asked["batch"])
                took.append(time.perf_counter() - begun)
        except _Refused as error:
            answer(stage="handle", reason=str(error))
        else:
            answer(took=took)


def _load(model: Path, body: bytes, content_type: str, change: str | None) -> Callable[[int], None]:
    """Load the handler as ts/model_service_worker.py does and return what handles a batch of so many requests.

    Source: ts/protocol/otf_message_handler.py decodes a body that is application/json.
    """
    import torch
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.model_loader import ModelLoaderFactory

    # A handler of ours would claim a slice, from the workers of live servers, and leave the cores that were given here.
    os.environ[OFF_VARIABLE] = "1"
    sys.path.insert(0, str(model))
    os.chdir(model)
    manifest = json.loads((model / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = manifest["modelName"]
    loader = ModelLoaderFactory.get_model_loader()
    envelope = manifest.get("envelope")
    service = loader.load(manifest["modelName"], str(model), manifest["handler"], None, 1, envelope, True, metrics)
    service.set_cl_socket(None)
    handler = getattr(service._entry_point, "__self__", None)
    if change == OPTIMIZE:
        handler.model = torch.jit.optimize_for_inference(handler.model)  # type: ignore[union-attr]
    entry, raised = service._entry_point, list[str]()

    def noted(*arguments: object) -> object:
        """TorchServe only logs what a handler raises."""
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == BFLOAT16):
                return entry(*arguments)
        except BaseException as error:
            raised.append(_one_line(error))
            raise

    service._entry_point = noted

    def request(number: int) -> dict[str, Any]:
        value: object = json.loads(body) if content_type == "application/json" else bytearray(body)
        name = f"bare-{number}".encode()
        return {"requestId": name, "parameters": [{"name": "body", "contentType": content_type, "value": value}]}

    def handle(batch: int) -> None:
        raised.clear()
        answer = bytes(service.predict([request(number) for number in range(batch)]))
        status: int = struct.unpack("!i", answer[:4])[0]
        if status != 200:
            length: int = struct.unpack("!i", answer[4:8])[0]
            told = answer[8 : 8 + length].decode(errors="replace")
            raise _Refused(raised[-1] if raised else f"{told} (status {status})")
        status = service.context.get_response_status(0)[0] or 200
        if status >= 300:
            raise _Refused(f"the handler answers with status {status}")

    return handle


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__


if __name__ == "__main__":
    main()
