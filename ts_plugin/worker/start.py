"""A worker's start, for the launcher and the handlers alike: claim a slice, say so, or serve unbound and say why."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

from ts_plugin.kernel import affinity, memory
from ts_plugin.ledger import coordinator
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease
from ts_plugin.worker import claim
from ts_plugin.worker.archive import read_archive
from ts_plugin.worker.environment import collapsing
from ts_plugin.worker.log import say

__all__ = ["OFF_VARIABLE", "Start", "collapsed", "start"]

OFF_VARIABLE = "TS_CORES_OFF"  # in a worker's environment: it stays as TorchServe started it, whatever its handler is


class Start(NamedTuple):
    """A worker's lease, or None and the reason why it serves unbound."""

    lease: Lease | None
    reason: str = ""


def start(
    *, worker: str, archive: str, prepare: Callable[[Lease], list[str]], hooked: bool = False, said: str = ""
) -> Start:
    """Claim a slice for this process, which binds it, and set the memory policy of the calling thread.

    ``worker`` is TorchServe's number for it, ``archive`` the directory of its model. ``prepare`` does what else the
    slice needs and returns notes for the log. ``hooked``: the frontend has our hook, so its entry in the ledger,
    which says what this worker may use, is worth a wait. Whatever goes wrong, the worker serves: unbound, on
    the CPUs that it had, with its lease given back. With TS_CORES_OFF it does so without a word. ``said``: the reason
    that the log has already.
    """
    if OFF_VARIABLE in os.environ:
        return Start(None, f"{OFF_VARIABLE} is set")
    had: frozenset[int] = frozenset()
    try:
        had = frozenset(os.sched_getaffinity(0))
        lease = claim.claim(Ledger(), archive=read_archive(archive), worker=worker, hooked=hooked)
        policy = lease.demand.policy
        notes = [*lease.notes, *policy.notes]
        if lease.slice.pinned and (note := memory.bind_memory(policy.memory, lease.slice.numa_nodes)):
            notes.append(note)
        notes += prepare(lease)
    except Exception as error:  # noqa: BLE001 - a pinning plug-in never takes serving down, whatever went wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason != said:
            say(f"worker {worker} serves UNBOUND: {reason}", problem=True)
        with contextlib.suppress(Exception):  # what failed above may fail here
            _give_back(reason, had)
        return Start(None, reason)
    say(claim.describe(lease) if hooked else f"{claim.describe(lease)} (claimed by the handler)")
    for note in notes:
        say(f"worker {worker}: {note}", problem=True)
    return Start(lease)


def _give_back(reason: str, had: frozenset[int]) -> None:
    """End the lease, and use what the frontend could use before it was moved aside, or else what this process had."""
    pid = os.getpid()
    held = os.sched_getaffinity(0)
    with contextlib.suppress(Exception):
        server = coordinator.server_of(Ledger().read(), pid)
        had = had if server is None else server.allowed
    with contextlib.suppress(Exception):
        coordinator.leave(Ledger(), pid, reason)
    affinity.release(pid, had, held=held)


def collapsed(lease: Lease) -> list[str]:
    """Return notes on the mask of a process that has imported torch already."""
    return [
        f"{name} is set, and shrank the affinity mask at `import torch`; unset it" for name in collapsing(os.environ)
    ]
