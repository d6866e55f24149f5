"""Where TorchServe is patched: its own Service and AsyncService, and what the hooks see of loads and requests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.process

STAND_IN = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch"].Tensor = type("Tensor", (), {})
"""  # what TorchServe's own modules use of the library, which takes seconds to be imported

SETUP = """
import asyncio, json, threading
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service
from ts.utils.util import PredictionException
from ts_plugin.worker import hooks

seen = []

class Hook(hooks.Hook):
    def __init__(self, name, broken=False):
        self.name, self.broken = name, broken
    def on_load(self, context):
        self.note(f"load {context.model_name}")
    def on_request_start(self):
        self.note("start")
    def on_request_end(self):
        self.note("end")
    def note(self, what):
        elsewhere = threading.current_thread() is not threading.main_thread()
        seen.append(f"{self.name} {what}" + elsewhere * " elsewhere")
        if self.broken:
            raise RuntimeError("broken hook")

class Socket:
    def sendall(self, message):
        seen.append("streamed")

class Metrics:
    request_ids = None
    def add_time(self, *arguments):
        pass

def service(entry_point):
    made = Service("resnet", "/", None, entry_point, None, 2, metrics_cache=Metrics())
    made.set_cl_socket(Socket())
    return made

BATCH = [{"requestId": b"a", "parameters": []}, {"requestId": b"b", "parameters": []}]
"""


def run(code: str, *, torch: bool = False) -> Any:
    """Run ``code`` after SETUP in a process of its own, which TorchServe is patched in; return the JSON it prints."""
    program = ("" if torch else STAND_IN) + SETUP + code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_every_request_has_a_start_and_an_end_around_the_handler() -> None:
    seen, _ = run("""
from ts.handler_utils.utils import send_intermediate_predict_response
hooks.install([Hook("A"), Hook("B")])

def handler(data, context):
    seen.append(f"handler {len(data)}")
    send_intermediate_predict_response(["x"], {0: "a"}, "partial", 200, context)
    return ["1", "2"]

answer = service(handler).predict(BATCH)
seen.append("answer" if b"Prediction success" in bytes(answer) else repr(answer))
print(json.dumps(seen))
""")
    around = [
        "A load resnet",
        "B load resnet",
        "A start",
        "B start",
        "handler 2",
        "streamed",
        "B end",
        "A end",
        "answer",
    ]
    assert seen == around


def test_an_end_comes_whatever_the_handler_does() -> None:
    seen, _ = run("""
hooks.install([Hook("A")])
outcomes = []
errors = ValueError("no"), MemoryError(), PredictionException("no", 404), SystemExit(1), KeyboardInterrupt(), None
for error in errors:
    def handler(data, context):
        if error is None:
            return "no list"
        raise error
    made = service(handler)
    seen.clear()
    try:
        made.predict(BATCH)
    except BaseException as raised:
        seen.append(type(raised).__name__)
    outcomes.append(list(seen))
try:
    made.predict(None)
except ValueError:
    outcomes.append(seen[-2:])
print(json.dumps(outcomes))
""")
    answered = ["A start", "A end"]
    assert seen == [
        answered, answered, answered, [*answered, "SystemExit"], [*answered, "KeyboardInterrupt"], answered, answered
    ]  # fmt: skip


def test_requests_of_an_asynchronous_handler_overlap_and_end_in_the_thread_of_the_loop() -> None:
    seen, _ = run("""
from ts.async_service import AsyncService
hooks.install([Hook("A")])

async def handler(data, context):
    name = context.request_ids[0]
    seen.append(f"{name} in")
    await asyncio.sleep(0.2 if name == "a" else 0.05)
    if name == "b":
        raise ValueError("no")
    seen.append(f"{name} out")
    return ["1"]

made = AsyncService(service(handler)).service
seen.clear()

async def both():
    await asyncio.gather(*(made.predict(BATCH[i : i + 1]) for i in (0, 1)))

asyncio.run(both())
print(json.dumps(seen))
""")
    assert seen == ["A start", "a in", "A start", "b in", "A end", "a out", "A end"]


def test_a_hook_that_fails_is_said_once_and_costs_no_answer() -> None:
    seen, log = run("""
hooks.install([Hook("broken", broken=True), Hook("B")])
made = service(lambda data, context: ["1", "2"])
for _ in range(3):
    assert b"Prediction success" in bytes(made.predict(BATCH))
print(json.dumps(seen))
""")
    assert seen.count("B start") == seen.count("B end") == 3
    assert log.count("on_request_start: RuntimeError: broken hook") == 1


def test_threads_of_micro_batching_follow_the_slice() -> None:
    """Its inference thread computes on its own: what the thread of the request sets is not set for it."""
    code = """
import os, torch
from dataclasses import replace
from ts.handler_utils import micro_batching
from tests.leases import lease_of, slice_of
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import State
from ts_plugin.worker.requests import Requests

cpus = tuple(os.sched_getaffinity(0))
lease = lease_of(slice_of(cpus, threads=3))
requests = Requests(Ledger(), lease, print)
hooks.install([requests])

class Handler:
    def preprocess(self, data):
        return data
    def inference(self, data):
        return [torch.get_num_threads() for _ in data]
    def postprocess(self, data):
        return data

handler = micro_batching.MicroBatching(Handler(), 1)
found = []
for threads in (3, 1, 2):
    requests.adopt(replace(lease, slice=replace(lease.slice, threads=threads)), State())
    found.append(handler.handle([0, 0]))
handler.shutdown()
print(json.dumps(found))
"""
    threads, _ = run(code, torch=True)
    assert threads == [[3, 3], [1, 1], [2, 2]]
