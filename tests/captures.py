"""The captures from which benchmarks/machines.txt was written, where somebody has them: their licences differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import CHECKOUT

CAPTURES = next(CHECKOUT.parent.glob("*/topologies"), Path("topologies"))
RECORDS = sorted([*CAPTURES.glob("json/*.json"), *CAPTURES.glob("derived/json/*.json")])

needs_captures = pytest.mark.skipif(
    not RECORDS,
    reason=f"no captures in {CHECKOUT.parent}/*/topologies: benchmarks/machines.txt is not compared with them",
)
