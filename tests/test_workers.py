"""All kinds of TorchServe workers get their slice: however they were started, and whoever asks them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest

from benchmarks.harness import archives
from benchmarks.harness.archives import Handler
from benchmarks.harness.server import TorchServe
from tests.eventually import eventually
from ts_plugin.ledger.file import Ledger
from ts_plugin.machine import discovery, process
from ts_plugin.machine.cpulist import parse_cpulist
from ts_plugin.trial.client import RequestError
from ts_plugin.trial.properties import Property

FRONTEND = Path(__file__).resolve().parent.parent / "ts_plugin" / "frontend"
PINNED: dict[str, str | int | float | bool | Path | None] = {"plugins_path": FRONTEND, "cpu_launcher_enable": True}
NEVER = {**PINNED, "cpu_launcher_args": "--lend never"}
CORES = len(discovery.read_topology().cores_of(os.sched_getaffinity(0)))

WORKFLOW = """
models:
  min-workers: 1
  max-workers: 1
  batch-size: 1
  max-batch-delay: 50
  retry-attempts: 1
  timeout-ms: 60000
  first:
    url: plain.mar
  second:
    url: ours.mar
dag:
  first: [second]
"""

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(CORES < 2, reason="needs two cores to tell one slice from another"),
]


def ask(server: TorchServe, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(server.predict(name, json.dumps(body or {}).encode()))
    return answer


def leases(server: TorchServe) -> dict[int, tuple[int, ...]]:
    return {lease.pid: lease.slice.cpus for lease in Ledger(str(server.state_directory)).read().leases}


def assert_bound(server: TorchServe, answer: dict[str, Any]) -> None:
    """Check what a worker says of itself against its lease and against the kernel."""
    held = {lease.pid: lease.slice for lease in Ledger(str(server.state_directory)).read().leases}
    own = held[answer["pid"]]
    assert answer["affinity"] == sorted(own.cpus)
    masks = {frozenset(parse_cpulist(mask)) for mask in answer["masks"].values()}
    wider = masks - {frozenset(own.cpus)}
    assert all(mask <= own.reach for mask in wider), "only what it may borrow, and only threads of the team"
    assert own.threads <= answer["threads"] <= max(own.threads, len(own.reach))
    cpus = [cpu for piece in held.values() for cpu in piece.cpus]
    assert len(cpus) == len(set(cpus)), "disjoint"


TEN_SECONDS = dict.fromkeys(range(1, CORES), 10.0)  # as a profile: requests borrow, however busy this machine is


def profiled() -> Path:
    return archives.facts("profiled", config=f"cpu: {{profile: {TEN_SECONDS}}}\n")


def wide_requests(server: TorchServe, most: int) -> Iterator[bool]:
    """Yield of each request, one at a time, whether it computed on more than its worker's slice."""
    own = leases(server)
    for _ in range(most):
        answer = ask(server, "profiled", {"work": 384, "rounds": 30})
        assert_bound(server, answer)
        yield answer["threads"] > len(own[answer["pid"]])


def test_a_lone_request_borrows_the_cores_of_idle_workers(pinned: TorchServe) -> None:
    pinned.register(profiled(), workers=2)
    own = leases(pinned)
    assert any(wide_requests(pinned, 300))
    assert eventually(lambda: all(idle(pid, cpus) for pid, cpus in own.items())), "and given back"
    assert eventually(lambda: any((piece["lending"] or {}).get("wide_requests") for piece in pinned.cores()["slices"]))
    assert all(Path(f"/proc/{pid}/maps").read_text().count("/regions-") for pid in own)


def idle(pid: int, cpus: tuple[int, ...]) -> bool:
    return all(os.sched_getaffinity(tid) == set(cpus) for tid in process.threads(pid))


def test_sizes_from_the_archive_grpc_batches_and_versions() -> None:
    """Fixed cores, gRPC, batching, two versions of a model; without lending, which gives a request more threads."""
    cpu = f"cpu: {{cores: 1, profile: {TEN_SECONDS}}}"
    fixed = archives.facts("fixed", config=f"{cpu}\nbatchSize: 2\nmaxBatchDelay: 200\n")
    plain = archives.facts("plain")
    later = archives.facts("later", version="2.0", handler=Handler.OURS)
    with TorchServe(fixed, workers=1, properties=NEVER) as server:
        assert ask(server, "fixed")["threads"] == 1
        assert_bound(server, ask(server, "fixed"))
        server.register(plain)
        assert ask(server, "fixed")["threads"] == 1
        assert ask(server, "plain")["threads"] == CORES - 1
        assert_bound(server, ask(server, "plain"))
        assert {ask(server, "fixed", {"work": 384, "rounds": 30})["threads"] for _ in range(10)} == {1}
        assert [piece["lending"] for piece in server.cores()["slices"]] == [None, None]
        assert not list(server.state_directory.glob("lending-*"))
        over_grpc = json.loads(grpc_predict(server, "plain"))
        assert_bound(server, over_grpc)
        server.unregister("plain")
        server.register(later, name="fixed")  # version 2.0 beside version 1.0
        answers = [json.loads(server.predict(f"fixed/{version}", b"{}")) for version in ("1.0", "2.0")]
        assert [answer["threads"] for answer in answers] == [1, CORES - 1]
        for answer in answers:
            assert_bound(server, answer)
        versions = {(entry["model"], entry["version"]) for entry in server.cores()["slices"]}
        assert versions == {("fixed", "1.0"), ("fixed", "2.0")}


