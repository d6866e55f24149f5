"""Servers side by side that get the same loads in turn: what `ts-cores tune` confirms with and `compare` compares.

An idle server costs next to nothing and a start ten seconds, so nothing restarts between repetitions. In a repetition
all servers get a load one after the other, and every other repetition goes backwards: what changes on the machine
meanwhile meets all of them alike. A closed loop has clients that send their next request when they have an answer, an
open loop independent users, whose arrivals are the same for every server.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from ts_plugin.config.file import built_plugin
from ts_plugin.trial.alone import others_seconds
from ts_plugin.trial.archive import copy_with
from ts_plugin.trial.asked import Model
from ts_plugin.trial.client import RequestError, TorchServeError
from ts_plugin.trial.load import Answer, Body, LoadError, in_threads, open_loop, percentile, poisson, take_turns
from ts_plugin.trial.properties import Property
from ts_plugin.trial.store import Store
from ts_plugin.trial.torchserve import TorchServe
from ts_plugin.worker.start import OFF_VARIABLE

LEAD_IN = 1.5  # seconds of every load that do not count: what learns, learns at this load
WARM_UP = 3.0  # seconds of full load after a start
PATIENCE = 60.0  # seconds that a request of an open loop may take
QUEUE = 40  # requests that wait: the queue only grows, and no more are sent
HOPELESS = 1.5  # times what was answered: a rate that is not tried again
MOST_LATENCIES = 500  # of a sample that are kept
GROWN = 3.0  # intervals between two requests by which latency may grow during an open loop
FRONTEND = 500 << 20  # bytes that TorchServe's frontend takes, a JVM
USABLE_MEMORY = 0.9  # of what is free
CPUS_ONLY: dict[str, Property | None] = {"number_of_gpu": 0}
STOCK = {OFF_VARIABLE: "1"}  # the environment of a server that is TorchServe's own, whatever handlers its archives have
FULL = "full load"

T = TypeVar("T")
Tell = Callable[[str, float], None]  # what is done now, and the seconds that this stage still takes


@dataclass(frozen=True, slots=True)
class Contender:
    """A server: its lines of config.properties and environment, and what its archives have in model-config.yaml.

    ``settings`` per model, or None for archives as they are. ``must_bind``: its workers are to be bound, by ts-cores or
    by TorchServe's launcher; it is not measured under the name of something that it is not.
    """

    title: str
    properties: Mapping[str, Property | None]
    settings: tuple[Mapping[str, Any], ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    must_bind: bool = False

    @property
    def key(self) -> str:
        """Everything that what is measured depends on."""
        properties = {name: str(value) for name, value in self.properties.items()}
        return json.dumps([self.title, properties, self.settings, dict(self.environment)])


@dataclass(frozen=True, slots=True)
class Load:
    """``seconds`` that count, of ``clients`` per model, or else of an open loop.

    Its rate is a ``share`` of what the first contender answers at full load, or per model what ``rates`` say.
    """

    name: str
    seconds: float
    repetitions: int
    clients: tuple[int, ...] = ()
    share: float = 0.0
    rates: tuple[float | None, ...] = ()

    @staticmethod
    def from_json(flat: Mapping[str, Any]) -> Load:
        return Load(**{**flat} | {"clients": tuple(flat["clients"]), "rates": tuple(flat["rates"])})


@dataclass(frozen=True, slots=True)
class Sample:
    """What the requests of one model met. ``rate`` of an open loop and ``throughput`` in requests/s.

    ``latencies`` in seconds, of good answers, the lowest first. ``saturated``: the queue only grew, so that latencies
    say how long one measured; without latencies it was not even tried, since a lower rate was far too much.
    """

    rate: float | None
    throughput: float
    latencies: tuple[float, ...]
    failed: int
    saturated: bool = False


@dataclass(frozen=True, slots=True)
class Round:
    """One load on one contender in one repetition; ``elsewhere`` is how many CPUs others used meanwhile."""

    contender: str
    load: str
    repetition: int
    samples: tuple[Sample, ...]
    elsewhere: float = 0.0

    @staticmethod
    def from_json(flat: Mapping[str, Any]) -> Round:
        samples = tuple(Sample(**sample | {"latencies": tuple(sample["latencies"])}) for sample in flat["samples"])
        return Round(flat["contender"], flat["load"], flat["repetition"], samples, flat["elsewhere"])


Closed = Callable[[str, Body, int, float], Sample]  # URL, body, clients, seconds that count


def ours() -> dict[str, Property | None]:
    """Return the properties of a server whose workers get their cores from ts-cores.

    Raises:
        CommandError: the frontend hook was not built.
    """
    return CPUS_ONLY | {"cpu_launcher_enable": True, "plugins_path": built_plugin()}


def packed(items: Iterable[T], size: Callable[[T], int], room: int) -> list[list[T]]:
    """Return groups of neighbours, each as large as ``room`` allows; every item fits by itself."""
    groups: list[list[T]] = []
    left = 0
    for item in items:
        if not groups or size(item) > left:
            groups.append([])
            left = room
        groups[-1].append(item)
        left -= size(item)
    return groups


def complete(store: Store, contender: Contender, loads: Iterable[Load]) -> bool:
    """Tell whether everything was measured."""
    return all(len(store.rounds(f"{load.name} {contender.key}")) >= load.repetitions for load in loads)


def rounds_of(store: Store, contenders: Iterable[Contender], loads: Iterable[str]) -> Iterator[Round]:
    """Yield everything that was measured."""
    for contender in contenders:
        for load in loads:
            yield from map(Round.from_json, store.rounds(f"{load} {contender.key}"))


@dataclass
class Turns:
    """Servers from ``start`` to the end of ``with``; ``trouble`` says of which there are none, and why."""

    models: Sequence[Model]
    _: KW_ONLY
    store: Store
    clients: Sequence[int]
    cpus: frozenset[int]
    tell: Tell = lambda what, left: None
    note: Callable[[str], None] = lambda text: None
    closed: Closed | None = None  # ours
    timeout: float = 180.0
    servers: dict[str, TorchServe] = field(default_factory=dict, init=False)
    trouble: dict[str, str] = field(default_factory=dict, init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, contender: Contender) -> bool:
        """Start a server, check what is bound, and let every worker see requests; return whether it stands.

        Its archives are called as their models are.
        """
        with contextlib.ExitStack() as stack:
            try:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts-cores-")))
                archives = [directory / f"{model.archive.model}.mar" for model in self.models]
                for at, (model, path) in enumerate(zip(self.models, archives, strict=True)):
                    if contender.settings is None:
                        path.symlink_to(model.archive.path.resolve())
                    else:
                        copy_with(model.archive, path, contender.settings[at])
                server = stack.enter_context(
                    TorchServe(
                        *archives,
                        workers=None,
                        properties=dict(contender.properties),
                        environment=dict(contender.environment),
                        timeout=self.timeout,
                    )
                )
                if contender.must_bind:
                    _require_bound(server, self.cpus)
                self._warm_up(server)
            except TorchServeError as error:
                self.trouble[contender.title] = str(error).partition("\n")[0]
                self.note(f"{contender.title}: {self.trouble[contender.title]}")
                return False
            self._stack.push(stack.pop_all())
            self.servers[contender.title] = server
            return True

    def _warm_up(self, server: TorchServe) -> None:
        """TorchScript and oneDNN prepare themselves in the first requests, and in the first batches."""
        for model in self.models:
            server.predict(model.archive.model, model.body.content, content_type=model.body.type)
        self._full_load(server, WARM_UP)

    def measure(
        self, contenders: Sequence[Contender], loads: Sequence[Load], *, deadline: float, essential: int
    ) -> None:
        """Let those that stand take turns, until all have had their repetitions or the time is over.

        What the store has is not measured again. The first ``essential`` loads are measured at least once.
        """
        standing = [contender for contender in contenders if contender.title in self.servers]
        todo = [
            (turn, load, contender)
            for turn in range(max(load.repetitions for load in loads))
            for load in loads
            for contender in standing[:: -1 if turn % 2 else 1]
            if turn < load.repetitions
        ]
        wanted = {load.name for load in loads[:essential]}
        for at, (turn, load, contender) in enumerate(todo):
            now = time.monotonic()
            if now + (LEAD_IN + load.seconds) / 2 > deadline and (turn or load.name not in wanted):
                continue
            rest = sum(LEAD_IN + load.seconds for _, load, _ in todo[at:])
            first = sum(LEAD_IN + load.seconds for turn, load, _ in todo[at:] if not turn and load.name in wanted)
            self._turn(contender, load, turn, min(rest, max(deadline - now, first)))

    def capacity(self) -> list[float] | None:
        """Return the requests/s of each model that shares are of: what the first contender answers at full load."""
        found: list[float] | None = self.store.get("capacity")
        return found

    def full_load(self, contender: Contender, seconds: float) -> None:
        """Keep a server busy for so long, and count nothing."""
        self._full_load(self.servers[contender.title], seconds)

    def _full_load(self, server: TorchServe, seconds: float) -> None:
        works = zip(self.models, self.clients, strict=True)
        self._at_once(server, [partial(_turns, model.body, each, seconds) for model, each in works])

    def _turn(self, contender: Contender, load: Load, turn: int, left: float) -> None:
        key = f"{load.name} {contender.key}"
        if len(self.store.rounds(key)) > turn:
            return
        rates: list[float] | None = None
        if not load.clients:
            capacity = self.capacity()
            if capacity is None:
                return  # nobody answers at full load: a part of what?
            rates = [load.share * most for most in capacity]
            rates = [given or rate for given, rate in zip(load.rates, rates, strict=True)] if load.rates else rates
        told = load.name if rates is None else f"{' and '.join(f'{rate:.3g}' for rate in rates)} requests/s"
        self.tell(f"{contender.title}: {told}", left)
        before, began = others_seconds(self.cpus), time.monotonic()
        if rates and self._hopeless(contender, rates):
            samples = [Sample(rate, 0.0, (), 0, True) for rate in rates]
        else:
            samples = self._measured(self.servers[contender.title], load, rates, turn)
        elsewhere = max(others_seconds(self.cpus) - before, 0.0) / max(time.monotonic() - began, 0.1)
        if load.name == FULL and self.capacity() is None and all(sample.throughput for sample in samples):
            self.store.set("capacity", [sample.throughput for sample in samples])
        self.store.add(key, asdict(Round(contender.title, load.name, turn, tuple(samples), round(elsewhere, 2))))

    def _hopeless(self, contender: Contender, rates: Sequence[float]) -> bool:
        """Tell whether a rate that is no higher was far too much already: a queue takes long to drain."""
        for name in self.store.names():
            if not name.endswith(contender.key):
                continue
            for each in map(Round.from_json, self.store.rounds(name)):
                for sample, rate in zip(each.samples, rates, strict=True):
                    tried = sample.saturated and sample.latencies and sample.rate is not None
                    if tried and sample.rate <= rate * 1.01 and HOPELESS * sample.throughput < rate:  # type: ignore[operator]
                        return True
        return False

    def _measured(self, server: TorchServe, load: Load, rates: Sequence[float] | None, turn: int) -> list[Sample]:
        whole = LEAD_IN + load.seconds
        works: list[Callable[[str], Sample]] = []
        for at, model in enumerate(self.models):
            if rates is not None:
                works.append(partial(self._users, model.body, rates[at], whole, turn, len(server.workers())))
            else:
                works.append(partial(self._clients_of, model.body, load.clients[at], load.seconds))
        samples = self._at_once(server, works)
        if any(sample.saturated for sample in samples):
            self._drain(server)
        return samples

    def _clients_of(self, body: Body, clients: int, seconds: float, url: str) -> Sample:
        return (self.closed or closed_loop)(url, body, clients, seconds) if clients else Sample(None, 0.0, (), 0)

    def _users(self, body: Body, rate: float, whole: float, turn: int, workers: int, url: str) -> Sample:
        arrivals = poisson(rate, whole, seed=turn)
        most = workers + QUEUE
        answers = open_loop(url, body.content, arrivals, content_type=body.type, patience=PATIENCE, most=most)
        found = counted(answers, whole - LEAD_IN, rate)
        cut = len(answers) < len(arrivals)  # it was left with a queue that only grew
        return Sample(found.rate, found.throughput, found.latencies, found.failed, found.saturated or cut)

    def _at_once(self, server: TorchServe, works: Sequence[Callable[[str], T]]) -> list[T]:
        found: dict[int, T] = {}
        trouble: list[LoadError] = []

        def work(at: int) -> None:
            try:
                found[at] = works[at](server.prediction_url(self.models[at].archive.model))
            except LoadError as error:
                trouble.append(error)

        in_threads(*(partial(work, at) for at in range(len(works))))
        if trouble:
            raise trouble[0]
        return [found[at] for at in range(len(works))]

    def _drain(self, server: TorchServe) -> None:
        """Wait until the server has worked off what its clients gave up on: its queue is first in, first out."""
        end = time.monotonic() + server.timeout
        for model in self.models:
            while time.monotonic() < end:
                with contextlib.suppress(RequestError):  # 503: the queue is full
                    server.predict(model.archive.model, model.body.content, content_type=model.body.type)
                    break
                time.sleep(1)


def _require_bound(server: TorchServe, cpus: frozenset[int]) -> None:
    """Refuse to measure a server under the name of one that it is not.

    Raises:
        TorchServeError: ts-cores left a worker unbound, or TorchServe's launcher pinned none.
    """
    if "plugins_path" in server.properties:
        if unbound := server.cores()["unbound"]:
            raise TorchServeError(f"its workers serve unbound: {unbound[0]['reason']}")
        return
    pids = list(server.workers())
    if len(pids) > 1 and all(os.sched_getaffinity(pid) >= cpus for pid in pids):
        raise TorchServeError("its workers came up, and none of them is pinned")


def _turns(body: Body, clients: int, seconds: float, url: str) -> list[Answer]:
    return take_turns(url, body.content, clients=clients, seconds=seconds, content_type=body.type)


def closed_loop(url: str, body: Body, clients: int, seconds: float) -> Sample:
    """Count what clients of ours see."""
    return counted(_turns(body, clients, LEAD_IN + seconds, url), seconds)


def counted(answers: Sequence[Answer], seconds: float, rate: float | None = None) -> Sample:
    """Return what a load was like in its last ``seconds``, after its lead-in."""
    # A load that was too much, or too slow, has nothing after its lead-in.
    due = [answer for answer in answers if answer.due >= LEAD_IN] or list(answers[len(answers) // 2 :])
    good = [answer for answer in answers if answer.good]
    times = [answer.at for answer in good if LEAD_IN < answer.at <= LEAD_IN + seconds]
    if len(times) >= 4 or rate is not None:
        throughput = pace(times, seconds)
    else:  # so few that those at its edges decide
        throughput = len(good) / max((answer.at for answer in good), default=1.0)
    latencies = sorted(round(answer.latency, 5) for answer in due if answer.good)
    return Sample(
        rate,
        throughput,
        thinned(latencies),
        sum(not answer.good for answer in answers),
        rate is not None and bool(due) and saturated(due, rate),
    )


def thinned(latencies: Sequence[float]) -> tuple[float, ...]:
    """Return at most 500 of them, evenly spread and with the last one: percentiles stay what they are."""
    step = max(len(latencies) / MOST_LATENCIES, 1.0)
    return tuple(latencies[round((place + 1) * step) - 1] for place in range(round(len(latencies) / step)))


def pace(times: Sequence[float], seconds: float) -> float:
    """Return how many answers come per second, of those that came at ``times`` within so many seconds.

    It is the slope of their number over time: batches come as a whole, and a plain count is off by up to one of each
    worker.
    """
    if len(set(times)) < 4:
        return len(times) / seconds
    return statistics.linear_regression(sorted(times), range(len(times))).slope


def saturated(answers: Sequence[Answer], rate: float) -> bool:
    """Return whether the server fell behind: latencies of the last quarter far above those of the first.

    A queue that only grows is what tells "too much" from "slow": by at least ``GROWN`` times the interval between two
    requests, a twentieth of the time that it lasts, and twice the first quarter's median.
    """
    quarter = max(len(answers) // 4, 1)
    first = percentile([answer.latency for answer in answers[:quarter]], 50)
    last = percentile([answer.latency for answer in answers[-quarter:]], 50)
    grown = max(GROWN / rate, (answers[-1].due - answers[0].due) / 20)
    return any(not answer.good for answer in answers) or (last > 2 * first and last - first > grown)
