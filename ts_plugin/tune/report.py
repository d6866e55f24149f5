"""What tune found, for people and for scripts: a table, a sentence, a picture, the lines to paste, JSON."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import javaproperties
import yaml
from rich.box import SIMPLE
from rich.table import Table

from ts_plugin.machine.words import count
from ts_plugin.tune.choose import LOAD, met
from ts_plugin.tune.profile import Choice, Profile, Target

__all__ = [
    "DEFAULT",
    "NOW",
    "Advice",
    "Answer",
    "Confirmed",
    "Lines",
    "lines",
    "markdown",
    "name_of",
    "picture",
    "sentence",
    "table",
    "to_json",
    "write",
]

DEFAULT = "TorchServe's default"
NOW = "what runs now"
KEPT = ".before-tune"  # the end of an old file's name
OWN_CORES = re.compile(r"\s*--ncores?[-_]per[-_]instance(\s+|=)\S+")
HEADS = ("", "requests/s", "+/-", "p50 ms", "p99 ms", "failed", "memory MB")
BATCHES = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#0072B2", "#D55E00")  # Okabe and Ito's colours
DRAWN = 10  # divisions in the picture at most


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What the real server did with ``choice``, or with settings that are no choice of ours.

    ``throughput`` in requests/s at full load, ``spread`` half of what lies between its lowest and highest repetition.
    ``p50`` and ``p99`` in seconds, at the rate that all rows had. ``failed`` requests of all.
    """

    name: str
    choice: Choice | None
    throughput: float
    spread: float
    p50: float
    p99: float
    failed: int


@dataclass(frozen=True, slots=True)
class Advice:
    """Something outside of slices that was measured: requests/s ``before`` and ``after``, and ``how`` to get it."""

    what: str
    before: float
    after: float
    how: str


