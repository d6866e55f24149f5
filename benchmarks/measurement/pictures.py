"""The pictures of a benchmark run, drawn from its results and traces: one function, one PNG.

Okabe and Ito's colours, told apart with every kind of colour vision; shapes and labels say the same once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, whatever display there is

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measurement.results import Config, Row, Scenario, scenarios, spread
from ts_plugin.machine.cpulist import parse_cpulist

__all__ = ["COLOURS", "draw"]

COLOURS = {
    Config.DEFAULT: "#999999",
    Config.THREADS: "#E69F00",
    Config.LAUNCHER: "#56B4E9",
    Config.TS_CORES: "#0072B2",
    Config.LENDING: "#009E73",
    Config.CEILING: "#000000",
}
WORKERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
WIDTH = 9.0  # inches; at 110 dots per inch a README shows it one to one
DPI = 110
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
}

Traces = Sequence[dict[str, Any]]


def draw(out: Path, rows: Sequence[Row], traces: Traces, scaling: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Write every picture that the data allow into ``out`` and return file name -> caption."""
    pictures: list[tuple[str, str, Callable[[], Figure | None]]] = [
        (
            "throughput.png",
            "Throughput: median bar, one dot per repetition. Longer is better.",
            lambda: throughput(rows),
        ),
        (
            "latency.png",
            "Latency: p50 (filled) to p99 (open), as ab saw it under full load and at a fixed rate. Left is better.",
            lambda: latency(rows),
        ),
        (
            "cpu_usage.png",
            "CPU usage per CPU over the first seconds of load: what htop shows, all at once.",
            lambda: cpu_usage(traces),
        ),
        (
            "memory_nodes.png",
            "Each worker's memory by NUMA node, local or remote to where the worker ran.",
            lambda: memory_nodes(traces),
        ),
        (
            "core_map.png",
            "The CPUs that each worker may run on. No column should have two marks while another has none.",
            lambda: core_map(traces),
        ),
        (
            "scaling.png",
            "Scaling 1 -> 2 -> 1 workers under load: one dot per answered request, a cross per failed one.",
            lambda: scaling_runs(scaling),
        ),
    ]
    traces = same_length(one_scenario(traces))
    made = {}
    out.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        for name, caption, paint in pictures:
            figure = paint()
            if figure is not None:
                figure.savefig(out / name, dpi=DPI)
                pyplot.close(figure)
                made[name] = caption
    return made


def one_scenario(traces: Traces) -> Traces:
    """Return the traces of the scenario with the most configurations, the first of equals: a picture shows one."""
    by_scenario: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in traces:
        by_scenario.setdefault((one["model"], one["workers_wanted"]), []).append(one)
    order = list(Config)
    largest = max(by_scenario.values(), key=len, default=[])
    return sorted(largest, key=lambda one: order.index(Config(one["config"])))


def same_length(traces: Traces) -> Traces:
    """Return the traces cut to the shortest one, so that their time axes can be compared."""
    number = min((len(one["trace"]["times"]) for one in traces), default=0)
    return [
        one
        | {
            "trace": {
                "times": one["trace"]["times"][:number],
                "usage": {cpu: shares[:number] for cpu, shares in one["trace"]["usage"].items()},
            }
        }
        for one in traces
        if number
    ]


def throughput(rows: Sequence[Row]) -> Figure | None:
    shown = [scenario for scenario in scenarios(rows) if any(row.scenario == scenario and row.valid for row in rows)]
    if not shown:
        return None
    figure, panels = _panels(len(shown), height=0.5 + 0.34 * len(Config))
    for axes, scenario in zip(panels, shown, strict=True):
        names = [config for config in Config if any(row.config is config and row.scenario == scenario for row in rows)]
        for height, config in enumerate(names):
            found = spread(rows, config, scenario, "requests_per_second")
            if found is None:
                axes.text(0, height, " could not run", va="center", style="italic")
                continue
            axes.barh(height, found.median, color=COLOURS[config], alpha=0.85, height=0.62)
            values = [
                row.figures.requests_per_second
                for row in rows
                if row.figures and row.valid and row.scenario == scenario and row.config is config
            ]
            axes.plot(values, [height] * len(values), "o", color="white", markeredgecolor="black", markersize=4)
            axes.annotate(f"  {found.median:.1f}", (max(values), height), va="center")
        _name_rows(axes, names)
        axes.margins(x=0.12)
        axes.set_title(f"{_title(scenario)}, {scenario.concurrency} concurrent requests", loc="left")
        axes.set_xlabel("requests per second")
    return figure


