"""Latency against load: which loads are compared on which servers, what was found, and what must hold. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.measurement.results import Config, Spread, spread_of
from ts_plugin.trial.load import percentile

__all__ = [
    "PROMISES",
    "Point",
    "Promise",
    "Sample",
    "Stage",
    "compared",
    "curve",
    "must_show",
    "points_table",
    "pooled",
    "promises_table",
]

SERVED = tuple(config for config in Config if config is not Config.CEILING)
ONE, UNEVEN, FULL = "one request at a time", "all load on one of two models", "full load"
SHARES = (0.2, 0.5, 0.8)
BESIDE_SLOW = "beside a model with 2-second requests"
SLOW_RATE = 0.25  # requests/s: the slow model computes for half of the time, and is idle for the other half


@dataclass(frozen=True, slots=True)
class Point:
    """One load, counted for ``seconds``: by ``clients`` that wait for their answers, or Poisson arrivals otherwise.

    Their rate is ``rate`` requests/s, or ``share`` of what the stage's ts-cores can serve at most.
    """

    name: str
    seconds: float
    clients: int | None = None
    rate: float | None = None
    share: float | None = None
    configs: tuple[Config, ...] = SERVED  # that get this load, of those that the stage serves
    beside_rate: float = 0.0  # requests/s that the model beside gets meanwhile


@dataclass(frozen=True, slots=True)
class Stage:
    """Servers that stand side by side, one for each configuration, and get the same loads in turn.

    Each serves ``model`` with ``workers`` workers and, with one worker, the model ``beside`` if there is one.
    """

    model: str
    workers: int
    points: tuple[Point, ...]
    configs: tuple[Config, ...] = SERVED
    beside: str | None = None

    @property
    def name(self) -> str:
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        if self.beside is None:
            return f"{self.model}, {workers}"
        return f"{self.model}, {workers}, beside {self.beside if self.beside != self.model else 'another of its kind'}"

    @property
    def shares(self) -> bool:
        return any(point.share is not None for point in self.points)


def curve(model: str, *, workers: int, seconds: float, configs: Sequence[Config]) -> list[Stage]:
    """Return the stages of the picture "latency against load"."""
    points = (
        Point(ONE, seconds / 2, clients=1),
        *(Point(_at(share), seconds, share=share) for share in SHARES),
        Point(FULL, seconds / 2, clients=4 * workers),
    )
    uneven = Point(UNEVEN, seconds / 2, clients=2)
    return [
        Stage(model, workers, points, tuple(configs)),
        Stage(model, 1, (uneven,), tuple(configs), beside=model),
    ]


def must_show(*, seconds: float) -> list[Stage]:
    """Return the stages that ``PROMISES`` speak of.

    They are for 2 cores, where 3 and 7 requests/s are some 0.2 and 0.5 of what ResNet-50 can serve.
    """
    default, alone, lending = Config.DEFAULT, Config.TS_CORES, Config.LENDING
    resnet = (
        Point(ONE, seconds / 3, clients=1, configs=(default, lending)),
        *(Point(_rate(rate), seconds, rate=rate, configs=(alone, lending)) for rate in (3.0, 7.0)),
        Point(FULL, seconds / 2, clients=8, configs=(alone, lending)),
    )
    small = (
        Point(ONE, seconds / 5, clients=1),
        Point(_at(SHARES[0]), seconds / 3, share=SHARES[0]),
        *(Point(_at(share), seconds / 3, share=share, configs=(alone, lending)) for share in SHARES[1:]),
        Point(FULL, seconds / 5, clients=8, configs=(alone, lending)),
    )
    uneven = Point(UNEVEN, seconds / 2, clients=2)
    short = Point(BESIDE_SLOW, 2 * seconds, rate=3.0, beside_rate=SLOW_RATE)
    return [
        Stage("resnet50", 2, resnet, (default, alone, lending)),
        Stage("resnet50", 1, (uneven,), (default, lending), beside="resnet50"),
        Stage("mobilenet_v3_small", 2, small, (default, alone, lending)),
        Stage("resnet50", 1, (short,), (alone, lending), beside="slow"),
    ]


def _at(share: float) -> str:
    return f"open loop at {share:g} of capacity"


def _rate(rate: float) -> str:
    return f"open loop, {rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one configuration did under one load in one repetition. ``error``: why it could not be measured.

    ``latencies_ms`` are those of the good answers, ``failed`` counts the others; ``rate`` is what was offered, None in
    a closed loop; ``saturated``: the queue only grew, so that latencies say how long one measured.
    """

    stage: str
    point: str
    config: Config
    repetition: int
    rate: float | None = None
    latencies_ms: tuple[float, ...] = ()
    requests_per_second: float | None = None
    failed: int = 0
    saturated: bool = False
    error: str | None = None

    @property
    def steady(self) -> bool:
        return bool(self.latencies_ms) and not self.failed and not self.saturated

    @property
    def mean_ms(self) -> float | None:
        return statistics.mean(self.latencies_ms) if self.latencies_ms else None

    @property
    def p50_ms(self) -> float | None:
        return percentile(self.latencies_ms, 50) if self.latencies_ms else None

    @property
    def p99_ms(self) -> float | None:
        return percentile(self.latencies_ms, 99) if self.latencies_ms else None

    def to_json(self) -> dict[str, Any]:
        figures = {"mean_ms": self.mean_ms, "p50_ms": self.p50_ms, "p99_ms": self.p99_ms}
        return asdict(self) | {"config": str(self.config)} | figures

    @staticmethod
    def from_json(flat: dict[str, Any]) -> Sample:
        names = Sample.__dataclass_fields__.keys() & flat.keys()
        given = {name: flat[name] for name in names}
        return Sample(**given | {"config": Config(flat["config"]), "latencies_ms": tuple(flat["latencies_ms"])})


