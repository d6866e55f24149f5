"""What an archive says of itself: its name, and the ``cpu:`` section of its model-config.yaml."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

GUESS = "the model's name is a guess"  # the end of a note, until TorchServe loads the model and says its name


@dataclass(frozen=True, slots=True)
class Wishes:
    """What an extracted archive says: which model it is, and the ``cores`` or the ``share`` that it wishes for.

    ``cores`` is 0 for the functions of a workflow, which own none unless they ask.
    """

    model: str
    version: str
    cores: int | None = None
    share: float = 1.0
    notes: tuple[str, ...] = ()


def read_archive(directory: str) -> Wishes:
    """Return what the archive extracted in ``directory`` says; what cannot be read or granted becomes a note.

    A workflow speaks for its functions; its models have archives of their own. A function hardly computes, between the
    models of one request: it owns no core unless the workflow's specification has a section ``cpu:``, which holds for
    each worker of each function.
    Source: org.pytorch.serve.ensemble.WorkFlow reads ``models`` and ``dag`` from the specification, nothing else.
    """
    workflow = os.path.isdir(f"{directory}/WAR-INF")
    folder, kind, settings, unasked = (
        ("WAR-INF", "workflow", "specFile", 0) if workflow else ("MAR-INF", "model", "configFile", None)
    )
    path = f"{directory}/{folder}/MANIFEST.json"
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)[kind]
        name, version = str(manifest[f"{kind}Name"]), str(manifest.get("modelVersion", "1.0"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Wishes(os.path.basename(directory), "1.0", unasked, notes=(f"{path}: {error}; {GUESS}",))
    if not manifest.get(settings):
        return Wishes(name, version, unasked)
    return Wishes(name, version, *_wishes(f"{directory}/{manifest[settings]}", unasked))


def _wishes(path: str, unasked: int | None) -> tuple[int | None, float, tuple[str, ...]]:
    """Return (cores, share, notes) from the ``cpu:`` section of a YAML file; ``unasked`` are the cores without one."""
    otherwise = "the section has no effect" if unasked is None else "the function owns no core"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if not _mentions_cpu(text):
            return unasked, 1.0, ()
        import yaml  # costs 20 ms of worker start, so only for archives that have the section

        keys = yaml.safe_load(text)
        if not isinstance(keys, dict):
            raise ValueError(f"the file must hold keys, not a {type(keys).__name__}")
        section = keys.get("cpu")
        if section is None or section == {}:
            return unasked, 1.0, ()
        return (*read_wishes(section), ())
    except Exception as error:  # noqa: BLE001 - PyYAML's errors are its own, and the model is served in any case
        return unasked, 1.0, (f"{path}: {' '.join(str(error).split())}; {otherwise}",)


def _mentions_cpu(text: str) -> bool:
    """Tell whether a key of that name may be in a YAML file, however it is written: ``"cpu" : {cores: 4}``."""
    return any(rest.lstrip("'\" \t\r\n").startswith(":") for rest in text.split("cpu")[1:])


def read_wishes(section: object) -> tuple[int | None, float]:
    """Return (cores, share) of the ``cpu:`` section of an archive's model-config.yaml.

    Raises:
        ValueError: it is no such section.
    """
    if section is None:
        return None, 1.0
    if not isinstance(section, dict):
        raise ValueError(f"cpu: must be a section such as {{cores: 4}} or {{share: 2}}, not {section!r}")
    unknown = [str(key) for key in section if key not in ("cores", "share", "profile")]
    if unknown:
        raise ValueError(f"cpu: has no {min(unknown)!r}; it takes 'cores: N' or 'share: X'")
    read_profile(section)
    cores, share = section.get("cores"), section.get("share", 1.0)
    if cores is not None and (not isinstance(cores, int) or isinstance(cores, bool) or cores < 1):
        raise ValueError(f"cpu.cores must be a whole number of at least 1, not {cores!r}")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
        raise ValueError(f"cpu.share must be a number above 0, not {share!r}")
    return cores, float(share)


def read_profile(section: object) -> dict[int, float]:
    """Return what the ``cpu:`` section says that a request takes: cores -> seconds; nothing where it says nothing.

    Raises:
        ValueError: it is no such table.
    """
    profile = section.get("profile") if isinstance(section, dict) else None
    if profile is None:
        return {}
    good = isinstance(profile, dict) and all(
        type(cores) is int and cores > 0 and type(seconds) in (int, float) and 0 < seconds < float("inf")
        for cores, seconds in profile.items()
    )
    if not good:
        raise ValueError(f"cpu.profile must be seconds by cores, such as {{1: 0.09, 2: 0.055}}, not {profile!r}")
    return {cores: float(seconds) for cores, seconds in profile.items()}
