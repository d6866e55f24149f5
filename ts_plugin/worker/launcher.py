"""What TorchServe runs as "python": a worker gets its slice first, everything else passes through.

The process becomes the real interpreter by execve: same PID, no wrapper, and all that the worker imports and allocates
is already local. This runs at every worker start, so it imports little; torch least of all.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from ts_plugin.leases import binding, claim, coordinator, registration
from ts_plugin.leases.ledger import LEASE_VARIABLE, Ledger, pack_lease

__all__ = ["main"]


def main(arguments: list[str]) -> NoReturn:
    """Replace this process by the interpreter that runs ``arguments``, as a bound worker if that is what they start."""
    if not (arguments and arguments[0].endswith(coordinator.WORKER_SCRIPT)):
        os.execv(sys.executable, [sys.executable, *arguments])  # metric collector, pip, venv
    environment = dict(os.environ)
    try:
        starter = [_bind(arguments, environment)]
    except Exception as error:  # noqa: BLE001 - a pinning plug-in never takes serving down, whatever went wrong
        reason = " ".join(f"{error}".split()) or type(error).__name__
        environment[coordinator.UNBOUND_VARIABLE] = reason
        environment.pop(LEASE_VARIABLE, None)
        say(f"worker {claim.worker_id(arguments)} serves UNBOUND: {reason}", problem=True)
        _unbind()
        starter = []
    os.execve(sys.executable, [sys.executable, *starter, *arguments], environment)


def _bind(arguments: list[str], environment: dict[str, str]) -> str:
    """Claim a slice for this process, and return the program that runs the worker inside it."""
    ledger = Ledger()
    registration.ensure_registered(ledger)
    archive = claim.read_archive(os.getcwd())
    lease = claim.claim(ledger, archive=archive, worker=claim.worker_id(arguments))
    policy = lease.demand.policy
    notes = [*lease.notes, *policy.notes]
    note = binding.bind_memory(policy.memory, lease.slice.numa_nodes) if lease.slice.pinned else None
    notes += [note] if note else []
    notes += binding.prepare_environment(environment, lease.slice, policy, library_roots=(sys.prefix,))
    environment[LEASE_VARIABLE] = pack_lease(lease)
    say(claim.describe(lease))
    for note in notes:
        say(f"worker {lease.worker_id}: {note}", problem=True)
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")


def _unbind() -> None:
    """Give back what this process may hold already, and use what its frontend could use before it was moved aside."""
    with contextlib.suppress(Exception):
        coordinator.leave(Ledger(), os.getpid())
    with contextlib.suppress(Exception):
        server = coordinator.server_of(Ledger().read(), os.getpid())
        os.sched_setaffinity(0, claim.own_mask(server))


def say(text: str, *, problem: bool = False) -> None:
    """Write one line where TorchServe logs it: stdout at level INFO, stderr at level WARN."""
    with contextlib.suppress(OSError):  # a reader that is gone
        os.write(2 if problem else 1, f"ts-cores: {text}\n".encode(errors="backslashreplace"))
