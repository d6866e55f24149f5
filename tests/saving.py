"""A plugin of coverage.py: a worker saves what it has run while it runs, since TorchServe ends its workers by SIGKILL.

It is loaded by every process whose coverage is taken.
"""

from __future__ import annotations

import sys
import threading
import time

from coverage import Coverage, CoveragePlugin
from coverage.plugin_support import Plugins
from coverage.types import TConfigurable

INTERVAL = 1.0  # seconds; what a worker runs in its last one is lost


class Saving(CoveragePlugin):
    def configure(self, config: TConfigurable) -> None:
        if any(word.endswith("/ts_plugin/worker/main.py") for word in sys.orig_argv):
            threading.Thread(target=_save, daemon=True).start()


def _save() -> None:
    while True:
        time.sleep(INTERVAL)
        if (coverage := Coverage.current()) is not None:
            coverage.save()


def coverage_init(plugins: Plugins, options: object) -> None:
    plugins.add_configurer(Saving())
