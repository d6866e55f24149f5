"""What the doctor knows: one look at this machine, its TorchServe installation and a config.properties."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from ts_plugin.config.file import PLUGIN, Config, read_config
from ts_plugin.config.properties import listening, on
from ts_plugin.config.served import Startup, Stored, java_cpus, read_store, startup, wanted
from ts_plugin.kernel import affinity
from ts_plugin.ledger.directory import LedgerError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import State
from ts_plugin.ledger.unbound import JAR, Unbound, unbound_workers
from ts_plugin.lending import library
from ts_plugin.machine import discovery, process
from ts_plugin.machine.discovery import DiscoveryError
from ts_plugin.machine.topology import Allowance, Topology
from ts_plugin.planning.policy import LauncherArgsError, Policy, parse_launcher_args
from ts_plugin.worker.environment import preload

BUSY = 0.2  # of one CPU: below it another process is no trouble
KEYS = ("private_key_file", "certificate_file", "keystore")
SAMPLE = 0.5  # seconds over which the CPU time of other processes is measured


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that TorchServe runs workers with, and which of the modules that they need it does not find."""

    path: str
    missing: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that the checks look at; None where there is nothing, or where it cannot be read.

    ``found``: torchserve itself would find ``config``, without being told where. ``plugins`` are the jars in
    plugins_path, ``store`` the archives that the file names, by address, ``absent`` the properties that name files
    which are not there, with these files, ``unusable`` the properties that name an address, a port or a key which
    TorchServe cannot use here, with the reason, ``gpus`` the number of GPUs that it finds,
    ``preload_notes`` what the launcher would say of libraries, ``ledger`` the file of ``state``, ``unbound`` the
    workers without a lease in it, ``astray`` the workers (PID, number of threads) with threads whose mask reaches
    outside their slice, ``busy`` other processes (PID, name, mask, used share of one CPU), ``no_lending`` why the
    library that lends cores cannot be used.
    """

    java: str | None = None
    torchserve: str | None = None
    interpreter: Interpreter | None = None
    config: Config | None = None
    found: bool = False
    jar: bool = True
    plugins: frozenset[str] | None = None
    store: Mapping[str, Stored] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 0
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
    no_lending: str = ""

    @property
    def cores(self) -> int:
        """Return the number of cores that workers may use."""
        return len(self.topology.cores_of(self.allowance.cpus)) if self.topology and self.allowance else 0

    @property
    def policy(self) -> Policy:
        return policy_of(self.config)

    @property
    def java_cpus(self) -> int:
        """Return how many CPUs the JVM counts."""
        if self.allowance is None:
            return 1
        options = java_options(self.environment, self.config)
        return java_cpus(len(self.allowance.cpus), self.allowance.quota, options)

    @property
    def startup(self) -> Startup:
        """Return which models would start with how many workers."""
        return startup(self.config, self.store, cpus=self.java_cpus, gpus=self.gpus) if self.config else Startup()


def policy_of(config: Config | None) -> Policy:
    """Return what cpu_launcher_args asks for, the default where it cannot be read: a check says so."""
    try:
        return parse_launcher_args(config.get("cpu_launcher_args") if config else "")
    except LauncherArgsError:
        return Policy()


def java_options(environment: Mapping[str, str], config: Config | None) -> str:
    """Return all words that the JVM is started with, in the order in which it reads them."""
    before = (environment.get(name, "") for name in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS"))
    words = (*before, config.get("vmargs") if config else "", environment.get("_JAVA_OPTIONS", ""))
    return " ".join(words)


def inspect(path: Path | None, *, found: bool = False) -> Inspection:
    """Look at this machine and at the config.properties at ``path``; takes about a second.

    ``found``: torchserve would find the file without being told where it is.

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
    store: Mapping[str, Stored] = {}
    if config:
        with suppress(OSError):
            store = read_store(config)
    return Inspection(
        java=_java_version(environment),
        torchserve=_version("torchserve"),
        interpreter=_find_interpreter(),
        config=config,
        found=found,
        jar=zipfile.is_zipfile(PLUGIN / JAR),
        plugins=_jars(config.get("plugins_path")) if config else None,
        store=store,
        absent=_absent(config, store) if config else {},
        unusable=unusable(config.properties) if config else {},
        gpus=count_gpus(environment),
        topology=topology,
        allowance=allowance,
        environment=environment,
        preload_notes=tuple(preload(dict(environment), policy_of(config), (sys.prefix,))),
        no_lending=_no_lending(),
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


def _absent(config: Config, archives: Mapping[str, Stored]) -> dict[str, str]:
    """Return what the file names and is not there; an address to fetch a model from is not tried."""
    store, metrics = config.get("model_store"), config.get("metrics_config")
    absent = {}
    if store and not os.path.isdir(store):
        absent["model_store"] = store
    elif store and "model_snapshot" not in config.properties:
        urls = [url for _, url in wanted(config.properties, ()) if url.lower() != "none"]
        missing = [repr(url) if url != url.strip() else url for url in urls if url not in archives]
        if missing:
            absent["load_models"] = ", ".join(missing)
    if metrics and not os.path.isfile(metrics):
        absent["metrics_config"] = metrics
    return absent


def unusable(properties: Mapping[str, str]) -> dict[str, str]:
    """Return the properties that name a place where nothing can listen here, or a key that cannot be read."""
    reasons: dict[str, str] = {}
    places = listening(properties)
    for name, place in places.items():
        if place.path:
            if not os.path.isdir(directory := os.path.dirname(place.path)):
                reasons[name] = f"there is no directory {directory}"
            continue
        if problem := _port_problem(place.port):
            reasons[name] = problem
        if problem := _host_problem(place.host):
            reasons[name.replace("port", "address")] = problem
    tls = on(properties, "enable_grpc_ssl") or any(place.tls for place in places.values())
    keys = ("keystore",) if "keystore" in properties and not on(properties, "enable_grpc_ssl") else KEYS
    for name in keys if tls else ():
        if name in properties and not os.access(properties[name], os.R_OK):
            reasons[name] = f"{properties[name]} is not there, or not to be read"
    return reasons


def _port_problem(port: int) -> str:
    """Return why this user may not listen on a port, empty if it may; whether somebody else does is not asked."""
    first = process.first_open_port()
    if not 0 < port < first:
        return ""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except PermissionError:
        return (
            f"user {os.geteuid()} may not listen on port {port}; take one from {first} on, or lower "
            f"net.ipv4.ip_unprivileged_port_start to {port}, or start the server with CAP_NET_BIND_SERVICE"
        )
    except OSError:
        pass  # it is taken, perhaps by the very server
    return ""


def _host_problem(host: str) -> str:
    """Return why no server can listen at ``host``, empty if one can."""
    if "*" in host or any(letter.isspace() for letter in host):
        return f"{host!r} is no host"
    problem = "it has no address"
    try:
        places = socket.getaddrinfo(host.strip("[]") or "127.0.0.1", 0, type=socket.SOCK_STREAM)
    except UnicodeError:  # which is no OSError
        return f"{host!r} is no host: a part between its dots is empty, or has more than 63 letters"
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    for family, kind, _, _, place in places:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(place)
                return ""
        except OSError as error:
            problem = f"{host} is no address of this machine: {error.strerror or error}"
    return problem


def count_gpus(environment: Mapping[str, str]) -> int:
    """Return the number of GPUs that TorchServe finds. Source: ConfigManager (getAvailableGpu)."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return len(visible.split(","))
    found = 0
    for command in (["nvidia-smi", "--query-gpu=index", "--format=csv"], ["xpu-smi", "discovery", "--dump", "1"]):
        if shutil.which(command[0]) is None:
            continue
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return 0
        found += max(0, len(answer.stdout.splitlines()) - 1)
    return found


def _no_lending() -> str:
    try:
        library.load()
    except library.LibraryError as error:
        return str(error)
    return ""


def _astray(state: State) -> Iterator[tuple[int, int]]:
    for lease in state.leases:
        allowed = lease.slice.reach.union(lease.slice.cpus)  # a request may borrow
        if outside := affinity.outside(lease.pid, allowed):
            yield lease.pid, outside


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
        if share >= BUSY and (mask := affinity.mask(pid)):
            yield pid, Path((process.command_line(pid) or ["?"])[0]).name, mask, share


def _cpu_seconds(other: psutil.Process) -> float:
    """Return the CPU time that a process has used, 0 if it ended."""
    try:
        times = other.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system
