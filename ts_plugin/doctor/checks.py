"""What is wrong on this machine and with this config.properties: facts in, findings out. Nothing is read here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ts_plugin.doctor.config_checks import CONFIG_CHECKS
from ts_plugin.doctor.finding import Finding, Severity, error, note, warning
from ts_plugin.doctor.inspection import Inspection
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.words import count
from ts_plugin.planning.policy import Pin
from ts_plugin.view.view import not_judged
from ts_plugin.worker.environment import THREAD_COUNTS, collapsing

JAVA_NEEDED = 11  # what the jar is compiled for; model-server.jar 0.12 itself is content with less
IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"  # in the environment of every container of a pod
TORCHSERVE_NEEDED = "0.12."
NAMED = 8  # processes of one kind that are named


def _java(seen: Inspection) -> Iterator[Finding]:
    why = f"TorchServe's frontend is a Java program and its plug-in needs release {JAVA_NEEDED} or newer"
    change = "apt-get install default-jre-headless, or set JAVA_HOME"
    if seen.java is None:
        yield error("java", "no java in JAVA_HOME or on PATH", why, change)
    elif (release := _release(seen.java)) is not None and release < JAVA_NEEDED:
        yield error("java", f"java is release {seen.java}", why, change)


def _torchserve(seen: Inspection) -> Iterator[Finding]:
    change = "pip install 'torchserve==0.12.*'"
    if seen.torchserve is None:
        yield error("torchserve", "torchserve is not installed beside ts-cores", "", change)
    elif not seen.torchserve.startswith(TORCHSERVE_NEEDED):
        why = "ts-cores was built and tested with 0.12"
        yield warning("torchserve", f"torchserve is {seen.torchserve}", why, change)


def _interpreter(seen: Inspection) -> Iterator[Finding]:
    found = seen.interpreter
    if found is None:
        change = "activate the environment that has torchserve and ts-cores"
        yield error("python", "no torchserve on PATH", "workers run with the Python behind it", change)
        return
    if "ts_plugin" in found.missing:
        yield error(
            "python",
            f"{found.path}, which runs TorchServe's workers, does not find ts_plugin",
            "the hook cannot ask it for slices, so all workers serve unbound",
            f"{found.path} -m pip install PATH, the checkout or a wheel of ts-cores",
        )
    others = sorted(found.missing - {"ts_plugin"})
    if others:
        yield error(
            "python",
            f"{found.path}, which runs TorchServe's workers, does not find {', '.join(others)}",
            "every worker dies at import",
            f"{found.path} -m pip install {' '.join({'yaml': 'PyYAML'}.get(name, name) for name in others)}",
        )


def _allowance(seen: Inspection) -> Iterator[Finding]:
    if seen.topology is None or seen.allowance is None:
        return
    allowed, quota = seen.allowance.cpus, seen.allowance.quota
    left = seen.topology.online - allowed - seen.topology.isolated
    if left:
        yield note(
            "cpuset",
            f"{len(allowed)} of {len(seen.topology.online)} CPUs are allowed here: {format_cpulist(allowed)}",
            "slices are cut from these alone",
        )
    if quota is None and not left and IN_KUBERNETES in seen.environment:
        yield warning(
            "cpuset",
            f"this pod may use all {len(allowed)} CPUs of its node: it has neither a CPU limit nor CPUs of its own",
            "a request alone reserves no CPU, so every such pod on the node pins its workers to the same first cores",
            "resources.limits.cpu: N, for as many workers in all: threads are then bounded and nothing is pinned; or "
            "whole CPUs, requests equal to limits, on a node with the static CPU manager",
        )
    if quota is not None and quota < len(seen.topology.cores_of(allowed)):
        pin = seen.policy.pin
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
        yield error("topology", "the machine cannot be read from /sys", "workers serve unbound")
        return
    cores = seen.topology.cores
    words = [count(len(cores), "core"), count(len({core.package for core in cores}), "package")]
    words.append(count(len({core.node for core in cores}), "NUMA node"))
    words.append(count(len({core.l3 for core in cores}), "L3 domain"))
    smt = max((len(core.cpus) for core in cores), default=1)
    words.append(f"{smt} SMT siblings per core" if smt > 1 else "no SMT")
    words += [f"{len({core.kind for core in cores})} core types"] if any(core.kind for core in cores) else []
    yield note("machine", ", ".join(words))
    for text in seen.topology.notes + (seen.allowance.notes if seen.allowance else ()):
        yield note("machine", text)


def _openmp(seen: Inspection) -> Iterator[Finding]:
    for name in collapsing(seen.environment):
        why = "it shrinks a mask to one CPU at `import torch`; workers are rid of it, other programs are not"
        yield warning("OpenMP", f"{name}={seen.environment[name]} is set", why, f"unset {name}")
    counts = [f"{name}={seen.environment[name]}" for name in THREAD_COUNTS if name in seen.environment]
    if counts:
        what = f"{', '.join(counts)} in the environment of this command"
        yield note("OpenMP", what, "workers get the count of their slice instead")
    preload = seen.environment.get("LD_PRELOAD", "")
    if "iomp" in preload:
        why = "torch brings an OpenMP runtime of its own: two in one process each start their own threads"
        yield warning("OpenMP", f"LD_PRELOAD={preload}", why, "take libiomp5 out of LD_PRELOAD")


def _overrides(seen: Inspection) -> Iterator[Finding]:
    """Name the variables that win over the file. Source: org.pytorch.serve.util.ConfigManager (setSystemVars)."""
    if seen.config is not None and seen.config.variables:
        names = ", ".join(seen.config.variables)
        yield note(
            "environment",
            f"{names}: set in the environment of this command, and go before {seen.config.path}",
            "a server reads the environment that it is started in: with other values there, ask in that one",
        )


def _preload(seen: Inspection) -> Iterator[Finding]:
    for text in seen.preload_notes:
        yield warning("preload", text)


def _lending(seen: Inspection) -> Iterator[Finding]:
    if seen.no_lending:
        why = "workers neither lend idle cores nor borrow any; everything else works"
        change = "install ts-cores where a C compiler is (cc), or a wheel that was built for this processor"
        yield warning("lending", seen.no_lending, why, change)


def _ledger(seen: Inspection) -> Iterator[Finding]:
    if seen.ledger_error:
        why = "without the ledger no worker knows what the others hold, so all serve unbound"
        yield error("ledger", seen.ledger_error, why, "export TS_CORES_STATE_DIR=DIR")
    elif seen.ledger:
        held = f"{count(len(seen.state.servers), 'server')}, {count(len(seen.state.leases), 'worker')} with a slice"
        yield note("ledger", f"{seen.ledger}: {held}")
    for server in seen.state.servers:
        if server.error:
            what, why = f"server {server.pid}: {server.error}", "its workers serve unbound"
            yield error("server", what, why, "correct the line and restart it")


def _workers(seen: Inspection) -> Iterator[Finding]:
    ours = [worker for worker in seen.unbound if not worker.elsewhere]
    for reason in dict.fromkeys(worker.reason for worker in ours):
        pids = [str(worker.pid) for worker in ours if worker.reason == reason]
        yield error(
            "worker",
            f"{count(len(pids), 'worker')} unbound (pid {', '.join(pids)}): {reason}",
            "they run on all workers' cores, with as many threads as the machine has cores",
        )
    for text in not_judged(seen.unbound):
        yield note("worker", text)
    if seen.astray:
        each = _listed([f"{threads} threads of worker {pid}" for pid, threads in seen.astray])
        yield warning(
            "worker",
            f"{each} may run outside their slice",
            "they run on other workers' cores; the look every 5 seconds should have put them back",
            "see its log: the handler or one of its libraries sets affinity masks",
        )
    told = [(text, lease) for lease in seen.state.leases for text in lease.notes]
    for text in dict.fromkeys(text for text, _ in told):
        yield note("worker", f"{_listed([str(lease) for said, lease in told if said == text])}: {text}")
    for text in seen.state.notes:
        yield note("plan", text)


def _neighbours(seen: Inspection) -> Iterator[Finding]:
    held = {cpu for lease in seen.state.leases if lease.slice.pinned for cpu in lease.slice.cpus}
    cpus = frozenset(held) or (seen.allowance.cpus if seen.allowance else frozenset())
    busy = [(name, str(pid), share) for pid, name, mask, share in seen.busy if not mask.isdisjoint(cpus)]
    for name in dict.fromkeys(name for name, _, _ in busy):
        pids = [pid for other, pid, _ in busy if other == name]
        share = sum(share for other, _, share in busy if other == name)
        yield warning(
            "neighbours",
            f"{name} (pid {_listed(pids)}) uses {share:.0%} of a CPU and may run on the workers' cores",
            "the slowest thread of a worker holds up all its others",
            f"cpu_launcher_args=--reserve-cores 1, then: taskset -apc CPUS {pids[0]} with the reserved CPUs"
            + (", and so for each" if len(pids) > 1 else ""),
        )


CHECKS = (
    _java,
    _torchserve,
    _interpreter,
    *CONFIG_CHECKS,
    _machine,
    _allowance,
    _overrides,
    _openmp,
    _preload,
    _lending,
    _ledger,
    _workers,
    _neighbours,
)


def _listed(words: Sequence[str]) -> str:
    """Return the first few, and how many more there are."""
    return ", ".join(words[:NAMED]) + (f" and {len(words) - NAMED} more" if len(words) > NAMED else "")


def _release(version: str) -> int | None:
    """Return 8 for ``1.8.0_292``, 17 for ``17.0.15``."""
    numbers = re.findall(r"\d+", version)
    if not numbers:
        return None
    return int(numbers[1] if numbers[0] == "1" and len(numbers) > 1 else numbers[0])


def examine(seen: Inspection) -> tuple[Finding, ...]:
    """Return what all checks find, the worst first."""
    order = list(Severity)
    return tuple(sorted((one for check in CHECKS for one in check(seen)), key=lambda one: order.index(one.severity)))
