"""What all tests share: a state directory of their own, the CPUs of this process, the checkout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import CHECKOUT


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
