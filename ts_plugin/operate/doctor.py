"""What is wrong on this machine and with this config.properties: facts in, findings out. Nothing is read here."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from ts_plugin.leases.environment import COLLAPSING, THREAD_COUNTS
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.operate.facts import JAR, Facts
from ts_plugin.operate.view import count
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


def _system(facts: Facts) -> Iterator[Finding]:
    if facts.system != "Linux":
        yield Finding(
            Severity.ERROR,
            "system",
            f"this is {facts.system}",
            "affinity masks of other processes exist on Linux only; workers serve unbound here",
            "serve on Linux",
        )


def _java(facts: Facts) -> Iterator[Finding]:
    why = f"TorchServe's frontend is a Java program and needs release {JAVA_NEEDED}"
    change = "apt-get install openjdk-17-jre-headless, or set JAVA_HOME"
    if facts.java is None:
        yield Finding(Severity.ERROR, "java", "no java in JAVA_HOME or on PATH", why, change)
    elif (release := _release(facts.java)) is not None and release < JAVA_NEEDED:
        yield Finding(Severity.ERROR, "java", f"java is release {facts.java}", why, change)


def _torchserve(facts: Facts) -> Iterator[Finding]:
    change = "pip install 'torchserve==0.12.*'"
    if facts.torchserve is None:
        yield Finding(Severity.ERROR, "torchserve", "torchserve is not installed beside ts-cores", "", change)
    elif not facts.torchserve.startswith(TORCHSERVE_NEEDED):
        what = f"torchserve is {facts.torchserve}"
        yield Finding(Severity.WARNING, "torchserve", what, "ts-cores was built and tested with 0.12", change)


def _interpreter(facts: Facts) -> Iterator[Finding]:
    found = facts.interpreter
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


def _switch(facts: Facts) -> Iterator[Finding]:
    config = facts.config
    if config is None:
        yield Finding(
            Severity.WARNING,
            "config",
            "no config.properties here",
            "without one TorchServe starts without ts-cores",
            "ts-cores init, then: torchserve --ts-config config.properties",
        )
    elif not config.on("cpu_launcher_enable"):
        yield Finding(
            Severity.WARNING,
            "config",
            f"{config.path}: cpu_launcher_enable is not true",
            "ts-cores stays out of the way: every worker uses all cores",
            "cpu_launcher_enable=true",
        )


def _plugin(facts: Facts) -> Iterator[Finding]:
    if not facts.jar:
        yield Finding(
            Severity.ERROR,
            "plug-in",
            f"{JAR} is missing in the installed package",
            "without it TorchServe's frontend knows nothing of ts-cores",
            "install a JDK 17, then: pip install --force-reinstall --no-deps ts-cores",
        )
    if facts.config is None or not facts.config.on("cpu_launcher_enable"):
        return
    path = facts.config.get("plugins_path")
    change = "plugins_path=" + str(Path(__file__).resolve().parents[1] / "frontend")
    if not path:
        yield Finding(
            Severity.ERROR,
            "plug-in",
            f"{facts.config.path}: no plugins_path",
            "TorchServe then uses its own launcher, which gives SMT siblings to different workers",
            change,
        )
    elif facts.plugins is None or JAR not in facts.plugins:
        what = "is no directory" if facts.plugins is None else f"has no {JAR}"
        why = "TorchServe then uses its own launcher"
        if not Path(path).is_absolute():
            why += "; a relative path counts from the directory that torchserve is started in"
        yield Finding(Severity.ERROR, "plug-in", f"plugins_path {path} {what}", why, change)


def _launcher_args(facts: Facts) -> Iterator[Finding]:
    try:
        policy = _policy(facts)
    except LauncherArgsError as error:
        yield Finding(Severity.ERROR, "cpu_launcher_args", str(error), "all workers serve unbound", "correct that word")
        return
    for note in policy.notes:
        yield Finding(Severity.NOTE, "cpu_launcher_args", note)


def _plan(facts: Facts) -> Iterator[Finding]:
    """Plan what the server would start with, and say what comes of it."""
    if facts.topology is None or facts.allowance is None or facts.config is None:
        return
    name, per_model = "default_workers_per_model", facts.config.get("default_workers_per_model")
    if not per_model:
        yield Finding(
            Severity.WARNING,
            "workers",
            f"{facts.config.path}: no {name}",
            f"TorchServe then starts {len(facts.allowance.cpus)} workers per model, one per CPU",
            f"{name}={max(1, min(4, facts.cores // 4))}",
        )
        return
    if not per_model.isdigit() or int(per_model) == 0:
        yield Finding(Severity.ERROR, "workers", f"{name}={per_model} is no number above 0", "", f"{name}=1")
        return
    workers = int(per_model) * max(1, facts.archives or 1)
    if workers > facts.cores:
        models = f" x {facts.archives} models" if (facts.archives or 1) > 1 else ""
        yield Finding(
            Severity.WARNING,
            "workers",
            f"{name}={per_model}{models}: {workers} workers for {facts.cores} cores",
            "workers then take turns on a core, with one thread each",
            f"{name}={max(1, facts.cores // max(1, facts.archives or 1))}",
        )
    try:
        demand = Demand(facts.allowance.cpus, _policy(facts), facts.allowance.quota)
        for note in plan(facts.topology, [demand] * workers).notes:
            yield Finding(Severity.NOTE, "plan", note)
    except LauncherArgsError:
        return  # said already
    except PlanError as error:
        yield Finding(Severity.ERROR, "plan", str(error), "workers serve unbound", "correct cpu_launcher_args")


def _allowance(facts: Facts) -> Iterator[Finding]:
    if facts.topology is None or facts.allowance is None:
        return
    allowed, quota = facts.allowance.cpus, facts.allowance.quota
    left = facts.topology.online - allowed - facts.topology.isolated
    if left:
        yield Finding(
            Severity.NOTE,
            "cpuset",
            f"{len(allowed)} of {len(facts.topology.online)} CPUs are allowed here: {format_cpulist(allowed)}",
            "slices are cut from these alone",
        )
    if quota is not None and quota < len(facts.topology.cores_of(allowed)):
        try:
            pin = _policy(facts).pin
        except LauncherArgsError:
            pin = Pin.AUTO
        yield Finding(
            Severity.NOTE if pin is Pin.AUTO else Severity.WARNING,
            "quota",
            f"a CFS quota allows {quota:g} CPUs' worth of time on {facts.cores} cores",
            "such CPUs are shared with other containers: threads are bounded by the quota and not pinned"
            if pin is not Pin.ALWAYS
            else "--pin always puts workers on cores that other containers may use too",
            "in Kubernetes: whole CPUs, requests equal to limits, on a node with the static CPU manager",
        )


def _machine(facts: Facts) -> Iterator[Finding]:
    if facts.topology is None:
        yield Finding(Severity.ERROR, "topology", "the machine cannot be read from /sys", "workers serve unbound")
        return
    cores = facts.topology.cores
    words = [count(len(cores), "core"), count(len({core.package for core in cores}), "package")]
    words += [
        count(len({core.node for core in cores}), "NUMA node"),
        count(len({core.l3 for core in cores}), "L3 domain"),
    ]
    smt = max((len(core.cpus) for core in cores), default=1)
    words.append(f"{smt} SMT siblings per core" if smt > 1 else "no SMT")
    words += [f"{len({core.kind for core in cores})} core types"] if any(core.kind for core in cores) else []
    yield Finding(Severity.NOTE, "machine", ", ".join(words))
    notes = facts.topology.notes + (facts.allowance.notes if facts.allowance else ())
    for note in notes:
        yield Finding(Severity.NOTE, "machine", note)


def _openmp(facts: Facts) -> Iterator[Finding]:
    for name in COLLAPSING:
        if name in facts.environment:
            yield Finding(
                Severity.WARNING,
                "OpenMP",
                f"{name}={facts.environment[name]} is set",
                "it shrinks a mask to one CPU at `import torch`; workers are rid of it, other programs are not",
                f"unset {name}",
            )
    counts = [f"{name}={facts.environment[name]}" for name in THREAD_COUNTS if name in facts.environment]
    if counts:
        what = f"{', '.join(counts)} in the environment"
        yield Finding(Severity.NOTE, "OpenMP", what, "workers get the count of their slice instead")
    preload = facts.environment.get("LD_PRELOAD", "")
    if "iomp" in preload:
        yield Finding(
            Severity.WARNING,
            "OpenMP",
            f"LD_PRELOAD={preload}",
            "torch brings an OpenMP runtime of its own: two in one process each start their own threads",
            "take libiomp5 out of LD_PRELOAD",
        )


def _preload(facts: Facts) -> Iterator[Finding]:
    for note in facts.preload_notes:
        yield Finding(Severity.WARNING, "preload", note)


def _token(facts: Facts) -> Iterator[Finding]:
    if facts.config is None:
        return
    address = facts.config.get("management_address", "http://127.0.0.1:8081")
    if not facts.config.on("disable_token_authorization"):
        minutes = facts.config.get("token_expiration_min", "60")
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


def _ledger(facts: Facts) -> Iterator[Finding]:
    if facts.ledger_error:
        why = "without the ledger no worker knows what the others hold, so all serve unbound"
        yield Finding(Severity.ERROR, "ledger", facts.ledger_error, why, "export TS_CORES_STATE_DIR=DIR")
    for server in facts.state.servers:
        if server.error:
            yield Finding(
                Severity.ERROR,
                "server",
                f"server {server.pid}: {server.error}",
                "its workers serve unbound",
                "correct the line and restart it",
            )


def _workers(facts: Facts) -> Iterator[Finding]:
    for reason in dict.fromkeys(worker.reason for worker in facts.unbound):
        pids = [str(worker.pid) for worker in facts.unbound if worker.reason == reason]
        yield Finding(
            Severity.ERROR,
            "worker",
            f"{count(len(pids), 'worker')} unbound (pid {', '.join(pids)}): {reason}",
            "they run on everybody's cores with as many threads as the machine has cores",
        )
    for pid, threads in facts.astray:
        yield Finding(
            Severity.WARNING,
            "worker",
            f"{threads} threads of worker {pid} may run outside its slice",
            "they run on other workers' cores; read-back should have put them back within seconds",
            "see its log: the handler or one of its libraries sets affinity masks",
        )
    for lease in facts.state.leases:
        for note in lease.notes:
            yield Finding(Severity.NOTE, "worker", f"{lease}: {note}")
    for note in facts.state.notes:
        yield Finding(Severity.NOTE, "plan", note)


def _neighbours(facts: Facts) -> Iterator[Finding]:
    held = {cpu for lease in facts.state.leases if lease.slice.pinned for cpu in lease.slice.cpus}
    cpus = frozenset(held) or (facts.allowance.cpus if facts.allowance else frozenset())
    for pid, name, mask, share in facts.busy:
        if not mask.isdisjoint(cpus):
            yield Finding(
                Severity.WARNING,
                "neighbours",
                f"{name} (pid {pid}) uses {share:.0%} of a CPU and may run on the workers' cores",
                "the slowest thread of a worker holds up all its others",
                f"cpu_launcher_args=--reserve-cores 1, then: taskset -apc CPUS {pid} with the reserved CPUs",
            )


CHECKS: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    _system,
    _java,
    _torchserve,
    _interpreter,
    _switch,
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


def _policy(facts: Facts) -> Policy:
    return parse_launcher_args(facts.config.get("cpu_launcher_args") if facts.config else "")


def _release(version: str) -> int | None:
    """Return 8 for ``1.8.0_292``, 17 for ``17.0.15``."""
    numbers = re.findall(r"\d+", version)
    if not numbers:
        return None
    return int(numbers[1] if numbers[0] == "1" and len(numbers) > 1 else numbers[0])


def _loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return address.startswith("unix:") or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Return what all checks find, the worst first."""
    order = list(Severity)
    return tuple(sorted((one for check in CHECKS for one in check(facts)), key=lambda one: order.index(one.severity)))
