"""Runs TorchServe's model_service_worker.py in this process, with the follower at its request boundaries.

A worker that the launcher could not bind tries again here. Started by the launcher as a script, with the path of
model_service_worker.py as the first argument.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # Python put this file's directory first; the worker must see its own there, as if it had been started directly.
    sys.path[0] = os.path.dirname(sys.argv[1])

import runpy

from ts_plugin.ledger.codec import LEASE_VARIABLE, unpack_lease
from ts_plugin.ledger.unbound import UNBOUND_VARIABLE
from ts_plugin.log import say
from ts_plugin.worker import follower, late, openmp
from ts_plugin.worker.start import worker_id


def _attach() -> None:
    openmp.load()
    if packed := os.environ.pop(LEASE_VARIABLE, None):
        follower.attach(unpack_lease(packed))
    else:
        reason = os.environ.get(UNBOUND_VARIABLE, "")
        late.begin(worker=worker_id(sys.argv), archive=os.getcwd(), hooked=True, reason=reason)


if __name__ == "__main__":
    del sys.argv[0]
    try:
        _attach()
    except Exception as error:  # noqa: BLE001 - the model is served whatever happens to the slice
        say(f"this worker will not follow its slice: {type(error).__name__}: {error}", problem=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
