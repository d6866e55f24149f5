"""What the user asks of `ts-cores tune`: archives, what their requests send, and what is wanted of each."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ts_plugin.trial.asked import Model, TrialError, asked_models, assigned
from ts_plugin.tune.profile import Target

__all__ = ["Wanted", "wanted_models"]


@dataclass(frozen=True, slots=True)
class Wanted(Model):
    """A model with its target."""

    target: Target


def wanted_models(options: argparse.Namespace) -> list[Wanted]:
    """Read what is asked for.

    Raises:
        TrialError: it makes no sense, or a file cannot be read.
    """
    models = asked_models(options)
    names = [path.stem for path in options.archives]
    rates = assigned("--rate", options.rate, names)
    bounds = assigned("--p99", options.p99, names)
    found = []
    for model, name in zip(models, names, strict=True):
        try:
            target = Target(
                p99=_seconds(bounds[name]) if name in bounds else None,
                rate=_positive(rates[name]) if name in rates else None,
            )
        except ValueError as error:
            raise TrialError(f"{name}: {error}") from error
        found.append(Wanted(model.archive, model.body, target))
    return found


def _seconds(text: str) -> float:
    """Return seconds of ``200ms``, ``0.2s`` or ``0.2``."""
    for unit, factor in (("ms", 0.001), ("s", 1.0)):
        if text.endswith(unit):
            return factor * _positive(text.removesuffix(unit))
    return _positive(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"must be a number above 0, as in --rate 20 or --p99 200ms, not {text!r}")
    return number
