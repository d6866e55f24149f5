"""Slices follow the workers of real servers, while these serve: join, leave, crash, and a second server."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from benchmarks.harness import archives
from benchmarks.harness.server import TorchServe
from tests.eventually import eventually
from ts_plugin.ledger.file import Ledger
from ts_plugin.machine import discovery, process
from ts_plugin.trial.client import RequestError

PINNED: dict[str, str | int | float | bool | Path | None] = {
    "plugins_path": Path(__file__).resolve().parent.parent / "ts_plugin" / "frontend",
    "cpu_launcher_enable": True,
}
ALLOWED = frozenset(os.sched_getaffinity(0))
CORES = len(discovery.read_topology().cores_of(ALLOWED))

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(CORES < 2, reason="needs two cores to tell one slice from another"),
]


class Load:
    """Requests at a constant rate, whatever the answers; ``failures`` holds what went wrong."""

    def __init__(self, server: TorchServe, name: str, *, rate: float = 5.0) -> None:
        self._server, self._name, self._rate = server, name, rate
        self._end = threading.Event()
        self.answers: list[float] = []
        self.failures: list[str] = []
        self._threads: list[threading.Thread] = []
        self._clock = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._clock.join()
        for thread in self._threads:
            thread.join()

    @property
    def asked(self) -> int:
        return len(self._threads)

    def _run(self) -> None:
        while not self._end.wait(1 / self._rate):
            thread = threading.Thread(target=self._ask)
            thread.start()
            self._threads.append(thread)

    def _ask(self) -> None:
        try:
            self._server.predict(self._name, b"{}")
            self.answers.append(time.monotonic())
        except RequestError as error:
            self.failures.append(str(error))


def masks(pid: int) -> set[frozenset[int]]:
    """Return the distinct masks of all threads of a process, read from the kernel's text, not through our code."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            for line in (task / "status").read_text().splitlines():
                if line.startswith("Cpus_allowed_list:"):
                    found.add(frozenset(cpus(line.split()[1])))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def cpus(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def divided(*servers: TorchServe) -> bool:
    """Tell whether the masks of all workers' threads are disjoint and together leave no core idle."""
    used: set[int] = set()
    for pid in [pid for server in servers for pid in server.workers()]:
        try:
            own = frozenset().union(*masks(pid))
        except FileNotFoundError:
            return False
        if used & own:
            return False
        used |= own
    return used <= ALLOWED and len(discovery.read_topology().cores_of(used)) == CORES


def threads_follow(server: TorchServe, *names: str) -> bool:
    """Tell whether every worker, at a request, runs as many intra-op threads as its mask has CPUs."""
    waiting = set(server.workers())
    for _ in range(20):
        for name in names:
            answer: dict[str, Any] = json.loads(server.predict(name, b"{}"))
            if answer["threads"] != len(answer["affinity"]):
                return False
            waiting.discard(answer["pid"])
        if not waiting:
            return True
    return False


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archives.facts()


@pytest.fixture(scope="module")
def server(archive: Path) -> Iterator[TorchServe]:
    with TorchServe(archive, workers=1, properties=PINNED) as running:
        yield running


def test_scaling_and_a_second_model_lose_no_request(server: TorchServe, archive: Path) -> None:
    first = set(server.workers())
    with Load(server, "facts") as load:
        assert eventually(lambda: divided(server))
        server.scale("facts", 2)
        assert eventually(lambda: divided(server))
        assert eventually(lambda: threads_follow(server, "facts"))
        assert first <= set(server.workers()), "the first worker was not restarted"
        server.scale("facts", 1)
        assert eventually(lambda: len(server.workers()) == 1 and divided(server)), "freed cores are used again"
        server.register(archive, name="second")
        assert eventually(lambda: divided(server))
        assert eventually(lambda: threads_follow(server, "facts", "second"))
        core_map = server.cores()
        assert (core_map["enabled"], core_map["unbound"]) == (True, [])
        assert sorted(entry["model"] for entry in core_map["slices"]) == ["facts", "second"], "as it was registered"
        assert {entry["pid"] for entry in core_map["slices"]} == set(server.workers())
        assert eventually(
            lambda: all(masks(entry["pid"]) == {frozenset(entry["cpus"])} for entry in core_map["slices"])
        )
        server.unregister("second")
        assert eventually(lambda: len(server.workers()) == 1 and divided(server))
        assert eventually(lambda: threads_follow(server, "facts"))
    assert load.failures == []
    assert len(load.answers) == load.asked > 0
    assert len(server.workers()) == 1


def test_more_workers_than_cores_all_serve(server: TorchServe) -> None:
    server.scale("facts", CORES + 1)
    try:
        assert eventually(lambda: all(len(frozenset().union(*masks(pid))) == 1 for pid in server.workers()))
        assert eventually(lambda: threads_follow(server, "facts"))
        assert any("share" in note for note in server.cores()["notes"])
    finally:
        server.scale("facts", 2)  # as the next test needs it


def test_a_killed_worker_comes_back_with_a_valid_slice(server: TorchServe) -> None:
    server.scale("facts", 2)
    victim = min(server.workers())
    os.kill(victim, signal.SIGKILL)
    assert eventually(lambda: victim not in server.workers() and divided(server)), "the survivor takes all cores"
    server.wait_ready("facts", 2)
    assert eventually(lambda: len(server.workers()) == 2 and divided(server))
    assert eventually(lambda: threads_follow(server, "facts"))
    for pid in server.workers():
        assert len(process.threads(pid)) > 1
        assert eventually(lambda pid=pid: len(masks(pid)) == 1), "all of its threads are in its slice"  # type: ignore[misc]


def test_a_worker_that_is_scaled_away_answers_first(server: TorchServe) -> None:
    """By itself: TorchServe alone has the request computed again by another worker, if it does not lose it."""
    server.scale("facts", 2)
    both, before = set(server.workers()), len(server.log())
    with ThreadPoolExecutor() as clients:
        answers = [clients.submit(server.predict, "facts", b'{"sleep": 2}') for _ in both]
        assert eventually(lambda: server.log()[before:].count("Flushing req.cmd PREDICT") == 2), "each computes one"
        server.scale("facts", 1)
        assert {json.loads(answer.result())["pid"] for answer in answers} == both
    assert eventually(lambda: len(server.workers()) == 1 and divided(server))
    assert "lose its request" not in server.log()[before:]


def test_two_servers_share_the_machine_and_hard_death_frees_it(server: TorchServe, archive: Path) -> None:
    server.scale("facts", 1)
    assert eventually(lambda: divided(server))
    with TorchServe(archive, workers=1, properties=PINNED, state_directory=server.state_directory) as second:
        assert eventually(lambda: divided(server, second))
        assert len(server.cores()["slices"]) == 1, "each frontend tells of its own workers"
        os.kill(second.pid, signal.SIGKILL)
        ledger = Ledger(str(server.state_directory))
        assert eventually(lambda: {lease.pid for lease in ledger.read().leases} == set(server.workers()), 10)
        assert eventually(lambda: divided(server))
    assert eventually(lambda: threads_follow(server, "facts"))
