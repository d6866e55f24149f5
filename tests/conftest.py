"""What all tests share: how they are marked, a state directory of their own, the CPUs of this process, the checkout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from benchmarks.harness import CHECKOUT, PLUGINS
from benchmarks.harness.server import TorchServe
from tests.claimants import Claimant
from tests.eventually import eventually

hypothesis.settings.register_profile("ts-cores", deadline=None)  # no test asserts how long something takes
hypothesis.settings.load_profile("ts-cores")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts `./dev test &` so, and commands inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

KINDS = ("pure", "process", "server")
# Modules in which the coverage of launchers, workers and other processes is taken, too.
TRACED = {"compare", "elastic", "hooks", "late", "openmp", "overruled", "readback", "tune"}
# A test marked with pytest-cov's no_cover runs what others run, but so often that to trace it would double its time.
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")  # audit events
started: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a test that is not marked: with a fixture that starts a server or a process, as such; else as pure."""
    for item in items:
        if not any(item.get_closest_marker(kind) for kind in KINDS):
            fixtures = set(getattr(item, "fixturenames", ()))
            process = "process" if fixtures & {"start", "sleeper", "held"} else "pure"
            item.add_marker("server" if "pinned" in fixtures else process)


def remember(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS:
        started.append(f"{event}: {arguments}")


sys.addaudithook(remember)


@pytest.fixture(autouse=True)
def _pure_tests_start_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Name the test that is in the wrong group, so that `./dev test -m pure` stays quick."""
    started.clear()
    yield
    if request.node.get_closest_marker("pure"):
        assert started == [], "mark this test with pytest.mark.process or pytest.mark.server"


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep every test, and every process that one starts, away from the ledger of this user's real servers.

    And let a JVM compile what it runs often once, not again for hours that it will not have.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_CORES_STATE_DIR", str(tmp_path_factory.mktemp("state") / "ts-cores"))
        patch.setenv("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")
        yield


@pytest.fixture(scope="module", autouse=True)
def _coverage_of_other_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take it only in modules that run what no others do: with it tests with servers take up to half as long again."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.removeprefix("tests.test_") not in TRACED:
            patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture(autouse=True)
def _same_cpus_afterwards() -> Iterator[None]:
    """Name the test that leaves this process on other CPUs: what every later test starts would inherit them."""
    before = os.sched_getaffinity(0)
    yield
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)
    assert after == before


@pytest.fixture(scope="module")  # not longer: others must find no server on this machine
def _pinned() -> Iterator[TorchServe]:
    with TorchServe(properties={"plugins_path": PLUGINS, "cpu_launcher_enable": True}) as server:
        yield server


@pytest.fixture
def pinned(_pinned: TorchServe) -> Iterator[TorchServe]:
    """A server with ts-cores, the same for all tests of a module: they register models, which go when they end.

    For tests that need no other config.properties, kill nothing but workers, and count nothing from the server's start.
    """
    yield _pinned
    for model in json.loads(_pinned.management("GET", "/models"))["models"]:
        name = model["modelName"]
        versions = {one["modelVersion"] for one in json.loads(_pinned.management("GET", f"/models/{name}/all"))}
        default = _pinned.describe(name)["modelVersion"]
        for version in (*versions - {default}, default):  # TorchServe removes it last
            _pinned.unregister(name, version=version)
    assert eventually(lambda: not _pinned.workers())


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of this checkout."""
    return CHECKOUT


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """The claimants' state directory; whoever is a frontend in it may be moved until the last claimant has ended."""
    mask = os.sched_getaffinity(0)
    yield tmp_path / "state"
    os.sched_setaffinity(0, mask)


@pytest.fixture
def start(state: Path) -> Iterator[Callable[..., Claimant]]:
    claimants: list[Claimant] = []

    def begin(**options: Any) -> Claimant:
        claimants.append(Claimant(state, **options))
        return claimants[-1]

    yield begin
    for claimant in claimants:
        if claimant.process.poll() is None:
            claimant.kill()
        for stream in (claimant.process.stdin, claimant.process.stdout):
            assert stream is not None
            stream.close()
