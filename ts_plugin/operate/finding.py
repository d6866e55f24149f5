"""What the doctor has to say: one finding."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Severity"]


class Severity(StrEnum):
    ERROR = "error"  # workers do not start, or serve unbound
    WARNING = "warning"  # it serves, but slower or less safely than it could
    NOTE = "note"  # worth knowing; nothing to do


@dataclass(frozen=True, slots=True)
class Finding:
    """``what`` is the case, ``why`` it matters, and the ``change`` that cures it: a line to write or a command."""

    severity: Severity
    subject: str
    what: str
    why: str = ""
    change: str = ""
