"""The command line of `ts-cores`: words in, checked options out."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ts_plugin import __version__
from ts_plugin.planning.planner import MOST_WORKERS

MOST_DIGITS = 18  # of a number: what is longer is a slip of the finger


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One ``--model``: its name, its number of workers, and the wishes of its archive's ``cpu:`` section."""

    name: str
    workers: int
    cores: int | None = None
    share: float = 1.0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Return the options, with the name of the command as ``command``; exits with status 2 if they make no sense."""
    parser = _parser()
    options = parser.parse_args(_join_values(words))
    if options.command == "plan":
        models = [PlannedModel("", options.workers)] * (options.workers is not None) + (options.model or [])
        if not models and options.config is None:
            parser.error("plan needs --workers N, --model NAME=N or --config FILE")
        if (total := sum(model.workers for model in models)) > MOST_WORKERS:
            parser.error(f"plan takes at most {MOST_WORKERS} workers, not {total}")
        options.models = models
    elif options.command == "show" and options.watch and options.json:
        parser.error("--watch draws and --json prints one document; leave one of them out")
    elif options.command == "show" and options.watch and not (options.svg or options.html or sys.stdout.isatty()):
        parser.error("--watch draws on a terminal; add --html FILE for a page that follows, or take --json alone")
    elif options.command == "compare" and (bool(options.archives) + bool(options.show) + bool(options.demo)) != 1:
        parser.error("compare needs one of these: archives with their --body, --demo, or --show FILE")
    elif options.command == "compare" and len(options.archives) > 2:
        parser.error(f"compare takes one archive, or two for uneven load, not {len(options.archives)}")
    return options


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
        prog="ts-cores",
        description="One slice of physical cores for every TorchServe worker.",
        epilog="examples:\n  ts-cores init\n  ts-cores doctor\n  ts-cores plan --workers 4\n  ts-cores show\n"
        "`ts-cores COMMAND --help` has the options of a command, and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"ts-cores {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, purpose: str, *examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog="\n  ".join(("examples:", *examples)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    plan = command(
        "plan",
        "show which cores workers would get, on this machine or on a captured one",
        "ts-cores plan --workers 4",
        'ts-cores plan --workers 4 --launcher-args "--reserve-cores 1" --svg plan.svg',
        "ts-cores plan --model bert=2:share=3 --model resnet18=4:cores=1 --quota 6",
        "ts-cores plan --config config.properties --sys-root captured-machine",
    )
    plan.add_argument(
        "--workers", type=_number(MOST_WORKERS), metavar="N", help="plan for N workers that ask for the same"
    )
    plan.add_argument(
        "--model",
        type=_model,
        action="append",
        metavar="NAME=N[:cores=C|:share=S]",
        help="N workers of a model, with the cpu: section of its archive; may be repeated",
    )
    plan.add_argument(
        "--config",
        type=_file,
        metavar="FILE",
        help="plan for the models that a server with this config.properties loads",
    )
    plan.add_argument("--launcher-args", metavar='"..."', help="the value of cpu_launcher_args")
    plan.add_argument("--quota", type=_above_nought, metavar="CPUS", help="plan as under a CFS quota of so many CPUs")
    plan.add_argument(
        "--sys-root", type=_file, metavar="DIR", help="read DIR/sys and DIR/proc instead of this machine's"
    )

    show = command(
        "show",
        "show which cores each worker has now",
        "ts-cores show",
        "ts-cores show --watch",
        "ts-cores show --json",
        "ts-cores show --html cores.html --watch",
    )
    show.add_argument(
        "--server", type=_number(sys.maxsize), metavar="PID", help="only the workers of this TorchServe frontend"
    )
    show.add_argument("--watch", action="store_true", help="live, with the utilisation of every CPU; Ctrl-C ends it")
    show.add_argument(
        "--html", type=_file, metavar="FILE", help="write a web page to FILE; --watch keeps it up to date"
    )
    for drawing in (plan, show):
        drawing.add_argument("--svg", type=_file, metavar="FILE", help="write the picture to FILE; - is stdout")
        help = "list each worker, where there are so many that a model would have one line"
        drawing.add_argument("--all", action="store_true", help=help)

    explain = command(
        "explain",
        "say why a worker has the cores that it has",
        "ts-cores explain resnet18",
        "ts-cores explain resnet18:1.0",
        "ts-cores explain 4711 --json",
    )
    explain.add_argument("who", metavar="PID|MODEL[:VERSION]", help="a worker, or all workers of a model")

    doctor = command(
        "doctor",
        "find what is wrong here, why it matters, and the line to change",
        "ts-cores doctor",
        "ts-cores doctor --config config.properties && torchserve --ts-config config.properties",
    )
    doctor.add_argument(
        "--config",
        type=_file,
        metavar="FILE",
        help="the file to examine; default: the one that a torchserve started here without --ts-config goes by",
    )
    for printing in (plan, show, explain, doctor):
        printing.add_argument("--json", action="store_true", help="print JSON")

    init = command(
        "init", "write a config.properties for a server of your own", "ts-cores init", "ts-cores init /etc/torchserve"
    )
    init.add_argument(
        "path",
        nargs="?",
        type=_config_file,
        default=Path("config.properties"),
        metavar="FILE|DIR",
        help="where to write it, with a directory model_store beside it; default: config.properties",
    )

    tune = command(
        "tune",
        "how many workers, how many cores each, which batch: measured here, in about five minutes per model",
        "ts-cores tune my.mar --body photo.jpg",
        "ts-cores tune my.mar --body photo.jpg --p99 200ms --config config.properties",
        "ts-cores tune a.mar b.mar --body a=photo.jpg --body b=text.json --rate a=20 --rate b=2",
    )
    tune.add_argument(
        "archives", type=_file, nargs="+", metavar="ARCHIVE", help="a model archive (.mar) as TorchServe loads it"
    )
    tune.add_argument("--body", action="append", metavar="[NAME=]FILE", help="what a request sends; JSON as such")
    tune.add_argument("--p99", action="append", metavar="[NAME=]TIME", help="99 of 100 answers within it: 200ms, 0.2s")
    tune.add_argument("--rate", action="append", metavar="[NAME=]N", help="requests/s to serve (default: the most)")
    tune.add_argument("--config", type=_file, metavar="FILE", help="what you run now, to compare with")
    tune.add_argument(
        "--write", type=_file, metavar="FILE", help="set the answer there; the old file is kept beside it"
    )
    tune.add_argument("--picture", type=_file, metavar="FILE", help="draw what was measured: .png or .svg")
    tune.add_argument("--minutes", type=_above_nought, default=5.0, metavar="N", help="per model (default: 5)")
    tune.add_argument("--memory", type=_size, metavar="SIZE", help="use no more, such as 4G (default: what is free)")
    tune.add_argument("--bfloat16", action="store_true", help="try it too; answers change in the third digit")
    tune.add_argument("--fresh", action="store_true", help="forget what was measured before")
    tune.add_argument("--anyway", action="store_true", help="measure although others compute on these cores")
    tune.add_argument("--json", action="store_true", help="print a document for programs")

    compare = command(
        "compare",
        "what do I win here: TorchServe alone and ts-cores side by side, with your archive, in about five minutes",
        "ts-cores compare my.mar --body photo.jpg",
        "ts-cores compare my.mar --body photo.jpg --workers 4 --config config.properties --minutes 15",
        "ts-cores compare a.mar b.mar --body a=photo.jpg --body b=text.json",
        "ts-cores compare --show compare-my.json",
    )
    compare.add_argument("archives", type=_file, nargs="*", metavar="ARCHIVE")
    compare.add_argument("--body", action="append", metavar="[NAME=]FILE", help="what a request sends; JSON as such")
    compare.add_argument(
        "--workers",
        type=_number(MOST_WORKERS),
        metavar="N",
        help="of each model (default: as the archive or the config says, else one per core, at most 4)",
    )
    compare.add_argument(
        "--config", type=_file, metavar="FILE", help="serve with its settings, except for launcher and plug-in"
    )
    compare.add_argument("--minutes", type=_above_nought, default=5.0, metavar="N", help="in all (default: 5)")
    compare.add_argument(
        "--out", type=_file, metavar="FILE", help="where to write it, .svg beside it (default: compare-MODEL.json)"
    )
    compare.add_argument("--show", type=_file, metavar="FILE", help="measure nothing: draw such a file again")
    compare.add_argument(
        "--demo", nargs="?", const="resnet18", metavar="NAME", help="measure a ResNet of torchvision's (resnet18)"
    )
    compare.add_argument("--client", choices=("own", "ab"), default="own", help="who sends full load: apache-bench?")
    compare.add_argument("--pictures", action="store_true", help="look inside afterwards: CPUs, moves, memory, stalls")
    compare.add_argument("--fresh", action="store_true", help="forget what was measured before")
    compare.add_argument("--anyway", action="store_true", help="measure although others compute on these cores")

    command(
        "plugin-path",
        "print the directory of the plug-in, the value of plugins_path",
        'torchserve --plugins-path "$(ts-cores plugin-path)" --ts-config config.properties',
    )
    return parser


def _number(highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS and 0 < int(text) <= highest:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {highest}, not {text[:40]!r}")

    return parse


def _above_nought(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text[:40]!r}")
    return number


def _size(text: str) -> int:
    """Return bytes of ``4G``, ``512M`` or a plain number."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    return int(_above_nought(digits) * 2 ** units.get(unit, 0))


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a file or directory, not ''")
    return Path(text)


def _config_file(text: str) -> Path:
    """Return the file that ``DIR/`` means, whether there is such a directory or not yet."""
    return _file(text) / "config.properties" if text.endswith("/") else _file(text)


def _model(text: str) -> PlannedModel:
    name, _, rest = text.partition("=")
    workers, _, wish = rest.partition(":")
    kind, _, value = wish.partition("=")
    if not name or not workers or (wish and kind not in ("cores", "share")):
        raise argparse.ArgumentTypeError(f"must be NAME=N, NAME=N:cores=C or NAME=N:share=S, not {text[:40]!r}")
    return PlannedModel(
        name,
        _number(MOST_WORKERS)(workers),
        cores=_number(MOST_WORKERS)(value) if kind == "cores" else None,
        share=_above_nought(value) if kind == "share" else 1.0,
    )