def pooled(samples: Sequence[Sample], figure: str) -> Spread | None:
    """Return a figure's spread over the repetitions; the middle of a 99th percentile is that of all answers together.

    One repetition has too few answers for a percentile that leaves out one in a hundred.
    """
    found = spread_of([value for sample in samples if (value := getattr(sample, figure)) is not None])
    if found and figure == "p99_ms":
        together = [latency for sample in samples for latency in sample.latencies_ms]
        return replace(found, median=percentile(together, 99))
    return found


def compared(
    samples: Iterable[Sample], stage: str, point: str, figure: str, config: Config, bases: Sequence[Config]
) -> Spread | None:
    """Return ``config`` / the best of ``bases`` within the repetitions, where neighbours in time are compared.

    The middle of a 99th percentile's ratios is that of all repetitions' answers together. None without a repetition
    that has both. Saturated samples and those with failed requests do not count.
    """
    here = [sample for sample in samples if (sample.stage, sample.point) == (stage, point) and sample.steady]
    best = max if figure == "requests_per_second" else min
    pairs: list[tuple[Sample, Sample]] = []
    for mine in here:
        others = [other for other in here if other.repetition == mine.repetition and other.config in bases]
        if mine.config is config and others:
            pairs.append((mine, best(others, key=lambda other: getattr(other, figure) or 0.0)))
    found = spread_of([getattr(mine, figure) / getattr(base, figure) for mine, base in pairs])
    if found is None or figure != "p99_ms":
        return found
    above, below = ([latency for pair in pairs for latency in pair[side].latencies_ms] for side in (0, 1))
    return replace(found, median=percentile(above, 99) / percentile(below, 99))


@dataclass(frozen=True, slots=True)
class Promise:
    """A ratio that ts-cores must reach: at most ``target`` for a latency, at least for requests/s."""

    stage: int  # of must_show
    point: str
    figure: str
    bases: tuple[Config, ...]
    target: float

    @property
    def at_least(self) -> bool:
        return self.figure == "requests_per_second"

    def kept(self, ratio: float) -> bool:
        return ratio >= self.target if self.at_least else ratio <= self.target


