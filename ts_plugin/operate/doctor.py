"""What is wrong on this machine and with this config.properties: facts in, findings out. Nothing is read here."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from ts_plugin.leases import binding
from ts_plugin.leases.coordinator import JAR
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.words import count
from ts_plugin.operate.arguments import MOST_WORKERS
from ts_plugin.operate.inspection import Inspection
from ts_plugin.operate.view import not_judged
from ts_plugin.planning.planner import Demand, PlanError, plan
from ts_plugin.planning.policy import LauncherArgsError, Pin, Policy, parse_launcher_args

__all__ = ["CHECKS", "Finding", "Severity", "examine"]

JAVA_NEEDED = 17
TORCHSERVE_NEEDED = "0.12."


class Severity(StrEnum):
    ERROR = "error"  # workers do not start, or serve unbound
    WARNING = "warning"  # it serves, but slower or less safely than it could
    NOTE = "note"  # worth knowing; nothing to do


@dataclass(frozen=True, slots=True)
class Finding:
    """``what`` is the case, ``why`` it matters, and the ``change`` that cures it: a line to write or a command."""

    severity: Severity
    subject: str
    what: str
    why: str = ""
    change: str = ""


def _system(seen: Inspection) -> Iterator[Finding]:
    if seen.system != "Linux":
        yield Finding(
            Severity.ERROR,
            "system",
            f"this is {seen.system}",
            "affinity masks of other processes exist on Linux only; workers serve unbound here",
            "serve on Linux",
        )


def _java(seen: Inspection) -> Iterator[Finding]:
    why = f"TorchServe's frontend is a Java program and needs release {JAVA_NEEDED}"
    change = "apt-get install openjdk-17-jre-headless, or set JAVA_HOME"
    if seen.java is None:
        yield Finding(Severity.ERROR, "java", "no java in JAVA_HOME or on PATH", why, change)
    elif (release := _release(seen.java)) is not None and release < JAVA_NEEDED:
        yield Finding(Severity.ERROR, "java", f"java is release {seen.java}", why, change)


def _torchserve(seen: Inspection) -> Iterator[Finding]:
    change = "pip install 'torchserve==0.12.*'"
    if seen.torchserve is None:
        yield Finding(Severity.ERROR, "torchserve", "torchserve is not installed beside ts-cores", "", change)
    elif not seen.torchserve.startswith(TORCHSERVE_NEEDED):
        what = f"torchserve is {seen.torchserve}"
        yield Finding(Severity.WARNING, "torchserve", what, "ts-cores was built and tested with 0.12", change)


def _interpreter(seen: Inspection) -> Iterator[Finding]:
    found = seen.interpreter
    if found is None:
        change = "activate the environment that has torchserve and ts-cores"
        yield Finding(
            Severity.ERROR, "python", "no torchserve on PATH", "workers run with the Python behind it", change
        )
        return
    if "ts_plugin" in found.missing:
        yield Finding(
            Severity.ERROR,
            "python",
            f"{found.path}, which runs TorchServe's workers, does not find ts_plugin",
            "the hook cannot ask it for slices, so all workers serve unbound",
            f"{found.path} -m pip install ts-cores",
        )
    others = sorted(found.missing - {"ts_plugin"})
    if others:
        yield Finding(
            Severity.ERROR,
            "python",
            f"{found.path}, which runs TorchServe's workers, does not find {', '.join(others)}",
            "every worker dies at import",
            f"{found.path} -m pip install {' '.join({'yaml': 'PyYAML'}.get(name, name) for name in others)}",
        )


def _switch(seen: Inspection) -> Iterator[Finding]:
    config = seen.config
    if config is None:
        yield Finding(
            Severity.WARNING,
            "config",
            "no config.properties here",
            "without one TorchServe starts without ts-cores",
            "ts-cores init, then: torchserve --ts-config config.properties",
        )
    elif not config.on("cpu_launcher_enable"):
        value = config.properties.get("cpu_launcher_enable")
        what = "no cpu_launcher_enable" if value is None else f"cpu_launcher_enable is {value!r}, not true"
        yield Finding(
            Severity.ERROR,
            "config",
            f"{config.path}: {what}",
            "ts-cores stays out of the way: every worker serves unbound, on all cores",
            "cpu_launcher_enable=true",
        )


def _config(seen: Inspection) -> Iterator[Finding]:
    """Say what keeps TorchServe from starting with the file as it stands."""
    if seen.config is None:
        return
    path, config = seen.config.path, seen.config
    for error in config.errors:
        yield Finding(Severity.ERROR, "config", f"{path}: {error}")
    for name in ("inference_address", "management_address", "metrics_address"):
        value = config.properties.get(name)
        if value is not None and not _is_address(value):
            yield Finding(
                Severity.ERROR,
                "config",
                f"{path}: {name}={value!r} is no address that TorchServe reads",
                "the server does not start",
                f"{name}=http://127.0.0.1:{_PORTS[name]}",
            )
    if not config.get("model_store"):
        yield Finding(
            Severity.WARNING,
            "config",
            f"{path}: no model_store",
            "torchserve stops unless it is started with --model-store",
            "model_store=DIR",
        )
    for name, absent in seen.absent.items():
        why, change = _ABSENT[name]
        yield Finding(Severity.ERROR, "config", f"{path}: {name}: {absent} is not there", why, change)


_PORTS = {"inference_address": 8080, "management_address": 8081, "metrics_address": 8082}
_ADDRESS = re.compile(r"https?://[^:^/\s\[\]]+(:(?P<port>[0-9]{1,9}))?|unix:/.*")
_ABSENT = {
    "model_store": ("torchserve stops", "mkdir it, or name the directory of the archives; an absolute path is best"),
    "load_models": ("a model that is not in model_store has no workers", "put it there, or take it out of load_models"),
    "metrics_config": ("every worker dies at its start", "name a file, or leave the line out"),
}


def _is_address(text: str) -> bool:
    """Tell whether TorchServe can listen there; it takes no IPv6 address, in brackets or not.

    Source: org.pytorch.serve.util.Connector (parse), ConfigManager (ADDRESS_PATTERN).
    """
    match = _ADDRESS.fullmatch(text)
    return match is not None and int(match["port"] or 0) <= 65535


def _plugin(seen: Inspection) -> Iterator[Finding]:
    if not seen.jar:
        yield Finding(
            Severity.ERROR,
            "plug-in",
            f"{JAR} is missing in the installed package",
            "without it TorchServe's frontend knows nothing of ts-cores",
            "install a JDK 17, then: pip install --force-reinstall --no-deps ts-cores",
        )
    if seen.config is None or not seen.config.on("cpu_launcher_enable"):
        return
    path = seen.config.get("plugins_path")
    change = "plugins_path=" + str(Path(__file__).resolve().parents[1] / "frontend")
    if not path:
        yield Finding(
            Severity.ERROR,
            "plug-in",
            f"{seen.config.path}: no plugins_path",
            "TorchServe then uses its own launcher, which gives SMT siblings to different workers",
            change,
        )
    elif seen.plugins is None or JAR not in seen.plugins:
        what = "is no directory" if seen.plugins is None else f"has no {JAR}"
        why = "TorchServe then uses its own launcher"
        if not Path(path).is_absolute():
            why += "; a relative path counts from the directory that torchserve is started in"
        yield Finding(Severity.ERROR, "plug-in", f"plugins_path {path} {what}", why, change)


def _launcher_args(seen: Inspection) -> Iterator[Finding]:
    try:
        policy = _policy(seen)
    except LauncherArgsError as error:
        yield Finding(Severity.ERROR, "cpu_launcher_args", str(error), "all workers serve unbound", "correct that word")
        return
    for note in policy.notes:
        yield Finding(Severity.NOTE, "cpu_launcher_args", note)


def _plan(seen: Inspection) -> Iterator[Finding]:
    """Plan what the server would start with, and say what comes of it."""
    if seen.topology is None or seen.allowance is None or seen.config is None:
        return
    name, per_model = "default_workers_per_model", seen.config.get("default_workers_per_model")
    number = _java_int(per_model) if per_model else 0
    if number == 0:
        yield Finding(
            Severity.WARNING,
            "workers",
            f"{seen.config.path}: {f'{name}={per_model}' if per_model else f'no {name}'}",
            f"TorchServe then starts {len(seen.allowance.cpus)} workers per model, one per CPU",
            f"{name}={max(1, min(4, seen.cores // 4))}",
        )
        return
    if number is None or number < 0:
        what, why = f"{name}={per_model!r} is no number above 0 that Java reads", "the server does not start"
        yield Finding(Severity.ERROR, "workers", f"{seen.config.path}: {what}", why, f"{name}=1")
        return
    models = max(1, seen.models or 1)
    workers = number * models
    if workers > seen.cores:
        times = f" x {models} models" if models > 1 else ""
        yield Finding(
            Severity.WARNING,
            "workers",
            f"{name}={per_model}{times}: {workers} workers for {seen.cores} cores",
            "workers then take turns on a core, with one thread each",
            f"{name}={max(1, seen.cores // models)}",
        )
    if workers > MOST_WORKERS:  # no server starts that many; a plan for them would only take time
        return
    try:
        demand = Demand(seen.allowance.cpus, _policy(seen), seen.allowance.quota)
        for note in plan(seen.topology, [demand] * workers).notes:
            yield Finding(Severity.NOTE, "plan", note)
    except LauncherArgsError:
        return  # said already
    except PlanError as error:
        yield Finding(Severity.ERROR, "plan", str(error), "workers serve unbound", "correct cpu_launcher_args")


def _allowance(seen: Inspection) -> Iterator[Finding]:
    if seen.topology is None or seen.allowance is None:
        return
    allowed, quota = seen.allowance.cpus, seen.allowance.quota
    left = seen.topology.online - allowed - seen.topology.isolated
    if left:
        yield Finding(
            Severity.NOTE,
            "cpuset",
            f"{len(allowed)} of {len(seen.topology.online)} CPUs are allowed here: {format_cpulist(allowed)}",
            "slices are cut from these alone",
        )
    if quota is not None and quota < len(seen.topology.cores_of(allowed)):
        try:
            pin = _policy(seen).pin
        except LauncherArgsError:
            pin = Pin.AUTO
        yield Finding(
            Severity.NOTE if pin is Pin.AUTO else Severity.WARNING,
            "quota",
            f"a CFS quota allows {quota:g} CPUs' worth of time on {seen.cores} cores",
            "such CPUs are shared with other containers: threads are bounded by the quota and not pinned"
            if pin is not Pin.ALWAYS
            else "--pin always puts workers on cores that other containers may use too",
            "in Kubernetes: whole CPUs, requests equal to limits, on a node with the static CPU manager",
        )


def _machine(seen: Inspection) -> Iterator[Finding]:
    if seen.topology is None:
        yield Finding(Severity.ERROR, "topology", "the machine cannot be read from /sys", "workers serve unbound")
        return
    cores = seen.topology.cores
    words = [count(len(cores), "core"), count(len({core.package for core in cores}), "package")]
    words += [
        count(len({core.node for core in cores}), "NUMA node"),
        count(len({core.l3 for core in cores}), "L3 domain"),
    ]
    smt = max((len(core.cpus) for core in cores), default=1)
    words.append(f"{smt} SMT siblings per core" if smt > 1 else "no SMT")
    words += [f"{len({core.kind for core in cores})} core types"] if any(core.kind for core in cores) else []
    yield Finding(Severity.NOTE, "machine", ", ".join(words))
    notes = seen.topology.notes + (seen.allowance.notes if seen.allowance else ())
    for note in notes:
        yield Finding(Severity.NOTE, "machine", note)


def _openmp(seen: Inspection) -> Iterator[Finding]:
    for name in binding.COLLAPSING:
        if name in seen.environment:
            yield Finding(
                Severity.WARNING,
                "OpenMP",
                f"{name}={seen.environment[name]} is set",
                "it shrinks a mask to one CPU at `import torch`; workers are rid of it, other programs are not",
                f"unset {name}",
            )
    counts = [f"{name}={seen.environment[name]}" for name in binding.THREAD_COUNTS if name in seen.environment]
    if counts:
        what = f"{', '.join(counts)} in the environment"
        yield Finding(Severity.NOTE, "OpenMP", what, "workers get the count of their slice instead")
    preload = seen.environment.get("LD_PRELOAD", "")
    if "iomp" in preload:
        yield Finding(
            Severity.WARNING,
            "OpenMP",
            f"LD_PRELOAD={preload}",
            "torch brings an OpenMP runtime of its own: two in one process each start their own threads",
            "take libiomp5 out of LD_PRELOAD",
        )


def _preload(seen: Inspection) -> Iterator[Finding]:
    for note in seen.preload_notes:
        yield Finding(Severity.WARNING, "preload", note)


def _token(seen: Inspection) -> Iterator[Finding]:
    if seen.config is None:
        return
    address = seen.config.get("management_address", "http://127.0.0.1:8081")
    if not seen.config.on("disable_token_authorization"):
        minutes = seen.config.get("token_expiration_min", "60")
        yield Finding(
            Severity.NOTE,
            "token",
            f"GET /cores wants the management key of key_file.json, which expires after {minutes} minutes",
            "TorchServe 0.12 guards all its APIs so; `ts-cores show` needs no key",
        )
    elif not _loopback(address):
        yield Finding(
            Severity.WARNING,
            "token",
            f"disable_token_authorization=true and management_address={address}",
            "whoever reaches that port can load models, which is to run programs here",
            "management_address=http://127.0.0.1:8081",
        )


def _ledger(seen: Inspection) -> Iterator[Finding]:
    if seen.ledger_error:
        why = "without the ledger no worker knows what the others hold, so all serve unbound"
        yield Finding(Severity.ERROR, "ledger", seen.ledger_error, why, "export TS_CORES_STATE_DIR=DIR")
    elif seen.ledger:
        held = f"{count(len(seen.state.servers), 'server')}, {count(len(seen.state.leases), 'worker')} with a slice"
        yield Finding(Severity.NOTE, "ledger", f"{seen.ledger}: {held}")
    for server in seen.state.servers:
        if server.error:
            yield Finding(
                Severity.ERROR,
                "server",
                f"server {server.pid}: {server.error}",
                "its workers serve unbound",
                "correct the line and restart it",
            )


def _workers(seen: Inspection) -> Iterator[Finding]:
    ours = [worker for worker in seen.unbound if not worker.elsewhere]
    for reason in dict.fromkeys(worker.reason for worker in ours):
        pids = [str(worker.pid) for worker in ours if worker.reason == reason]
        yield Finding(
            Severity.ERROR,
            "worker",
            f"{count(len(pids), 'worker')} unbound (pid {', '.join(pids)}): {reason}",
            "they run on everybody's cores with as many threads as the machine has cores",
        )
    for note in not_judged(seen.unbound):
        yield Finding(Severity.NOTE, "worker", note)
    for pid, threads in seen.astray:
        yield Finding(
            Severity.WARNING,
            "worker",
            f"{threads} threads of worker {pid} may run outside its slice",
            "they run on other workers' cores; read-back should have put them back within seconds",
            "see its log: the handler or one of its libraries sets affinity masks",
        )
    for lease in seen.state.leases:
        for note in lease.notes:
            yield Finding(Severity.NOTE, "worker", f"{lease}: {note}")
    for note in seen.state.notes:
        yield Finding(Severity.NOTE, "plan", note)


def _neighbours(seen: Inspection) -> Iterator[Finding]:
    held = {cpu for lease in seen.state.leases if lease.slice.pinned for cpu in lease.slice.cpus}
    cpus = frozenset(held) or (seen.allowance.cpus if seen.allowance else frozenset())
    for pid, name, mask, share in seen.busy:
        if not mask.isdisjoint(cpus):
            yield Finding(
                Severity.WARNING,
                "neighbours",
                f"{name} (pid {pid}) uses {share:.0%} of a CPU and may run on the workers' cores",
                "the slowest thread of a worker holds up all its others",
                f"cpu_launcher_args=--reserve-cores 1, then: taskset -apc CPUS {pid} with the reserved CPUs",
            )


CHECKS: tuple[Callable[[Inspection], Iterable[Finding]], ...] = (
    _system,
    _java,
    _torchserve,
    _interpreter,
    _switch,
    _config,
    _plugin,
    _launcher_args,
    _machine,
    _allowance,
    _plan,
    _openmp,
    _preload,
    _token,
    _ledger,
    _workers,
    _neighbours,
)


def _policy(seen: Inspection) -> Policy:
    return parse_launcher_args(seen.config.get("cpu_launcher_args") if seen.config else "")


def _java_int(text: str) -> int | None:
    """Return the number that Integer.parseInt reads, None where it throws: blanks around it, more than 32 bits."""
    if not re.fullmatch(r"[+-]?0*\d{1,10}", text):
        return None
    return number if -(2**31) <= (number := int(text)) < 2**31 else None


def _release(version: str) -> int | None:
    """Return 8 for ``1.8.0_292``, 17 for ``17.0.15``."""
    numbers = re.findall(r"\d+", version)
    if not numbers:
        return None
    return int(numbers[1] if numbers[0] == "1" and len(numbers) > 1 else numbers[0])


def _loopback(address: str) -> bool:
    try:
        host = urlsplit(address).hostname or ""
        return address.startswith("unix:") or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def examine(seen: Inspection) -> tuple[Finding, ...]:
    """Return what all checks find, the worst first."""
    order = list(Severity)
    return tuple(sorted((one for check in CHECKS for one in check(seen)), key=lambda one: order.index(one.severity)))
