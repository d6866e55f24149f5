"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 30.0  # seconds: that the slices follow within 2 is measured by ./dev chaos, on a quiet machine


def eventually(check: Callable[[], object], patience: float = PATIENCE) -> bool:
    """Ask again and again until it is so, or patience ends; return whether it is so."""
    deadline = time.monotonic() + patience
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
