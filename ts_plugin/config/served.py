"""Which models TorchServe loads at its start, with how many workers each, and what about them ends the start.

Source: org.pytorch.serve.ModelServer (initModelStore), wlm.ModelManager (createModel), wlm.WorkLoadManager
(modelChanged), snapshot.SnapshotManager (restore), archive.model.ModelArchive and ModelConfig, util.ConfigManager
(getDefaultWorkers, getJsonIntValue); tests/test_verdict.py asks these classes themselves.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ts_plugin.config.file import Config
from ts_plugin.config.gson import GsonError, Pairs, as_int, java_int, model_map, parse
from ts_plugin.config.properties import INTEGERS, Fault, on, pattern_problem
from ts_plugin.machine.words import count
from ts_plugin.worker.archive import read_wishes

RUNTIMES = ("python", "python3", "LSP")
JAVA_FLAG = re.compile(r"-XX:(?:ActiveProcessorCount=(\d+)|([-+])UseContainerSupport)")


@dataclass(frozen=True, slots=True)
class Stored:
    """An archive that load_models or a snapshot names.

    ``settings`` are its model-config.yaml, None where it has none that can be read; ``fatal`` says why the one that it
    has ends TorchServe's start. Nothing is known of one that would be fetched from an address.
    """

    model: str
    version: str = "1.0"
    settings: Mapping[str, Any] | None = None
    fatal: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is loaded at the start: ``workers`` of it start, as ``source`` says.

    ``most`` is its maxWorkers where it says one, else 0; ``cores`` and ``share`` are what its archive wishes for each
    worker.
    """

    model: str
    version: str
    workers: int
    source: str
    most: int
    cores: int | None = None
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Startup:
    """What becomes of a start: the models, what ends it, and what TorchServe overlooks without a word."""

    served: tuple[Served, ...] = ()
    refusals: tuple[Fault, ...] = ()
    overlooked: tuple[Fault, ...] = ()


def java_cpus(cpus: int, quota: float | None, options: str) -> int:
    """Return how many CPUs the JVM counts: those that it may use, or its CFS quota, rounded up.

    ``options`` are all that reach the JVM, such as ``vmargs``; of two that contradict the last counts.
    Source: OpenJDK 17, os::active_processor_count, CgroupSubsystem::active_processor_count.
    """
    fixed, follows = 0, True
    for number, sign in JAVA_FLAG.findall(options):
        if number:
            fixed = int(number)
        else:
            follows = sign == "+"
    return fixed or (max(1, min(cpus, math.ceil(quota))) if follows and quota is not None else cpus)


def default_workers(properties: Mapping[str, str], cpus: int, gpus: int) -> tuple[int, str]:
    """Return the number of workers of a model that says nothing itself, and where the number comes from.

    ``cpus`` are those that the JVM counts, ``gpus`` those that TorchServe finds.
    """
    if on(properties, "debug"):
        return 1, "debug=true"
    configured = java_int(properties.get("default_workers_per_model", "0"))
    if configured:
        return configured, "default_workers_per_model"
    gpus = min(gpus, number if (number := java_int(properties.get("number_of_gpu", ""))) is not None else gpus)
    return (gpus, "one per GPU") if gpus else (cpus, "one per CPU")