_DEFAULT, _ALONE, _BETTER = (Config.DEFAULT,), (Config.TS_CORES,), (Config.DEFAULT, Config.TS_CORES)
PROMISES = (
    Promise(0, ONE, "p50_ms", _DEFAULT, 1.10),
    Promise(1, UNEVEN, "requests_per_second", _DEFAULT, 0.95),
    *(
        Promise(0, _rate(rate), figure, _ALONE, target)
        for rate in (3.0, 7.0)
        for figure, target in (("mean_ms", 0.70), ("p99_ms", 1.05))
    ),
    Promise(0, FULL, "requests_per_second", _ALONE, 0.98),
    Promise(2, ONE, "p50_ms", _BETTER, 1.05),
    Promise(2, _at(SHARES[0]), "mean_ms", _BETTER, 1.05),
    *(Promise(2, _at(share), "mean_ms", _ALONE, 1.05) for share in SHARES[1:]),
    Promise(2, FULL, "requests_per_second", _ALONE, 0.95),
    Promise(3, BESIDE_SLOW, "p99_ms", _ALONE, 1.3),
)
NAMES = {"requests_per_second": "requests/s", "mean_ms": "mean", "p50_ms": "p50", "p99_ms": "p99"}


def promises_table(samples: Sequence[Sample]) -> tuple[str, bool]:
    """Return the promises' Markdown table, and whether all of them were kept; what was not measured was not kept."""
    stages = [stage.name for stage in must_show(seconds=1)]
    lines = ["| servers | load | figure | ts-cores | against | ratio | target | |\n"]
    lines.append("|---|---|---|---:|---:|---:|---:|---|\n")
    everything = True
    for promise in PROMISES:
        stage = stages[promise.stage]
        found = compared(samples, stage, promise.point, promise.figure, Config.LENDING, promise.bases)
        kept = found is not None and promise.kept(found.median)
        everything &= kept
        here = [sample for sample in samples if (sample.stage, sample.point) == (stage, promise.point)]
        mine = pooled([sample for sample in here if sample.config is Config.LENDING], promise.figure)
        against = []
        for base in promise.bases:
            other = pooled([sample for sample in here if sample.config is base], promise.figure)
            against.append(f"{base}: {_text(other)}")
        fields = [stage, promise.point, NAMES[promise.figure], _text(mine), ", ".join(against)]
        fields.append(found.text(2) if found else "not measured")
        fields.append(f"{'≥' if promise.at_least else '≤'} {promise.target:.2f}")
        lines.append(f"| {' | '.join(fields)} | {'holds' if kept else 'MISSED'} |\n")
    lost = sum(sample.failed for sample in samples if sample.config is Config.LENDING)
    everything &= lost == 0
    lines.append(f"| all | all | requests lost | {lost} | | | 0 | {'MISSED' if lost else 'holds'} |\n")
    return "".join(lines), everything


def points_table(samples: Sequence[Sample]) -> str:
    """Return one Markdown table per stage: a line for each configuration, a column for each load."""
    parts = []
    for stage in dict.fromkeys(sample.stage for sample in samples):
        here = [sample for sample in samples if sample.stage == stage]
        points = list(dict.fromkeys(sample.point for sample in here))
        heads = [_head([sample for sample in here if sample.point == point]) for point in points]
        lines = [f"**{stage}**\n\n| configuration | {' | '.join(heads)} |\n|---|{'---:|' * len(points)}\n"]
        for config in Config:
            mine = [sample for sample in here if sample.config is config]
            if mine:
                fields = [_cell([sample for sample in mine if sample.point == point]) for point in points]
                lines.append(f"| {config} | {' | '.join(fields)} |\n")
        parts.append("".join(lines))
    return "\n".join(parts)


def _head(samples: Sequence[Sample]) -> str:
    rate = next((sample.rate for sample in samples if sample.rate), None)
    if rate is None:
        return f"{samples[0].point}: requests/s; mean / p50 / p99 ms"
    return f"{samples[0].point} ({rate:.3g}/s): mean / p50 / p99 ms"


def _cell(samples: Sequence[Sample]) -> str:
    if not samples:
        return "\N{EN DASH}"
    if error := next((sample.error for sample in samples if sample.error), None):
        return f"could not run: {error.splitlines()[0].replace('|', '/')}"
    text = " / ".join(_text(pooled(samples, figure)) for figure in ("mean_ms", "p50_ms", "p99_ms"))
    if samples[0].rate is None:
        text = f"{_text(pooled(samples, 'requests_per_second'), 1)}; {text}"
    if any(sample.saturated for sample in samples):
        text += ", saturated"
    if failed := sum(sample.failed for sample in samples):
        text += f", {failed} failed"
    return text


def _text(found: Spread | None, digits: int | None = None) -> str:
    if found is None:
        return "\N{EN DASH}"
    return found.text((0 if found.median >= 100 else 1) if digits is None else digits)
