"""The best choices on the real server, beside TorchServe's default and what the user runs now.

All servers stand side by side, if memory allows, and get each load in turn; an idle one costs next to nothing. Every
other round goes backwards. Full load: clients that send their next request when they have an answer, always more than
the workers can take. Open loop: independent users, at the same rate for all.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ts_plugin.operate.config import built_plugin
from ts_plugin.trial.archive import Archive, copy_with
from ts_plugin.trial.load import Answer, OpenLoop, in_threads, percentile, poisson, take_turns
from ts_plugin.trial.properties import Property
from ts_plugin.trial.torchserve import TorchServe, TorchServeError
from ts_plugin.tune.answer import Confirmed
from ts_plugin.tune.measure import Body, Tell, packed
from ts_plugin.tune.profile import LOAD, Choice, Target
from ts_plugin.tune.settings import archive_settings
from ts_plugin.tune.store import Store

__all__ = [
    "CPUS_ONLY",
    "Candidate",
    "Model",
    "Served",
    "clients_of",
    "confirm",
    "full_load",
    "ours",
    "pace",
    "pick",
    "start",
    "warm_up",
]

LEAD_IN = 1.5  # seconds of every load that do not count
FULL = 5.0  # seconds of full load in one round, at least
OPEN = 7.0  # seconds of open loop
START = 15.0  # seconds that a server takes to start
ROUNDS = 3
MOST_CLIENTS = 96  # TorchServe refuses the 101st request in its queue
CPUS_ONLY: dict[str, Property | None] = {"number_of_gpu": 0}
SAME = 0.02  # throughputs that differ by less are the same


@dataclass(frozen=True, slots=True)
class Model:
    """One archive, what its requests send, and what is wanted of it."""

    archive: Archive
    body: Body
    target: Target


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server: ``choices`` per model, or None for archives as they are; ``memory`` in bytes, its frontend included."""

    title: str
    choices: tuple[Choice, ...] | None
    properties: Mapping[str, Property | None]
    memory: int


@dataclass(frozen=True, slots=True)
class Served:
    """What a candidate did: a row per model."""

    candidate: Candidate
    rows: tuple[Confirmed, ...]


def ours() -> dict[str, Property | None]:
    """Return the properties of a server whose workers get their cores from ts-cores.

    Raises:
        TorchServeError: the frontend hook was not built.
    """
    try:
        return CPUS_ONLY | {"cpu_launcher_enable": True, "plugins_path": built_plugin()}
    except FileNotFoundError as error:
        raise TorchServeError(str(error)) from error


def confirm(
    models: Sequence[Model],
    candidates: Sequence[Candidate],
    *,
    store: Store,
    seconds: float,
    memory: int,
    tell: Tell = lambda what, left: None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Served]:
    """Measure every candidate and return those that could be, in their order.

    ``seconds`` is the budget, ``memory`` what all servers together may take; a candidate that needs more by itself is
    left out, and ``note`` says so.

    Raises:
        TorchServeError: no choice could be served.
    """
    end = time.monotonic() + seconds
    run = _Run(models, store, clients_of(models, candidates), _length(models, candidates), tell, note)
    groups = _groups(candidates, memory, note)
    for number, group in enumerate(groups):
        run.measure(group, time.monotonic() + (end - time.monotonic()) / (len(groups) - number))
    measured = [(one, store.rounds(_key(one, models))) for one in candidates]
    found = [_served(one, rounds, run.rates) for one, rounds in measured if rounds]
    if not any(one.candidate.choices for one in found):
        raise TorchServeError("; ".join(run.trouble) or "no server could be measured")
    return found


def _groups(candidates: Sequence[Candidate], memory: int, note: Callable[[str], None]) -> list[list[Candidate]]:
    """Return groups that fit into memory at once; what needs more by itself is left out."""
    for one in candidates:
        if one.memory > memory:
            note(f"{one.title}: not measured, it needs {one.memory >> 20} MiB and {memory >> 20} may be used")
    return packed((one for one in candidates if one.memory <= memory), lambda one: one.memory, memory)


