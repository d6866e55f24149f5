"""What the user asks of `ts-cores tune`: archives, what their requests send, and what is wanted of each."""

from __future__ import annotations

import argparse
import mimetypes
from collections.abc import Sequence
from pathlib import Path

from ts_plugin.trial.archive import ArchiveError, read_archive
from ts_plugin.trial.load import CONTENT_TYPE
from ts_plugin.tune.confirm import Model
from ts_plugin.tune.measure import Body
from ts_plugin.tune.profile import Target

__all__ = ["TuneError", "asked_models"]


class TuneError(RuntimeError):
    """Nothing can be tuned; the message is the one line that the user sees."""


def asked_models(options: argparse.Namespace) -> list[Model]:
    """Read what is asked for.

    Raises:
        TuneError: it makes no sense, or a file cannot be read.
    """
    names = [path.stem for path in options.archives]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TuneError(f"{', '.join(twice)}: two archives of this name; one server cannot load both")
    bodies = _assigned("--body", options.body, names)
    rates = _assigned("--rate", options.rate, names)
    bounds = _assigned("--p99", options.p99, names)
    models = []
    for path, name in zip(options.archives, names, strict=True):
        if name not in bodies:
            given = f"--body {name}=FILE" if len(names) > 1 else "--body FILE"
            raise TuneError(f"{path}: what do its requests send? Give one, for example with {given}")
        file = Path(bodies[name])
        try:
            archive = read_archive(path)
            content = file.read_bytes()
        except ArchiveError as error:
            raise TuneError(str(error)) from error
        except OSError as error:
            raise TuneError(f"{error.filename}: {error.strerror}") from error
        kind = mimetypes.guess_type(file.name)[0]
        body = Body(content, kind if kind == "application/json" else CONTENT_TYPE)
        try:
            target = Target(
                p99=_seconds(bounds[name]) if name in bounds else None,
                rate=_positive(rates[name]) if name in rates else None,
            )
        except ValueError as error:
            raise TuneError(f"{name}: {error}") from error
        models.append(Model(archive, body, target))
    called = [model.archive.model for model in models]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise TuneError(f"{', '.join(twice)}: two archives with a model of this name; one server cannot load both")
    return models


def _assigned(option: str, values: Sequence[str] | None, names: Sequence[str]) -> dict[str, str]:
    """Return what ``NAME=VALUE``, or without a name the same for all models, says.

    Raises:
        TuneError: a name that no archive has.
    """
    found = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if equals and name in names:
            found[name] = value
        elif equals and len(names) > 1:
            raise TuneError(f"{option} {text}: no archive is called {name}; there are: {', '.join(names)}")
        else:
            found |= dict.fromkeys((one for one in names if one not in found), text)
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
