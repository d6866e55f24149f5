"""The entry of a frontend in the ledger, its mark, and what a worker does that finds neither."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.eventually import eventually
from ts_plugin.ledger import registration
from ts_plugin.ledger.coordinator import CannotBind
from ts_plugin.ledger.directory import LedgerError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Server
from ts_plugin.machine import process
from ts_plugin.planning.policy import Policy
from ts_plugin.worker.archive import Wishes
from ts_plugin.worker.start import claim


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "state"))


def server(pid: int) -> Server:
    identity = process.identify(pid)
    return Server(pid, identity.start_time if identity else 0, Policy(), frozenset(os.sched_getaffinity(0)))


@pytest.mark.process
def test_a_registered_server_has_a_mark_and_one_that_ended_has_none(ledger: Ledger) -> None:
    with subprocess.Popen(["sleep", "60"]) as frontend:
        registration.register(ledger, server(frontend.pid))
        gone = Path(registration.mark(ledger, frontend.pid))
        assert gone.exists()
        frontend.kill()
    registration.register(ledger, server(os.getppid()))
    assert not gone.exists()
    assert Path(registration.mark(ledger, os.getppid())).exists()
    assert [one.pid for one in ledger.read().servers] == [os.getppid()]


def test_a_worker_asks_its_server_and_waits(ledger: Ledger) -> None:
    registration.register(ledger, server(os.getppid()))
    Path(ledger.path).unlink()  # the mark is left: the worker has to ask
    mark = Path(registration.mark(ledger, os.getppid()))

    def hook() -> None:
        if eventually(lambda: not mark.exists()):
            registration.register(ledger, server(os.getppid()))

    thread = threading.Thread(target=hook)
    thread.start()
    try:
        registration.wait_for_server(ledger)
    finally:
        thread.join()
    assert [one.pid for one in ledger.read().servers] == [os.getppid()]


def test_a_server_without_the_hook_is_not_guessed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "WAIT_SECONDS", 0.1)
    with pytest.raises(CannotBind, match=rf"{ledger.path}: no entry of process {os.getppid()}.*plugins_path"):
        claim(ledger, wishes=Wishes("m", "1.0"), worker="9000", hooked=True)
    assert ledger.read().leases == ()


def test_a_directory_that_cannot_be_used_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=f"{tmp_path}/file/state: Not a directory"):
        registration.wait_for_server(Ledger(str(tmp_path / "file" / "state")))