@dataclass(frozen=True, slots=True)
class Answer:
    """All that is known of one model; ``name`` and ``version`` are its manifest's, ``choice`` is what tune advises."""

    name: str
    version: str
    profile: Profile
    target: Target
    choices: tuple[Choice, ...]
    choice: Choice
    confirmed: tuple[Confirmed, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def measured(self) -> Confirmed | None:
        """What the server did with the choice, if it was confirmed."""
        return next((row for row in self.confirmed if row.choice == self.choice), None)

    @property
    def met(self) -> bool:
        """Whether the target is met, by what was measured if anything was."""
        row, target = self.measured, self.target
        if row is None:
            return met(self.choice, target)
        served = target.rate is None or target.rate <= LOAD * row.throughput
        return served and (target.p99 is None or row.p99 <= target.p99)


@dataclass(frozen=True, slots=True)
class Lines:
    """``properties`` for config.properties, and for each archive, by file name, the text of its model-config.yaml."""

    properties: Mapping[str, str]
    archives: Mapping[str, str]


def name_of(choice: Choice) -> str:
    """Return for example ``2 workers x 1 core, batch 4``."""
    return f"{_division(choice)}, batch {choice.batch}"


def table(answer: Answer) -> Table:
    """Draw what was measured for a terminal, the advised row bold; what was only computed says so."""
    result = Table(title=answer.profile.archive, title_justify="left", box=SIMPLE, pad_edge=False, header_style="dim")
    for head in HEADS:
        result.add_column(head, justify="right" if head else "left")
    for cells, chosen in _rows(answer):
        result.add_row(*cells, style="bold" if chosen else "")
    return result


def markdown(answer: Answer) -> str:
    """Return the same table in Markdown."""
    text = [f"| {' | '.join(HEADS)} |", "|---|" + "---:|" * (len(HEADS) - 1)]
    for cells, chosen in _rows(answer):
        text.append(f"| {' | '.join(f'**{cell}**' if chosen and cell else cell for cell in cells)} |")
    return "\n".join(text) + "\n"


def sentence(answer: Answer) -> str:
    """Say in one sentence what is advised and why."""
    choice, target, row = answer.choice, answer.target, answer.measured
    throughput, p99 = (row.throughput, row.p99) if row else (choice.throughput, choice.p99)
    late = f"99 of 100 answers at {_figure(choice.rate)} requests/s within {_ms(p99)} ms"
    most = f"{_figure(throughput)} requests/s at full load"
    if not answer.met and target.rate is not None and target.rate > LOAD * throughput:
        return (
            f"{_figure(target.rate)} requests/s are more than this machine serves: {name_of(choice)} comes nearest "
            f"with {most}, of which {_figure(LOAD * throughput)} ({LOAD:.0%}) leave room for bursts."
        )
    if not answer.met and target.p99 is not None:
        return f"Nothing holds {_ms(target.p99)} ms: {name_of(choice)} comes nearest, with {late} and {most}."
    wish = "is fastest" if target.rate is not None and target.p99 is None else "serves most"
    within = f" within {_ms(target.p99)} ms" if target.p99 is not None else ""
    return f"{name_of(choice)} {wish}{within}: {most}, {late}{_against(answer, throughput, p99)}."


def _against(answer: Answer, throughput: float, p99: float) -> str:
    """Return what the choice is better than: a server's other settings, else the best other division."""
    fastest = answer.target.rate is not None and answer.target.p99 is None
    for row in answer.confirmed:
        if row.choice is None and row.name == DEFAULT:
            if fastest:
                return f"; {DEFAULT} takes {_ms(row.p99)} ms"
            if row.throughput:
                return f"; that is {throughput / row.throughput:.2f} times {DEFAULT} ({_figure(row.throughput)})"
    for other in answer.choices:
        if other.workers != answer.choice.workers:
            figure = f"{_ms(other.p99)} ms" if fastest else f"{_figure(other.throughput)} requests/s"
            return f"; {name_of(other)} would have {figure}"
    return ""


def picture(path: Path, answer: Answer) -> str:
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
    divisions = list(dict.fromkeys(_division(one, short=True) for one in choices))
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")  # a page's own background may be any
    panels: list[Any] = list(figure.subplots(1, 2))
    for axes, title, field, scale in zip(
        panels,
        ("Requests/s at full load: higher is better", "99th percentile in ms: lower is better"),
        ("throughput", "p99"),
        (1, 1000),
        strict=True,
    ):
        for number, batch in enumerate(sorted({one.batch for one in choices})):
            drawn = [one for one in choices if one.batch == batch and math.isfinite(getattr(one, field))]
            axes.plot(
                [divisions.index(_division(one, short=True)) for one in drawn],
                [scale * getattr(one, field) for one in drawn],
                "o-",
                color=BATCHES[number % len(BATCHES)],
                label=f"batch {batch}",
            )
        place = divisions.index(_division(answer.choice, short=True))
        if math.isfinite(getattr(answer.choice, field)):
            axes.plot(
                place, scale * getattr(answer.choice, field), "o", ms=15, mfc="none", mec="black", mew=2, label="chosen"
            )
        if answer.measured:
            axes.plot(place, scale * getattr(answer.measured, field), "*", color="black", ms=11, label="measured")
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.set_xticks(range(len(divisions)), divisions, rotation=45 if len(divisions) > 5 else 0)
        axes.set_xlabel("workers x cores of each")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=8, frameon=False, title=answer.profile.archive)
    figure.savefig(path, dpi=110)
    return f"picture: {path}"


def lines(answers: Sequence[Answer], present: Mapping[str, str] = MappingProxyType({})) -> Lines:
    """Return what to set, merged with ``present``, the properties of the file that it is meant for.

    A batch of 1 has no delay. Where an archive has a model-config.yaml of its own, that one wins over ``models``. Cores
    of several models can be told apart by their archives alone.

    Raises:
        ValueError: ``models`` in the file is no JSON object.
    """
    try:
        models = json.loads(present.get("models", "{}"))
        for answer in answers:
            version = models.setdefault(answer.name, {}).setdefault(answer.version, {})
            version |= {"marName": answer.profile.archive} | _settings(answer.choice)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"models: not the JSON object that TorchServe reads: {error}; correct that line") from error
    arguments = OWN_CORES.sub("", present.get("cpu_launcher_args", ""))
    if len(answers) == 1:
        arguments += f" --ncores-per-instance {answers[0].choice.threads}"
    properties = {
        "cpu_launcher_enable": "true",
        "cpu_launcher_args": arguments.strip(),
        "models": json.dumps(models),
    }
    if not properties["cpu_launcher_args"] and "cpu_launcher_args" not in present:
        del properties["cpu_launcher_args"]
    archives = {
        answer.profile.archive: yaml.safe_dump(
            _settings(answer.choice) | {"cpu": {"cores": answer.choice.threads}}, sort_keys=False
        )
        for answer in answers
    }
    return Lines(properties, archives)