def latency(rows: Sequence[Row]) -> Figure | None:
    shown = [scenario for scenario in scenarios(rows) if any(_served(row, scenario) for row in rows)]
    if not shown:
        return None
    figure, grid = pyplot.subplots(
        len(shown), 2, figsize=(WIDTH, (0.7 + 0.34 * (len(Config) - 1)) * len(shown)), squeeze=False
    )
    kinds = (("p", "under full load (ab)"), ("rate_p", "at a fixed rate"))
    for line, scenario in zip(grid, shown, strict=True):
        names = [config for config in Config if any(_served(row, scenario) and row.config is config for row in rows)]
        for axes, (prefix, title) in zip(line, kinds, strict=True):
            for height, config in enumerate(names):
                low, high = (spread(rows, config, scenario, f"{prefix}{percent}_ms") for percent in (50, 99))
                if low is None or high is None:
                    continue
                axes.plot([low.median, high.median], [height, height], "-", color=COLOURS[config], linewidth=2.5)
                for each, fill in ((low, COLOURS[config]), (high, "white")):
                    error = [[each.median - each.low], [each.high - each.median]]
                    axes.errorbar(
                        each.median, height, xerr=error, fmt="o", color=COLOURS[config], markerfacecolor=fill, capsize=3
                    )
            _name_rows(axes, names)
            axes.set_xlim(left=0)
            axes.margins(x=0.08)
            rate = next((found for row in rows if row.scenario == scenario and (found := _rate(row))), None)
            suffix = f", {rate:.3g} requests/s" if prefix == "rate_p" and rate else ""
            axes.set_title(f"{_title(scenario)}\n{title}{suffix}", loc="left")
            axes.set_xlabel("milliseconds, p50 to p99")
    return figure


def cpu_usage(traces: Traces) -> Figure | None:
    if not traces:
        return None
    cpus = len(traces[0]["trace"]["usage"])
    figure, panels = _panels(len(traces), height=0.75 + min(0.22 * cpus, 2.5))
    image = None
    for axes, one in zip(panels, traces, strict=True):
        trace = one["trace"]
        numbers = sorted(trace["usage"], key=int)
        if not trace["times"]:
            continue
        image = axes.imshow(
            [trace["usage"][cpu] for cpu in numbers],
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            vmin=0,
            vmax=1,
            extent=(0, trace["times"][-1], len(numbers) - 0.5, -0.5),
        )
        _cpu_axis(axes, numbers)
        axes.set_title(_title_of(one), loc="left")
    panels[-1].set_xlabel("seconds of load")
    if image is not None:
        bar = figure.colorbar(image, ax=panels, label="busy", fraction=0.03, pad=0.01)
        bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    return figure


