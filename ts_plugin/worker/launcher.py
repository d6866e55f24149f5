"""What TorchServe runs as "python": a worker gets its slice first, everything else passes through.

The process becomes the real interpreter by execve: same PID, no wrapper, and all that the worker imports and allocates
is already local. This runs at every worker start, so it imports little; torch least of all.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from ts_plugin.ledger.codec import LEASE_VARIABLE, pack_lease
from ts_plugin.ledger.unbound import UNBOUND_VARIABLE, WORKER_SCRIPT
from ts_plugin.worker.start import start, worker_id

# Runs the worker, and follows its slice or tries again to get one.
INSIDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")


def main(arguments: list[str]) -> NoReturn:
    """Replace this process by the interpreter that runs ``arguments``, as a bound worker if that is what they start."""
    python = sys.executable
    if not (arguments and arguments[0].endswith(WORKER_SCRIPT)):
        os.execv(python, [python, *arguments])  # metric collector, pip, venv

    bound = dict(os.environ)
    lease, reason = start(worker=worker_id(arguments), archive=os.getcwd(), environment=bound, hooked=True)
    if lease is None:
        unbound = {**os.environ, UNBOUND_VARIABLE: reason}
        unbound.pop(LEASE_VARIABLE, None)
        os.execve(python, [python, INSIDE, *arguments], unbound)
    bound[LEASE_VARIABLE] = pack_lease(lease)
    os.execve(python, [python, INSIDE, *arguments], bound)
