"""The core map as an SVG document, and the sizes of its boxes, which the page shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, isqrt, sqrt
from textwrap import wrap

from ts_plugin.machine.cpulist import short_cpulist
from ts_plugin.machine.topology import Core
from ts_plugin.view.rows import Row, all_notes, rows, shortened
from ts_plugin.view.tiles import STYLE, Scale, at, key, patterns, swatch, text_at, tile
from ts_plugin.view.view import Group, View

PAD, GAP, TILE_GAP, WIDTH = 10, 8, 3, 1160
RANGE = 9.5  # font size of a group's CPU ranges


@dataclass(frozen=True, slots=True)
class Box:
    """A drawn rectangle of known size, to be placed at any point."""

    width: float
    height: float
    draw: Callable[[float, float], str]


def svg(view: View) -> str:
    """Return the picture as an SVG document, light or dark as its reader prefers."""
    scale = Scale.of(view.topology.cores)
    body = machine(view, scale)
    wide = max(body.width, 560.0)
    unbound = [f"unbound pid {pid}: {why}" for pid, why in view.unbound]
    notes = [f"note on {tags}: {note}" if tags else f"note: {note}" for tags, note in all_notes(view)]
    parts = [_head(view), _lines(unbound, wide, "bad"), body, _key(view), _lines(notes, wide, "label"), _legend(view)]
    parts = [part for part in parts if part.height]
    width = max(part.width for part in parts) + 2 * PAD
    y, drawn = float(PAD), []
    for part in parts:
        drawn.append(part.draw(PAD, y))
        y += part.height + 2 * GAP
    height = y - 2 * GAP + PAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ts-cores" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"><title>{escape(view.title)}: {escape(view.summary())}</title>'
        f"<style>{STYLE}</style>{patterns(view)}"
        f'<rect class="page" width="100%" height="100%"/>{"".join(drawn)}</svg>\n'
    )


def machine(view: View, scale: Scale) -> Box:
    """Return the map: all packages, in rows of equal length."""
    return _stack([_group_box(view, group, scale) for group in view.packages()], WIDTH)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a package, NUMA node or L3 domain has in its box, which is ``pad`` wider on every side than ``width``.

    ``lines`` are the ranges of its CPUs, where its tiles have no numbers.
    """

    label: str
    pad: int
    width: int
    content: Box
    lines: list[str]

    @classmethod
    def of(cls, view: View, group: Group, scale: Scale) -> Frame:
        pad, text = (6, 10) if group.kind == "l3" else (PAD, 12)
        boxes = [_group_box(view, part, scale) for part in group.groups]
        content = _stack(boxes, WIDTH - 2 * PAD) if boxes else _grid(view, group.cores, scale)
        label = group.label if _long(group.label, text) < content.width else group.label.split(" · ")[0]
        label = label if group.kind != "l3" or scale.size >= 24 else ""
        width = ceil(max(content.width, _long(label, text)))
        return cls(label, pad, width, content, [] if boxes else _ranges(group.cores, scale, width))


def _group_box(view: View, group: Group, scale: Scale) -> Box:
    frame, text = Frame.of(view, group, scale), 10 if group.kind == "l3" else 12
    head, pad = 18 if frame.label else 0, frame.pad
    wide, high = frame.width + 2 * pad, frame.content.height + head + 12 * len(frame.lines) + 2 * pad

    def draw(x: float, y: float) -> str:
        top = y + pad + head
        lines: list[tuple[str, float, float]] = [(frame.label, y + pad + text - 3, text)] if frame.label else []
        lines += [(line, top + frame.content.height + 12 * n + 11, RANGE) for n, line in enumerate(frame.lines)]
        return (
            f'<rect class="{group.kind}" {at(x, y, wide, high)} rx="6"/>'
            + "".join(text_at(words, x + pad, below, size, 'class="label"') for words, below, size in lines)
            + frame.content.draw(x + pad, top)
        )

    return Box(wide, high, draw)


def _long(words: str, size: float) -> float:
    """Return about how many pixels ``words`` take at a font size of ``size``: a little more, rather than less."""
    return len(words) * size * 0.57


def _ranges(cores: Sequence[Core], scale: Scale, width: float) -> list[str]:
    """Return the CPUs of ``cores`` in lines of ``width`` pixels, none where the tiles have their numbers."""
    if scale.digits:
        return []
    cpus = short_cpulist(cpu for core in cores for cpu in core.cpus).replace(",", ", ")
    widest = max(map(len, cpus.split()))
    return wrap(cpus, max(widest, int(width / _long(" ", RANGE))), break_on_hyphens=False)


