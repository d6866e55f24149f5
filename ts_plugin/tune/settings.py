"""The lines that set a choice: for config.properties, which can be written in place, and for an archive's own file."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import javaproperties
import yaml

from ts_plugin.config.gson import GsonError, model_map, parse, strict
from ts_plugin.errors import CommandError
from ts_plugin.tune.values import Choice, Result

BEFORE = ".before-tune"  # the end of an old file's name
OWN_CORES = re.compile(r"\s*--ncores?[-_]per[-_]instance(\s+|=)\S+")


@dataclass(frozen=True, slots=True)
class Lines:
    """``properties`` for config.properties, and for each archive, by file name, the text of its model-config.yaml."""

    properties: Mapping[str, str]
    archives: Mapping[str, str]


def lines(answers: Sequence[Result], present: Mapping[str, str] = MappingProxyType({})) -> Lines:
    """Return what to set, merged with ``present``, the properties of the file that it is meant for.

    A batch of 1 has no delay. Where an archive has a model-config.yaml of its own, that one wins over ``models``. Cores
    of several models can be told apart by their archives alone.

    Raises:
        ValueError: ``models`` in the file is not the JSON that TorchServe reads.
    """
    try:
        models = strict(model_map(parse(present.get("models", ""))) or {})
    except GsonError as error:
        raise ValueError(f"models: not the JSON that TorchServe reads: {error}; correct that line") from error
    for answer in answers:
        versions = models[answer.name] = models.get(answer.name) or {}
        version = versions.setdefault(answer.version, {})
        version |= {"marName": answer.profile.archive} | _settings(answer.choice)
    arguments = OWN_CORES.sub("", present.get("cpu_launcher_args", ""))
    if len(answers) == 1:
        arguments += f" --ncores-per-instance {answers[0].choice.threads}"
    properties = {
        "cpu_launcher_enable": "true",
        "cpu_launcher_args": arguments.strip(),
        "models": json.dumps(models),
    }
    if not properties["cpu_launcher_args"] and "cpu_launcher_args" not in present:
        del properties["cpu_launcher_args"]
    archives = {
        answer.profile.archive: yaml.safe_dump(archive_settings(answer.choice), sort_keys=False) for answer in answers
    }
    return Lines(properties, archives)


def write(path: Path, lines: Lines) -> Path | None:
    """Set the properties in the file at ``path`` and return where the old one is kept; None: there is none, or it fits.

    All other lines stay as they are. The file changes at once or not at all.

    Raises:
        CommandError: it cannot be read, kept or written; it is then as it was.
    """
    path = path.resolve()  # a link stays one
    draft, kept = path.with_name(f".{path.name}.{os.getpid()}"), None
    try:
        old = path.read_bytes() if path.exists() else None
        new = _merged(old or b"", lines.properties)
        if new == old:
            return None
        with draft.open("xb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            shutil.copymode(path, draft)
            kept = keep(path)
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
            if kept:
                kept.unlink()
        raise CommandError(
            f"{path}: not written, it is as it was: {error.strerror}; paste the lines, or name another file"
        ) from error
    return kept


def archive_settings(choice: Choice) -> dict[str, Any]:
    """Return what a choice means in an archive's model-config.yaml."""
    return _settings(choice) | {"cpu": {"cores": choice.threads}}


def _settings(choice: Choice) -> dict[str, int]:
    settings = {"minWorkers": choice.workers, "maxWorkers": choice.workers, "batchSize": choice.batch}
    return settings | ({"maxBatchDelay": choice.batch_delay_ms} if choice.batch > 1 else {})


def _merged(old: bytes, properties: Mapping[str, str]) -> bytes:
    """Return the file with ``properties`` set: in their old place, else at the end."""
    text = old.decode("latin-1")  # as Java reads it; every byte comes back as it was
    end = "\r\n" if "\r\n" in text else "\n"
    left = {key: f"{key}={value.replace(chr(92), chr(92) * 2)}{end}" for key, value in properties.items()}
    ready, result = dict(left), []
    for element in javaproperties.parse(text):
        key = element.key if isinstance(element, javaproperties.KeyValue) else ""
        result.append(ready.get(key, element.source))
        left.pop(key, None)
    if result and left and not result[-1].endswith(("\r", "\n")):
        result.append(end)
    return "".join([*result, *left.values()]).encode("latin-1")


def keep(path: Path) -> Path:
    """Give a file a second name beside it that is free, and return that.

    Raises:
        OSError: it cannot be kept.
    """
    number = 1
    while True:
        kept = path.with_name(path.name + BEFORE + (f"-{number}" if number > 1 else ""))
        try:
            os.link(path, kept)
            return kept
        except FileExistsError:
            number += 1
        except OSError:  # a file system without hard links
            try:
                shutil.copy2(path, kept)
            except OSError:
                kept.unlink(missing_ok=True)
                raise
            return kept
