"""Numbers in sentences, for every message that counts something or names CPUs."""

from __future__ import annotations

from collections.abc import Iterable

from ts_plugin.machine.cpulist import format_cpulist


def count(number: int, noun: str) -> str:
    """Return for example ``1 core`` or ``2 cores``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def listed(numbers: Iterable[int]) -> str:
    """Return for example ``0-3,8``; ``none`` where there are none."""
    return format_cpulist(numbers) or "none"