def grpc_predict(server: TorchServe, model: str) -> bytes:
    """Call InferenceAPIsService.Predictions; the two messages are encoded by hand, since the wheel has no stubs."""

    def field(number: int, value: bytes) -> bytes:
        assert len(value) < 128
        return bytes([number << 3 | 2, len(value)]) + value

    request = field(1, model.encode()) + field(3, field(1, b"data") + field(2, b"{}"))
    with grpc.insecure_channel(f"127.0.0.1:{server.properties['grpc_inference_port']}") as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
        )
        answer: bytes = call(request, timeout=60)
    assert answer[0] == 1 << 3 | 2
    return answer[answer.index(b"{") :]


def test_asynchronous_communication(pinned: TorchServe) -> None:
    archive = archives.facts("asynchronous", handler=Handler.ASYNC, config="asyncCommunication: true\n")
    pinned.register(archive)
    answer = ask(pinned, "asynchronous")
    assert_bound(pinned, answer)
    assert answer["threads"] == CORES
    pinned.register(archives.facts("plain"))
    assert ask(pinned, "asynchronous")["threads"] == CORES - CORES // 2, "follows at its next request"


def test_a_server_without_the_plugin_the_handler_claims() -> None:
    with TorchServe(archives.facts("ours", handler=Handler.OURS), workers=2) as server:
        answers = {answer["pid"]: answer for answer in (ask(server, "ours", {"sleep": 0.05}) for _ in range(12))}
        assert set(answers) == set(server.workers()) == set(leases(server))
        for answer in answers.values():
            assert_bound(server, answer)
        loaded = [answer["threads_at_load"] for answer in answers.values()]
        assert min(loaded) == CORES // 2, "the later one had its threads before its model was loaded"


def test_a_mask_that_openmp_collapsed_is_repaired_by_the_handler() -> None:
    archive = archives.facts("ours", handler=Handler.OURS)
    with TorchServe(archive, workers=1, environment={"OMP_PROC_BIND": "true"}) as server:
        answer = ask(server, "ours", {"work": 512})
        assert answer["threads"] == CORES
        assert len(answer["affinity"]) == CORES, "the main thread may run on the whole slice again"
        assert "OMP_PROC_BIND is set" in server.log()


def test_a_model_with_its_own_virtual_environment() -> None:
    """useVenv starts the model's own interpreter, past the launcher: the handler claims."""
    archive = archives.facts("isolated", handler=Handler.OURS, config="useVenv: true\n")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    checkout = str(Path(__file__).resolve().parent.parent)
    environment = {"PYTHONPATH": os.pathsep.join([*packages, checkout])}  # the inner environment starts empty
    with TorchServe(archive, workers=1, properties=PINNED, environment=environment) as server:
        answer = ask(server, "isolated")
        assert "venv" in answer["executable"]
        assert answer["executable"] != sys.executable
        assert_bound(server, answer)


