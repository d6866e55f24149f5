"""One row: one configuration serves one model, is loaded, looked at, and stopped again."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import PLUGINS
from benchmarks.harness.archives import Handler
from benchmarks.measurement import perf, probe
from benchmarks.measurement.ab import ab
from benchmarks.measurement.results import Config, Figures, Scenario
from ts_plugin.machine.topology import Core
from ts_plugin.trial.bare import Bare, Binding
from ts_plugin.trial.load import Answer, Load, LoadError, OpenLoop, closed_loop, percentile
from ts_plugin.trial.torchserve import Property, TorchServe

__all__ = [
    "Observed",
    "Setting",
    "UnboundError",
    "Workload",
    "ceiling",
    "divide",
    "require_bound",
    "saturated",
    "serve",
    "setting",
]

WARM_UP = 5  # requests per worker: TorchScript optimises during the first ones
RATE_SHARE = 0.7  # of a closed loop's throughput: below saturation
SATURATED = 3.0  # intervals between two requests by which latency may grow during an open loop


class UnboundError(RuntimeError):
    """A configuration that should bind its workers did not."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What makes a configuration: lines of config.properties, environment variables, the archive's handler."""

    properties: dict[str, Property | None]
    environment: dict[str, str]
    handler: Handler = Handler.STOCK


