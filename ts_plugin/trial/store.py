"""What was measured so far, kept in a file: an interrupted trial goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from ts_plugin import __version__
from ts_plugin.trial.room import Room

FORMAT = 1  # of the file; one of another format counts as absent


def cache_directory() -> Path:
    """Return where everything is kept that can be made again: ``$XDG_CACHE_HOME/ts-cores``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ts-cores"


def key(parts: Iterable[object]) -> str:
    """Return a file name for what a measurement depends on: archive, body, machine, versions."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:20]


class Store:
    """Named lists of measurements. Every ``add`` is on disk when it returns: a killed tuner loses one piece of work."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self._data: dict[str, Any] = {"format": FORMAT}
        if not fresh:
            try:
                data = json.loads(path.read_text())
                if data["format"] == FORMAT:
                    self._data = data
            except (OSError, ValueError, KeyError, TypeError):
                pass

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def get(self, name: str, default: Any = None) -> Any:
        return self._data.get(name, default)

    def rounds(self, name: str) -> list[Any]:
        """Return what was added under ``name``, oldest first."""
        return list(self._data.get("rounds", {}).get(name, ()))

    def names(self) -> list[str]:
        return list(self._data.get("rounds", {}))

    def set(self, name: str, value: Any) -> None:
        """Keep one value.

        Raises:
            OSError: the file cannot be written.
        """
        self._data[name] = value
        self._save()

    def add(self, name: str, value: Any) -> None:
        """Keep one more measurement under ``name``; raises what ``set`` raises."""
        self._data.setdefault("rounds", {}).setdefault(name, []).append(value)
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.write_text(json.dumps(self._data))
        draft.replace(self.path)


def where(room: Room) -> list[object]:
    """Return the part of a key that every measurement on the cores of ``room`` depends on: versions and the machine."""
    return [
        __version__,
        metadata.version("torch"),
        platform.node(),
        platform.machine(),
        sorted(room.cpus),
        room.quota,
    ]
