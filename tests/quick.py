"""The command `ts-cores` with short looks, warm-ups and loads: what it does does not depend on how long they are.

Tests of tune and compare run this file instead of the command, with real servers, and real signals.
"""

from __future__ import annotations

import sys

from ts_plugin.cli.main import main
from ts_plugin.compare import command, ways
from ts_plugin.trial import alone, turns
from ts_plugin.tune import confirm, measure

SECONDS = [
    (alone, "LOOK", 0.2),
    *((module, "LEAD_IN", 0.3) for module in (turns, ways, command)),
    (turns, "WARM_UP", 0.3),
    (ways, "SHORTEST", 1.0),
    (measure, "PIECE", 0.1),
    (confirm, "SECONDS", 0.7),
    (confirm, "OPEN", 1.0),
]

if __name__ == "__main__":
    for module, name, seconds in SECONDS:
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, seconds)
    sys.exit(main())