def wanted(properties: Mapping[str, str], store: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, address in the model store or elsewhere) of each model to load; ``store`` lists the model store.

    The name is empty where the archive itself says it. A snapshot names what to load in another way.
    """
    text = properties.get("load_models", "")
    if text.lower() == "all":
        return [("", file) for file in store if not file.startswith(".")]
    pairs = (entry.partition("=") if "=" in entry else ("", "", entry) for entry in text.split(","))
    return [(name, url) for name, _, url in pairs if url]


def snapshot_archives(properties: Mapping[str, str]) -> list[str]:
    """Return the archives that a snapshot in the file names, [] where it cannot be read."""
    try:
        models = model_map(dict(parse(properties.get("model_snapshot", "")) or ()).get("models")) or {}
    except (GsonError, TypeError, ValueError):
        return []
    names = (settings.get("marName") for versions in models.values() for settings in (versions or {}).values())
    return [str(name) for name in names if isinstance(name, str)]


def read_store(config: Config) -> dict[str, Stored]:
    """Return what there is of the models that the file names, by address.

    Raises:
        OSError: the model store, or an archive in it, cannot be read.
    """
    store = config.get("model_store")
    files: list[str] = []
    if store and config.get("load_models").lower() == "all":
        ends = (".mar", ".model", ".tar.gz")
        files = [file.name for file in Path(store).iterdir() if file.is_dir() or file.name.endswith(ends)]
    urls = [url for _, url in wanted(config.properties, files)] + snapshot_archives(config.properties)
    found = ((url, read_stored(store, url)) for url in dict.fromkeys(urls))
    return {url: stored for url, stored in found if stored is not None}


def read_stored(store: str, url: str) -> Stored | None:
    """Return what the archive ``url`` in the directory ``store`` says of itself, None where there is none."""
    name = _default_name(url)
    if "://" in url:
        return Stored(name)
    path = Path(store, re.split(r"[/\\]", url)[-1])
    if not store or ".." in url or not path.exists():
        return None
    try:
        manifest = json.loads(_part(path, "MAR-INF/MANIFEST.json") or b"{}").get("model") or {}
        version = str(manifest.get("modelVersion") or "1.0")
        stored = Stored(str(manifest.get("modelName") or name), version)
        content = _part(path, str(manifest["configFile"])) if manifest.get("configFile") else None
    except tarfile.TarError:
        return None
    except (ValueError, AttributeError):
        return Stored(name)
    return stored if content is None else _with_settings(stored, path, content)


def _with_settings(stored: Stored, path: Path, content: bytes) -> Stored:
    """Add an archive's model-config.yaml; TorchServe overlooks one that is no YAML, and stops at one without keys."""
    try:
        settings = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError):
        return stored
    if not isinstance(settings, dict):
        what = "is empty" if settings is None else f"is a {type(settings).__name__}"
    elif strange := [key for key in settings if not isinstance(key, str)]:
        what = f"has {strange[0]!r}, which is no text"
    else:
        return replace(stored, settings=settings)
    return replace(stored, fatal=f"{path}: its model-config.yaml {what}")


def _default_name(url: str) -> str:
    last = url.rpartition("/")[2]
    stem = last.rpartition(".")[0] if ".mar" in url or ".model" in url else last
    return re.sub(r"\W|^_", "_", stem, flags=re.ASCII)


def _part(path: Path, name: str) -> bytes | None:
    """Return a file of an archive, which may be a directory; None where it has none of that name.

    Raises:
        tarfile.TarError: it is no archive. What is no ZIP file is an empty one for TorchServe.
    """
    try:
        if path.is_dir():
            inner = list(path.iterdir())
            root = inner[0] if len(inner) == 1 and inner[0].is_dir() else path
            return (root / name).read_bytes()
        if path.name.endswith(".mar"):
            with zipfile.ZipFile(path) as archive:
                return archive.read(name)
        with tarfile.open(path) as parts:
            member = next((one for one in parts if one.name.endswith(name)), None)
            file = parts.extractfile(member) if member else None
            return file.read() if file else None
    except (KeyError, FileNotFoundError, zipfile.BadZipFile):
        return None


def startup(config: Config, store: Mapping[str, Stored], *, cpus: int, gpus: int = 0) -> Startup:
    """Return what TorchServe does with ``config``, where ``store`` has the archives that it names, by address."""
    start = _Start(config.properties, store, default_workers(config.properties, cpus, gpus))
    if "model_snapshot" in config.properties:
        start.restore(config.properties["model_snapshot"])
    else:
        start.load()
    return Startup(tuple(start.served), tuple(dict.fromkeys(start.refusals)), tuple(dict.fromkeys(start.overlooked)))


