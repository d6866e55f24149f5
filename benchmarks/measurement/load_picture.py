"""The picture "latency against load": all configurations, from one request at a time to as many as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.measurement.pictures import COLOURS, DPI, STYLE, WIDTH
from benchmarks.measurement.points import FULL, ONE, UNEVEN, Sample, pooled
from benchmarks.measurement.results import Config, Spread

__all__ = ["draw"]

NAMES = {Config.DEFAULT: "TorchServe default", Config.LAUNCHER: "TorchServe's launcher", Config.THREADS: "threads only"}
MARKERS = {Config.DEFAULT: "s", Config.THREADS: "^", Config.LAUNCHER: "v", Config.TS_CORES: "D", Config.LENDING: "o"}


def draw(out: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Write a picture for each stage with an open loop into ``out`` and return file name -> caption."""
    stages = list(dict.fromkeys(sample.stage for sample in samples if sample.rate is not None))
    made = {}
    out.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        for number, stage in enumerate(stages):
            name = f"latency_against_load{f'_{number + 1}' if number else ''}.png"
            figure = _against_load(samples, stage)
            figure.savefig(out / name, dpi=DPI)
            pyplot.close(figure)
            made[name] = (
                f"Latency against load, {stage}: median of the repetitions (p99: of all their answers), bars from "
                "lowest to highest. Open marks: the queue only grew, the latency says how long one measured."
            )
    return made


def _against_load(samples: Sequence[Sample], stage: str) -> Figure:
    here = [sample for sample in samples if sample.stage == stage]
    model = stage.split(",")[0]
    uneven = [sample for sample in samples if sample.point == UNEVEN and sample.stage.split(",")[0] == model]
    full = [sample for sample in here if sample.point == FULL]
    configs = [config for config in Config if any(sample.config is config for sample in uneven + full)]
    figure, grid = pyplot.subplots(2, 2, figsize=(WIDTH, 6.0), height_ratios=(3, 1.35), sharey="row", squeeze=False)
    for axes, name, title in zip(grid[0], ("mean_ms", "p99_ms"), ("mean", "99th percentile"), strict=True):
        _curves(axes, here, name)
        axes.set_title(f"Latency in ms, {title}: lower is better", loc="left")
        axes.set_xlabel("requests/s, and part of full load")
    _bars(grid[1][0], configs, uneven, "Two models, one has load: requests/s")
    _bars(grid[1][1], configs, full, "Full load: requests/s")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", title=stage, ncols=len(labels), frameon=False, fontsize=9
    )
    return figure


def _curves(axes: Axes, samples: Sequence[Sample], figure: str) -> None:
    """Draw a line per configuration over one request at a time and the open loops, by ascending rate."""
    points = sorted(
        {(sample.rate or 0.0, sample.point) for sample in samples if sample.rate is not None or sample.point == ONE}
    )
    shown = [config for config in Config if any(one.config is config and one.latencies_ms for one in samples)]
    for number, config in enumerate(shown):
        shift = 0.06 * (number - (len(shown) - 1) / 2)  # so that bars of equal configurations lie side by side
        found: list[tuple[float, Spread, bool]] = []
        for index, (_, point) in enumerate(points):
            mine = [one for one in samples if one.config is config and one.point == point and one.latencies_ms]
            if value := pooled(mine, figure):
                found.append((index + shift, value, any(one.saturated for one in mine)))
        colour, main = COLOURS[config], config is Config.LENDING
        axes.plot(
            [place for place, _, _ in found],
            [value.median for _, value, _ in found],
            marker=MARKERS[config],
            color=colour,
            linewidth=2.8 if main else 1.6,
            markersize=7 if main else 5,
            zorder=3 if main else 2,
            label=NAMES.get(config, str(config)),
        )
        for place, value, late in found:
            axes.plot([place, place], [value.low, value.high], "-", color=colour, linewidth=1, zorder=2)
            if late:
                axes.plot(place, value.median, MARKERS[config], color="white", markeredgecolor=colour, zorder=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    labels = [_label(rate, point) for rate, point in points]
    axes.set_xticks(range(len(points)), labels, fontsize=9)


def _bars(axes: Axes, configs: Sequence[Config], samples: Sequence[Sample], title: str) -> None:
    """Draw a bar for each of ``configs``, the same for panels that share their axis, whether or not it ran here."""
    if not samples:
        axes.set_axis_off()
        return
    axes.set_title(title, loc="left")
    for height, config in enumerate(configs):
        mine = [one for one in samples if one.config is config]
        value = pooled([one for one in mine if one.latencies_ms], "requests_per_second")
        if value is None:
            axes.annotate("  could not run" if mine else "", (0, height), va="center", fontsize=9)
            continue
        axes.barh(height, value.median, color=COLOURS[config], alpha=0.85, height=0.62)
        axes.plot([value.low, value.high], [height, height], "-", color="black", linewidth=1)
        axes.annotate(f"  {value.median:.1f}", (value.high, height), va="center", fontsize=9)
    axes.set_yticks(range(len(configs)), [NAMES.get(config, str(config)) for config in configs], fontsize=9)
    axes.set_ylim(len(configs) - 0.5, -0.5)
    axes.margins(x=0.14)


def _label(rate: float, point: str) -> str:
    if not rate:
        return "one at\na time"
    share = point.split(" at ")[-1].removesuffix(" of capacity")
    return f"{rate:.3g}\n{share}" if share != point else f"{rate:.3g}"
