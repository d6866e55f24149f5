"""A model archive (.mar): what it says of itself, and a copy of it with other settings."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Archive", "ArchiveError", "config_text", "copy_with", "read_archive"]

MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG = "model-config.yaml"


class ArchiveError(ValueError):
    """The file is no archive that TorchServe could load; the message starts with its path and ends with the remedy."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A .mar file. ``model`` is the name under which TorchServe serves it.

    ``settings`` are its model-config.yaml, ``config`` the name of that file in it, if it has one. ``digest`` names its
    content, ``torchscript`` is whether its serialized file is a TorchScript model.
    """

    path: Path
    model: str
    version: str
    torchscript: bool
    settings: Mapping[str, Any]
    config: str | None
    digest: str


def read_archive(path: Path) -> Archive:
    """Return what the archive says.

    Raises:
        ArchiveError: it is no archive, or a part of it is missing or wrong.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    try:
        with zipfile.ZipFile(path) as parts:
            manifest = json.loads(parts.read(MANIFEST))["model"]
            name, handler = str(manifest["modelName"]), str(manifest["handler"])
            version = str(manifest.get("modelVersion", "1.0"))
            config = manifest.get("configFile")
            settings = yaml.safe_load(parts.read(config)) or {} if config else {}
            serialized = str(manifest.get("serializedFile", ""))
            torchscript = bool(serialized and not manifest.get("modelFile") and _is_torchscript(parts, serialized))
            damaged = parts.testzip()
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"{path}: no model archive ({error}); make one with torch-model-archiver") from error
    except KeyError as error:
        told = " ".join(str(error.args[0]).split())
        raise ArchiveError(f"{path}: broken archive: {told}; make it again with torch-model-archiver") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ArchiveError(f"{path}: broken archive: {told}; make it again with torch-model-archiver") from error
    if damaged or not handler or not isinstance(settings, dict):
        told = f"{damaged} is damaged" if damaged else f"{config} holds no keys" if handler else "it names no handler"
        raise ArchiveError(f"{path}: broken archive: {told}; make it again with torch-model-archiver")
    if settings.get("asyncCommunication"):
        raise ArchiveError(
            f"{path}: its handler is asynchronous (asyncCommunication); such requests cannot be profiled"
        )
    return Archive(path, name, version, torchscript, settings, config, digest.hexdigest())


def _is_torchscript(parts: zipfile.ZipFile, name: str) -> bool:
    """Tell whether the file is what torch.jit.save writes: a ZIP file of its own with code in it."""
    if not name.endswith((".pt", ".pth")):
        return False
    with parts.open(name) as stream:
        try:
            with zipfile.ZipFile(stream) as inner:
                return any("/code/" in member for member in inner.namelist())
        except zipfile.BadZipFile:
            return False


def config_text(archive: Archive, settings: Mapping[str, Any]) -> str:
    """Return the archive's model-config.yaml with ``settings`` in it.

    A section such as ``cpu`` is merged; None removes a key.
    """
    merged = dict(archive.settings)
    for key, value in settings.items():
        before = merged.pop(key, None)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = {**before, **value}
        if value is not None:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return str(yaml.safe_dump(merged, sort_keys=False))


def copy_with(archive: Archive, target: Path, settings: Mapping[str, Any]) -> Path:
    """Write a copy of the archive with ``settings`` in its model-config.yaml to ``target``, and return that.

    Raises:
        OSError: it cannot be written.
    """
    config = archive.config or CONFIG
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
                        while block := old.read(1 << 20):
                            new.write(block)
            copy.writestr(config, config_text(archive, settings))
        return draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
