"""What a benchmark run found: rows of figures, their ratios with spread, and the forms they are written in."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = [
    "Scenario",
    "Config",
    "Figures",
    "Row",
    "Spread",
    "scenarios",
    "markdown",
    "ratio",
    "rotated",
    "spread",
    "spread_of",
    "to_csv",
]


class Config(StrEnum):
    """The ways to serve that are compared, in the order of tables and pictures."""

    DEFAULT = "default"  # TorchServe as it comes
    THREADS = "threads"  # torch.set_num_threads(cores / workers), nothing pinned
    LAUNCHER = "launcher"  # TorchServe's own cpu_launcher_enable
    TS_CORES = "ts-cores"  # the same property with the plug-in: a worker computes on its own slice
    LENDING = "ts-cores --lend auto"  # and on slices of idle neighbours
    CEILING = "ceiling"  # the same handler in bare pinned processes: no HTTP, no Java


def rotated(configs: Sequence[Config], repetition: int) -> list[Config]:
    """Return the configurations in the order of one repetition: each starts one further, so none is always first."""
    start = repetition % max(len(configs), 1)
    return [*configs[start:], *configs[:start]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement. None: this machine or this configuration does not have the figure; machine.unavailable says why.

    ``failed`` counts failed and non-2xx answers; any voids the row. CPU seconds are those of the whole process tree.
    ``cpu_migrations`` is the scheduler's own count over the workers' threads, ``node_migrations`` a sampled lower
    bound; both per second of load. ``elsewhere_cpus`` is CPU time that neither the server nor we used, in CPUs: noise.
    ``rate_*`` is the open-loop run at ``rate_per_second``; ``rate_saturated``: the server could not keep up with it.
    ``forward_per_second`` (ceiling only): the model's forward alone, without decoding and encoding.
    """

    requests: int
    failed: int
    requests_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_seconds_per_request: float
    pss_mib: float
    processes: int
    threads: int
    elsewhere_cpus: float
    ready_seconds: float | None = None
    context_switches_per_request: float | None = None
    preemptions_per_request: float | None = None
    cpu_migrations: float | None = None
    node_migrations: float | None = None
    remote_pages_share: float | None = None
    spinning_share: float | None = None
    core_bound_share: float | None = None
    rate_per_second: float | None = None
    rate_p50_ms: float | None = None
    rate_p90_ms: float | None = None
    rate_p99_ms: float | None = None
    rate_failed: int | None = None
    rate_saturated: bool | None = None
    forward_per_second: float | None = None


@dataclass(frozen=True, slots=True, order=True)
class Scenario:
    """What rows must share to be compared."""

    model: str
    workers: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration in one repetition: figures, or the error that left it without."""

    config: Config
    scenario: Scenario
    repetition: int
    figures: Figures | None = None
    error: str | None = None

    @property
    def valid(self) -> bool:
        return self.figures is not None and self.figures.failed == 0

    def to_json(self) -> dict[str, Any]:
        flat: dict[str, Any] = {
            "config": str(self.config),
            **dataclasses.asdict(self.scenario),
            "repetition": self.repetition,
        }
        if self.figures is None:
            return flat | {"error": self.error}
        return flat | dataclasses.asdict(self.figures) | {"void": not self.valid}

    @staticmethod
    def from_json(flat: dict[str, Any]) -> Row:
        scenario = Scenario(flat["model"], flat["workers"], flat["concurrency"])
        names = {field.name for field in dataclasses.fields(Figures)}
        figures = None if "error" in flat else Figures(**{name: flat[name] for name in names & flat.keys()})
        return Row(Config(flat["config"]), scenario, flat["repetition"], figures, flat.get("error"))


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the repetitions: median, lowest, highest and their number."""

    median: float
    low: float
    high: float
    number: int

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Return for example ``14.1 (13.8-14.6)``; the bare number if there was one repetition."""
        low, middle, high = (f"{value * scale:.{digits}f}" for value in (self.low, self.median, self.high))
        return middle if self.number == 1 else f"{middle} ({low}\N{EN DASH}{high})"


def scenarios(rows: Iterable[Row]) -> list[Scenario]:
    return list(dict.fromkeys(row.scenario for row in rows))


def spread(rows: Iterable[Row], config: Config, scenario: Scenario, figure: str) -> Spread | None:
    """Return a figure's spread over the valid rows; None where there is none."""
    return spread_of([value for row in rows if (value := _value(row, config, scenario, figure)) is not None])


