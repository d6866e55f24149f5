"""Figures over repetitions: median, lowest and highest, and ratios formed within a repetition."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest, highest of so many repetitions."""

    median: float
    low: float
    high: float
    number: int

    def text(self, scale: float = 1.0) -> str:
        """Return for example ``14.1 (13.8–14.6)``; the bare figure if there was one repetition."""
        low, middle, high = (figure(scale * value) for value in (self.low, self.median, self.high))
        return middle if self.number == 1 or low == high else f"{middle} ({low}\N{EN DASH}{high})"


def spread_of(values: Iterable[float]) -> Spread | None:
    """Return the spread of the values; None where there is none."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found), len(found)) if found else None


def ratio(above: Mapping[int, float], below: Mapping[int, float]) -> Spread | None:
    """Return the spread of ``above / below``, both by repetition: neighbours in time are compared."""
    return spread_of(value / below[number] for number, value in above.items() if below.get(number))


def figure(value: float) -> str:
    """Return three digits: 4.1, 46.3, 664."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
