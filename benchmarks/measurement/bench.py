"""The benchmark run: every configuration of every scenario, in rotated order; then scaling, then the exercises.

``--loads`` and ``--must-show`` are runs of their own: the loads of points.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.harness import archives
from benchmarks.harness.archives import Handler
from benchmarks.measurement import exercises, points, report, scaling
from benchmarks.measurement.ab import FEWEST_REQUESTS
from benchmarks.measurement.loads import Loads
from benchmarks.measurement.machine import describe, summary
from benchmarks.measurement.measure import Observed, UnboundError, Workload, ceiling, serve, setting
from benchmarks.measurement.points import Sample, Stage
from benchmarks.measurement.results import Config, Row, Scenario, rotated
from ts_plugin.machine.discovery import read_allowance, read_topology
from ts_plugin.machine.topology import Core
from ts_plugin.trial.bare import BareError
from ts_plugin.trial.load import LoadError
from ts_plugin.trial.torchserve import TorchServeError

__all__ = ["Job", "jobs", "main", "parse"]

MODELS = ("resnet18", "resnet50", "transformer")
SCALED = (Config.DEFAULT, Config.LAUNCHER, Config.TS_CORES)
FAILURES = (TorchServeError, LoadError, BareError, UnboundError, FileNotFoundError)


@dataclass(frozen=True, slots=True)
class Job:
    """One row to be measured."""

    config: Config
    scenario: Scenario
    repetition: int


def jobs(configs: Sequence[Config], scenarios: Sequence[Scenario], repetitions: int) -> Iterator[Job]:
    """Yield every row to measure: within a repetition all configurations of a scenario are neighbours in time."""
    for repetition in range(repetitions):
        for scenario in scenarios:
            for config in rotated(configs, repetition):
                yield Job(config, scenario, repetition)


@dataclass(slots=True)
class Run:
    """What was asked for, and what has been found so far."""

    options: argparse.Namespace
    body: Path
    rows: list[Row] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    scaled: list[dict[str, Any]] = field(default_factory=list)
    single: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[Scenario, float] = field(default_factory=dict)  # requests per second of each scenario's open loops
    machine: dict[str, Any] = field(default_factory=describe)
    cores: Sequence[Core] = field(default_factory=lambda: read_topology().cores_of(read_allowance().cpus))
    interrupted: bool = False

    def archive(self, model: str, handler: Handler) -> Path:
        if self.options.mar is not None:
            return Path(self.options.mar)
        if model == "transformer":
            return archives.transformer(handler=handler)
        if model == "slow":
            return archives.slow(handler=handler)
        return archives.resnet(model, handler=handler)

    def measure(self, job: Job) -> Row:
        """Measure one row; a configuration that cannot run becomes a row that says so."""
        scenario, options = job.scenario, self.options
        rate = options.rate or self.rates.get(scenario)
        first, keep_alive = job.repetition == 0, not options.no_keep_alive
        workload = Workload(scenario, options.requests, options.seconds, rate, first, keep_alive)
        try:
            if job.config is Config.CEILING:
                found = ceiling(self.archive(scenario.model, Handler.STOCK), self.body, workload, self.cores)
            else:
                given = setting(
                    job.config, workers=scenario.workers, cores=len(self.cores), launcher_args=options.launcher_args
                )
                mar = self.archive(scenario.model, given.handler)
                found = serve(job.config, mar, self.body, given, workload, self.cores)
        except FAILURES as error:
            row = Row(job.config, scenario, job.repetition, error=str(error))
        else:
            row = Row(job.config, scenario, job.repetition, found.figures)
            if found.figures.rate_per_second:  # the first served row sets it for its scenario: default, the slowest
                self.rates.setdefault(scenario, found.figures.rate_per_second)
            self.machine["unavailable"] |= found.unavailable
            if first:
                self.traces.append(_trace(job, found, {cpu: core.node for core in self.cores for cpu in core.cpus}))
        self.rows.append(row)
        return row

    def scale(self, config: Config) -> None:
        model = self.options.models[0]
        given = setting(config, workers=2, cores=len(self.cores), launcher_args=self.options.launcher_args)
        try:
            found = scaling.scale(
                self.archive(model, given.handler),
                self.body.read_bytes(),
                str(config),
                given,
                rate=self.options.scaling_rate,
                hold=self.options.hold,
            )
        except FAILURES as error:
            self.scaled.append({"config": str(config), "error": str(error)})
        else:
            self.scaled.append(found.to_json())

    def exercise(self, one: exercises.Exercise) -> None:
        model = "resnet18" if self.options.quick else "resnet50"
        try:
            found = exercises.run(
                one,
                self.archive(model, Handler.STOCK),
                self.body.read_bytes(),
                repetitions=self.options.repetitions,
                seconds=self.options.seconds,
            )
        except FAILURES as error:
            found = {"title": one.title, "error": str(error)}
        self.single.append(found)

    def save(self) -> None:
        """Write results.json and traces.json; called after every row, so that an end at any time keeps them."""
        out: Path = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {
            "machine": self.machine,
            "rows": [row.to_json() for row in self.rows],
            "scaling": self.scaled,
            "exercises": self.single,
            "command": self.options.command,
        }
        if self.samples:
            found["loads"] = [sample.to_json() for sample in self.samples]
            found["must_show"] = self.options.must_show
        if self.interrupted:
            found["interrupted"] = True
        for name, content in (("results.json", found), ("traces.json", self.traces)):
            partial = out / f"{name}.partial"
            partial.write_text(json.dumps(content, indent=1 if content is found else None) + "\n")
            partial.replace(out / name)


def _trace(job: Job, found: Observed, node_of: dict[int, int]) -> dict[str, Any]:
    workers = {
        pid: binding | {"node_seconds": found.trace.node_seconds(int(pid), node_of)}
        for pid, binding in found.bindings.items()
    }
    return {
        "config": str(job.config),
        "model": job.scenario.model,
        "workers_wanted": job.scenario.workers,
        "concurrency": job.scenario.concurrency,
        "workers": workers,
        "trace": {
            "times": [round(moment, 2) for moment in found.trace.times],
            "usage": {cpu: [round(share, 2) for share in shares] for cpu, shares in found.trace.usage.items()},
        },
    }


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure everything that was asked for; Ctrl-C ends it early with what there is."""
    with tempfile.TemporaryDirectory(prefix="ts-cores-") as scratch:
        body = options.body
        if body is None:
            body = Path(scratch) / "grace_hopper.jpg"
            body.write_bytes(archives.photograph())
        state = Run(options, body)
        console.print(summary(state.machine))
        stages = _stages(options, len(state.cores))
        todo = [] if stages else list(jobs(options.configs, _scenarios(options), options.repetitions))
        scaled = [config for config in SCALED if config in options.configs and not (stages or options.no_scaling)]
        single = [] if stages or options.no_exercises else list(exercises.exercises(state.cores))
        columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn())
        progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        try:
            with progress:
                task = progress.add_task("archives", total=len(stages) + len(todo) + len(scaled) + len(single))

                def note(sample: Sample) -> None:
                    state.samples.append(sample)
                    progress.console.print(_sample_line(sample), soft_wrap=True)
                    state.save()

                loads = Loads(
                    state.archive, body.read_bytes(), state.cores, options.repetitions, options.launcher_args, note
                )
                for stage in stages:
                    progress.update(task, description=f"loads: {stage.name}")
                    loads.run(stage)
                    progress.advance(task)
                for job in todo:
                    progress.update(task, description=_label(job))
                    progress.console.print(_line(state.measure(job)))
                    state.save()
                    progress.advance(task)
                for config in scaled:
                    progress.update(task, description=f"scaling 1 -> 2 -> 1: {config}")
                    state.scale(config)
                    state.save()
                    progress.advance(task)
                for one in single:
                    progress.update(task, description=one.title)
                    state.exercise(one)
                    state.save()
                    progress.advance(task)
        except KeyboardInterrupt:
            state.interrupted = True
            console.print("interrupted; no server is left, what was measured is kept")
        state.save()
    files = report.write(options.out)
    console.print((options.out / "results.md").read_text(), markup=False, highlight=False, soft_wrap=True)
    console.print("written: " + ", ".join(str(file) for file in files), soft_wrap=True)
    if state.interrupted:
        return 130
    return 1 if options.must_show and not points.promises_table(state.samples)[1] else 0


