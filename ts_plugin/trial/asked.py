"""What the user asks for: archives, and what their requests send."""

from __future__ import annotations

import argparse
import mimetypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ts_plugin.config.file import Config, read_config
from ts_plugin.trial.archive import Archive, ArchiveError, read_archive
from ts_plugin.trial.load import CONTENT_TYPE, Body

__all__ = ["KEPT", "Model", "TrialError", "asked_config", "asked_models", "assigned"]

# What makes a server of the user's config.properties as fast as it is.
KEPT = (
    "batch_size",
    "cpu_launcher_args",
    "cpu_launcher_enable",
    "default_workers_per_model",
    "job_queue_size",
    "max_batch_delay",
    "models",
    "netty_client_threads",
    "number_of_netty_threads",
    "plugins_path",
    "prefer_direct_buffer",
    "vmargs",
)


class TrialError(RuntimeError):
    """Nothing can be measured; the message is the one line that the user sees."""


@dataclass(frozen=True, slots=True)
class Model:
    """One archive, and what its requests send."""

    archive: Archive
    body: Body


def asked_models(options: argparse.Namespace) -> list[Model]:
    """Read the archives and bodies that are asked for.

    Raises:
        TrialError: it makes no sense, or a file cannot be read.
    """
    names = [path.stem for path in options.archives]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TrialError(f"{', '.join(twice)}: two archives of this name; one server cannot load both")
    bodies = assigned("--body", options.body, names)
    models = []
    for path, name in zip(options.archives, names, strict=True):
        if name not in bodies:
            given = f"--body {name}=FILE" if len(names) > 1 else "--body FILE"
            raise TrialError(f"{path}: what do its requests send? Give one, for example with {given}")
        file = Path(bodies[name])
        try:
            archive = read_archive(path)
            content = file.read_bytes()
        except ArchiveError as error:
            raise TrialError(str(error)) from error
        except OSError as error:
            raise TrialError(f"{error.filename}: {error.strerror}") from error
        kind = mimetypes.guess_type(file.name)[0]
        models.append(Model(archive, Body(content, kind if kind == "application/json" else CONTENT_TYPE)))
    called = [model.archive.model for model in models]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise TrialError(f"{', '.join(twice)}: two archives with a model of this name; one server cannot load both")
    return models


def assigned(option: str, values: Sequence[str] | None, names: Sequence[str]) -> dict[str, str]:
    """Return what ``NAME=VALUE``, or without a name the same for all models, says.

    Raises:
        TrialError: a name that no archive has.
    """
    found = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if equals and name in names:
            found[name] = value
        elif equals and len(names) > 1:
            raise TrialError(f"{option} {text}: no archive is called {name}; there are: {', '.join(names)}")
        else:
            found |= dict.fromkeys((name for name in names if name not in found), text)
    return found


def asked_config(path: Path | None) -> Config | None:
    """Read the config.properties that is asked for.

    Raises:
        TrialError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return read_config(path, os.environ)
    except OSError as error:
        raise TrialError(f"{path}: {error.strerror}") from error
