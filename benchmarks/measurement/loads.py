"""The run of points.py: servers of all configurations stand side by side and get each load in turn.

An idle server costs next to nothing, a start costs ten seconds: so nothing restarts between repetitions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness.archives import Handler
from benchmarks.measurement.measure import UnboundError, require_bound, saturated, setting
from benchmarks.measurement.points import FULL, Point, Sample, Stage
from benchmarks.measurement.results import Config, rotated
from ts_plugin.machine.topology import Core
from ts_plugin.trial.load import Answer, LoadError, OpenLoop, closed_loop, poisson, take_turns
from ts_plugin.trial.torchserve import RequestError, TorchServe, TorchServeError

__all__ = ["Loads", "counted"]

BESIDE = "beside"  # the second model's name on every server
LEAD_IN = 2.0  # seconds of every load that do not count: what learns, learns at this load
PATIENCE = 30.0  # seconds that a request of an open loop may take
WARM_UP = 4  # requests per worker, all at once and again one by one
FAILURES = (TorchServeError, LoadError, UnboundError, FileNotFoundError)


@dataclass(frozen=True, slots=True)
class Loads:
    """How stages are run. ``archive`` returns a model's archive, ``note`` gets every sample as soon as there is one."""

    archive: Callable[[str, Handler], Path]
    body: bytes
    cores: Sequence[Core]
    repetitions: int
    launcher_args: str
    note: Callable[[Sample], None]

    def run(self, stage: Stage) -> None:
        """Measure the stage; a configuration that cannot run becomes samples that say so."""
        with contextlib.ExitStack() as stack:
            servers: dict[Config, TorchServe] = {}
            for config in stage.configs:
                try:
                    servers[config] = stack.enter_context(self._served(config, stage))
                    self._warm(config, servers[config], stage)
                except FAILURES as error:
                    servers.pop(config, None)
                    for point in stage.points:
                        if config in point.configs:
                            self.note(Sample(stage.name, point.name, config, 0, error=str(error)))
            capacity = self._capacity(servers, stage) if stage.shares else None
            for repetition in range(self.repetitions):
                overrun: dict[Config, float] = {}  # the rate that a configuration could not keep up with
                for point in stage.points:
                    if point.share and capacity is None:
                        continue  # ts-cores does not run here, as its samples say: a part of what?
                    rate = point.rate if point.share is None or capacity is None else capacity * point.share
                    for config in rotated([each for each in servers if each in point.configs], repetition):
                        if rate is not None and rate > overrun.get(config, rate):
                            continue  # it has no steady state there either, and its queue takes a minute to drain
                        sample = self._measure(servers[config], stage, point, config, rate, repetition)
                        self.note(sample)
                        if sample.saturated and rate is not None:
                            overrun[config] = rate

    def _served(self, config: Config, stage: Stage) -> TorchServe:
        given = setting(
            config,
            workers=stage.workers + (stage.beside is not None),
            cores=len(self.cores),
            launcher_args=self.launcher_args,
        )
        archive = self.archive(stage.model, given.handler)
        return TorchServe(archive, workers=stage.workers, properties=given.properties, environment=given.environment)

    def _warm(self, config: Config, server: TorchServe, stage: Stage) -> None:
        """Load the second model, warm every worker up, and check what is bound."""
        name = self._name(stage)
        if stage.beside is not None:
            handler = Handler.THREADS if config is Config.THREADS else Handler.STOCK
            server.register(self.archive(stage.beside, handler), workers=1, name=BESIDE)
            closed_loop(server.prediction_url(BESIDE), self.body, requests=2, concurrency=1)
        url = server.prediction_url(name)
        for clients in (stage.workers, 1):
            closed_loop(url, self.body, requests=WARM_UP * stage.workers, concurrency=clients)
        require_bound(config, server, sorted(server.workers()), self.cores)

    def _capacity(self, servers: dict[Config, TorchServe], stage: Stage) -> float | None:
        """Return what ts-cores serves at full load, in requests/s; None: it does not run."""
        server = servers.get(Config.TS_CORES)
        if server is None:
            return None
        full = next((point for point in stage.points if point.name == FULL), None)
        point = Point("capacity", full.seconds if full else 5.0, clients=full.clients if full else 4 * stage.workers)
        sample = self._measure(server, stage, point, Config.TS_CORES, None, 0)
        self.note(sample)
        return sample.requests_per_second

    def _measure(
        self, server: TorchServe, stage: Stage, point: Point, config: Config, rate: float | None, repetition: int
    ) -> Sample:
        """Put the load on one server; every configuration gets the same arrivals in the same repetition."""
        url = server.prediction_url(self._name(stage))
        whole = LEAD_IN + point.seconds
        with contextlib.ExitStack() as stack:
            beside = None
            if point.beside_rate:
                arrivals = poisson(point.beside_rate, whole, seed=1000 + repetition)
                beside = OpenLoop(server.prediction_url(BESIDE), self.body, arrivals=arrivals, patience=PATIENCE)
                stack.enter_context(beside)
            if rate is None:
                answers = take_turns(url, self.body, clients=point.clients or 1, seconds=whole)
            else:
                arrivals = poisson(rate, whole, seed=repetition)
                answers = OpenLoop(url, self.body, arrivals=arrivals, patience=PATIENCE).run(whole)
            lost = sum(not answer.good for answer in beside.stop()) if beside else 0
        sample = counted(answers, Sample(stage.name, point.name, config, repetition, rate, failed=lost), point.seconds)
        if sample.saturated:
            _drain(server, self._name(stage), self.body)
        return sample

    def _name(self, stage: Stage) -> str:
        return self.archive(stage.model, Handler.STOCK).stem


def counted(answers: Sequence[Answer], sample: Sample, seconds: float) -> Sample:
    """Return the sample with the figures of the answers that were due in the last ``seconds`` of the load."""
    due = [answer for answer in answers if answer.due >= LEAD_IN]
    good = [answer for answer in due if answer.good]
    done = sorted(answer.at for answer in answers if answer.good and LEAD_IN <= answer.at <= LEAD_IN + seconds)
    return replace(
        sample,
        latencies_ms=tuple(round(1000 * answer.latency, 2) for answer in good),
        requests_per_second=(len(done) - 1) / (done[-1] - done[0]) if len(done) > 1 and done[-1] > done[0] else None,
        failed=sample.failed + len(due) - len(good),
        saturated=sample.rate is not None and (not good or saturated(due, sample.rate)),
    )


def _drain(server: TorchServe, name: str, body: bytes) -> None:
    """Wait until the server has worked off what its clients gave up on: its queue is first in, first out."""
    end = time.monotonic() + server.timeout
    while time.monotonic() < end:
        with contextlib.suppress(RequestError):  # 503: the queue is full
            server.predict(name, body, timeout=server.timeout)
            return
        time.sleep(1)
