"""What all tests share: a state directory of their own, the CPUs of this process, the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from benchmarks.harness import CHECKOUT
from tests.claimants import Claimant

hypothesis.settings.register_profile("ts-cores", deadline=None)  # no test asserts how long something takes
hypothesis.settings.load_profile("ts-cores")


@pytest.fixture(scope="session", autouse=True)
def _own_state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep every test, and every process that one starts, away from the ledger of this user's real servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_CORES_STATE_DIR", str(tmp_path_factory.mktemp("state") / "ts-cores"))
        yield


@pytest.fixture(autouse=True)
def _same_cpus_afterwards() -> Iterator[None]:
    """Name the test that leaves this process on other CPUs: what every later test starts would inherit them."""
    before = os.sched_getaffinity(0)
    yield
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)
    assert after == before


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
