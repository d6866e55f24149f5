"""Numbers of threads that a handler or a library chooses by itself: torch's is overruled, ONNX Runtime's is bounded."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.leases import lease_of, slice_of
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import State
from ts_plugin.worker.onnx_threads import OnnxThreads
from ts_plugin.worker.requests import Requests


class Torch(types.ModuleType):
    """A stand-in with what is used of the library: the number of threads."""

    threads = 8

    def get_num_threads(self) -> int:
        return self.threads

    def set_num_threads(self, threads: int) -> None:
        self.threads = threads


@pytest.mark.parametrize("where", ["nowhere", "import", "initialize", "request"])
def test_a_handlers_own_number_of_threads_is_told(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it may call torch.set_num_threads: its module, `initialize`, or each request; the slice has 2 threads."""
    torch = Torch("torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    said = list[str]()
    lease = lease_of(slice_of(os.sched_getaffinity(0), threads=2))
    requests = Requests(Ledger(str(tmp_path / "state")), lease, said.append)

    def reach(place: str, threads: int = 2) -> None:
        torch.set_num_threads(1 if place == where else threads)

    requests.hold()
    reach("import")
    requests.hold()
    reach("initialize")
    requests.on_loaded()
    now = 2
    for threads in (2, 2, 3, 3):
        if threads != now:
            requests.adopt(replace(lease, slice=replace(lease.slice, threads=threads)), State())
            now = threads
        requests.on_request_start()
        assert torch.get_num_threads() == threads
        reach("request", threads)
        requests.on_request_end()
    assert bool(said) == (where != "nowhere")
    assert all(text.startswith("torch.set_num_threads(1)") and "the slice's number is" in text for text in said)


class SessionOptions:
    intra_op_num_threads = 0


class InferenceSession:
    """Takes what onnxruntime.InferenceSession takes, and keeps the number of threads."""

    def __init__(self, path_or_bytes: str, sess_options: Any = None, providers: Any = None, **kwargs: Any) -> None:
        self.kept = (sess_options.intra_op_num_threads, providers)


def options(number: int) -> SessionOptions:
    made = SessionOptions()
    made.intra_op_num_threads = number
    return made


def test_onnx_sessions_get_the_slices_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in with the library's two names, since no test depends on it."""
    session = type("InferenceSession", (InferenceSession,), {})
    library = types.SimpleNamespace(SessionOptions=SessionOptions, InferenceSession=session)
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    said, threads = list[str](), [3]
    hook = OnnxThreads(lambda: threads[0], said.append)
    hook.patch()
    hook.patch()
    assert session("default").kept == (3, None)
    assert session("all CPUs", sess_options=options(64), providers=["CPU"]).kept == (3, ["CPU"])
    assert session("fewer", options(2), ["CPU"]).kept == (2, ["CPU"])
    threads[0] = 1
    assert session("later", options(2)).kept == (1, None)
    assert [text.partition(", and")[0] for text in said] == [
        "a session of ONNX Runtime gets 3 threads instead of one per core of the machine",
        "a session of ONNX Runtime gets 3 threads instead of 64",
        "a session of ONNX Runtime gets 1 thread instead of 2",
    ]


@pytest.mark.process
@pytest.mark.parametrize("asked", ["", "from importlib.util import find_spec; find_spec('onnxruntime')"])
def test_onnx_is_patched_whenever_it_is_imported(asked: str, tmp_path: Path) -> None:
    """A handler may import it in `initialize`; a library that only asks whether it is there changes nothing."""
    classes = "".join(inspect.getsource(one) for one in (SessionOptions, InferenceSession))
    (tmp_path / "onnxruntime.py").write_text(f"from typing import Any\n{classes}")
    lines = [
        "import sys",
        "from ts_plugin.worker.onnx_threads import OnnxThreads",
        "before = list(sys.meta_path)",
        "OnnxThreads(lambda: 3, print).patch()",
        asked,
        "import onnxruntime",
        "print(onnxruntime.InferenceSession('x').kept, sys.meta_path == before)",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{tmp_path}"}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[0].startswith("a session of ONNX Runtime gets 3 threads")
    assert done.stdout.splitlines()[1:] == ["(3, None) True"]


@pytest.mark.process
def test_without_onnx_the_import_fails_as_ever() -> None:
    lines = ["from ts_plugin.worker.onnx_threads import OnnxThreads", "OnnxThreads(lambda: 3, print).patch()"]
    lines += ["import sys; sys.path.clear(); import onnxruntime"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: No module named 'onnxruntime'" in done.stderr