def memory_nodes(traces: Traces) -> Figure | None:
    shown = [one for one in traces if any(worker["pages"] for worker in one["workers"].values())]
    if not shown:
        return None
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.9 + 0.36 * len(shown)))
    for height, one in enumerate(shown):
        local = remote = 0.0
        for worker in one["workers"].values():
            memory = {int(node): kib / 1024 for node, kib in worker["pages"].items()}
            ran = {int(node): seconds for node, seconds in worker["node_seconds"].items()}
            total = sum(ran.values()) or 1
            near = sum(memory.get(node, 0) * seconds / total for node, seconds in ran.items())
            local, remote = local + near, remote + sum(memory.values()) - near
        axes.barh(height, local, color="#0072B2", height=0.6, label="local" if height == 0 else None)
        axes.barh(
            height, remote, left=local, color="#D55E00", hatch="//", height=0.6, label="remote" if not height else None
        )
        axes.annotate(
            f"  {100 * remote / max(local + remote, 1e-9):.0f} % remote", (local + remote, height), va="center"
        )
    axes.set_yticks(range(len(shown)), [_title_of(one) for one in shown])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("MiB mapped by the workers")
    axes.legend(ncols=2, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def core_map(traces: Traces) -> Figure | None:
    shown = [one for one in traces if one["workers"]]
    if not shown:
        return None
    tallest = max(len(one["workers"]) for one in shown)
    figure, panels = _panels(len(shown), height=0.7 + 0.24 * tallest)
    for axes, one in zip(panels, shown, strict=True):
        cpus = sorted(int(cpu) for cpu in one["trace"]["usage"])
        for worker, binding in enumerate(one["workers"].values()):
            allowed = set().union(*(parse_cpulist(mask) for mask in binding["masks"].values()))
            colour = WORKERS[worker % len(WORKERS)]
            axes.bar(
                range(len(cpus)),
                0.8,
                bottom=worker - 0.4,
                width=0.92 if len(cpus) <= 64 else 1,
                color=[colour if cpu in allowed else "#EEEEEE" for cpu in cpus],
            )
        axes.set_xlim(-0.5, len(cpus) - 0.5)
        axes.set_ylim(len(one["workers"]) - 0.5, -0.5)
        step = max(len(cpus) // 16, 1)
        axes.set_xticks(range(0, len(cpus), step), [str(cpu) for cpu in cpus[::step]])
        axes.set_yticks(range(len(one["workers"])), [str(worker + 1) for worker in range(len(one["workers"]))])
        axes.set_ylabel("worker")
        axes.set_title(_title_of(one), loc="left")
    panels[-1].set_xlabel("CPU (the kernel's number)")
    return figure


def scaling_runs(scaling: Sequence[dict[str, Any]]) -> Figure | None:
    shown = [one for one in scaling if "error" not in one]
    if not shown:
        return None
    figure, panels = _panels(len(shown), height=1.7)
    longest = max(one["ended"] for one in shown)
    for axes, one in zip(panels, shown, strict=True):
        colour = COLOURS[Config(one["config"])]
        good = [(due + latency, latency) for due, latency, fine in one["answers"] if fine]
        bad = [due for due, _, fine in one["answers"] if not fine]
        axes.plot(*zip(*good, strict=True), "o", color=colour, markersize=3) if good else None
        axes.plot(bad, [0] * len(bad), "x", color="#D55E00", markersize=7)
        for moment, text in ((one["up_at"], "1→2"), (one["down_at"], "2→1")):
            axes.axvline(moment, color="black", linewidth=0.8, linestyle="--")
            axes.annotate(f" {text}", (moment, 1), xycoords=("data", "axes fraction"), va="top")
        axes.set_xlim(0, longest)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("latency (s)")
        gap = max(one["gap_up_s"], one["gap_down_s"])
        axes.set_title(
            f"{one['config']}: longest gap {gap:.1f} s, {one['failed']} of {one['requests']} failed", loc="left"
        )
    panels[-1].set_xlabel("seconds; the dot is where the answer came")
    return figure


def _panels(number: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """Return panels under one another, each ``height`` inches high."""
    figure, grid = pyplot.subplots(number, 1, figsize=(WIDTH, height * number + 0.3), squeeze=False)
    return figure, [line[0] for line in grid]


def _name_rows(axes: Axes, names: Sequence[Config]) -> None:
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _cpu_axis(axes: Axes, numbers: Sequence[str]) -> None:
    step = max(len(numbers) // 8, 1)
    axes.set_yticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    axes.set_ylabel("CPU")


def _served(row: Row, scenario: Scenario) -> bool:
    return row.scenario == scenario and row.valid and row.config is not Config.CEILING


def _rate(row: Row) -> float | None:
    return row.figures.rate_per_second if row.figures else None


def _title(scenario: Scenario) -> str:
    return f"{scenario.model}, {scenario.workers} workers"


def _title_of(one: dict[str, Any]) -> str:
    return f"{one['config']}: {one['model']}, {one['workers_wanted']} workers"
