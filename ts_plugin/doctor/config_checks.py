"""What the doctor says of a config.properties: each check takes what was seen and yields findings."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from ts_plugin.config.file import PLUGIN, Config
from ts_plugin.config.properties import INTEGERS, KNOWN, SWITCHES, nearest, refused
from ts_plugin.config.served import default_workers, describe
from ts_plugin.doctor.finding import Finding, Severity, error, note, warning
from ts_plugin.doctor.inspection import Inspection
from ts_plugin.ledger.unbound import JAR
from ts_plugin.planning.core_groups import PlanError
from ts_plugin.planning.planner import MOST_WORKERS, Demand, plan
from ts_plugin.planning.policy import LauncherArgsError, parse_launcher_args

TRUE = ("true", "yes", "on", "1")
LATER = {  # properties that are read after the start
    "max_response_size": "every worker dies when the frontend connects to it",
    "unregister_model_timeout": "removing a worker or a model fails",
}
ABSENT = {
    "model_store": ("torchserve stops", "mkdir it, or name the directory of the archives; an absolute path is best"),
    "load_models": (
        "a model that is not in model_store has no workers",
        "put it there, or take it out of load_models; between two of them stands a comma and no blank",
    ),
    "metrics_config": ("every worker dies at its start", "name a file, or leave the line out"),
}


def _switch(seen: Inspection) -> Iterator[Finding]:
    config = seen.config
    if config is None:
        yield warning(
            "config",
            "no config.properties here",
            "without one TorchServe starts without ts-cores",
            "ts-cores init, then: torchserve --ts-config config.properties",
        )
    elif not config.on("cpu_launcher_enable"):
        value = config.properties.get("cpu_launcher_enable")
        what = "no cpu_launcher_enable" if value is None else f"cpu_launcher_enable is {value!r}, not true"
        why = "ts-cores stays out of the way: every worker serves unbound, on all cores"
        yield error("config", f"{config.path}: {what}", why, "cpu_launcher_enable=true")


def _found(seen: Inspection) -> Iterator[Finding]:
    """Say when this is not the file that a server goes by, or not wholly."""
    if seen.config is None:
        return
    path, named = seen.config.path, seen.environment.get("TS_CONFIG_FILE", str(seen.config.path))
    if seen.found:
        snapshot = "model_snapshot" in seen.config.properties
        yield Finding(
            Severity.WARNING if snapshot else Severity.NOTE,
            "config",
            f"{path}: torchserve finds it without --ts-config"
            + (", the newest snapshot, and does not read config.properties" if snapshot else ""),
            "it does not load the plug-in then: it looks for plugins_path only in a file that --ts-config names",
            "torchserve --ncs --ts-config config.properties; and so: ts-cores doctor --config config.properties"
            if snapshot
            else f"torchserve --ncs --ts-config {path}",
        )
    elif named != str(path):
        yield warning(
            "config",
            f"TS_CONFIG_FILE={named} in the environment of this command goes before --ts-config {path}",
            "a server that is started in it does not read this file",
            "unset TS_CONFIG_FILE",
        )


def _config(seen: Inspection) -> Iterator[Finding]:
    """Say what keeps TorchServe from starting with the file as it stands."""
    if seen.config is None:
        return
    path, config = seen.config.path, seen.config
    for what in config.errors:
        yield error("config", f"{path}: {what}")
    stop = "the server does not start"
    for refusal in (*refused(config.properties), *seen.startup.refusals):
        yield error("config", f"{path}: {refusal.what}", stop, refusal.change)
    for name, why in seen.unusable.items():
        yield error("config", f"{path}: {name}={config.get(name)}: {why}", stop, f"correct {name}")
    for one in seen.startup.overlooked:
        yield warning("config", f"{path}: {one.what}", "TorchServe does not say so, and goes on", one.change)
    yield from _misread(config)
    yield from _unknown(config)
    if not config.get("model_store"):
        why = "torchserve stops unless it is started with --model-store"
        yield warning("config", f"{path}: no model_store", why, "model_store=DIR")
    for name, absent in seen.absent.items():
        why, change = ABSENT[name]
        yield error("config", f"{path}: {name}: {absent} is not there", why, change)


def _misread(config: Config) -> Iterator[Finding]:
    """Say which values TorchServe takes for others without a word, or finds wrong only when it is too late."""
    for name, otherwise in SWITCHES.items():
        value = config.properties.get(name)
        said = name == "cpu_launcher_enable"  # in _switch
        if value is not None and value.lower() not in ("true", "false") and not said:
            blank = "; a blank at its end is part of it" if value != value.strip() else ""
            yield warning(
                "config",
                f"{config.path}: {name}={value!r}: TorchServe reads false{blank}",
                "nothing but the word true switches it on",
                f"{name}={'true' if value.strip().lower() in TRUE or not otherwise else 'false'}",
            )
    for name, why in LATER.items():
        if problem := INTEGERS[name].problem(config.get(name, "1")):
            change = f"{name}={INTEGERS[name].sample}"
            yield error("config", f"{config.path}: {name}={config.get(name)!r} {problem}", why, change)
    mode = config.get("metrics_mode", "log")
    if "".join(mode.split()).lower() not in ("log", "prometheus", "legacy"):
        what = f"{config.path}: metrics_mode={mode!r}"
        yield warning("config", what, "TorchServe takes log instead", "metrics_mode=prometheus")


def _unknown(config: Config) -> Iterator[Finding]:
    """Name the properties that TorchServe does not have; other plug-ins may have them."""
    for name in sorted(config.properties.keys() - KNOWN):
        meant = nearest(name)
        yield Finding(
            Severity.WARNING if meant else Severity.NOTE,
            "config",
            f"{config.path}: TorchServe has no property {name}" + (f"; did you mean {meant}?" if meant else ""),
            "it overlooks the line",
            f"{meant}={config.get(name)}, or take the line out" if meant else "",
        )


def _plugin(seen: Inspection) -> Iterator[Finding]:
    if not seen.jar:
        yield error(
            "plug-in",
            f"{JAR} is missing in the installed package",
            "without it TorchServe's frontend knows nothing of ts-cores",
            "install a JDK, 11 or newer, then in the checkout: pip install --force-reinstall --no-deps .",
        )
    if seen.config is None or not seen.config.on("cpu_launcher_enable"):
        return
    path, change = seen.config.get("plugins_path"), f"plugins_path={PLUGIN}"
    if not path:
        why = "TorchServe then uses its own launcher, which gives SMT siblings to different workers"
        yield error("plug-in", f"{seen.config.path}: no plugins_path", why, change)
    elif seen.plugins is None or JAR not in seen.plugins:
        what = "is no directory" if seen.plugins is None else f"has no {JAR}"
        why = "TorchServe then uses its own launcher"
        if not Path(path).is_absolute():
            why += "; a relative path counts from the directory that torchserve is started in"
        yield error("plug-in", f"plugins_path {path} {what}", why, change)


def _launcher_args(seen: Inspection) -> Iterator[Finding]:
    try:
        parse_launcher_args(seen.config.get("cpu_launcher_args") if seen.config else "")
    except LauncherArgsError as problem:
        yield error("cpu_launcher_args", str(problem), "all workers serve unbound", "correct that word")
    for text in seen.policy.notes:
        yield note("cpu_launcher_args", text)


def _plan(seen: Inspection) -> Iterator[Finding]:
    """Plan what the server would start with, and say what comes of it."""
    if seen.topology is None or seen.allowance is None or seen.config is None:
        return
    served = seen.startup.served
    workers = sum(one.workers for one in served)
    number, source = default_workers(seen.config.properties, seen.java_cpus, seen.gpus)
    name = "default_workers_per_model"
    unsaid = source == "one per CPU" and seen.java_cpus > 1
    if unsaid and (not served or any(one.source == source for one in served)):
        models = ", ".join(one.model for one in served if one.source == source)
        yield warning(
            "workers",
            f"{seen.config.path}: {name} says nothing{f' for {models}' if models else ''}",
            f"TorchServe then starts {number} workers per model, one per CPU that its JVM counts",
            f"{name}={max(1, min(4, seen.cores // 4))}",
        )
    if not served and number < 0:
        what, why = f"{seen.config.path}: {number} workers for each model", "the server stops at the first model"
        yield error("workers", what, why, f"{name}=1")
    if not served and source == name and number > seen.cores:
        workers, told = number, f"{name}={number}"
    else:
        told = ", ".join(describe(served))
    if workers > seen.cores:
        yield warning(
            "workers",
            f"{told}: {workers} workers for {seen.cores} cores",
            "workers then take turns on a core, with one thread each",
            "fewer workers, or models on other machines",
        )
    if grows := [one.model for one in served if one.most > one.workers and one.source != "snapshot"]:
        yield note(
            "workers",
            f"maxWorkers of {', '.join(grows)} is above minWorkers",
            "TorchServe starts minWorkers and adds none by itself, however many requests wait: maxWorkers is where "
            "scaling down ends",
        )
    if workers > MOST_WORKERS:  # no server starts that many; a plan for them would only take time
        return
    try:
        cpus, quota, policy = seen.allowance.cpus, seen.allowance.quota, seen.policy
        demands = [Demand(cpus, policy, quota, one.cores, one.share) for one in served for _ in range(one.workers)]
        demands = demands or [Demand(cpus, policy, quota)] * max(1, min(number, MOST_WORKERS))
        for text in plan(seen.topology, demands).notes:
            yield note("plan", text)
    except PlanError as problem:
        yield error("plan", str(problem), "workers serve unbound", "correct cpu_launcher_args")


def _token(seen: Inspection) -> Iterator[Finding]:
    if seen.config is None:
        return
    address = seen.config.get("management_address", "http://127.0.0.1:8081")
    if not seen.config.on("disable_token_authorization"):
        minutes = seen.config.get("token_expiration_min", "60")
        yield note(
            "token",
            f"GET /cores needs the management key in key_file.json, which expires after {minutes} minutes",
            "TorchServe 0.12 protects all its APIs with keys; `ts-cores show` needs none",
        )
    elif not _loopback(address):
        yield warning(
            "token",
            f"disable_token_authorization=true and management_address={address}",
            "anyone who reaches that port can load models, and so run programs here",
            "management_address=http://127.0.0.1:8081",
        )


def _loopback(address: str) -> bool:
    try:
        host = urlsplit(address).hostname or ""
        return address.startswith("unix:") or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


CONFIG_CHECKS = (_switch, _found, _config, _plugin, _launcher_args, _plan, _token)