class _Run:
    """What all groups have in common: the loads, and the rates of the open loop, which the first full load gives."""

    def __init__(
        self,
        models: Sequence[Model],
        store: Store,
        clients: Sequence[int],
        length: float,
        tell: Tell,
        note: Callable[[str], None],
    ) -> None:
        self._models = models
        self._store = store
        self._clients = clients
        self._length = length
        self._tell = tell
        self._note = note
        self._wanted = f"rates {[model.target.rate for model in models]}"
        self.rates: list[float] = store.get(self._wanted, [])
        self.trouble: list[str] = []

    def measure(self, group: Sequence[Candidate], deadline: float) -> None:
        """Let the servers of a group take turns until all have had their rounds, or no further one fits the time."""
        with contextlib.ExitStack() as stack:
            servers: dict[str, TorchServe] = {}
            for at, one in enumerate(group):
                if self._rounds(one) < ROUNDS:
                    self._tell(f"starting the server: {one.title}", deadline - time.monotonic() - START * at)
                    if (server := self._start(one, stack)) is not None:
                        servers[one.title] = server
            took = 0.0
            for turn in range(ROUNDS):
                began = time.monotonic()
                if turn and began + 0.8 * took > deadline:
                    break
                due = [one for one in group if one.title in servers and self._rounds(one) <= turn]
                for at, one in enumerate(due[:: -1 if turn % 2 else 1]):
                    each = self._length + OPEN
                    further = min(ROUNDS - turn - 1, max(deadline - began, 0) // (len(due) * each))
                    self._turn(one, servers[one.title], turn, (len(due) * (1 + further) - at) * each)
                took = time.monotonic() - began

    def _rounds(self, one: Candidate) -> int:
        return len(self._store.rounds(_key(one, self._models)))

    def _start(self, one: Candidate, stack: contextlib.ExitStack) -> TorchServe | None:
        try:
            server = stack.enter_context(start(self._models, one, stack))
            if one.choices is not None and (unbound := server.cores()["unbound"]):
                raise TorchServeError(f"its workers serve unbound: {unbound[0]['reason']}")
            warm_up(self._models, server, self._clients)
        except TorchServeError as error:
            self.trouble.append(f"{one.title}: {str(error).partition(chr(10))[0]}")
            self._note(self.trouble[-1])
            return None
        return server

    def _turn(self, one: Candidate, server: TorchServe, turn: int, left: float) -> None:
        """Measure one round of one candidate; ``left`` are the seconds until all are done."""
        self._tell(f"{one.title}: full load", left)
        full, failed = full_load(self._models, server, self._clients, self._length)
        if not self.rates:
            if not all(full):
                self._note(f"{one.title}: no answer at full load")
                return
            self.rates = [model.target.rate or LOAD * most for model, most in zip(self._models, full, strict=True)]
            self._store.set(self._wanted, self.rates)
        told = ", ".join(f"{rate:.3g}" for rate in self.rates)
        self._tell(f"{one.title}: {told} requests/s", left - self._length)
        latencies, more = _open(self._models, server, self.rates, turn)
        key = _key(one, self._models)
        self._store.add(key, {"full": full, "latencies": latencies, "failed": failed + more})


def pick(found: Sequence[Served], targets: Sequence[Target]) -> int:
    """Return the place of the best choice, as measured: those that are within all targets first.

    Of these with a rate the first (the chooser's order), otherwise the one with the most throughput; throughputs that
    differ by less than 2 % are the same. If none is within, the nearest: by the 99th percentile, or the rate served.
    """
    best, best_key = -1, (False, 0.0)
    for place, one in enumerate(found):
        if one.candidate.choices is None:
            continue
        nearness = min(_nearness(target, row) for target, row in zip(targets, one.rows, strict=True))
        inside = nearness >= 1
        if not inside:
            value = nearness
        elif all(target.rate is not None for target in targets):
            value = 1.0
        else:
            value = math.prod(row.throughput for row in one.rows)
        if best < 0 or inside > best_key[0] or (inside == best_key[0] and value > best_key[1] * (1 + SAME)):
            best, best_key = place, (inside, value)
    return best


def _nearness(target: Target, row: Confirmed) -> float:
    """Return 1 where the target is met, less where not: how much of it is reached."""
    reached = [1.0]
    if target.rate is not None:
        reached.append(LOAD * row.throughput / target.rate)
    if target.p99 is not None:
        reached.append(target.p99 / row.p99)
    return min(reached)


def _key(one: Candidate, models: Sequence[Model]) -> str:
    choices = one.choices and [archive_settings(choice) for choice in one.choices]
    properties = {name: str(value) for name, value in one.properties.items()}
    return f"real {json.dumps([choices, properties, [model.target.rate for model in models]])}"


def clients_of(models: Sequence[Model], candidates: Sequence[Candidate]) -> list[int]:
    """Return the clients of each model under full load: twice what any choice can have in its workers."""
    most = [4] * len(models)
    for one in candidates:
        for at, choice in enumerate(one.choices or ()):
            most[at] = max(most[at], 2 * choice.workers * choice.batch)
    return [min(clients, max(MOST_CLIENTS // len(models), 4)) for clients in most]


def _length(models: Sequence[Model], candidates: Sequence[Candidate]) -> float:
    """Return the seconds of full load: several batches of every choice."""
    slowest = max(
        (choice.workers * choice.batch / choice.throughput for one in candidates for choice in one.choices or ()),
        default=0.0,
    )
    return max(FULL, LEAD_IN + 5 * slowest)


def start(models: Sequence[Model], one: Candidate, stack: contextlib.ExitStack) -> TorchServe:
    """Start a server with archives that have the candidate's settings; their files are called as their models are."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts-cores-")))
    archives = [directory / f"{model.archive.model}.mar" for model in models]
    for at, (model, path) in enumerate(zip(models, archives, strict=True)):
        if one.choices is None:
            path.symlink_to(model.archive.path.resolve())
        else:
            copy_with(model.archive, path, archive_settings(one.choices[at]))
    return TorchServe(*archives, workers=None, properties=dict(one.properties))


def warm_up(models: Sequence[Model], server: TorchServe, clients: Sequence[int]) -> None:
    """Let every worker see its batches: TorchScript and oneDNN prepare themselves."""
    for model in models:
        server.predict(model.archive.model, model.body.content, content_type=model.body.type)
    _at_once(models, server, lambda url, at: _turns(models[at], url, clients[at], 3.0))


def full_load(
    models: Sequence[Model], server: TorchServe, clients: Sequence[int], length: float
) -> tuple[list[float], int]:
    """Return the throughput of each model, and the requests that failed."""
    found = _at_once(models, server, lambda url, at: _turns(models[at], url, clients[at], length))
    good = [[one.at for one in answers if one.good and LEAD_IN < one.at <= length] for answers in found]
    failed = sum(not one.good for answers in found for one in answers)
    return [pace(times, length - LEAD_IN) for times in good], failed


def pace(times: Sequence[float], seconds: float) -> float:
    """Return how many answers come per second, of those that came at ``times`` within so many seconds.

    It is the slope of their number over time: batches come as a whole, and a plain count is off by up to one of each
    worker.
    """
    if len(set(times)) < 4:
        return len(times) / seconds
    return statistics.linear_regression(sorted(times), range(len(times))).slope


def _turns(model: Model, url: str, clients: int, seconds: float) -> list[Answer]:
    return take_turns(url, model.body.content, clients=clients, seconds=seconds, content_type=model.body.type)


def _open(
    models: Sequence[Model], server: TorchServe, rates: Sequence[float], turn: int
) -> tuple[list[list[float]], int]:
    """Return the latencies of each model, in seconds, and the requests that failed."""

    def users(url: str, at: int) -> list[Answer]:
        arrivals = poisson(rates[at], OPEN, seed=turn)
        loop = OpenLoop(url, models[at].body.content, arrivals=arrivals, content_type=models[at].body.type)
        return loop.run(OPEN)

    found = _at_once(models, server, users)
    latencies = [[one.latency for one in answers if one.good and one.due > LEAD_IN] for answers in found]
    return latencies, sum(not one.good for answers in found for one in answers)


def _at_once(
    models: Sequence[Model], server: TorchServe, work: Callable[[str, int], list[Answer]]
) -> list[list[Answer]]:
    found: list[list[Answer]] = [[] for _ in models]

    def one(at: int) -> None:
        found[at] = work(server.prediction_url(models[at].archive.model), at)

    in_threads(*(partial(one, at) for at in range(len(models))))
    return found


def _served(one: Candidate, rounds: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> Served:
    rows = []
    for at, rate in enumerate(rates):
        full = [each["full"][at] for each in rounds]
        latencies = [value for each in rounds for value in each["latencies"][at]] or [math.inf]
        rows.append(
            Confirmed(
                name=str(one.choices[at]) if one.choices else one.title,
                choice=one.choices[at] if one.choices else None,
                throughput=statistics.median(full),
                spread=(max(full) - min(full)) / 2,
                p50=percentile(latencies, 50),
                p99=percentile(latencies, 99),
                failed=sum(each["failed"] for each in rounds),
                rate=rate,
            )
        )
    return Served(one, tuple(rows))
