"""The command `ts-cores`: what is planned, what is held, why, and what is wrong. JSON on stdout, errors on stderr."""

from __future__ import annotations

import argparse
import io
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ts_plugin.cli.arguments import PlannedModel, parse_arguments
from ts_plugin.errors import CommandError, InputError
from ts_plugin.ledger.directory import LedgerError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.unbound import unbound_workers
from ts_plugin.lending import status, words
from ts_plugin.machine import cpu_time, discovery
from ts_plugin.machine.discovery import DiscoveryError
from ts_plugin.machine.topology import Allowance, Topology
from ts_plugin.planning.core_groups import PlanError
from ts_plugin.planning.planner import Demand, Plan, plan
from ts_plugin.planning.policy import LauncherArgsError, Policy, parse_launcher_args
from ts_plugin.view import view
from ts_plugin.view.core_map import core_map, lease_document, slice_document

if TYPE_CHECKING:
    from ts_plugin.view.html import Ticks

# What a name promises that no option of ours writes.
PICTURES = frozenset((".svg", ".html", ".htm", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"))
LOOK_EVERY = 1.0  # seconds between two pictures of `show --watch`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 if it failed, 2 if it was not understood."""
    _open_streams()
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        status = COMMANDS[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:  # `ts-cores show | head`: the reader has seen enough
        _discard_output()
        return 0
    except (CommandError, PlanError, LauncherArgsError, DiscoveryError, LedgerError) as error:
        print(f"ts-cores: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError | PlanError | LauncherArgsError) else 1
    except OSError as error:
        print(f"ts-cores: {error.filename or 'stdout'}: {error.strerror or error}", file=sys.stderr)
        _discard_output()
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _discard_output() -> None:
    """Let what is not written yet go nowhere: Python would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Let output go somewhere, with ``?`` for a character that its encoding lacks: PYTHONIOENCODING=ascii.

    A stream that is closed (``>&-``) is None. The next file that is opened would take its number.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _plan(options: argparse.Namespace) -> int:
    topology, allowance = _machine(options.sys_root)
    quota = allowance.quota if options.quota is None else options.quota
    wanted, told, words = list(options.models), list[str](), ""
    if options.config:
        from ts_plugin.cli.from_config import config_models

        try:
            allowed = replace(allowance, quota=quota)
            more, told, words = config_models(options.config, allowed, here=options.sys_root is None)
        except OSError as error:
            raise InputError(f"{error.filename or options.config}: {error.strerror}") from error
        wanted += more
    policy = parse_launcher_args(words if options.launcher_args is None else options.launcher_args)
    models = [model for model in wanted for _ in range(model.workers)]
    result = plan(topology, [Demand(allowance.cpus, policy, quota, model.cores, model.share) for model in models])
    said = (*told, *topology.notes, *allowance.notes, *policy.notes, *result.notes, *uneven(models, policy, result))
    notes = tuple(dict.fromkeys(said))
    names = [model.name for model in models]
    planned = replace(view.of_plan(topology, result, allowance.cpus, notes, names), whole=options.all)
    if options.svg:
        from ts_plugin.view.svg import svg

        _write("--svg", options.svg, svg(planned))
    if options.json:
        workers = [
            {"worker": number, **({"model": name} if name else {}), **slice_document(piece)}
            for number, (name, piece) in enumerate(zip(names, result.slices, strict=True))
        ]
        print(json.dumps({"workers": workers, "idle_cpus": sorted(result.idle), "notes": notes}))
    elif not options.svg:
        from ts_plugin.view.terminal import Map, tell

        tell(Map(planned))
    return 0


def uneven(models: Sequence[PlannedModel], policy: Policy, planned: Plan) -> Iterator[str]:
    """Say that workers which ask for the same get slices of different sizes, and which option changes that."""
    threads: dict[float, list[int]] = {}
    for model, piece in zip(models, planned.slices, strict=True):
        if model.cores is None and not policy.cores_per_worker and not policy.equal:
            threads.setdefault(model.share, []).append(piece.threads)
    for numbers in threads.values():
        if max(numbers) - min(numbers) > 1:
            yield (
                f"workers that ask for the same get {min(numbers)} to {max(numbers)} threads: slices that stay inside "
                "NUMA nodes, L3 domains and core types go before equal sizes; --equal makes them equal"
            )


def _machine(root: Path | None) -> tuple[Topology, Allowance]:
    if root is None:
        return discovery.read_topology(), discovery.read_allowance()
    if root.is_file():
        raise InputError(f"{root}: is a file; unpack it and name the directory that has sys/devices/system/cpu")
    try:
        return discovery.read_topology(str(root)), discovery.read_allowance(str(root))
    except DiscoveryError as error:
        raise InputError(str(error)) from error


def _show(options: argparse.Namespace) -> int:
    drawn = options.svg or options.html
    if options.watch and Path("-") in (options.svg, options.html):
        raise InputError("--watch keeps a file up to date, and stdout is none; name a file")
    _need_directory()
    _need_server(options.server)
    if drawn:
        ticks = _write_pictures(options, before=None)
        while options.watch:
            time.sleep(LOOK_EVERY)
            ticks = _write_pictures(options, before=ticks)
    if options.json:
        ledger = Ledger()
        state = ledger.read()
        document = core_map(state, words.look(ledger), server_pid=options.server)
        idle = sorted(view.current_view(options.server).idle())
        print(json.dumps({**document, "idle_cpus": idle, "ledger": ledger.path}))
    elif options.watch and not drawn:
        _watch(options)
    elif not drawn:
        from ts_plugin.view.terminal import Map, tell

        tell(Map(view.current_view(options.server, whole=options.all)))
    return 0


def _need_directory() -> None:
    """Warn where the state directory that the user names is not there: a slip, or nobody has started yet."""
    directory = Ledger().directory
    if os.environ.get("TS_CORES_STATE_DIR") and not os.path.lexists(directory):
        print(f"ts-cores: {directory}: not there, so no worker uses it; TS_CORES_STATE_DIR names it", file=sys.stderr)


def _need_server(pid: int | None) -> None:
    """Raise CommandError if ``pid`` is given and no server of that PID has a part in the ledger or a worker outside."""
    if pid is None:
        return
    ledger = Ledger()
    state = ledger.read()
    known = {server.pid for server in state.servers} | {lease.server_pid for lease in state.leases}
    if pid not in known and pid not in {worker.server_pid for worker in unbound_workers(state)}:
        there = ", ".join(str(pid) for pid in sorted(pid for pid in known if pid is not None))
        raise CommandError(
            f"no TorchServe frontend with PID {pid} in {ledger.path}; "
            + (f"there are: {there}" if there else "there is none, so leave --server out")
        )


def _write_pictures(options: argparse.Namespace, *, before: Ticks | None) -> Ticks:
    """Write what was asked for; return the clock ticks that the page holds, for the utilisation in the next one."""
    from ts_plugin.view.html import html
    from ts_plugin.view.svg import svg

    now = view.current_view(options.server, whole=options.all)
    ticks, reload = cpu_time.ticks(), LOOK_EVERY if options.watch else None
    if options.svg:
        _write("--svg", options.svg, svg(now))
    if options.html:
        _write("--html", options.html, html(now, ticks=ticks, before=before, reload=reload))
    return ticks


def _write(option: str, file: Path, text: str) -> None:
    """Write a file whole or not at all: a browser may be reading the old one. What is no file is written to as it is.

    ``-`` is stdout, as is /dev/stdout. A symbolic link stays one.
    """
    kind = option.removeprefix("--")
    if file.suffix.lower() in PICTURES and not file.suffix.lower().startswith(f".{kind[:3]}"):
        raise InputError(
            f"{file}: {option} writes {kind.upper()} and nothing else; name it {file.with_suffix('.' + kind)}"
        )
    try:
        status = None if str(file) == "-" or not file.exists() else file.stat()
        if str(file) == "-" or (status and os.path.samestat(status, os.fstat(sys.stdout.fileno()))):
            sys.stdout.write(text)
            sys.stdout.flush()
        elif status and stat.S_ISDIR(status.st_mode):
            raise InputError(f"{file}: is a directory; name a file in it")
        elif status and not stat.S_ISREG(status.st_mode):
            file.write_text(text, encoding="utf-8")
        else:
            target = file.resolve()
            draft = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                draft.write_text(text, encoding="utf-8")
                draft.replace(target)
            finally:
                draft.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from error


def _watch(options: argparse.Namespace) -> None:
    from rich.live import Live

    from ts_plugin.view.terminal import Map, make_console, utilisation

    def now() -> view.View:
        return view.current_view(options.server, whole=options.all)

    before = cpu_time.ticks()
    with Live(Map(now()), console=make_console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(LOOK_EVERY)
            after = cpu_time.ticks()
            live.update(Map(now(), utilisation(before, after)), refresh=True)
            before = after


def _explain(options: argparse.Namespace) -> int:
    from ts_plugin.view.explain import explain, find

    _need_directory()
    ledger = Ledger()
    state = ledger.read()
    leases = find(state, options.who)
    if not leases:
        known = sorted({lease.model for lease in state.leases})
        hint = f"models with a slice: {', '.join(known)}" if known else "no worker holds a slice now"
        raise CommandError(f"no slice is held by {options.who!r}; {hint}")
    topology = discovery.read_topology()
    seen = words.look(ledger)
    found = [(lease, explain(lease, state, topology, status.status_of(state, lease.pid, seen))) for lease in leases]
    if options.json:
        users = status.computing(seen, state)
        documents = [
            {
                **lease_document(lease, users, seen),
                "reasons": [{"about": about, "text": text} for about, text in reasons],
            }
            for lease, reasons in found
        ]
        print(json.dumps({"workers": documents}))
        return 0
    from ts_plugin.view.terminal import reasons_table, tell

    tell(*(reasons_table(f"{lease}, pid {lease.pid}", reasons) for lease, reasons in found))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from ts_plugin.config.file import default_config
    from ts_plugin.doctor.checks import examine
    from ts_plugin.doctor.finding import Severity, report
    from ts_plugin.doctor.inspection import inspect

    found = options.config is None and "TS_CONFIG_FILE" not in os.environ
    path = options.config or default_config()
    try:
        findings = examine(inspect(path, found=found))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; `ts-cores init {path}` writes one") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory; name the file in it: --config {path}/config.properties") from error
    except OSError as error:
        remedy = f"let user {os.getuid()} read it" if isinstance(error, PermissionError) else "name another file"
        raise InputError(f"{path}: {error.strerror}; {remedy}") from error
    if options.json:
        print(json.dumps({"config": str(path) if path else None, "findings": [asdict(one) for one in findings]}))
    else:
        from ts_plugin.view.terminal import tell

        tell(report(findings))
    return int(any(finding.severity is Severity.ERROR for finding in findings))


def _init(options: argparse.Namespace) -> int:
    import javaproperties

    from ts_plugin.config.file import built_plugin, parse_config

    target = (options.path / "config.properties" if options.path.is_dir() else options.path).absolute()
    paths = {
        "plugins_path": built_plugin(),
        "model_store": target.parent / "model_store",
        "metrics_config": target.with_name("metrics.yaml"),  # a copy: workers do not start without it
    }
    cores = len(discovery.read_topology().cores_of(discovery.read_allowance().cpus))
    template = Template(resources.files("ts_plugin.config").joinpath("template.properties").read_text(encoding="utf-8"))
    text = template.substitute(
        file=target,
        plugins=paths["plugins_path"],
        store=paths["model_store"],
        metrics=javaproperties.escape(str(paths["metrics_config"])),
        workers=min(2, cores),
    )
    content = text.encode(errors="surrogateescape")
    config = parse_config(target, content, {})
    unreadable = [str(path) for name, path in paths.items() if config.get(name) != str(path)]
    if unreadable or config.errors or not str(target).isprintable():
        raise InputError(f"TorchServe cannot read {unreadable or [str(target)]} from a file; use a simpler name")
    try:
        paths["model_store"].mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(content)
        if not paths["metrics_config"].exists():
            paths["metrics_config"].write_bytes(paths["plugins_path"].with_name("metrics.yaml").read_bytes())
    except FileExistsError:
        raise CommandError(f"{target}: exists already and is left as it is; name another file") from None
    except OSError as error:
        raise CommandError(f"{error.filename or target}: {error.strerror}") from error
    print(target)
    print(
        f"put archives (.mar) into {target.parent / 'model_store'}, then: torchserve --ncs --ts-config {target}",
        file=sys.stderr,
    )
    return 0


def _tune(options: argparse.Namespace) -> int:
    from ts_plugin.tune.command import tune

    return tune(options)


def _compare(options: argparse.Namespace) -> int:
    from ts_plugin.compare.command import compare

    return compare(options)


def _plugin_path(options: argparse.Namespace) -> int:
    from ts_plugin.config.file import built_plugin

    print(built_plugin())
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "show": _show,
    "explain": _explain,
    "doctor": _doctor,
    "init": _init,
    "plugin-path": _plugin_path,
    "tune": _tune,
    "compare": _compare,
}
