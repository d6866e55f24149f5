"""Numbers of threads that a handler or a library chooses by itself: torch's is overruled, ONNX Runtime's is bounded."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest

from ts_plugin.worker.onnx_threads import OnnxThreads
from ts_plugin.worker.overruled import Overruled


class Torch:
    """Stands for the library where only its number matters."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_num_threads(self) -> int:
        return self.number


@pytest.mark.parametrize("where", ["nowhere", "import", "initialize", "request"])
def test_a_handlers_own_number_of_threads_is_said_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it may call torch.set_num_threads: its module, `initialize`, or each request; the slice has 2 threads."""
    torch, said = Torch(2), list[str]()
    monkeypatch.setitem(sys.modules, "torch", torch)
    overruled = Overruled(said.append)
    overruled.remember()

    def step(name: str, *arguments: Any) -> None:
        getattr(overruled.before, name)(*arguments)
        torch.number = 2  # as ts_plugin.worker.elastic does
        getattr(overruled.behind, name)(*arguments)

    torch.number = 1 if where == "import" else 2
    step("on_load", None)
    torch.number = 1 if where == "initialize" else 2
    for _ in range(3):
        step("on_request_start")
        torch.number = 1 if where == "request" else 2
    assert len(said) == (where != "nowhere")
    assert all(text.startswith("torch.set_num_threads(1)") and "the slice's number is 2" in text for text in said)


def test_another_slice_is_no_handlers_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch, said = Torch(2), list[str]()
    monkeypatch.setitem(sys.modules, "torch", torch)
    overruled = Overruled(said.append)
    for number in (2, 4, 1):
        overruled.before.on_request_start()
        torch.number = number
        overruled.behind.on_request_start()
    assert said == []


def test_the_real_torch_is_read() -> None:
    program = """
import torch
from ts_plugin.worker.overruled import Overruled
torch.set_num_threads(2)
overruled = Overruled(print)
overruled.behind.on_load(None)
torch.set_num_threads(1)
overruled.before.on_request_start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torch.set_num_threads(1), called by the handler or a library, is overruled")


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


def test_without_onnx_nothing_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    OnnxThreads(lambda: 3, pytest.fail).patch()
    assert "onnxruntime" not in sys.modules
