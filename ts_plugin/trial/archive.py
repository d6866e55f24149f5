"""A model archive (.mar): what it says of itself, and a copy of it with other settings."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ts_plugin.errors import CommandError

MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG = "model-config.yaml"


@dataclass(frozen=True, slots=True)
class Archive:
    """A .mar file. ``model`` is the name under which TorchServe serves it.

    ``settings`` are its model-config.yaml, ``config`` the name of that file in it, if it has one. ``digest`` names its
    content.
    """

    path: Path
    model: str
    version: str
    settings: Mapping[str, Any]
    config: str | None
    digest: str


def read_archive(path: Path) -> Archive:
    """Return what the archive says.

    Raises:
        CommandError: it is no archive that TorchServe could load, or one that cannot be profiled.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with zipfile.ZipFile(path) as parts:
            manifest = json.loads(parts.read(MANIFEST))["model"]
            name, handler = str(manifest["modelName"]), str(manifest["handler"])
            version = str(manifest.get("modelVersion", "1.0"))
            config = manifest.get("configFile")
            settings = yaml.safe_load(parts.read(config)) or {} if config else {}
            if damaged := parts.testzip():
                raise ValueError(f"{damaged} is damaged")
            if not handler:
                raise ValueError("it names no handler")
            if not isinstance(settings, dict):
                raise ValueError(f"{config} holds no keys")
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise CommandError(f"{path}: no model archive: {told}; make it again with torch-model-archiver") from error
    if settings.get("asyncCommunication"):
        raise CommandError(
            f"{path}: its handler is asynchronous (asyncCommunication); such requests cannot be profiled"
        )
    return Archive(path, name, version, settings, config, digest)


def copy_with(archive: Archive, target: Path, settings: Mapping[str, Any]) -> Path:
    """Write a copy of the archive with ``settings`` in its model-config.yaml to ``target``, and return that.

    A section such as ``cpu`` is merged.

    Raises:
        OSError: it cannot be written.
    """
    config = archive.config or CONFIG
    merged = dict(archive.settings)
    for key, value in settings.items():
        before = merged.get(key)
        merged[key] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
    draft = target.with_name(f".{target.name}.draft")
    try:
        with zipfile.ZipFile(archive.path) as source, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as copy:
            for part in source.infolist():
                if part.filename == MANIFEST:
                    manifest = json.loads(source.read(part))
                    manifest["model"]["configFile"] = config
                    copy.writestr(MANIFEST, json.dumps(manifest, indent=2))
                elif part.filename != config and not part.is_dir():
                    with source.open(part) as old, copy.open(part.filename, "w", force_zip64=True) as new:
                        shutil.copyfileobj(old, new, 1 << 20)
            copy.writestr(config, yaml.safe_dump(merged, sort_keys=False))
        return draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
