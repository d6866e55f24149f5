"""`ts-cores compare`: measure side by side, say who wins, and keep it in a file; interrupted, it goes on."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ts_plugin import __version__
from ts_plugin.compare import inside
from ts_plugin.compare.comparison import Comparison, FormatError, Server
from ts_plugin.compare.demo import demonstration
from ts_plugin.compare.machine import describe
from ts_plugin.compare.picture import picture
from ts_plugin.compare.report import machine, notes, table, verdict
from ts_plugin.compare.ways import BETWEEN, DELAYS, PER_WORKER, Way, configured, contender, plan, workers_of
from ts_plugin.config.file import Config, read_config
from ts_plugin.errors import CommandError
from ts_plugin.machine import process
from ts_plugin.machine.words import count
from ts_plugin.trial.ab import ab
from ts_plugin.trial.alone import alone, require_quiet
from ts_plugin.trial.asked import Model, asked_models
from ts_plugin.trial.bare import Bare, BareError, Binding, explained
from ts_plugin.trial.client import TorchServeError
from ts_plugin.trial.load import LoadError
from ts_plugin.trial.progress import Show
from ts_plugin.trial.room import Room, find_room, free_memory
from ts_plugin.trial.store import Store, key, where
from ts_plugin.trial.turns import (
    FRONTEND,
    LEAD_IN,
    USABLE_MEMORY,
    Contender,
    Load,
    Tell,
    Turns,
    complete,
    packed,
    rounds_of,
)

A_SERVER = 12.0  # seconds that starting one takes, as long as none was started
WRAPPED = 400 << 20  # bytes more that each worker takes behind TorchServe's launcher: an interpreter with torch
START, MEASURE = 0.1, 0.9  # parts of the time


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs: bytes of its first worker and of each other, seconds of one request alone."""

    first: int
    further: int
    request: float


def compare(options: argparse.Namespace) -> int:
    """Run the command: 0, or 1 if no verdict could be had, 130 if it was interrupted.

    Raises:
        CommandError, OSError: and why.
    """
    if options.show:
        try:
            found = Comparison.from_json(options.show.read_bytes())
        except FormatError as error:
            raise CommandError(f"{options.show}: {error}") from error
        return _report(found, options.out or options.show, kept=False)
    if options.demo:
        archive, body = demonstration(options.demo)
        options.archives, options.body = [archive], options.body or [str(body)]
    models, config = asked_models(options), read_config(options.config, os.environ) if options.config else None
    if options.client == "ab" and shutil.which("ab") is None:
        raise CommandError("--client ab: ab is not installed: apt-get install apache2-utils")
    out = options.out or Path(f"compare-{models[0].archive.model}.json")
    if out.suffix == ".svg" or out.is_dir() or not os.access(out.parent, os.W_OK):  # said before minutes of measuring
        raise CommandError(f"{out}: cannot be written, or is the picture's name; name another with --out FILE.json")
    with alone("compare") as cache:
        room = find_room(anyway=options.anyway)
        busy = require_quiet(room.cpus, anyway=options.anyway)
        os.sched_setaffinity(0, room.cpus)  # what we start inherits it
        store = _store(cache, models, room, options)
        if "busy" not in store:
            store.set("busy", round(busy, 2))
        interrupted = False
        run = _Run(models, config, room, store, options)
        try:
            run.measure()
        except KeyboardInterrupt:
            print("ts-cores: interrupted; the same command goes on from here", file=sys.stderr)
            interrupted = True
        except (TorchServeError, LoadError) as error:
            raise CommandError(f"the real server does not serve: {error}") from error
        found = run.found(interrupted=interrupted)
    if not found.rounds:
        if interrupted:
            return 130
        told = "; ".join(f"{way}: {server.error}" for way, server in found.servers.items() if server.error)
        raise CommandError(f"nothing could be measured: {told or 'no server answered'}")
    status = _report(found, out, kept=True)
    return 130 if interrupted else status


