"""What is compared, under which loads, and how long: the ways to serve, and a plan that fits the time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from ts_plugin.config.file import Config
from ts_plugin.trial.archive import Archive
from ts_plugin.trial.asked import KEPT
from ts_plugin.trial.properties import Property
from ts_plugin.trial.turns import CPUS_ONLY, FULL, LEAD_IN, STOCK, Contender, Load, ours

ONE, UNEVEN = "one request at a time", "all load on the first"
SHARES = (0.2, 0.5, 0.8)
PER_WORKER = 4  # clients under full load
MOST_CLIENTS = 96  # TorchServe refuses the 101st request in its queue
MOST_WORKERS = 4  # that nobody asked for: wide slices have most to lend, and memory is limited
SHORTEST, LONGEST = 2.0, 8.0  # seconds of a load that count, in one repetition
BETWEEN = 0.7  # seconds from one load to the next: answers that are still under way
DELAYS = ("batchSize", "maxBatchDelay", "responseTimeout")


class Way(StrEnum):
    """The ways to serve, most wanted first: a short run has the first ones only."""

    OURS = "ts-cores"
    DEFAULT = "TorchServe's default"
    LAUNCHER = "TorchServe's launcher"
    THREADS = "threads only"
    NEVER = "ts-cores without lending"


def contender(way: Way, settings: tuple[Mapping[str, Any], ...], *, threads: int, config: Config | None) -> Contender:
    """Return the server of a way; ``threads`` are the cores of each worker if they were divided equally.

    Of ``config`` it has what makes a server fast, but the launcher and the plug-in are the way's. TorchServe alone is
    alone: a handler of ours binds nothing there.

    Raises:
        CommandError: the plug-in was not built.
    """
    kept: dict[str, Property | None] = dict(CPUS_ONLY)
    arguments = ""
    if config is not None:
        others = ("cpu_launcher_args", "cpu_launcher_enable", "default_workers_per_model", "models", "plugins_path")
        kept |= {name: config.get(name) for name in KEPT if name in config.properties and name not in others}
        arguments = config.get("cpu_launcher_args")
    launcher: dict[str, Property | None] = {"cpu_launcher_enable": True, "cpu_launcher_args": arguments or None}
    match way:
        case Way.OURS | Way.NEVER:
            lend = "auto" if way is Way.OURS else "never"
            lending = {"cpu_launcher_args": f"{arguments} --lend {lend}".strip()}
            return Contender(way, kept | ours() | lending, settings, must_bind=True)
        case Way.LAUNCHER:
            return Contender(way, kept | launcher, settings, STOCK, must_bind=True)
        case Way.THREADS:
            return Contender(way, kept, settings, STOCK | {"OMP_NUM_THREADS": str(threads)})
        case Way.DEFAULT:
            return Contender(way, kept, settings, STOCK)


def configured(archive: Archive, config: Config | None) -> dict[str, Any]:
    """Return what config.properties says of the model; the archive's own model-config.yaml wins over it."""
    if config is None or archive.config:
        return {}
    try:
        found = json.loads(config.get("models", "{}"))[archive.model][archive.version]
        return {name: found[name] for name in ("minWorkers", *DELAYS) if name in found}
    except (ValueError, KeyError, TypeError):
        return {}


def workers_of(archives: Sequence[Archive], config: Config | None, asked: int | None, cores: int) -> list[int]:
    """Return the workers of each model: as asked, as its archive or the config says, or one per core, at most four."""
    found = []
    for archive in archives:
        said = archive.settings.get("minWorkers") or configured(archive, config).get("minWorkers")
        default = config.get("default_workers_per_model") if config is not None else ""
        if said is None and default.isascii() and default.isdecimal():
            said = int(default)
        few = max(min(cores // len(archives), MOST_WORKERS), 1)
        found.append(asked or (said if isinstance(said, int) and said > 0 else few))
    return found


def share_name(share: float) -> str:
    return f"{share:g} of full load"


def plan(seconds: float, contenders: int, workers: Sequence[int], *, request: float) -> tuple[Load, ...]:
    """Return the loads that so many contenders can get in so many seconds, in the order of measuring.

    ``request`` is the seconds of one request alone: a load has room for several. Full load and one request at a time
    come first and are repeated more often, because the verdict rests on them; there are always those two.
    """
    least = max(SHORTEST, 4 * request)
    both = 1 + (len(workers) > 1)  # full load and, with two models, uneven load have workers' clients
    pair, rest = both + 1, len(SHARES)

    def takes(essential: int, shares: int, each: float) -> float:
        return contenders * (essential * pair + shares * rest) * (LEAD_IN + BETWEEN + each)

    wanted = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (3, 3)]
    repetitions = max((rounds for rounds in wanted if takes(*rounds, least) <= seconds), default=wanted[0])
    each = least
    if repetitions == wanted[-1]:
        most = max(LONGEST, least)
        number = int(seconds // takes(1, 1, most))
        repetitions = max(repetitions, (number, number))
    spare = seconds - takes(*repetitions, least)
    if spare > 0:
        each = min(least + spare / takes(*repetitions, 1.0 - LEAD_IN - BETWEEN), max(LONGEST, least))
    each = round(each, 1)
    essential, shares = repetitions
    clients = tuple(min(PER_WORKER * number, MOST_CLIENTS // len(workers)) for number in workers)
    alone = (1, *[0] * (len(workers) - 1))
    loads = [Load(FULL, each, essential, clients), Load(ONE, each, essential, alone)]
    if len(workers) > 1:
        loads.append(Load(UNEVEN, each, essential, (2 * workers[0], *[0] * (len(workers) - 1))))
    if shares:
        loads += [Load(share_name(share), each, shares, share=share) for share in SHARES]
    return tuple(loads)
