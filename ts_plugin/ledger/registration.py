"""A TorchServe frontend's entry in the ledger, and how it comes back after the state directory was deleted.

The entry has a mark, an empty file beside the ledger. The frontend hook looks for its mark twice a second and registers
again when it is gone; a worker that does not find its server's entry deletes the mark, and waits.
"""

from __future__ import annotations

import contextlib
import os
import time

from ts_plugin.ledger import coordinator
from ts_plugin.ledger.coordinator import NotRegistered
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Server
from ts_plugin.machine import process

__all__ = ["NotRegistered", "ensure_registered", "mark", "register"]

LOOK_SECONDS = 0.05


def mark(ledger: Ledger, server_pid: int) -> str:
    """Return the path of the file that says that ``server_pid`` is in the ledger."""
    return f"{ledger.path.removesuffix('.json')}-server-{server_pid}"


def register(ledger: Ledger, server: Server) -> None:
    """Enter ``server`` into the ledger and make its mark; marks of servers that have ended go.

    Raises:
        LedgerError: the ledger cannot be used. OSError: the mark cannot be made.
    """
    coordinator.register_server(ledger, server)
    os.close(os.open(mark(ledger, server.pid), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    prefix = os.path.basename(mark(ledger, 0)).removesuffix("0")
    for name in os.listdir(ledger.directory):
        pid = name.removeprefix(prefix)
        if name.startswith(prefix) and pid.isdigit() and process.identify(int(pid)) is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{ledger.directory}/{name}")


def ensure_registered(ledger: Ledger, *, timeout: float = 10.0) -> None:
    """Return once the frontend that started this process, its parent, is in the ledger; ask it to register if need be.

    For workers that the launcher starts: only a frontend with the hook starts them so, and its entry alone says
    which cores its config.properties allows. ``timeout`` is in seconds.

    Raises:
        NotRegistered: the frontend did not register in time. LedgerError: the ledger cannot be used.
    """
    pid, server_pid = os.getpid(), os.getppid()
    if coordinator.server_of(ledger.read(), pid) is not None:
        return
    with ledger.locked():  # makes the directory, or says why that cannot be
        pass
    with contextlib.suppress(FileNotFoundError):
        os.unlink(mark(ledger, server_pid))
    deadline = time.monotonic() + timeout
    while coordinator.server_of(ledger.read(), pid) is None:
        if time.monotonic() > deadline:
            raise NotRegistered(
                f"{ledger.path}: no entry of process {server_pid}, which started this worker, and none came within "
                f"{timeout:g} s; start TorchServe with plugins_path, or set its property python to an interpreter"
            )
        time.sleep(LOOK_SECONDS)
