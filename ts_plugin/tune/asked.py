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


DRAWN = (".png", ".svg")  # how the name of a picture may end


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
    _check_files(options)
    targets = {name: _target(name, rates.get(name), bounds.get(name)) for name in names}
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
        models.append(Model(archive, body, targets[name]))
    called = [model.archive.model for model in models]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise TuneError(f"{', '.join(twice)}: two archives with a model of this name; one server cannot load both")
    return models


def _check_files(options: argparse.Namespace) -> None:
    """Raises: TuneError: what is to be written at the end cannot be, which must not be found out then."""
    for option, file in (("--write", options.write), ("--picture", options.picture)):
        if file and not file.absolute().parent.is_dir():
            raise TuneError(f"{option} {file}: there is no directory {file.absolute().parent}; make it first")
    if options.picture and options.picture.suffix not in DRAWN:
        raise TuneError(f"--picture {options.picture}: its name must end with {' or '.join(DRAWN)}")


def _target(name: str, rate: str | None, bound: str | None) -> Target:
    """Raises: TuneError: one of them is no number."""
    try:
        return Target(
            p99=None if bound is None else _seconds(bound),
            rate=None if rate is None else _positive(rate),
        )
    except ValueError as error:
        raise TuneError(f"{name}: {error}") from error


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
