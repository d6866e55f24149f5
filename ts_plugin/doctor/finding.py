"""What the doctor has to say: one finding, and how a terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ts_plugin.machine.words import count


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


error, warning, note = (partial(Finding, severity) for severity in Severity)


def report(findings: Sequence[Finding]) -> RenderableType:
    """Draw the doctor's findings: what, why, and the change, one under the other."""
    marks = {Severity.ERROR: ("✗", "bold red"), Severity.WARNING: ("!", "bold yellow"), Severity.NOTE: ("·", "dim")}
    table = Table.grid(padding=(0, 1))
    for finding in findings:
        mark, style = marks[finding.severity]
        words = Text(finding.what, "dim" if finding.severity is Severity.NOTE else "")
        if finding.why:
            words.append(f"\n{finding.why}", "dim")
        if finding.change and finding.severity is not Severity.NOTE:
            words.append("\n→ ", style).append(finding.change, "bold")
        table.add_row(Text(mark, style), Text(finding.subject, style), words)
    found = {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}
    verdict = f"{count(found[Severity.ERROR], 'error')}, {count(found[Severity.WARNING], 'warning')}"
    return Group(table, Text(f"\n{verdict}", "bold"))
