"""Workers of real servers that wait less long than those of users."""

from __future__ import annotations

from pathlib import Path

INSIDE_WORKERS = """
import sys
if any(word.endswith("/ts_plugin/worker/main.py") for word in sys.orig_argv):
    {}
"""


def sitecustomize(directory: Path, statement: str) -> dict[str, str]:
    """Return what to add to the environment so that each worker runs ``statement`` first; uses ``directory``."""
    (directory / "sitecustomize.py").write_text(INSIDE_WORKERS.format(statement))
    return {"PYTHONPATH": str(directory)}
