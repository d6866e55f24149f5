"""What the user asks for: archives, and what their requests send."""

from __future__ import annotations

import argparse
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ts_plugin.errors import CommandError
from ts_plugin.trial.archive import Archive, read_archive
from ts_plugin.trial.load import CONTENT_TYPE, Body

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


@dataclass(frozen=True, slots=True)
class Model:
    """One archive, and what its requests send."""

    archive: Archive
    body: Body


def asked_models(options: argparse.Namespace) -> list[Model]:
    """Read the archives and bodies that are asked for.

    Raises:
        CommandError: it makes no sense.
        OSError: a file cannot be read.
    """
    names = [path.stem for path in options.archives]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{', '.join(twice)}: two archives of this name; one server cannot load both")
    bodies = assigned("--body", options.body, names)
    models = []
    for path, name in zip(options.archives, names, strict=True):
        if name not in bodies:
            given = f"--body {name}=FILE" if len(names) > 1 else "--body FILE"
            raise CommandError(f"{path}: what do its requests send? Give one, for example with {given}")
        file = Path(bodies[name])
        json = mimetypes.guess_type(file.name)[0] == "application/json"
        body = Body(file.read_bytes(), "application/json" if json else CONTENT_TYPE)
        models.append(Model(read_archive(path), body))
    called = [model.archive.model for model in models]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise CommandError(f"{', '.join(twice)}: two archives with a model of this name; one server cannot load both")
    return models


def assigned(option: str, values: Sequence[str] | None, names: Sequence[str]) -> dict[str, str]:
    """Return what ``NAME=VALUE``, or without a name the same for all models, says.

    Raises:
        CommandError: a name that no archive has.
    """
    found = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if equals and name in names:
            found[name] = value
        elif equals and len(names) > 1:
            raise CommandError(f"{option} {text}: no archive is called {name}; there are: {', '.join(names)}")
        else:
            found |= dict.fromkeys((name for name in names if name not in found), text)
    return found
