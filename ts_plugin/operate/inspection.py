"""What the doctor knows: one look at this machine, its TorchServe installation and a config.properties."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from ts_plugin.leases.environment import COLLAPSING, prepare_environment
from ts_plugin.leases.ledger import Ledger, LedgerError, State
from ts_plugin.leases.unbound import JAR, Unbound, unbound_workers
from ts_plugin.machine import discovery, process
from ts_plugin.machine.discovery import DiscoveryError
from ts_plugin.machine.topology import Allowance, Topology
from ts_plugin.operate.config import PLUGIN, Config, read_config
from ts_plugin.planning.planner import Slice
from ts_plugin.planning.policy import LauncherArgsError, parse_launcher_args

__all__ = ["Inspection", "Interpreter", "inspect"]

BUSY = 0.2  # of one CPU: below it another process is no trouble
SAMPLE = 0.5  # seconds over which the CPU time of other processes is measured


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that TorchServe runs workers with, and which of the modules that they need it does not find."""

    path: str
    missing: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that the checks look at; None where there is nothing, or where it cannot be read.

    ``plugins`` are the jars in plugins_path, ``models`` the number of models loaded at start, ``absent`` the properties
    that name files which are not there, with these files, ``preload_notes`` what the launcher would say of libraries,
    ``ledger`` the file of ``state``, ``unbound`` the workers without a lease in it, ``astray`` the workers (PID, number
    of threads) with threads whose mask reaches outside their slice, ``busy`` other processes (PID, name, mask, used
    share of one CPU).
    """

    system: str = "Linux"
    java: str | None = None
    torchserve: str | None = None
    interpreter: Interpreter | None = None
    config: Config | None = None
    jar: bool = True
    plugins: frozenset[str] | None = None
    models: int | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    topology: Topology | None = None
    allowance: Allowance | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    preload_notes: tuple[str, ...] = ()
    state: State = field(default_factory=State)
    ledger: str = ""
    ledger_error: str | None = None
    unbound: tuple[Unbound, ...] = ()
    astray: tuple[tuple[int, int], ...] = ()
    busy: tuple[tuple[int, str, frozenset[int], float], ...] = ()

    @property
    def cores(self) -> int:
        """Return the number of cores that workers may use."""
        return len(self.topology.cores_of(self.allowance.cpus)) if self.topology and self.allowance else 0


def inspect(path: Path | None) -> Inspection:
    """Look at this machine and at the config.properties at ``path``; takes about a second.

    Raises:
        OSError: the file cannot be read.
    """
    environment = dict(os.environ)
    config = read_config(path, environment) if path else None
    topology = allowance = None
    with suppress(DiscoveryError):
        topology, allowance = discovery.read_topology(), discovery.read_allowance()
    state, ledger_path, ledger_error = State(), "", None
    try:
        ledger = Ledger()
        ledger_path = ledger.path
        with ledger.locked():  # a directory that can be read only is of no use to workers
            pass
        state = ledger.read()
    except LedgerError as error:
        ledger_error = str(error)
    unbound = tuple(unbound_workers(state)) if ledger_path else ()
    models = _models(config) if config else None
    return Inspection(
        system=platform.system(),
        java=_java_version(environment),
        torchserve=_version("torchserve"),
        interpreter=_find_interpreter(),
        config=config,
        jar=zipfile.is_zipfile(PLUGIN / JAR),
        plugins=_jars(config.get("plugins_path")) if config else None,
        models=len(models) if models is not None else None,
        absent=_absent(config, models or ()) if config else {},
        topology=topology,
        allowance=allowance,
        environment=environment,
        preload_notes=tuple(_preload_notes(environment, config)),
        state=state,
        ledger=ledger_path,
        ledger_error=ledger_error,
        unbound=unbound,
        astray=tuple(_astray(state)),
        busy=tuple(_busy(state, unbound)),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _java_version(environment: Mapping[str, str]) -> str | None:
    home = environment.get("JAVA_HOME")
    java = f"{home}/bin/java" if home else "java"
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "([^"]+)"', answer.stderr)
    return match[1] if match else None


def _find_interpreter() -> Interpreter | None:
    """Return the interpreter behind the command torchserve, which hands itself to the frontend (--python)."""
    command = shutil.which("torchserve") or shutil.which("torchserve", path=str(Path(sys.executable).parent))
    if command is None:
        return None
    with Path(command).open("rb") as file:
        first = file.readline(4096)
    words = os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
    path = words[-1] if words and not words[0].endswith("/sh") else sys.executable
    question = "import importlib.util as u, json; print(json.dumps([n for n in {!r} if u.find_spec(n) is None]))"
    modules = ("torch", "ts", "yaml", "psutil", "ts_plugin")
    try:
        answer = subprocess.run(
            [path, "-I", "-c", question.format(modules)], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return Interpreter(path, frozenset(modules))
    return Interpreter(path, frozenset(json.loads(answer.stdout)))


def _jars(path: str) -> frozenset[str] | None:
    directory = Path(path.removesuffix("*"))
    try:
        return frozenset(file.name for file in directory.iterdir() if file.suffix == ".jar") if path else None
    except OSError:
        return None


def _models(config: Config) -> tuple[str, ...] | None:
    """Return the models that the server loads at start, as load_models names them; None where that cannot be said.

    Source: org.pytorch.serve.ModelServer (initModelStore).
    """
    wanted = config.get("load_models")
    if wanted.lower() != "all":
        names = (entry.rpartition("=")[2] if "://" not in entry else entry for entry in wanted.split(","))
        return tuple(name for name in names if name and name.lower() != "none")
    store = config.get("model_store")
    try:
        files = [file for file in Path(store).iterdir() if not file.name.startswith(".")] if store else None
    except OSError:
        return None
    if files is None:
        return None
    return tuple(file.name for file in files if file.is_dir() or file.name.endswith((".mar", ".model", ".tar.gz")))


def _absent(config: Config, models: Sequence[str]) -> dict[str, str]:
    """Return what the file names and is not there; an address to fetch a model from is not tried."""
    store, metrics = config.get("model_store"), config.get("metrics_config")
    absent = {}
    if store and not os.path.isdir(store):
        absent["model_store"] = store
    elif store:
        missing = [name for name in models if "://" not in name and not os.path.exists(os.path.join(store, name))]
        if missing:
            absent["load_models"] = ", ".join(missing)
    if metrics and not os.path.isfile(metrics):
        absent["metrics_config"] = metrics
    return absent


def _preload_notes(environment: Mapping[str, str], config: Config | None) -> list[str]:
    """Return what the launcher would say about the libraries that it is to preload into workers."""
    try:
        policy = parse_launcher_args(config.get("cpu_launcher_args") if config else "")
    except LauncherArgsError:
        return []
    draft = {name: value for name, value in environment.items() if name not in COLLAPSING}
    nothing = Slice(cpus=(), threads=1, numa_nodes=(), l3_domains=(), packages=())
    return prepare_environment(draft, nothing, policy, library_roots=(sys.prefix,))


def _astray(state: State) -> Iterator[tuple[int, int]]:
    for lease in state.leases:
        masks = [mask for tid in process.threads(lease.pid) if (mask := _mask(tid))]
        allowed = lease.slice.reach.union(lease.slice.cpus)  # a request may borrow
        outside = sum(1 for mask in masks if not mask <= allowed)
        if outside:
            yield lease.pid, outside


def _mask(tid: int) -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(tid))
    except OSError:
        return frozenset()


def _busy(state: State, unbound: tuple[Unbound, ...]) -> Iterator[tuple[int, str, frozenset[int], float]]:
    """Yield processes that belong to no server, to no worker and not to this one, with the CPU time that they take.

    A worker of another ledger is one of them: nothing keeps its slice off ours.
    """
    ours = {os.getpid(), os.getppid(), *(worker.pid for worker in unbound if not worker.elsewhere)}
    for root in (*(server.pid for server in state.servers), *(lease.pid for lease in state.leases)):
        ours.update(process.tree(root))
    others = [other for other in psutil.process_iter() if other.pid not in ours]
    before, start = {other.pid: _cpu_seconds(other) for other in others}, time.monotonic()
    time.sleep(SAMPLE)
    after, seconds = {other.pid: _cpu_seconds(other) for other in others}, time.monotonic() - start
    for pid, used in after.items():
        share = (used - before[pid]) / seconds
        if share >= BUSY and (mask := _mask(pid)):
            yield pid, Path((process.command_line(pid) or ["?"])[0]).name, mask, share


def _cpu_seconds(other: psutil.Process) -> float:
    """Return the CPU time that a process has used, 0 if it ended."""
    try:
        times = other.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system
