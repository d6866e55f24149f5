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
from typing import Any

from ts_plugin.leases.ledger import LEASE_VARIABLE, Ledger, unpack_lease
from ts_plugin.worker import follower
from ts_plugin.worker.launcher import say


def attach() -> None:
    """Follow the lease that the launcher left in the environment; know more of it once TorchServe loads the model.

    Source: ts/service.py. `Service.__init__` runs right before the handler's `initialize`.
    """
    own = follower.attach(Ledger(), unpack_lease(os.environ.pop(LEASE_VARIABLE)))
    from ts.service import Service

    begin = Service.__init__

    def initialize(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        own.loaded(self.context)
        own.follow()

    Service.__init__ = initialize


if __name__ == "__main__":
    del sys.argv[0]
    try:
        attach()
    except Exception as error:  # noqa: BLE001 - the worker is bound already; it must serve even if it cannot follow
        say(f"slice will not follow the other workers: {type(error).__name__}: {error}", problem=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