def setting(config: Config, *, workers: int, cores: int, launcher_args: str = "") -> Setting:
    """Return the setting of a served configuration on ``cores`` physical cores.

    THREADS sets both ``torch.set_num_threads`` (in our archives) and OMP_NUM_THREADS (for an archive given by --mar).

    Raises:
        FileNotFoundError: the plug-in jar was not built.
    """
    launcher: dict[str, Property | None] = {"cpu_launcher_enable": True, "cpu_launcher_args": launcher_args or None}
    match config:
        case Config.THREADS:
            threads = str(max(cores // workers, 1))
            return Setting({}, {"TS_BENCHMARK_THREADS": threads, "OMP_NUM_THREADS": threads}, Handler.THREADS)
        case Config.LAUNCHER:
            return Setting(launcher, {})
        case Config.TS_CORES | Config.LENDING:
            if not list(PLUGINS.glob("*.jar")):
                raise FileNotFoundError(f"{PLUGINS}: no plug-in jar here; build it with ./dev setup")
            if config is Config.LENDING:
                launcher["cpu_launcher_args"] = f"{launcher_args} --lend auto".strip()
            return Setting(launcher | {"plugins_path": PLUGINS}, {})
        case Config.DEFAULT:
            return Setting({}, {})
        case Config.CEILING:
            raise ValueError("the ceiling is not served")


@dataclass(frozen=True, slots=True)
class Workload:
    """How much to measure. ``rate``: requests per second of the open loop, None for a share of the row's throughput.

    ``seconds`` is the length of the open loop, of a profile, and of the ceiling's loop.
    """

    scenario: Scenario
    requests: int
    seconds: float
    rate: float | None = None
    profile: bool = False
    keep_alive: bool = True


class Observed(NamedTuple):
    """A row's figures, what was sampled for the pictures, and why some figures are missing."""

    figures: Figures
    trace: probe.Trace
    bindings: dict[str, dict[str, Any]]  # worker pid -> {"masks": {thread: CPU list}, "pages": {node: KiB}}
    unavailable: dict[str, str]


def serve(
    config: Config, archive: Path, body: Path, given: Setting, workload: Workload, cores: Sequence[Core]
) -> Observed:
    """Measure one served configuration.

    Raises:
        TorchServeError: the server or its workers did not come up.
        LoadError: the client gave up.
        UnboundError: the workers are not bound as the configuration says.
    """
    workers = workload.scenario.workers
    with TorchServe(archive, workers=workers, properties=given.properties, environment=given.environment) as server:
        url = server.prediction_url(archive.stem)
        pids = sorted(server.workers())
        for _ in range(WARM_UP):  # as many at once as there are workers: the one that still optimises gets its share
            closed_loop(url, body.read_bytes(), requests=workers, concurrency=workers)
        require_bound(config, server, pids, cores)
        with Watch([process.pid for process in server.tree()], pids, cores) as watch:
            load = _load(url, body, workload)
        figures = watch.figures(load, [process.pid for process in server.tree()])
        figures = replace(figures, ready_seconds=server.ready_seconds)
        figures = _at_rate(figures, url, body.read_bytes(), workload)
        unavailable: dict[str, str] = {}
        if workload.profile:
            with OpenLoop(url, body.read_bytes(), rate=figures.requests_per_second):
                figures = _profiled(figures, pids, workload.seconds, unavailable)
        return Observed(figures, watch.trace, _bindings(pids), unavailable)


def ceiling(archive: Path, body: Path, workload: Workload, cores: Sequence[Core]) -> Observed:
    """Measure the same handler in as many bare processes as there would be workers, each on its own cores."""
    bindings: list[Binding] = divide(cores, workload.scenario.workers)
    with Bare(archive, body.read_bytes(), bindings) as bare:
        bare.work(min(workload.seconds, 2))  # warm-up
        with Watch(bare.pids, bare.pids, cores) as watch:
            begun = time.monotonic()
            took = [1000 * seconds for seconds in bare.work(workload.seconds)]
            seconds = time.monotonic() - begun
        load = Load(
            requests=len(took),
            failed=0,
            seconds=seconds,
            requests_per_second=len(took) / seconds,
            p50_ms=percentile(took, 50),
            p90_ms=percentile(took, 90),
            p99_ms=percentile(took, 99),
        )
        figures = replace(watch.figures(load, bare.pids), ready_seconds=bare.ready_seconds)
        begun = time.monotonic()
        forward = len(bare.work(workload.seconds, what="forward"))
        figures = replace(figures, forward_per_second=forward / (time.monotonic() - begun) if forward else None)
        return Observed(figures, watch.trace, _bindings(bare.pids), {})


def divide(cores: Sequence[Core], workers: int) -> list[Binding]:
    """Return what a careful person would write after ``taskset -c``: neighbouring whole cores, one CPU of each.

    Independent of the product's planner on purpose: the ceiling must not inherit its mistakes. More workers than cores
    share cores, one thread each.
    """
    ordered = sorted(cores, key=lambda core: (core.kind, core.package, core.node, core.l3, core.number))
    if workers >= len(ordered):
        return [Binding((ordered[worker % len(ordered)].number,), 1) for worker in range(workers)]
    bounds = [worker * len(ordered) // workers for worker in range(workers + 1)]
    slices = [ordered[low:high] for low, high in pairwise(bounds)]
    return [Binding(tuple(core.number for core in part), len(part)) for part in slices]


class Watch:
    """Counters before and after a load, and samples during it."""

    def __init__(self, tree: Sequence[int], workers: Sequence[int], cores: Sequence[Core]) -> None:
        self._tree = tree
        self._workers = workers
        self._node_of = {cpu: core.node for core in cores for cpu in core.cpus}
        self._sampler = probe.Sampler(workers)
        self.trace = self._sampler.trace

    def __enter__(self) -> Watch:
        self._before = probe.snapshot(self._tree)
        self._before_workers = probe.snapshot(self._workers)
        self._busy = _busy_seconds()
        self._own = _own_seconds()
        self._begun = time.monotonic()
        self._sampler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._sampler.__exit__()
        self._seconds = time.monotonic() - self._begun
        self._busy = _busy_seconds() - self._busy
        self._own = _own_seconds() - self._own
        self._after = probe.snapshot(self._tree)
        self._after_workers = probe.snapshot(self._workers)

    def figures(self, load: Load, tree: Sequence[int]) -> Figures:
        """Return what the load and the counters say; ``tree`` are the processes alive now, for memory and threads."""
        spent, switches, preemptions, _ = self._after.since(self._before)
        moves = self._after_workers.since(self._before_workers)[3]
        done = max(load.requests - load.failed, 1)
        nodes = set(self._node_of.values())
        return Figures(
            requests=load.requests,
            failed=load.failed,
            requests_per_second=load.requests_per_second,
            p50_ms=load.p50_ms,
            p90_ms=load.p90_ms,
            p99_ms=load.p99_ms,
            cpu_seconds_per_request=spent / done,
            pss_mib=probe.pss_mib(tree),
            processes=len(tree),
            threads=probe.snapshot(tree).threads,
            elsewhere_cpus=max(self._busy - self._own - spent, 0) / self._seconds,
            context_switches_per_request=switches / done,
            preemptions_per_request=preemptions / done,
            cpu_migrations=None if moves is None else moves / self._seconds,
            node_migrations=self.trace.moves(self._node_of) / self._seconds if len(nodes) > 1 else 0.0,
            remote_pages_share=self._remote(),
        )

    def _remote(self) -> float | None:
        """Return the mean over the workers."""
        found = (
            probe.remote_share(probe.pages(pid), self.trace.node_seconds(pid, self._node_of)) for pid in self._workers
        )
        shares = [share for share in found if share is not None]
        return sum(shares) / len(shares) if shares else None


def _load(url: str, body: Path, workload: Workload) -> Load:
    if workload.keep_alive:
        return ab(url, body, requests=workload.requests, concurrency=workload.scenario.concurrency)
    return closed_loop(url, body.read_bytes(), requests=workload.requests, concurrency=workload.scenario.concurrency)


def require_bound(config: Config, server: TorchServe, pids: Sequence[int], cores: Sequence[Core]) -> None:
    """Refuse to measure a configuration under the name of one that it is not.

    Raises:
        UnboundError: ts-cores left a worker unbound, or TorchServe's launcher pinned none.
    """
    if config in (Config.TS_CORES, Config.LENDING) and (unbound := server.cores()["unbound"]):
        raise UnboundError(f"{len(unbound)} of {len(pids)} workers are unbound: {unbound[0]['reason']}")
    everywhere = {cpu for core in cores for cpu in core.cpus}
    if config is Config.LAUNCHER and len(pids) > 1 and all(os.sched_getaffinity(pid) == everywhere for pid in pids):
        raise UnboundError("TorchServe's launcher came up without pinning anything: see its log")


def _at_rate(figures: Figures, url: str, body: bytes, workload: Workload) -> Figures:
    rate = workload.rate or RATE_SHARE * figures.requests_per_second
    answers = OpenLoop(url, body, rate=rate).run(workload.seconds)
    good = [1000 * answer.latency for answer in answers if answer.good]
    if not good:
        raise LoadError(f"no good answer at {rate:g} requests/s")
    return replace(
        figures,
        rate_per_second=rate,
        rate_p50_ms=percentile(good, 50),
        rate_p90_ms=percentile(good, 90),
        rate_p99_ms=percentile(good, 99),
        rate_failed=len(answers) - len(good),
        rate_saturated=saturated(answers, rate),
    )


def saturated(answers: Sequence[Answer], rate: float) -> bool:
    """Return whether the server fell behind: latencies of the last quarter far above those of the first.

    A queue that only grows is what tells "too much" from "slow": at least ``SATURATED`` times the interval between two
    requests and twice the first quarter's median.
    """
    quarter = max(len(answers) // 4, 1)
    first = percentile([answer.latency for answer in answers[:quarter]], 50)
    last = percentile([answer.latency for answer in answers[-quarter:]], 50)
    return any(not answer.good for answer in answers) or (last > 2 * first and last - first > SATURATED / rate)


def _profiled(figures: Figures, pids: Sequence[int], seconds: float, unavailable: dict[str, str]) -> Figures:
    found: dict[str, float | None] = {}
    for name, read in (("spinning_share", perf.spinning), ("core_bound_share", perf.core_bound)):
        try:
            found[name] = read(pids, seconds=min(seconds, 5))
        except perf.Unavailable as reason:
            unavailable[name] = str(reason)
    return replace(figures, spinning_share=found.get("spinning_share"), core_bound_share=found.get("core_bound_share"))


def _bindings(pids: Sequence[int]) -> dict[str, dict[str, Any]]:
    return {str(pid): {"masks": probe.thread_masks(pid), "pages": probe.pages(pid)} for pid in pids}


def _busy_seconds() -> float:
    return sum(busy for busy, _ in probe.cpu_ticks().values()) / probe.TICKS_PER_SECOND


def _own_seconds() -> float:
    """Return our CPU seconds and those of ab, which counts once it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
