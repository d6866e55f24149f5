"""Numbers in sentences, for every message that counts something."""

from __future__ import annotations

__all__ = ["count"]


def count(number: int, noun: str) -> str:
    """Return for example ``1 core`` or ``2 cores``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
