"""A TorchServe frontend's entry in the ledger, and how it comes back after the state directory was deleted.

The entry has a mark, an empty file beside the ledger. The frontend hook looks for its mark twice a second and registers
again when it is gone; a worker that does not find its server's entry deletes the mark, and waits.
"""

from __future__ import annotations

import contextlib
import os
import time

from ts_plugin.ledger import coordinator
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Server
from ts_plugin.machine import process

LOOK_SECONDS = 0.05
WAIT_SECONDS = 10.0


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


def wait_for_server(ledger: Ledger) -> None:
    """Return once the frontend that started this process is in the ledger; ask it to register if it is not.

    For workers that the launcher starts: only a frontend with the hook starts them so, and its entry alone says
    which cores its config.properties allows. Return after WAIT_SECONDS in any case; ``coordinator.join`` then finds no
    entry.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    pid = os.getpid()
    if coordinator.server_of(ledger.read(), pid) is not None:
        return
    ledger.announce()  # makes the directory, or says why that cannot be
    with contextlib.suppress(FileNotFoundError):
        os.unlink(mark(ledger, os.getppid()))
    deadline = time.monotonic() + WAIT_SECONDS
    while coordinator.server_of(ledger.read(), pid) is None and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