@dataclasses.dataclass
class _Run:
    models: Sequence[Model]
    config: Config | None
    room: Room
    store: Store
    options: argparse.Namespace
    workers: list[int] = dataclasses.field(default_factory=list, init=False)
    contenders: dict[Way, Contender] = dataclasses.field(default_factory=dict, init=False)

    def measure(self) -> None:
        """Measure what the store does not have yet.

        Raises:
            CommandError: an archive cannot be loaded or rejects its body, or there is no memory for one server.
        """
        end = time.monotonic() + self.options.minutes * 60
        with Show(1, self.options.minutes * 60) as show:
            with show.stage("trying the archive", START) as stage:
                costs = []
                for model in self.models:
                    stage.tell(model.archive.path.name, stage.seconds)
                    costs.append(self._cost(model))
            limit = int(USABLE_MEMORY * free_memory())
            self._divide(costs, limit)
            with show.stage("comparing", MEASURE) as stage:
                self._compare(costs, limit, end, stage.tell, show.note)

    def _cost(self, model: Model) -> Cost:
        """Load the archive in a process without a server: what is wrong with it is said in a few seconds."""
        name = f"cost {model.archive.model}"
        if name not in self.store:
            binding = Binding(tuple(sorted(self.room.cpus)), self.room.cores)
            try:
                with Bare(model.archive.path, model.body.content, [binding], content_type=model.body.type) as bare:
                    took = bare.work(0.5, fewest=3)
                    first, further = process.memory(bare.pids[0]) or (0, 0)
            except BareError as error:
                raise CommandError(explained(model.archive, error)) from error
            self.store.set(name, [first, further, min(took)])
        return Cost(*self.store.get(name))

    def _divide(self, costs: Sequence[Cost], limit: int) -> None:
        """Decide on the workers of each model, and so on the servers.

        Raises:
            CommandError: they do not fit into memory.
        """
        archives = [model.archive for model in self.models]
        asked = self.options.workers
        workers: list[int] = self.store.get("workers") or workers_of(archives, self.config, asked, self.room.cores)
        while (needed := _bytes(costs, workers)) > limit:
            if asked or max(workers) == 1:
                raise CommandError(
                    f"a server with {count(sum(workers), 'worker')} needs {needed >> 20} MiB, and {limit >> 20} MiB "
                    "may be used; free some memory, or give fewer --workers"
                )
            workers = [max(number - 1, 1) for number in workers]
        self.workers = workers
        self.store.set("workers", workers)
        settings = tuple(
            {"minWorkers": number, "maxWorkers": number}
            | {name: value for name, value in configured(archive, self.config).items() if name in DELAYS}
            for archive, number in zip(archives, workers, strict=True)
        )
        threads = max(self.room.cores // sum(workers), 1)
        self.contenders = {way: contender(way, settings, threads=threads, config=self.config) for way in Way}

    def _compare(self, costs: Sequence[Cost], limit: int, end: float, tell: Tell, note: Callable[[str], None]) -> None:
        ways, sizes = self._possible(costs, limit, note)
        loads = self._loads()
        if loads and all(self._complete(way, loads) for way in ways):
            note(f"measured before, {self.store.get('when')} UTC; --fresh measures again")
            return
        request = max(cost.request for cost in costs)
        started: list[float] = []  # how long each start took
        groups = packed(ways, lambda way: sizes[way], limit)
        if len(groups) > 1:
            note(f"memory for {len(groups[0])} servers at once: the others come after them, further apart in time")
        for number, group in enumerate(groups):
            with Turns(
                self.models,
                store=self.store,
                clients=[PER_WORKER * workers for workers in self.workers],
                cpus=self.room.cpus,
                tell=tell,
                note=note,
                closed=ab if self.options.client == "ab" else None,
                timeout=min(max((end - time.monotonic()) / 3, 60.0), 180.0),
            ) as turns:
                for way in group:
                    if loads and self._complete(way, loads):
                        continue
                    left, each = end - time.monotonic(), statistics.fmean(started or [A_SERVER])
                    if not loads and len(started) > 1 and left < each + self._shortest(len(started) + 1, request):
                        note(f"{way}: not measured, --minutes {self.options.minutes:g} has no time for it")
                        ways.remove(way)
                        continue
                    tell(f"starting the server: {way}", left)
                    began = time.monotonic()
                    self._start(turns, way)
                    started.append(time.monotonic() - began)
                if not loads:
                    later = sum(len(group) for group in groups[number + 1 :])
                    left = end - time.monotonic() - statistics.fmean(started) * later
                    loads = plan(left, max(len(turns.servers) + later, 1), self.workers, request=request)
                    self.store.set("loads", [dataclasses.asdict(load) for load in loads])
                    self.store.set("ways", ways)
                    self.store.set("when", time.strftime("%Y-%m-%d %H:%M", time.gmtime()))
                now = time.monotonic()
                deadline = now + (end - now) / (len(groups) - number)
                turns.measure([self.contenders[way] for way in group], loads, deadline=deadline, essential=2)
                for way in group:
                    if self.options.pictures and str(way) in turns.servers and f"inside {way}" not in self.store:
                        tell(f"looking inside {way}", inside.SECONDS)
                        self.store.set(f"inside {way}", self._inside(turns, way))

    def _possible(
        self, costs: Sequence[Cost], limit: int, note: Callable[[str], None]
    ) -> tuple[list[Way], dict[Way, int]]:
        """Return the ways that can run here, and the bytes of each one's server; the others are refused."""
        ways = [Way(way) for way in self.store.get("ways", list(Way))]
        sizes = dict.fromkeys(ways, _bytes(costs, self.workers))
        most, cores = max(self.workers), len(self.room.topology.cores)
        why = {}
        if Way.LAUNCHER in sizes:
            sizes[Way.LAUNCHER] += WRAPPED * sum(self.workers)
            if most > cores:  # every worker dies, again and again
                why[Way.LAUNCHER] = f"it needs a core for each worker: {most} workers, {cores} cores"
        for way, size in sizes.items():
            if size > limit:
                why[way] = f"it needs {size >> 20} MiB, and {limit >> 20} MiB may be used"
        for way, reason in why.items():
            note(f"{way}: {reason}")
            self.store.set(f"server {way}", {"error": reason})
        return [way for way in ways if way not in why], sizes

    def _inside(self, turns: Turns, way: Way) -> dict[str, Any]:
        load = threading.Thread(target=turns.full_load, args=(self.contenders[way], inside.SECONDS), daemon=True)
        load.start()
        time.sleep(LEAD_IN)
        cores = self.room.topology.cores
        node_of = {cpu: core.node for core in cores for cpu in core.cpus if cpu in self.room.cpus}
        try:
            return inside.look(sorted(turns.servers[way].workers()), node_of)
        finally:
            load.join()

    def _loads(self) -> tuple[Load, ...]:
        return tuple(map(Load.from_json, self.store.get("loads", ())))

    def _shortest(self, contenders: int, request: float) -> float:
        """Return the seconds that the shortest run with a spread takes."""
        loads = plan(0.0, contenders, self.workers, request=request)
        return 2 * contenders * sum(LEAD_IN + BETWEEN + load.seconds for load in loads)

    def _complete(self, way: Way, loads: Sequence[Load]) -> bool:
        looked = not self.options.pictures or f"inside {way}" in self.store
        return looked and complete(self.store, self.contenders[way], loads)

    def _start(self, turns: Turns, way: Way) -> None:
        if not turns.start(self.contenders[way]):
            self.store.set(f"server {way}", {"error": turns.trouble[way]})
            return
        server = turns.servers[way]
        memory = sum(found[0] for one in server.processes() if (found := process.memory(one.pid)))
        about = Server(round(server.ready_seconds or 0.0, 1), memory >> 20)
        self.store.set(f"server {way}", dataclasses.asdict(about))

    def found(self, *, interrupted: bool) -> Comparison:
        loads = self._loads()
        rounds = tuple(rounds_of(self.store, self.contenders.values(), [load.name for load in loads]))
        servers = {str(way): Server(**self.store.get(f"server {way}")) for way in Way if f"server {way}" in self.store}
        settings = {
            "ts_cores": __version__,
            "archives": [model.archive.path.name for model in self.models],
            "bodies": [{"bytes": len(model.body.content), "type": model.body.type} for model in self.models],
            "workers": self.workers,
            "batch": [self._batch(model) for model in self.models],
            "minutes": self.options.minutes,
            "client": self.options.client,
            "config": self._kept(),
            "when": self.store.get("when"),
        }
        return Comparison(
            machine=describe(self.room),
            settings=settings,
            models=tuple(model.archive.model for model in self.models),
            loads=loads,
            servers=servers,
            rounds=rounds,
            busy_before=self.store.get("busy", 0.0),
            interrupted=interrupted,
            inside={way: seen for way in Way if (seen := self.store.get(f"inside {way}"))},
        )

    def _batch(self, model: Model) -> int:
        said = configured(model.archive, self.config) | dict(model.archive.settings)
        return int(said.get("batchSize", 1))

    def _kept(self) -> Mapping[str, str]:
        """Return what all ways had of the user's config.properties."""
        launcher = self.contenders.get(Way.LAUNCHER)
        properties = {} if launcher is None else launcher.properties
        return {name: str(value) for name, value in properties.items() if value is not None}


def _bytes(costs: Sequence[Cost], workers: Sequence[int]) -> int:
    each = (cost.first + (number - 1) * cost.further for cost, number in zip(costs, workers, strict=True))
    return FRONTEND + sum(each)


def _store(cache: Path, models: Sequence[Model], room: Room, options: argparse.Namespace) -> Store:
    """Return where it is kept; the name has in it all that measurements depend on."""
    config = options.config.read_bytes() if options.config else b""
    parts = [*where(room), options.minutes, options.workers, options.client, config]
    parts += [part for model in models for part in (model.archive.path.name, model.archive.digest, model.body)]
    return Store(cache / f"{key(parts)}.json", fresh=options.fresh)


def _report(found: Comparison, out: Path, *, kept: bool) -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    for model in range(len(found.models)):
        console.print(table(found, model))
        for text in (verdict(found, model), *notes(found, model), ""):
            console.print(text, soft_wrap=True, markup=False)
    console.print(machine(found), soft_wrap=True, markup=False)
    files = [(out.with_suffix(".svg"), picture(found))] + ([(out, found.to_json())] if kept else [])
    if found.inside:
        files.append((out.with_suffix(".inside.svg"), inside.drawn(found)))
    for file, text in files:
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(file)
        except OSError as error:
            raise CommandError(f"{file}: {error.strerror}; name another with --out FILE") from error
        finally:
            draft.unlink(missing_ok=True)
        console.print(f"written: {file}", soft_wrap=True, markup=False)
    return 0 if all(found.samples(Way.OURS, load.name) for load in found.loads[:1]) else 1
