"""Runs TorchServe's model_service_worker.py in this process, with the follower at its request boundaries.

Started by the launcher as a script, with the path of model_service_worker.py as the first argument.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # Python put this file's directory first; the worker must see its own there, as if it had been started directly.
    sys.path[0] = os.path.dirname(sys.argv[1])

import runpy

from ts_plugin.leases.ledger import LEASE_VARIABLE, unpack_lease
from ts_plugin.worker import follower, openmp

if __name__ == "__main__":
    del sys.argv[0]
    openmp.load()
    follower.attach(unpack_lease(os.environ.pop(LEASE_VARIABLE)))
    runpy.run_path(sys.argv[0], run_name="__main__")
