"""What tune found, for people and for scripts: a table, a sentence, a picture, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ts_plugin.trial.spread import figure as _figure
from ts_plugin.trial.spread import spread_of
from ts_plugin.tune.settings import Lines
from ts_plugin.tune.values import DEFAULT, LOAD, Choice, Result, Target

HEADS = ("", "requests/s", "+/-", "p50 ms", "p99 ms", "failed", "memory MB")
BATCHES = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#0072B2", "#D55E00")  # Okabe and Ito's colours
SOONER = 0.95  # of a latency: more is the same
DRAWN = 10  # divisions in the picture at most


def table(answer: Result) -> Table:
    """Draw what was measured for a terminal, the advised row bold."""
    result = Table(title=answer.profile.archive, title_justify="left", box=SIMPLE, pad_edge=False, header_style="dim")
    for head in HEADS:
        result.add_column(head, justify="right" if head else "left", no_wrap=not head)
    for row in answer.confirmed:
        memory = f"{row.choice.memory / 1e6:.0f}" if row.choice else ""
        figures = _figure(row.throughput), _figure(row.spread), _ms(row.p50), _ms(row.p99), str(row.failed), memory
        result.add_row(row.name, *figures, style="bold" if row is answer.measured else "")
    return result


def sentence(answer: Result) -> str:
    """Say in one sentence what is advised and why."""
    choice, target, row = answer.choice, answer.target, answer.measured
    late = f"99 of 100 answers at {_figure(row.rate)} requests/s within {_ms(row.p99)} ms"
    most = f"{_figure(row.throughput)} requests/s at full load"
    if target.rate is not None and not target.serves(row.throughput):
        return (
            f"{_figure(target.rate)} requests/s are more than this machine serves: {choice} comes nearest "
            f"with {most}, of which {_figure(LOAD * row.throughput)} ({LOAD:.0%}) leave room for bursts."
        )
    if not answer.met and target.p99 is not None:
        return f"Nothing holds {_ms(target.p99)} ms: {choice} comes nearest, with {late} and {most}."
    wish = "is fastest" if target.rate is not None and target.p99 is None else "serves most"
    within = f" within {_ms(target.p99)} ms" if target.p99 is not None else ""
    return f"{choice} {wish}{within}: {most}, {late}{_against(answer)}{_cost(answer)}."


def _against(answer: Result) -> str:
    """Return what the choice is better than: a server's other settings, else the best other division."""
    fastest = answer.target.rate is not None and answer.target.p99 is None
    for row in answer.confirmed:
        if row.choice is None and row.name == DEFAULT:
            if fastest:
                return f"; {DEFAULT} takes {_ms(row.p99)} ms"
            if row.throughput:
                pairs = zip(answer.measured.throughputs, row.throughputs, strict=False)
                times = spread_of(ours / base for ours, base in pairs if base)
                told = times.text() if times else _figure(answer.measured.throughput / row.throughput)
                return f"; that is {told} times {DEFAULT} ({_figure(row.throughput)})"
    for other in answer.choices:
        if other.workers != answer.choice.workers:
            figure = f"{_ms(other.p99)} ms" if fastest else f"{_figure(other.throughput)} requests/s"
            return f"; {other} would have {figure}"
    return ""


def _cost(answer: Result) -> str:
    """Return what the most throughput costs in latency: who else answers sooner, as measured."""
    if answer.target != Target():
        return ""
    sooner = [row for row in answer.confirmed if not row.failed and row.p99 < SOONER * answer.measured.p99]
    if not sooner:
        return ""
    best = min(sooner, key=lambda row: row.p99)
    return f"; it costs latency: {best.name} takes {_ms(best.p99)} ms, and serves {_figure(best.throughput)} requests/s"


def advice(answer: Result) -> list[str]:
    """Return a sentence for everything outside of slices that helps."""
    return [
        f"{tip.what} gains {tip.after / tip.before - 1:.0%} ({_figure(tip.before)} -> {_figure(tip.after)} requests/s, "
        f"without a server): {tip.how}"
        for tip in answer.advice
    ]


def picture(path: Path, answer: Result) -> str:
    """Draw throughput and 99th percentile of all batches and divisions, and return a sentence about it.

    The format is that of the file's name (png, svg). Without matplotlib the sentence says so, and nothing is drawn.

    Raises:
        OSError: the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed here; pip install matplotlib draws it next time"
    choices = _drawn(answer)
    divisions = list(dict.fromkeys(_division(choice) for choice in choices))
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")  # a page's own background may be any
    panels: list[Any] = list(figure.subplots(1, 2))
    for axes, title, field, scale in zip(
        panels,
        ("Requests/s at full load: higher is better", "99th percentile in ms: lower is better"),
        ("throughput", "p99"),
        (1, 1000),
        strict=True,
    ):
        for number, batch in enumerate(sorted({choice.batch for choice in choices})):
            drawn = [choice for choice in choices if choice.batch == batch and math.isfinite(getattr(choice, field))]
            axes.plot(
                [divisions.index(_division(choice)) for choice in drawn],
                [scale * getattr(choice, field) for choice in drawn],
                "o-",
                color=BATCHES[number % len(BATCHES)],
                label=f"batch {batch}",
            )
        place = divisions.index(_division(answer.choice))
        marks = [("o", answer.choice, "chosen", 15), ("*", answer.measured, "measured", 11)]
        for mark, choice, label, size in marks:
            if math.isfinite(getattr(choice, field)):
                y = scale * getattr(choice, field)
                fill = "none" if mark == "o" else "black"
                axes.plot(place, y, mark, ms=size, mfc=fill, mec="black", mew=2, label=label, ls="", clip_on=False)
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.set_xticks(range(len(divisions)), divisions, rotation=45 if len(divisions) > 5 else 0)
        axes.set_xlabel("workers x cores of each")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=8, frameon=False, title=answer.profile.archive)
    figure.savefig(path, dpi=110)
    return f"picture: {path}"


def to_json(answers: Sequence[Result], lines: Lines) -> str:
    """Return everything as JSON, ``lines`` included; what is endless is null."""
    told = [
        {"model": answer.name, "met": answer.met, "sentence": sentence(answer)}
        | {key: value for key, value in asdict(answer).items() if key not in ("name", "choices", "measured", "profile")}
        | {"archive": answer.profile.archive, "alternatives": [asdict(choice) for choice in answer.choices[:5]]}
        for answer in answers
    ]
    return json.dumps({"models": _finite(told), "lines": _finite(asdict(lines))}, indent=2)


def _drawn(answer: Result) -> list[Choice]:
    """Return all batches of the choice's division and of the best that leave no core idle, most workers last."""
    best: dict[tuple[int, int], float] = {}
    for choice in answer.choices:
        key = choice.workers, choice.threads
        best[key] = max(best.get(key, 0.0), choice.throughput)
    full = [(w, t) for w, t in best if (w + 1, t) not in best and (w, t + 1) not in best]
    keys = {*sorted(full, key=lambda key: -best[key])[: DRAWN - 1], (answer.choice.workers, answer.choice.threads)}
    return sorted(
        (choice for choice in answer.choices if (choice.workers, choice.threads) in keys),
        key=lambda choice: (choice.workers, -choice.threads, choice.batch),
    )


def _division(choice: Choice) -> str:
    return f"{choice.workers} x {choice.threads}"


def _ms(seconds: float) -> str:
    return _figure(1000 * seconds) if math.isfinite(seconds) else "endless"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