def test_every_rank_of_torchrun_gets_its_own_slice(pinned: TorchServe) -> None:
    config = "parallelType: tp\nparallelLevel: 2\ndeviceType: cpu\ntorchrun:\n  nproc-per-node: 2\n"
    archive = archives.facts("ranks", handler=Handler.OURS, config=config)
    pinned.register(archive)
    # TorchServe calls it READY when rank 0 is: rank 1 may still be joining.
    assert eventually(lambda: len(leases(pinned)) == 2 and ask(pinned, "ranks")["threads"] == CORES // 2)
    assert_bound(pinned, ask(pinned, "ranks"))
    held = leases(pinned)
    assert len(held) == 2
    assert all(len(cpus) == CORES // 2 for cpus in held.values())


TRACE = """<?xml version="1.0"?>
<Configuration>
  <Appenders>
    <Console name="console"><PatternLayout pattern="%d %p %c %m%n"/></Console>
    <File name="pipe" fileName="{pipe}"><PatternLayout pattern="%-{width}m%n"/></File>
  </Appenders>
  <Loggers>
    <Root level="info"><AppenderRef ref="console"/></Root>
    <Logger name="org.pytorch.serve.wlm.Model" level="trace" additivity="false"><AppenderRef ref="pipe"/></Logger>
  </Loggers>
</Configuration>
"""


class SlowLog:
    """TorchServe's trace of "get first job", between a request's leaving the queue and its entry in the worker's batch.

    Written to a pipe that nobody reads while ``held``, so that a worker can be kept at that very point.
    """

    def __init__(self, directory: Path) -> None:
        pipe = directory / "pipe"
        os.mkfifo(pipe)
        self._file = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        room = fcntl.fcntl(self._file, fcntl.F_SETPIPE_SZ, 4096)
        self.config = directory / "log4j2.xml"
        self.config.write_text(TRACE.format(pipe=pipe, width=4 * room))  # one line alone fills the pipe
        self.held = False
        self._end = threading.Event()
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held = False
        self._end.set()
        self._reader.join()
        os.close(self._file)

    def full(self) -> bool:
        return bool(select.select([self._file], [], [], 0)[0])

    def _read(self) -> None:
        while not self._end.wait(0.005):
            with contextlib.suppress(BlockingIOError):
                while not self.held:
                    os.read(self._file, 65536)


def test_a_worker_that_is_scaled_away_while_it_takes_a_request_answers_it(tmp_path: Path) -> None:
    with (
        SlowLog(tmp_path) as log,
        TorchServe(properties={**PINNED, "vmargs": f"-Dlog4j2.configurationFile={log.config}"}) as server,
    ):
        for batch in (1, 2):
            scale_away_what_takes_a_request(server, log, batch)


def scale_away_what_takes_a_request(server: TorchServe, log: SlowLog, batch: int) -> None:
    name = server.register(archives.facts(f"of{batch}", config=f"batchSize: {batch}\nmaxBatchDelay: 200\n"), workers=2)
    stays, goes = (worker["pid"] for worker in server.describe(name)["workers"])
    with ThreadPoolExecutor() as client:
        # A worker polls while the other waits for its turn, so they take requests in turns.
        assert eventually(lambda: ask(server, name)["pid"] == stays)
        log.held = True
        answer = client.submit(ask, server, name)
        assert eventually(log.full), "the request has left the queue"
        server.scale(name, 1, synchronous=False, wait=False)
        assert eventually(lambda: len(server.describe(name)["workers"]) == 1)
        assert not answer.done()
        log.held = False
        assert answer.result(timeout=60)["pid"] == goes
        assert eventually(lambda: list(server.workers()) == [stays])
    server.unregister(name)


GPU = {"CUDA_VISIBLE_DEVICES": "0"}  # enough for TorchServe's frontend to number its workers' devices


def test_scaling_down_is_done_when_the_worker_has_left_its_gpu() -> None:
    """The device's memory can be used again when the API says 200, as after TorchServe's own scaling."""
    server = TorchServe(archives.facts(), workers=2, properties=PINNED, environment=GPU)
    with server, ThreadPoolExecutor() as clients:
        answers = [clients.submit(ask, server, "facts", {"sleep": 2}) for _ in range(2)]
        assert eventually(lambda: server.log().count("Flushing req.cmd PREDICT") == 2), "each computes one"
        server.scale("facts", 1, wait=False)
        assert len(server.workers()) == 1
        assert len({answer.result()["pid"] for answer in answers}) == 2


def test_a_hung_worker_that_is_scaled_away_ends_with_its_response_timeout() -> None:
    archive = archives.facts("hung", config="responseTimeout: 3\n")
    properties: dict[str, Property | None] = {**PINNED, "unregister_model_timeout": 1}
    server = TorchServe(archive, workers=2, properties=properties, environment=GPU)
    with server, ThreadPoolExecutor() as clients:
        answers = [clients.submit(ask, server, "hung", {"sleep": 600}) for _ in range(2)]
        assert eventually(lambda: server.log().count("Flushing req.cmd PREDICT") == 2), "each computes one"
        with pytest.raises(RequestError) as refusal:
            server.scale("hung", 1, wait=False)
        assert refusal.value.status == 408
        goes = set(server.workers())
        assert eventually(lambda: goes.isdisjoint(server.workers())), "the one that stays is restarted by TorchServe"
        assert all(isinstance(answer.exception(), RequestError) for answer in answers)
        server.wait_ready("hung", 1)


def test_a_worker_that_is_scaled_away_before_its_restart_does_not_start(pinned: TorchServe) -> None:
    pinned.register(archives.facts(), workers=2)
    stays, goes = pinned.describe("facts")["workers"]
    os.kill(goes["pid"], signal.SIGKILL)
    assert eventually(lambda: f"Retry worker: {goes['id']} in 1 seconds" in pinned.log())
    pinned.scale("facts", 1)
    assert eventually(lambda: f"worker {goes['id']} was scaled away before its restart" in pinned.log())
    assert list(pinned.workers()) == list(leases(pinned)) == [stays["pid"]]


def test_a_section_that_cannot_be_granted_is_refused_with_a_note_and_serves(pinned: TorchServe) -> None:
    archive = archives.facts("greedy", config="cpu: {cores: 10000}\n")
    wrong = archives.facts("wrong", config="cpu: {corse: 1}\n")
    pinned.register(archive)
    assert_bound(pinned, ask(pinned, "greedy"))
    assert any("10000" in note for note in pinned.cores()["notes"])
    pinned.register(wrong)
    assert_bound(pinned, ask(pinned, "wrong"))
    assert "'corse'" in pinned.log()


def test_a_workers_children_stay_in_its_slice_and_do_not_keep_its_lease(pinned: TorchServe) -> None:
    archive = archives.facts("parent")
    pinned.register(archive)
    answer = ask(pinned, "parent", {"child": 600})
    child = answer["child"]
    try:
        pinned.register(archives.facts("plain"))
        held = leases(pinned)[answer["pid"]]
        assert sorted(os.sched_getaffinity(child)) == sorted(held), "the child followed its parent's slice"
        pinned.unregister("parent")
        assert eventually(lambda: answer["pid"] not in leases(pinned))
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, 9)


def pack_workflow(directory: Path, name: str, specification: str) -> None:
    (directory / "spec.yaml").write_text(specification)
    (directory / "functions.py").write_text(FUNCTION)  # the archiver wants the file even where no step is a function
    archiver = [str(Path(sys.executable).with_name("torch-workflow-archiver")), "--workflow-name", name]
    archiver += ["--spec-file", str(directory / "spec.yaml"), "--export-path", str(directory)]
    archiver += ["--handler", str(directory / "functions.py")]
    subprocess.run(archiver, check=True, capture_output=True)


FUNCTION = """
import json, os
def before(data, context):
    if data is None:  # at load
        return None
    return [json.dumps({"pid": os.getpid()}) for _ in data]
"""


def test_workflows(tmp_path: Path) -> None:
    """Steps own their slices; a function owns no core unless it asks."""
    store = tmp_path / "store"
    store.mkdir()
    for archive in (archives.facts("plain"), archives.facts("ours", handler=Handler.OURS)):
        (store / archive.name).symlink_to(archive)
    before = WORKFLOW.replace("  first: [second]", "  before: [first]")
    for name, specification in (("pair", WORKFLOW), ("function", before), ("asks", f"{before}cpu: {{cores: 1}}\n")):
        pack_workflow(tmp_path, name, specification)
    with TorchServe(properties={**PINNED, "workflow_store": tmp_path, "model_store": store}) as server:
        server.management("POST", "/workflows", {"url": "pair.war"})
        answer = json.loads(server.predict_workflow("pair", b"{}"))
        held = leases(server)
        assert held.keys() == {answer["pid"], answer["asked_by"]} == set(server.workers())
        assert_bound(server, answer)
        assert {entry["model"] for entry in server.cores()["slices"]} == {"pair__first", "pair__second"}
        server.management("DELETE", "/workflows/pair")
        assert eventually(lambda: not leases(server))

        for name, asks in (("function", False), ("asks", True)):
            server.management("POST", "/workflows", {"url": f"{name}.war"})
            model = json.loads(server.predict_workflow(name, b"{}"))
            function = model["asked_by"]
            (entry,) = [entry for entry in server.cores()["slices"] if entry["pid"] == function]
            assert entry["model"] == f"{name}__before"
            assert entry["notes"] == []
            assert entry["pinned"] is asks
            assert process.environment(function)["OMP_NUM_THREADS"] == "1"
            assert model["threads"] == CORES - asks, "the model has what the function does not own"
            if not asks:
                assert os.sched_getaffinity(function) == os.sched_getaffinity(0)
            server.management("DELETE", f"/workflows/{name}")
            assert eventually(lambda: not leases(server))


def test_workers_of_stock_handlers_under_torchrun_are_listed_as_unbound(pinned: TorchServe) -> None:
    config = "parallelType: tp\nparallelLevel: 1\ndeviceType: cpu\ntorchrun:\n  nproc-per-node: 1\n"
    archive = archives.facts("stock_rank", config=config)
    pinned.register(archive)
    ask(pinned, "stock_rank")
    unbound = pinned.cores()["unbound"]
    assert len(unbound) == 1
    assert "CoreSliceMixin" in unbound[0]["reason"]