def _lines(texts: Sequence[str], width: float, style: str) -> Box:
    """Place texts under one another, broken at ``width``."""
    lines = [line for text in texts for line in wrap(text, int(width / _long(" ", 12.5)), subsequent_indent="   ")]

    def draw(x: float, y: float) -> str:
        return "".join(
            text_at(line.lstrip(), x + 12 * line.startswith(" "), y + 18 * n + 12, 12.5, f'class="{style}"')
            for n, line in enumerate(lines)
        )

    return Box(width if lines else 0, 18 * len(lines), draw)


def _stack(boxes: Sequence[Box], width: float) -> Box:
    """Place boxes in rows of about equal length, no row wider than ``width`` unless one box is."""
    widest = max(box.width for box in boxes)
    fitting = max(1, int((width + GAP) // (widest + GAP)))
    per_row = ceil(len(boxes) / ceil(len(boxes) / fitting))
    rows = [boxes[start : start + per_row] for start in range(0, len(boxes), per_row)]
    heights = [max(box.height for box in row) for row in rows]

    def draw(x: float, y: float) -> str:
        drawn = []
        for row, height in zip(rows, heights, strict=True):
            left = x
            for box in row:
                drawn.append(box.draw(left, y))
                left += box.width + GAP
            y += height + GAP
        return "".join(drawn)

    longest = max(sum(box.width + GAP for box in row) - GAP for row in rows)
    return Box(longest, sum(heights) + GAP * (len(rows) - 1), draw)


def _grid(view: View, cores: Sequence[Core], scale: Scale) -> Box:
    """Place the cores of one domain in a rectangle about twice as wide as high."""
    count, goal = len(cores), sqrt(2 * len(cores))
    columns = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - goal))
    if not 0.6 <= columns / goal <= 1.5 or count <= 3:
        columns = count if count <= 3 else isqrt(2 * count - 1) + 1
    step = scale.size + TILE_GAP

    def draw(x: float, y: float) -> str:
        return "".join(
            tile(view, core, x + n % columns * step, y + n // columns * step, scale) for n, core in enumerate(cores)
        )

    return Box(columns * step - TILE_GAP, ceil(count / columns) * step - TILE_GAP, draw)


def _head(view: View) -> Box:
    def draw(x: float, y: float) -> str:
        title = text_at(view.title, x, y + 16, 17, 'font-weight="650"')
        return title + text_at(view.summary(), x, y + 36, 13, 'class="label"')

    return Box(len(view.summary()) * 7, 40, draw)


def _key(view: View) -> Box:
    marks = key(view)
    lefts = [sum(42 + len(words) * 6.4 for _, words in marks[:n]) for n in range(len(marks) + 1)]

    def draw(x: float, y: float) -> str:
        return "".join(
            f'<g transform="translate({x + left:.1f} {y:.1f})">{mark}</g>'
            + text_at(words, x + left + 22, y + 12.5, 12, 'class="label"')
            for left, (mark, words) in zip(lefts, marks, strict=False)
        )

    return Box(lefts[-1], 16 if marks else 0, draw)


def _legend(view: View) -> Box:
    """List the workers with their tags, in as many columns as fit."""
    lines = [_describe(row) for row in rows(view)]
    width = max((len(line) for line in lines), default=0) * 6.7 + 44
    columns = max(1, min(ceil(len(lines) / 8), int(WIDTH // width)))
    height = ceil(len(lines) / columns)

    def draw(x: float, y: float) -> str:
        drawn = []
        for n, line in enumerate(lines):
            left, top = x + n // height * width, y + n % height * 24
            drawn.append(f'<g transform="translate({left:.1f} {top:.1f})">{swatch(n)}</g>')
            drawn.append(text_at(line, left + 36, top + 14, 12.5))
        return "".join(drawn)

    return Box(width * columns, height * 24, draw)


def _describe(row: Row) -> str:
    many = len(row.members) > 1
    who = f"worker {row.worker} · pid {row.pid}" if row.pid else row.worker if many else f"worker {row.worker}"
    words = [f"{row.model} {row.version}".strip(), who if many or row.pid or not row.model else ""]
    words.append(f"{row.threads} {'thread' if row.threads == '1' else 'threads'}{' each' * many}")
    cpus = f"{'CPU' if row.cpus.isdigit() else 'CPUs'} {shortened(row.cpus)}"
    words += [cpus if row.pinned else f"anywhere in {cpus}", f"NUMA {row.numa_nodes}" if row.numa_nodes else ""]
    return " · ".join(word for word in words if word)
