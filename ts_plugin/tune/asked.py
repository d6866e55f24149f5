"""What the user asks of `ts-cores tune`: archives, what their requests send, and what is wanted of each."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ts_plugin.errors import CommandError
from ts_plugin.trial.asked import Model, asked_models, assigned
from ts_plugin.tune.values import Target

DRAWN = (".png", ".svg")  # how the name of a picture may end


@dataclass(frozen=True, slots=True)
class Wanted(Model):
    """A model with its target."""

    target: Target


def wanted_models(options: argparse.Namespace) -> list[Wanted]:
    """Read what is asked for.

    Raises:
        CommandError: it makes no sense.
        OSError: a file cannot be read.
    """
    names = [path.stem for path in options.archives]
    rates = assigned("--rate", options.rate, names)
    bounds = assigned("--p99", options.p99, names)
    _check_files(options)
    targets = [_target(name, rates.get(name), bounds.get(name)) for name in names]
    models = asked_models(options)
    return [Wanted(model.archive, model.body, target) for model, target in zip(models, targets, strict=True)]


def _check_files(options: argparse.Namespace) -> None:
    """Raises: CommandError: what is to be written at the end cannot be, which must not be found out then."""
    for option, file in (("--write", options.write), ("--picture", options.picture)):
        if file and not file.absolute().parent.is_dir():
            raise CommandError(f"{option} {file}: there is no directory {file.absolute().parent}; make it first")
    if options.picture and options.picture.suffix not in DRAWN:
        raise CommandError(f"--picture {options.picture}: its name must end with {' or '.join(DRAWN)}")


def _target(name: str, rate: str | None, bound: str | None) -> Target:
    """Raises: CommandError: one of them is no number."""
    try:
        return Target(
            p99=None if bound is None else _seconds(bound),
            rate=None if rate is None else _positive(rate),
        )
    except ValueError as error:
        raise CommandError(f"{name}: {error}") from error


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
