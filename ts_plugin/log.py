"""What ts-cores leaves in TorchServe's log: lines for everybody, and with TS_CORES_LOG=debug every decision."""

from __future__ import annotations

import contextlib
import os
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING

from ts_plugin.machine.cpulist import format_cpulist

if TYPE_CHECKING:
    import logging

DEBUG = os.environ.get("TS_CORES_LOG", "").strip().lower() == "debug"


def say(text: str, *, problem: bool = False) -> None:
    """Write one line where TorchServe logs it: stdout at level INFO, stderr at level WARN."""
    with contextlib.suppress(OSError):  # a reader that is gone
        os.write(2 if problem else 1, f"ts-cores: {text}\n".encode(errors="backslashreplace"))


def debug(text: str, *values: object) -> None:
    """Log a decision and what it rests on, for those who must find out why; nothing unless TS_CORES_LOG=debug.

    ``values`` are for the ``%s`` in ``text``: of a dataclass the fields with another value than their default, sets of
    CPUs as CPU lists. The lines go to stderr, through the logger ``ts_plugin`` of the standard library.
    """
    if DEBUG:
        _logger().debug(text, *map(_shown, values), stacklevel=2)


def _shown(value: object) -> object:
    if isinstance(value, frozenset):
        return format_cpulist(value) or "none"
    if not is_dataclass(value) or isinstance(value, type):
        return value
    told = {field.name: getattr(value, field.name) for field in fields(value)}
    usual = {field.name: field.default for field in fields(value)}
    parts = [f"{name}={_shown(part)}" for name, part in told.items() if part != usual[name]]
    return f"{type(value).__name__}({', '.join(parts)})"


@cache
def _logger() -> logging.Logger:
    import logging  # takes a tenth as long as the launcher itself, so only for those who want it

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("ts-cores: debug: %(module)s.%(funcName)s: %(message)s"))
    logger = logging.getLogger("ts_plugin")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # the root logger is TorchServe's
    logger.addHandler(handler)
    return logger