class _Start:
    """One start of the server, step by step; it goes on where TorchServe would stop, to find all reasons at once."""

    def __init__(self, properties: Mapping[str, str], store: Mapping[str, Stored], default: tuple[int, str]) -> None:
        self.properties, self.store = properties, store
        self.default, self.origin = default
        self.served: list[Served] = []
        self.refusals: list[Fault] = []
        self.overlooked: list[Fault] = []
        self.models: Mapping[str, Mapping[str, Mapping[str, Any]] | None] | None = {}
        if "models" in properties:
            try:
                self.models = model_map(parse(properties["models"]))
            except GsonError as error:
                self._refuse(f"models is not the JSON that TorchServe reads: {error}", "correct that line")

    def _refuse(self, what: str, change: str) -> None:
        self.refusals.append(Fault(what, change))

    def _overlook(self, what: str, change: str) -> None:
        self.overlooked.append(Fault(what, change))

    def load(self) -> None:
        """What load_models names."""
        for name, url in wanted(self.properties, list(self.store)):
            for timeout in ("default_response_timeout", "default_startup_timeout"):
                self._check_integer(timeout)
            stored = self.store.get(url)
            if stored and self._is_allowed(url) and self._enter(name or stored.model, stored):
                model = name or stored.model
                self._serve(model, stored, *self._workers(model, stored))

    def restore(self, text: str) -> None:
        """What a snapshot has."""
        line = "model_snapshot"
        try:
            snapshot = parse(text)
            if not isinstance(snapshot, Pairs):
                raise GsonError("it must be an object {...}")
            fields = dict(snapshot)
            number = _gson_int(fields.get("modelCount"), 32)
            _gson_int(fields.get("created"), 64)
            if isinstance(fields.get("name"), list):
                raise GsonError("its name must be a text")
            models = model_map(fields.get("models"))
            if models is None:
                raise GsonError("it has no models")
        except GsonError as error:
            self._refuse(f"{line} is no snapshot that TorchServe reads: {error}", "start from a file without that line")
            return
        for model, versions in models.items():
            if versions is None:
                self._refuse(f"{line}: {model!r} is null", "take the model out, or start without the snapshot")
            for version, settings in (versions or {}).items():
                self._restore(model, version, settings, counted=number > 0)
        if number <= 0 and models:
            self._overlook(f"{line}: its modelCount is {number}, so none of its models is loaded", "start without it")

    def _restore(self, model: str, version: str, settings: Mapping[str, Any], *, counted: bool) -> None:
        where = f"model_snapshot: {model} {version}"
        archive = settings.get("marName")
        stored = self.store.get(archive) if isinstance(archive, str) else None
        if stored is None:
            self._refuse(f"{where}: its archive (marName) {archive!r} is not in model_store", "put it there")
            return
        if not counted or not self._enter(model, stored):
            return
        keys = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay")
        least, most, *_ = (self._snapshot_int(where, settings, key) for key in keys)
        for key in ("responseTimeout", "startupTimeout"):
            if settings.get(key) is not None:
                self._snapshot_int(where, settings, key)
        if "parallelLevel" in settings:
            self._snapshot_int(where, settings, "parallelLevel")
        if settings.get("defaultVersion") is None or isinstance(settings["defaultVersion"], list):
            self._refuse(f"{where}: defaultVersion must be true or false", '"defaultVersion": true')
        if "runtimeType" in settings and settings["runtimeType"] not in RUNTIMES:
            self._refuse(f"{where}: runtimeType is {settings['runtimeType']!r}", '"runtimeType": "python"')
        self._serve(model, stored, least, most, "snapshot")

    def _snapshot_int(self, where: str, settings: Mapping[str, Any], key: str) -> int:
        try:
            number = as_int(settings[key]) if key in settings else None
            if number is not None:
                return number
            problem = "is missing" if key not in settings else "must be a number"
        except GsonError as error:
            problem = f"is {error}, which is no number that Java reads"
        self._refuse(f"{where}: {key} {problem}", f'"{key}": 1')
        return 0

    def _is_allowed(self, url: str) -> bool:
        """Tell whether TorchServe loads from there; what matches a pattern is fetched, even if it is no address.

        It looks for the first pattern that matches, so that one before it which is none ends the start.
        """
        for text in self.properties.get("allowed_urls", "file://.*|http(s)?://.*").split(","):
            if problem := pattern_problem(text):
                self._refuse(f"allowed_urls: {text!r} is no regular expression: {problem}", "correct it")
                return False
            if re.fullmatch(text, url, re.IGNORECASE):
                return "://" in url
        return "://" not in url

    def _check_integer(self, name: str) -> bool:
        if name in self.properties and java_int(self.properties[name]) is None:
            problem = INTEGERS[name].problem(self.properties[name])
            self._refuse(f"{name}={self.properties[name]!r} {problem}", f"{name}={INTEGERS[name].sample}")
            return False
        return True

    def _enter(self, model: str, stored: Stored) -> bool:
        """Go as far as TorchServe does before it looks for the number of workers."""
        if stored.fatal:
            self._refuse(stored.fatal, "write keys into that file, or archive the model without one")
            return False
        if (model, stored.version) in [(one.model, one.version) for one in self.served]:
            self._refuse(f"{model} {stored.version} is loaded twice", "take one of the two archives out")
            return False
        queue = "job_queue_size"
        own = _whole(stored.settings, "jobQueueSize") or 0
        if self._check_integer(queue) and own < 1 and (java_int(self.properties.get(queue, "100")) or 0) < 1:
            self._refuse(f"{queue}={self.properties[queue]!r} is below 1", f"{queue}=100")
        return True

    def _workers(self, model: str, stored: Stored) -> tuple[int, int | None, str]:
        """Return minWorkers, maxWorkers where one is given, and where the first comes from."""
        settings, own = self._in_models(model, stored), stored.settings
        least, most = (self._read(model, stored, settings, key) for key in ("minWorkers", "maxWorkers"))
        if own is not None:
            minimum, maximum = max(1, _whole(own, "minWorkers") or 1), _whole(own, "maxWorkers") or 0
            if _whole(own, "minWorkers") is not None and maximum >= minimum:
                return minimum, maximum, "model-config.yaml"
            if "minWorkers" in own or "maxWorkers" in own:
                both = f"minWorkers: {own.get('minWorkers')!r} and maxWorkers: {own.get('maxWorkers')!r}"
                self._overlook(
                    f"{model}: {both} in its model-config.yaml count for nothing",
                    "write both there, as whole numbers, the second not below the first",
                )
        return least or self.default, most, "models=" if least else self.origin

    def _in_models(self, model: str, stored: Stored) -> Mapping[str, Any]:
        """Return what ``models`` has for a model that is loaded; it is read even where the archive's own file wins."""
        if self.models is None:
            self._refuse("models is null, and so it ends the start with the first model", "models={}")
            return {}
        versions = self.models.get(model, {})
        if versions is None:
            self._refuse(f"models: {model!r} is null", f'"{model}": {{}}')
            return {}
        if versions and stored.version not in versions:
            there = ", ".join(versions)
            self._overlook(f"models has {model} {there}, its archive is {stored.version}", "name that version")
        settings = versions.get(stored.version, {})
        own = stored.settings
        unread = [] if own is None else ["responseTimeout", "startupTimeout"]
        unread += ["batchSize"] if _whole(own, "batchSize") is not None else []
        unread += ["maxBatchDelay"] if (_whole(own, "maxBatchDelay") or 0) > 0 else []
        for key in ("batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout"):
            if key not in unread:
                self._read(model, stored, settings, key)
        kind = settings.get("runtimeType", "python")
        if kind is None or isinstance(kind, Pairs):
            self._refuse(f"models: {model} {stored.version}: runtimeType must be a text", '"runtimeType": "python"')
        return settings

    def _read(self, model: str, stored: Stored, settings: Mapping[str, Any], key: str) -> int | None:
        """Return a number above 0, None where TorchServe takes the default."""
        if key not in settings:
            return None
        where = f"models: {model} {stored.version}: {key}"
        try:
            number = as_int(settings[key])
        except GsonError as error:
            self._refuse(f"{where} is {error}, which is no number that Java reads", f'"{key}": 1')
            return None
        if number is None or number <= 0:
            self._overlook(f"{where} is {settings[key]!r}: the default is taken instead", f'"{key}": 1')
            return None
        return number

    def _serve(self, model: str, stored: Stored, minimum: int, maximum: int | None, source: str) -> None:
        if minimum < 0 and (minimum if maximum is None else maximum) < 0:
            self._refuse(f"{model}: {minimum} workers ({source})", f"{source.rstrip('=')}=1")
        cores, share = None, 1.0
        if stored.settings is not None:
            try:
                cores, share = read_wishes(stored.settings.get("cpu"))
            except ValueError as error:
                self._overlook(f"{model}: {error}; the section has no effect", "correct its model-config.yaml")
        self.served.append(Served(model, stored.version, max(0, minimum), source, maximum or 0, cores, share))


def _whole(settings: Mapping[str, Any] | None, key: str) -> int | None:
    """Return the number that TorchServe finds in a model-config.yaml, where nothing but a whole number counts."""
    value = settings.get(key) if settings is not None else None
    return value if type(value) is int and -(2**31) <= value < 2**31 else None


def _gson_int(value: Any, bits: int) -> int:
    """Return what Gson reads into a Java int or long; it reads null as 0.

    Raises:
        GsonError: it throws.
    """
    if value is None:
        return 0
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        number = math.nan
    if not number.is_integer() or abs(number) >= 2 ** (bits - 1):
        raise GsonError(f"{value!r} is no whole number")
    return int(number)


def describe(served: Sequence[Served]) -> Iterator[str]:
    """Yield ``2 workers for each of bert, bart (models=)`` for all models with one source."""
    groups: dict[tuple[int, str], list[str]] = {}
    for one in served:
        groups.setdefault((one.workers, one.source), []).append(one.model)
    for (workers, source), names in groups.items():
        yield f"{count(workers, 'worker')} for {'each of ' * (len(names) > 1)}{', '.join(names)} ({source})"
