"""The command `ts-cores`: what is planned, what is held, why, and what is wrong. JSON on stdout, trouble on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ts_plugin import __version__
from ts_plugin.leases.ledger import Ledger, LedgerError
from ts_plugin.machine import cpu_time, discovery
from ts_plugin.machine.discovery import DiscoveryError
from ts_plugin.operate import view
from ts_plugin.operate.core_map import core_map
from ts_plugin.planning.planner import Demand, PlanError, Slice, plan
from ts_plugin.planning.policy import LauncherArgsError, parse_launcher_args

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

LOOK_EVERY = 1.0  # seconds between two pictures of `show --watch`


class CommandError(Exception):
    """The command cannot do what was asked; the message is the one line that the user sees."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 if it failed, 2 if it was not understood."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(_join_values(words))
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except (CommandError, PlanError, LauncherArgsError, DiscoveryError, LedgerError) as error:
        print(f"ts-cores: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `ts-cores show | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return status


def _join_values(words: Sequence[str]) -> list[str]:
    """Write ``--launcher-args VALUE`` as one word: argparse takes a value that starts with dashes for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--launcher-args":
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ts-cores", description="One slice of physical cores for every TorchServe worker."
    )
    parser.add_argument("--version", action="version", version=f"ts-cores {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    planning = commands.add_parser("plan", help="who would get what, and why: on this machine or on a captured one")
    planning.add_argument("--workers", type=_positive, required=True, metavar="N")
    planning.add_argument("--launcher-args", default="", metavar='"..."', help="as in cpu_launcher_args")
    planning.add_argument("--sys-root", default="/", metavar="DIR", help="read DIR/sys and DIR/proc instead of / ")
    planning.add_argument("--svg", type=Path, metavar="FILE", help="write the picture for a document")
    planning.add_argument("--json", action="store_true")
    planning.set_defaults(run=_plan)

    show = commands.add_parser("show", help="who holds what now")
    show.add_argument("--server", type=_positive, metavar="PID", help="only the workers of this TorchServe frontend")
    show.add_argument("--watch", action="store_true", help="live, with the utilisation of every CPU; Ctrl-C ends it")
    show.add_argument("--svg", type=Path, metavar="FILE", help="write the picture for a document")
    show.add_argument("--html", type=Path, metavar="FILE", help="write a page; with --watch it keeps itself up to date")
    show.add_argument("--json", action="store_true")
    show.set_defaults(run=_show)

    explain = commands.add_parser("explain", help="why a worker has the cores that it has")
    explain.add_argument("who", metavar="PID|MODEL[:VERSION]")
    explain.set_defaults(run=_explain)

    doctor = commands.add_parser("doctor", help="what is wrong here, why it matters, and the line to change")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="default: what torchserve started here would read")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    init = commands.add_parser("init", help="write a config.properties for a server of your own")
    init.add_argument("path", nargs="?", type=Path, default=Path("config.properties"), metavar="FILE|DIR")
    init.set_defaults(run=_init)

    where = commands.add_parser("plugin-path", help="print the directory for plugins_path")
    where.set_defaults(run=_plugin_path)
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _plan(options: argparse.Namespace) -> int:
    policy = parse_launcher_args(options.launcher_args)
    topology = discovery.read_topology(options.sys_root)
    allowance = discovery.read_allowance(options.sys_root)
    demand = Demand(allowance.cpus, policy, allowance.quota)
    result = plan(topology, [demand] * options.workers)
    notes = dict.fromkeys((*topology.notes, *allowance.notes, *policy.notes, *result.notes))
    if options.json:
        workers = [{"worker": number, **_document(piece)} for number, piece in enumerate(result.slices)]
        print(json.dumps({"workers": workers, "idle_cpus": sorted(result.idle), "notes": list(notes)}))
        return 0
    planned = view.of_plan(topology, result, allowance.cpus, tuple(notes))
    if options.svg:
        from ts_plugin.operate import picture

        _write(options.svg, picture.svg(planned))
        return 0
    from ts_plugin.operate.terminal import Map

    _console().print(Map(planned))
    return 0


def _document(piece: Slice) -> dict[str, object]:
    return {
        "cpus": list(piece.cpus),
        "threads": piece.threads,
        "numa_nodes": list(piece.numa_nodes),
        "l3_domains": list(piece.l3_domains),
        "packages": list(piece.packages),
    }


def _show(options: argparse.Namespace) -> int:
    if options.json:
        document = core_map(Ledger().read(), server_pid=options.server)
        print(json.dumps({**document, "idle_cpus": sorted(view.look(options.server).idle())}))
        return 0
    if options.svg or options.html:
        _write_pictures(options)
        while options.watch:
            time.sleep(LOOK_EVERY)
            _write_pictures(options)
        return 0
    from ts_plugin.operate.terminal import Map

    if options.watch:
        _watch(options.server)
    else:
        _console().print(Map(view.look(options.server)))
    return 0


def _write_pictures(options: argparse.Namespace) -> None:
    from ts_plugin.operate import picture

    now = view.look(options.server)
    reload = LOOK_EVERY if options.watch else None
    if options.svg:
        _write(options.svg, picture.svg(now))
    if options.html:
        _write(options.html, picture.html(now, ticks=cpu_time.ticks(), reload=reload))


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all: a browser may be reading the old one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from error


def _watch(server_pid: int | None) -> None:
    from rich.live import Live

    from ts_plugin.operate.terminal import Map, utilisation

    before = cpu_time.ticks()
    with Live(Map(view.look(server_pid)), console=_console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(LOOK_EVERY)
            after = cpu_time.ticks()
            live.update(Map(view.look(server_pid), utilisation(before, after)), refresh=True)
            before = after


def _explain(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from ts_plugin.operate.explain import explain, find

    state = Ledger().read()
    leases = find(state, options.who)
    if not leases:
        known = sorted({lease.model for lease in state.leases})
        hint = f"models with a slice: {', '.join(known)}" if known else "no worker holds a slice now"
        raise CommandError(f"no slice is held by {options.who!r}; {hint}")
    topology, console = discovery.read_topology(), _console()
    for lease in leases:
        table = Table.grid(padding=(0, 2))
        for head, text in explain(lease, state, topology):
            table.add_row(Text(f"  {head}", "dim"), text)
        console.print(Text(f"{lease}, pid {lease.pid}", "bold"), table, sep="\n")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from ts_plugin.operate.doctor import Severity, examine
    from ts_plugin.operate.facts import default_config, gather

    config = options.config or default_config()
    try:
        findings = examine(gather(config))
    except OSError as error:
        raise CommandError(f"{config}: {error.strerror}; `ts-cores init {config}` writes one") from error
    if options.json:
        print(json.dumps({"config": str(config) if config else None, "findings": [asdict(one) for one in findings]}))
    else:
        from ts_plugin.operate.terminal import report

        _console().print(report(findings))
    return int(any(one.severity is Severity.ERROR for one in findings))


def _init(options: argparse.Namespace) -> int:
    target = (options.path / "config.properties" if options.path.is_dir() else options.path).absolute()
    cores = len(discovery.read_topology().cores_of(discovery.read_allowance().cpus))
    text = Template(
        resources.files("ts_plugin.operate").joinpath("template.properties").read_text(encoding="utf-8")
    ).substitute(
        file=target,
        plugins=_plugins(),
        metrics=_plugins().with_name("metrics.yaml"),
        store=target.parent / "model_store",
        workers=min(2, cores),
    )
    try:
        (target.parent / "model_store").mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
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


def _plugin_path(options: argparse.Namespace) -> int:
    print(_plugins())
    return 0


def _plugins() -> Path:
    directory = Path(str(resources.files("ts_plugin"))).resolve() / "frontend"
    if not (directory / "ts-cores.jar").is_file():
        raise CommandError(f"{directory}/ts-cores.jar: not there; build it with: pip install . (a JDK 17 is needed)")
    return directory


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
