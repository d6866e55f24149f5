"""The lines that a worker leaves in TorchServe's log."""

from __future__ import annotations

import contextlib
import os

__all__ = ["say"]


def say(text: str, *, problem: bool = False) -> None:
    """Write one line where TorchServe logs it: stdout at level INFO, stderr at level WARN."""
    with contextlib.suppress(OSError):  # a reader that is gone
        os.write(2 if problem else 1, f"ts-cores: {text}\n".encode(errors="backslashreplace"))
