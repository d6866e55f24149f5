"""What the doctor says of a config.properties: each check takes what was seen and yields findings."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from ts_plugin.leases.unbound import JAR
from ts_plugin.operate.arguments import MOST_WORKERS
from ts_plugin.operate.config import PLUGIN
from ts_plugin.operate.finding import Finding, Severity
from ts_plugin.operate.inspection import Inspection
from ts_plugin.planning.planner import Demand, PlanError, plan
from ts_plugin.planning.policy import LauncherArgsError, Policy, parse_launcher_args

__all__ = [
    "check_config",
    "check_launcher_args",
    "check_plan",
    "check_plugin",
    "check_switch",
    "check_token",
    "policy_of",
]

PORTS = {"inference_address": 8080, "management_address": 8081, "metrics_address": 8082}
ADDRESS = re.compile(r"https?://[^:^/\s\[\]]+(:(?P<port>[0-9]{1,9}))?|unix:/.*")
ABSENT = {
    "model_store": ("torchserve stops", "mkdir it, or name the directory of the archives; an absolute path is best"),
    "load_models": ("a model that is not in model_store has no workers", "put it there, or take it out of load_models"),
    "metrics_config": ("every worker dies at its start", "name a file, or leave the line out"),
}


def check_switch(seen: Inspection) -> Iterator[Finding]:
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


def check_config(seen: Inspection) -> Iterator[Finding]:
    """Say what keeps TorchServe from starting with the file as it stands."""
    if seen.config is None:
        return
    path, config = seen.config.path, seen.config
    for error in config.errors:
        yield Finding(Severity.ERROR, "config", f"{path}: {error}")
    for name, port in PORTS.items():
        value = config.properties.get(name)
        if value is not None and not _is_address(value):
            yield Finding(
                Severity.ERROR,
                "config",
                f"{path}: {name}={value!r} is no address that TorchServe reads",
                "the server does not start",
                f"{name}=http://127.0.0.1:{port}",
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
        why, change = ABSENT[name]
        yield Finding(Severity.ERROR, "config", f"{path}: {name}: {absent} is not there", why, change)


def _is_address(text: str) -> bool:
    """Tell whether TorchServe can listen there; it takes no IPv6 address, in brackets or not.

    Source: org.pytorch.serve.util.Connector (parse), ConfigManager (ADDRESS_PATTERN).
    """
    match = ADDRESS.fullmatch(text)
    return match is not None and int(match["port"] or 0) <= 65535


def check_plugin(seen: Inspection) -> Iterator[Finding]:
    if not seen.jar:
        yield Finding(
            Severity.ERROR,
            "plug-in",
            f"{JAR} is missing in the installed package",
            "without it TorchServe's frontend knows nothing of ts-cores",
            "install a JDK, 11 or newer, then in the checkout: pip install --force-reinstall --no-deps .",
        )
    if seen.config is None or not seen.config.on("cpu_launcher_enable"):
        return
    path = seen.config.get("plugins_path")
    change = f"plugins_path={PLUGIN}"
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


def check_launcher_args(seen: Inspection) -> Iterator[Finding]:
    try:
        policy = policy_of(seen)
    except LauncherArgsError as error:
        yield Finding(Severity.ERROR, "cpu_launcher_args", str(error), "all workers serve unbound", "correct that word")
        return
    for note in policy.notes:
        yield Finding(Severity.NOTE, "cpu_launcher_args", note)


def check_plan(seen: Inspection) -> Iterator[Finding]:
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
        demand = Demand(seen.allowance.cpus, policy_of(seen), seen.allowance.quota)
        for note in plan(seen.topology, [demand] * workers).notes:
            yield Finding(Severity.NOTE, "plan", note)
    except LauncherArgsError:
        return  # said already
    except PlanError as error:
        yield Finding(Severity.ERROR, "plan", str(error), "workers serve unbound", "correct cpu_launcher_args")


def check_token(seen: Inspection) -> Iterator[Finding]:
    if seen.config is None:
        return
    address = seen.config.get("management_address", "http://127.0.0.1:8081")
    if not seen.config.on("disable_token_authorization"):
        minutes = seen.config.get("token_expiration_min", "60")
        yield Finding(
            Severity.NOTE,
            "token",
            f"GET /cores needs the management key in key_file.json, which expires after {minutes} minutes",
            "TorchServe 0.12 protects all its APIs with keys; `ts-cores show` needs none",
        )
    elif not _loopback(address):
        yield Finding(
            Severity.WARNING,
            "token",
            f"disable_token_authorization=true and management_address={address}",
            "anyone who reaches that port can load models, and so run programs here",
            "management_address=http://127.0.0.1:8081",
        )


def policy_of(seen: Inspection) -> Policy:
    return parse_launcher_args(seen.config.get("cpu_launcher_args") if seen.config else "")


def _java_int(text: str) -> int | None:
    """Return the number that Integer.parseInt reads, None where it throws: blanks around it, more than 32 bits."""
    if not re.fullmatch(r"[+-]?0*\d{1,10}", text):
        return None
    return number if -(2**31) <= (number := int(text)) < 2**31 else None


def _loopback(address: str) -> bool:
    try:
        host = urlsplit(address).hostname or ""
        return address.startswith("unix:") or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