def ratio(rows: Sequence[Row], config: Config, base: Config, scenario: Scenario, figure: str) -> Spread | None:
    """Return the spread of ``config / base``, each ratio from one repetition, where neighbours in time are compared."""
    ratios = []
    for repetition in sorted({row.repetition for row in rows}):
        same = [row for row in rows if row.repetition == repetition]
        above = [value for row in same if (value := _value(row, config, scenario, figure)) is not None]
        below = [value for row in same if (value := _value(row, base, scenario, figure)) is not None]
        if above and below and below[0] > 0:
            ratios.append(above[0] / below[0])
    return spread_of(ratios)


def _value(row: Row, config: Config, scenario: Scenario, figure: str) -> float | None:
    if row.config is not config or row.scenario != scenario or not row.valid:
        return None
    value: float | None = getattr(row.figures, figure)
    return value


def spread_of(values: Sequence[float]) -> Spread | None:
    """Return the spread of the values; None where there is none."""
    return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


def to_csv(rows: Iterable[Row]) -> str:
    """Return all rows as CSV with a header; an unknown figure is an empty field, an error its first line."""
    names = ["config", *(field.name for field in dataclasses.fields(Scenario)), "repetition", "error", "void"]
    names += [field.name for field in dataclasses.fields(Figures)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = row.to_json()
        writer.writerow(flat | {"error": row.error.splitlines()[0]} if row.error else flat)
    return text.getvalue()


COLUMNS = (
    "configuration",
    "requests/s",
    "× default",
    "of ceiling",
    "p50 / p99 ms",
    "at a fixed rate: p50 / p99 ms",
    "CPU ms/request",
    "start to READY s",
    "memory MiB",
    "threads",
    "CPU moves/s",
)


def markdown(rows: Sequence[Row]) -> str:
    """Return one table per scenario, ready to paste: medians, and lowest to highest in brackets."""
    parts = []
    for scenario in scenarios(rows):
        found = [row for row in rows if row.scenario == scenario]
        lines = [_line(found, config, scenario) for config in Config if any(row.config is config for row in found)]
        head = f"**{scenario.model}, {scenario.workers} workers, {scenario.concurrency} concurrent requests**"
        table = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        parts.append(f"{head}\n\n{table}{''.join(lines)}")
    return "\n".join(parts)


def _line(rows: Sequence[Row], config: Config, scenario: Scenario) -> str:
    mine = [row for row in rows if row.config is config]
    if not any(row.valid for row in mine):
        return f"| {config} | {_complaint(mine)} |" + " |" * (len(COLUMNS) - 2) + "\n"

    def one(figure: str, digits: int = 0, scale: float = 1.0) -> str:
        found = spread(rows, config, scenario, figure)
        return found.text(digits, scale) if found else "\N{EN DASH}"

    def against(base: Config, digits: int) -> str:
        found = ratio(rows, config, base, scenario, "requests_per_second")
        return found.text(digits) if found and config is not base else "\N{EN DASH}"

    limited = next((row.figures for row in mine if row.valid and row.figures and row.figures.rate_per_second), None)
    rate = "\N{EN DASH}"
    if limited:
        late = ", saturated" if any(row.figures and row.figures.rate_saturated for row in mine) else ""
        rate = f"{one('rate_p50_ms')} / {one('rate_p99_ms')} at {limited.rate_per_second:.3g}/s{late}"
    lost = sum(not row.valid for row in mine)
    name = f"{config} ({lost} of {len(mine)} void)" if lost else f"{config}"
    fields = [
        name,
        one("requests_per_second", 1),
        against(Config.DEFAULT, 2),
        against(Config.CEILING, 2),
        f"{one('p50_ms')} / {one('p99_ms')}",
        rate,
        one("cpu_seconds_per_request", 1, 1000),
        one("ready_seconds", 1),
        one("pss_mib"),
        one("threads"),
        one("cpu_migrations", 1),
    ]
    return f"| {' | '.join(fields)} |\n"


def _complaint(rows: Sequence[Row]) -> str:
    for row in rows:
        if row.error:
            return f"could not run: {row.error.splitlines()[0].replace('|', '/')}"
    failed = sum(row.figures.failed for row in rows if row.figures)
    return f"void: {failed} requests failed"
