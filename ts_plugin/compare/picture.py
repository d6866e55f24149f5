"""The picture "latency against load", as SVG that is light or dark as its reader prefers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ts_plugin.compare.comparison import Comparison
from ts_plugin.compare.ways import ONE, UNEVEN, Way
from ts_plugin.trial.spread import Spread, figure
from ts_plugin.trial.turns import FULL
from ts_plugin.view.tiles import text_at

# Okabe and Ito's colours with marks that say the same once more. Source: https://jfly.uni-koeln.de/color/
LOOKS = {
    Way.DEFAULT: ("#8a8a8a", "square"),
    Way.THREADS: ("#E69F00", "up"),
    Way.LAUNCHER: ("#56B4E9", "down"),
    Way.NEVER: ("#CC79A7", "diamond"),
    Way.OURS: ("#009E73", "circle"),
}
WIDTH, PAD = 940, 16
LEFT, HIGH = 52, 230  # of a panel: room for the axis' numbers, height of the curves
ROW = 26  # pixels of a bar
STYLE = """
.ts-compare{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.ts-compare .page{fill:#fff}.ts-compare text{fill:#1c2430}.ts-compare .label{fill:#5a6675}
.ts-compare .grid{stroke:#e3e6ea;shape-rendering:crispEdges}
.ts-compare .open{fill:#fff}.ts-compare .range{stroke:#1c2430}
@media(prefers-color-scheme:dark){.ts-compare .page{fill:#12161c}.ts-compare text{fill:#e6e9ed}
.ts-compare .label{fill:#9aa6b4}.ts-compare .grid{stroke:#343d49}.ts-compare .open{fill:#12161c}
.ts-compare .range{stroke:#e6e9ed}}
"""


def picture(found: Comparison) -> str:
    """Return the SVG document: for each model two panels of latency and the bars of throughput under them."""
    y, parts = float(PAD), [_legend(found, PAD)]
    y += 30
    for model in range(len(found.models)):
        drawn, height = _model(found, model, y)
        parts.append(drawn)
        y += height + PAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ts-compare" role="img" viewBox="0 0 {WIDTH} {y:.0f}" '
        f'width="{WIDTH}" height="{y:.0f}"><title>Latency against load: {escape(", ".join(found.models))}</title>'
        f'<style>{STYLE}</style><rect class="page" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def _legend(found: Comparison, y: float) -> str:
    x, drawn = float(PAD), []
    for way in found.ways:
        drawn.append(_mark(way, x + 6, y + 6, 6) + text_at(way, x + 18, y + 11, 13))
        x += 32 + 7.2 * len(way)
    if any(
        found.saturated(way, load.name, model)
        for way in found.ways
        for load in found.loads
        for model in range(len(found.models))
    ):
        drawn.append(text_at("open: cannot keep up", x, y + 11, 13, 'class="label"'))
    return "".join(drawn)


def _model(found: Comparison, model: int, y: float) -> tuple[str, float]:
    wide = (WIDTH - 3 * PAD) / 2
    places = [
        load.name
        for load in found.loads
        if (load.share or load.name == ONE) and any(_seen(found, way, load.name, "mean", model) for way in found.ways)
    ]
    parts, height = [text_at(found.models[model], PAD, y + 12, 14, 'font-weight="650"')], 24.0
    if places:
        for column, (name, title) in enumerate((("mean", "mean"), ("p99", "99th percentile"))):
            x = PAD + column * (wide + PAD)
            parts.append(text_at(f"Latency in ms, {title}: lower is better", x, y + height + 12, 13))
            parts.append(_curves(found, model, name, places, x + LEFT, y + height + 28, wide - LEFT))
        height += 28 + HIGH + 50
    bars = [load for load in (FULL, UNEVEN) if any(_seen(found, way, load, "throughput", model) for way in found.ways)]
    for column, load in enumerate(bars):
        x = PAD + column * (wide + PAD)
        parts.append(text_at(f"{load}: requests/s, higher is better", x, y + height + 12, 13))
        parts.append(_bars(found, model, load, x, y + height + 22, wide))
    return "".join(parts), height + 22 + ROW * len(found.ways)


def _seen(found: Comparison, way: Way, load: str, name: str, model: int) -> Spread | None:
    value = found.spread(way, load, name, model)
    return value if value and value.median > 0 else None


def _curves(
    found: Comparison, model: int, name: str, places: Sequence[str], left: float, top: float, wide: float
) -> str:
    """Draw a line per way over the loads, with the repetitions' range; a mark is open where the queue only grew."""
    seen = {
        (way, load): value for way in found.ways for load in places if (value := _seen(found, way, load, name, model))
    }
    low = math.log(min(value.low for value in seen.values()) * 0.85)
    high = math.log(max(max(value.high, value.median) for value in seen.values()) * 1.15)
    step = wide / len(places)

    def at(value: float) -> float:
        return top + HIGH * (1 - (math.log(value) - low) / (high - low))

    parts = []
    for tick in _ticks(math.exp(low), math.exp(high)):
        parts.append(f'<path class="grid" d="M{left:.1f} {at(tick):.1f}h{wide:.1f}"/>')
        words = f"{1000 * tick:,.0f}" if tick >= 0.01 else f"{1000 * tick:.3g}"
        parts.append(text_at(words, left - 8, at(tick) + 4, 11, 'class="label" text-anchor="end"'))
    for number, load in enumerate(places):
        rate = found.rate(load, model)
        lines = ("one at", "a time") if rate is None else (f"{figure(rate)}/s", load)
        for below, words in enumerate(lines):
            middle = left + (number + 0.5) * step
            parts.append(
                text_at(words, middle, top + HIGH + 18 + 15 * below, 11.5, 'class="label" text-anchor="middle"')
            )
    for order, way in enumerate(found.ways):
        shift = 11 * (order - (len(found.ways) - 1) / 2)  # so that equal ways lie side by side
        points = [
            (left + (number + 0.5) * step + shift, seen[way, load], found.saturated(way, load, model))
            for number, load in enumerate(places)
            if (way, load) in seen
        ]
        colour, own = LOOKS[way][0], way is Way.OURS
        line = " ".join(f"{x:.1f},{at(value.median):.1f}" for x, value, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{2.8 if own else 1.6}"/>')
        for x, value, late in points:
            parts.append(f'<path d="M{x:.1f} {at(value.low):.1f}V{at(value.high):.1f}" stroke="{colour}"/>')
            parts.append(_mark(way, x, at(value.median), 5.5 if own else 4.5, hollow=late))
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between the bounds, or 1, 2, 5, 10, ..., or other round numbers: at least four."""
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        if len(ticks) >= 4:
            return ticks
    most = (high - low) / 5
    step = max(step for digit in (1, 2, 5) if (step := digit * 10.0 ** math.floor(math.log10(most))) <= most)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _bars(found: Comparison, model: int, load: str, left: float, top: float, wide: float) -> str:
    names = 7.0 * max(len(way) for way in found.ways)
    room = wide - names - 50
    values = {way: _seen(found, way, load, "throughput", model) for way in found.ways}
    most = max(value.high for value in values.values() if value)
    parts = []
    for number, way in enumerate(found.ways):
        y, value = top + ROW * number, values[way]
        parts.append(text_at(way, left + names, y + 16, 12, 'text-anchor="end"'))
        start = left + names + 8
        if value is None:
            parts.append(
                text_at("could not run" if found.servers[way].error else "none", start, y + 16, 12, 'class="label"')
            )
            continue
        low, middle, high = (room * each / most for each in (value.low, value.median, value.high))
        parts.append(f'<rect x="{start:.1f}" y="{y + 3:.1f}" width="{middle:.1f}" height="18" fill="{LOOKS[way][0]}"/>')
        parts.append(f'<path class="range" d="M{start + low:.1f} {y + 12:.1f}H{start + high:.1f}"/>')
        parts.append(text_at(figure(value.median), start + high + 6, y + 16, 12))
    return "".join(parts)


def _mark(way: Way, x: float, y: float, size: float, *, hollow: bool = False) -> str:
    colour, shape = LOOKS[way]
    fill = f'class="open" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "up": ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
        "down": ((0, 1.1), (1.1, -0.9), (-1.1, -0.9)),
        "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
    }
    if shape == "circle":
        return f'<circle {fill} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    points = " ".join(f"{x + right * size:.1f},{y + down * size:.1f}" for right, down in corners[shape])
    return f'<polygon {fill} points="{points}"/>'