def write(path: Path, lines: Lines) -> Path | None:
    """Set the properties in the file at ``path`` and return where the old file is kept; None: there was nothing to keep.

    All other lines stay as they are. The file changes at once or not at all.

    Raises:
        OSError: it cannot be read, kept or written; it is then as it was.
    """
    path = path.resolve()  # a link stays one
    draft, kept = path.with_name(f".{path.name}.{os.getpid()}"), None
    try:
        old = path.read_bytes() if path.exists() else None
        new = _merged(old or b"", lines.properties)
        if new == old:
            return None
        with draft.open("xb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            shutil.copymode(path, draft)
            kept = _keep(path)
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if kept:
            kept.unlink()
        raise OSError(
            f"{path}: not written, it is as it was: {error.strerror}; paste the lines, or name another file"
        ) from error
    return kept


def to_json(answers: Sequence[Answer]) -> str:
    """Return everything as JSON; what is endless is null."""
    told = [
        {"model": answer.name, "met": answer.met, "sentence": sentence(answer)}
        | {key: value for key, value in asdict(answer).items() if key not in ("name", "choices", "profile")}
        | {"archive": answer.profile.archive, "alternatives": [asdict(one) for one in answer.choices[:5]]}
        for answer in answers
    ]
    return json.dumps({"models": _finite(told), "lines": _finite(asdict(lines(answers)))}, indent=2)


def _rows(answer: Answer) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield cells, and whether the row is the advised one."""
    for row in answer.confirmed:
        cells = (_figure(row.throughput), _figure(row.spread), _ms(row.p50), _ms(row.p99), str(row.failed))
        memory = f"{row.choice.memory / 1e6:.0f}" if row.choice else ""
        yield (row.name, *cells, memory), row.choice == answer.choice
    if answer.measured is None:
        one = answer.choice
        cells = (_figure(one.throughput), "", "", _ms(one.p99), "", f"{one.memory / 1e6:.0f}")
        yield (f"{name_of(one)} (expected)", *cells), True
    for advice in answer.advice:
        gain = f"{advice.after / advice.before - 1:+.0%}"
        yield (f"{advice.what}, one process alone: {advice.how}", gain, "", "", "", "", ""), False


def _drawn(answer: Answer) -> list[Choice]:
    """Return all batches of the most productive divisions and of the choice, most workers last."""
    best: dict[tuple[int, int], float] = {}
    for one in answer.choices:
        key = one.workers, one.threads
        best[key] = max(best.get(key, 0.0), one.throughput)
    keys = set(sorted(best, key=lambda key: -best[key])[: DRAWN - 1]) | {(answer.choice.workers, answer.choice.threads)}
    return sorted(
        (one for one in answer.choices if (one.workers, one.threads) in keys),
        key=lambda one: (one.workers, -one.threads, one.batch),
    )


def _division(choice: Choice, *, short: bool = False) -> str:
    if short:
        return f"{choice.workers} x {choice.threads}"
    return f"{count(choice.workers, 'worker')} x {count(choice.threads, 'core')}"


def _settings(choice: Choice) -> dict[str, int]:
    settings = {"minWorkers": choice.workers, "maxWorkers": choice.workers, "batchSize": choice.batch}
    return settings | ({"maxBatchDelay": choice.batch_delay_ms} if choice.batch > 1 else {})


def _merged(old: bytes, properties: Mapping[str, str]) -> bytes:
    """Return the file with ``properties`` set: in their old place, else at the end."""
    text = old.decode("latin-1")  # as Java reads it; every byte comes back as it was
    end = "\r\n" if "\r\n" in text else "\n"
    left = {key: f"{key}={value.replace(chr(92), chr(92) * 2)}{end}" for key, value in properties.items()}
    ready, result = dict(left), []
    for key, _, source in javaproperties.parse(text):
        result.append(source if key not in ready else ready[key])
        left.pop(key or "", None)
    if result and left and not result[-1].endswith(("\r", "\n")):
        result.append(end)
    return "".join([*result, *left.values()]).encode("latin-1")


def _keep(path: Path) -> Path:
    """Copy a file beside itself under a name that is free."""
    number = 1
    while True:
        kept = path.with_name(path.name + KEPT + (f"-{number}" if number > 1 else ""))
        try:
            with kept.open("xb") as file:
                file.write(path.read_bytes())
                return kept
        except FileExistsError:
            number += 1
        except OSError:
            kept.unlink(missing_ok=True)
            raise


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return _figure(1000 * seconds) if math.isfinite(seconds) else "endless"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