def _stages(options: argparse.Namespace, cores: int) -> list[Stage]:
    if options.must_show:
        return points.must_show(seconds=options.seconds)
    if not options.loads:
        return []
    configs = [config for config in options.configs if config is not Config.CEILING]
    # Without --workers one per core, but no more than four: wide slices have most to lend.
    workers = options.workers or [min(cores, 4)]
    return [
        stage
        for model in options.models
        for number in workers
        for stage in points.curve(model, workers=number, seconds=options.seconds, configs=configs)
    ]


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    return [Scenario(model, workers, options.concurrency) for model in options.models for workers in options.workers]


def _label(job: Job) -> str:
    return f"{job.scenario.model}, {job.scenario.workers} workers, {job.config} #{job.repetition}"


def _line(row: Row) -> str:
    what = _label(Job(row.config, row.scenario, row.repetition))
    if row.figures is None:
        return f"{what}: could not run: {(row.error or '').splitlines()[0]}"
    void = f", VOID: {row.figures.failed} failed" if not row.valid else ""
    figures = row.figures
    return f"{what}: {figures.requests_per_second:.1f} requests/s, p50 {figures.p50_ms:.0f} ms{void}"


def _sample_line(sample: Sample) -> str:
    what = f"{sample.stage}, {sample.point}, {sample.config} #{sample.repetition}"
    if sample.error is not None:
        return f"{what}: could not run: {sample.error.splitlines()[0]}"
    if sample.mean_ms is None:
        return f"{what}: no good answer, {sample.failed} failed"
    late = f"{', saturated' * sample.saturated}{f', {sample.failed} failed' if sample.failed else ''}"
    figures = f"mean {sample.mean_ms:.0f} ms, p50 {sample.p50_ms:.0f} ms, p99 {sample.p99_ms:.0f} ms{late}"
    return f"{what}: {sample.requests_per_second or 0:.1f} requests/s, {figures}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; what --quick and --sweep leave open is the tutorial's exercise."""
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description="Measure TorchServe's ways to place workers on this machine's cores, and draw what was found.",
        epilog="Without options this is the tutorial's exercise: ResNet-50, 4 workers, 100 concurrent requests, 10,000 "
        "requests per row, three repetitions. On a small machine that takes hours; --quick takes about 7 minutes.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="ResNet-18, 2 workers, 60 requests per row, two repetitions")
    add("--sweep", action="store_true", help=f"{', '.join(MODELS)} with 1, 2 and 4 workers; 400 requests per row")
    add("--loads", action="store_true", help="latency against load: the loads of points.py instead, and their picture")
    add(
        "--must-show",
        action="store_true",
        help="what lending cores must reach on 2 cores, each ratio with its target; exit status 1 if one is missed",
    )
    add("--config", action="append", type=Config, choices=list(Config), metavar="NAME", help=", ".join(Config))
    add("--model", action="append", metavar="NAME", help=f"{', '.join(MODELS)} or another torchvision ResNet")
    add("--mar", type=Path, help="your own archive instead of --model")
    add("--body", type=Path, help="the file that is sent in every request (default: a JPEG photograph)")
    add("--workers", action="append", type=_positive, metavar="N", help="workers of the model; repeat for several")
    add("--repetitions", type=_positive, metavar="N")
    add("--requests", type=_positive, metavar="N", help=f"per row, at least {FEWEST_REQUESTS}")
    add("--concurrency", type=_positive, metavar="N", help="requests under way at any time")
    add("--seconds", type=float, metavar="S", help="length of the open loops and of the ceiling's loop")
    add(
        "--rate",
        type=float,
        metavar="R",
        help="requests/s of the fixed-rate load (default: 0.7 of the first row's)",
    )
    add("--scaling-rate", type=float, default=5.0, metavar="R", help="requests/s while scaling (default: 5)")
    add("--launcher-args", default="", metavar="ARGS", help="cpu_launcher_args for launcher and ts-cores alike")
    add("--no-keep-alive", action="store_true", help="a new connection per request; by our own client, ab cannot")
    add("--no-scaling", action="store_true", help="leave out scaling under load")
    add("--no-exercises", action="store_true", help="leave out the single-process exercises")
    add("--out", type=Path, default=Path("benchmark-results"), metavar="DIR", help="default: benchmark-results")
    options = parser.parse_args(arguments)
    options.command = shlex.join(["./dev", "bench", *arguments])
    small, many, loads = options.quick, options.sweep, options.loads or options.must_show
    if options.loads and options.must_show:
        parser.error("--loads and --must-show are two runs; give one of them")
    if options.must_show and (options.config or options.model or options.mar or options.workers):
        parser.error("--must-show has its own configurations, models and workers")
    options.configs = [config for config in Config if config in (options.config or Config)]
    options.models = [options.mar.stem] if options.mar else options.model or _models(options)
    if not loads:
        options.workers = options.workers or ([2] if small else [1, 2, 4] if many else [4])
    options.workers = list(dict.fromkeys(options.workers or []))
    options.repetitions = options.repetitions or (2 if small else 3)
    options.requests = options.requests or (60 if small else 400 if many else 10_000)
    options.concurrency = options.concurrency or (10 if small else 20 if many else 100)
    options.seconds = options.seconds or (3.0 if small else 11.0 if options.must_show else 15.0)
    options.hold = 4.0 if small else 15.0
    if options.requests < FEWEST_REQUESTS:
        parser.error(f"--requests {options.requests}: ab needs at least {FEWEST_REQUESTS} for its 99th percentile")
    for file in (options.mar, options.body):
        if file is not None and not file.is_file():
            parser.error(f"{file}: no such file")
    return options


def _models(options: argparse.Namespace) -> list[str]:
    if options.sweep:
        return list(MODELS)
    return ["resnet18"] if options.quick else ["resnet50"]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    options = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):  # the server is stopped, the rows are kept
        signal.signal(number, _interrupted)
    return run(options, Console(stderr=False))


if __name__ == "__main__":
    sys.exit(main())
