"""The core map drawn as SVG: a document of its own, and the tiles of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, isqrt, sqrt
from textwrap import wrap

from ts_plugin.machine.cpulist import format_cpulist, short_cpulist
from ts_plugin.machine.topology import Core
from ts_plugin.operate.rows import Row, all_notes, rows, shortened
from ts_plugin.operate.view import WORDS, Group, Use, View, tag

__all__ = [
    "PALETTE",
    "STYLE",
    "Frame",
    "Scale",
    "colour",
    "fill_of",
    "key",
    "machine",
    "patterns",
    "svg",
    "swatch",
    "text_at",
    "tile",
]

# Okabe and Ito's palette, told apart with every kind of colour vision, in an order that keeps neighbours unlike;
# each with the colour of the text on it. Source: https://jfly.uni-koeln.de/color/
PALETTE = (
    ("#56B4E9", "#000000"),
    ("#E69F00", "#000000"),
    ("#00A67A", "#000000"),
    ("#D98CB3", "#000000"),
    ("#F0E442", "#000000"),
    ("#0072B2", "#ffffff"),
    ("#E06B1F", "#000000"),
)


# On the plain colours, in an order that keeps neighbours unlike, too.
MARKS = (
    "",
    '<circle cx="4" cy="4" r="1.6"/>',
    '<rect width="8" height="2.4"/>',
    '<rect width="2.4" height="8"/>',
    '<path d="M0 8L8 0" stroke-width="2"/>',
    '<path d="M0 0h4v4h-4zM4 4h4v4h-4z"/>',
)


def colour(row: int) -> tuple[str, str]:
    """Return fill and text colour of a row of workers; they come round again after the palette's end, tags never do."""
    return PALETTE[row % len(PALETTE)]


def _mark(row: int, member: int) -> int:
    return (row // len(PALETTE) + member % 2) % len(MARKS)


def fill_of(row: int, member: int = 0) -> str:
    """Return the fill of a worker: its row's colour, with a pattern that tells it from its neighbours in the row."""
    mark = _mark(row, member)
    return f"url(#ts-{row % len(PALETTE)}-{mark})" if mark else colour(row)[0]


def machine(view: View, scale: Scale) -> Box:
    """Return the map: all packages, in rows of equal length."""
    return _stack([_group_box(view, group, scale) for group in view.packages()], WIDTH)


def patterns(view: View) -> str:
    """Return the fills with dots, bars, ... that `fill_of` names in this picture."""
    ranks = map(view.rank, range(len(view.workers)))
    fills = []
    for row, mark in sorted({(row % len(PALETTE), _mark(row, member)) for row, member in ranks}):
        fill, ink = colour(row)
        drawn = (
            f'<pattern id="ts-{row}-{mark}" width="8" height="8" patternUnits="userSpaceOnUse"><rect width="8" '
            f'height="8" fill="{fill}"/><g fill="{ink}" stroke="{ink}" stroke-width="0" opacity=".24">'
            f"{MARKS[mark]}</g></pattern>"
        )
        fills += [drawn] if mark else []
    return f"<defs>{''.join(fills)}</defs>"


PAD, GAP, TILE_GAP, WIDTH = 10, 8, 3, 1160
RANGE = 9.5  # font size of a group's CPU ranges

STYLE = """
.ts-cores{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.ts-cores .page{fill:#fff}.ts-cores .package{fill:#f4f5f7;stroke:#d4d8dd}.ts-cores .node{fill:#fff;stroke:#d4d8dd}
.ts-cores .l3{fill:none;stroke:#c3c9d0;stroke-dasharray:2 3}.ts-cores text{fill:#1c2430}.ts-cores .label{fill:#5a6675}
.ts-cores .idle{fill:#fff;stroke:#9aa5b1}.ts-cores .reserved{fill:#5a6675}.ts-cores .barred{fill:#e3e6ea}
.ts-cores .shared{fill:#cfe3f1;stroke:#7fa8c4}.ts-cores .resting{fill:#fff;opacity:.88}.ts-cores text.bad{fill:#b3261e}
.ts-cores .cell text{text-anchor:middle}
.ts-cores .gap{fill:#fff}
.ts-cores .elsewhere{fill:#b9c1ca}.ts-cores text.on-reserved{fill:#fff}.ts-cores text.on-barred{fill:#8a94a0}
.ts-cores .load{fill:#000;opacity:.7;transform-box:fill-box;transform-origin:left;transform:scaleX(0)}
@media(prefers-color-scheme:dark){
.ts-cores .page{fill:#12161c}.ts-cores .package{fill:#1a2028;stroke:#343d49}.ts-cores .node{fill:#12161c;stroke:#343d49}
.ts-cores .l3{stroke:#46515e}.ts-cores text{fill:#e6e9ed}.ts-cores .label{fill:#9aa6b4}
.ts-cores .idle{fill:#12161c;stroke:#6b7785}.ts-cores .reserved{fill:#8a96a5}.ts-cores .barred{fill:#252c36}
.ts-cores .shared{fill:#24384a;stroke:#4d7390}.ts-cores .resting{fill:#12161c}.ts-cores text.on-reserved{fill:#12161c}
.ts-cores text.on-barred{fill:#6b7785}.ts-cores .load.bare{fill:#fff}.ts-cores .elsewhere{fill:#46515e}
.ts-cores .gap{fill:#12161c}.ts-cores text.bad{fill:#ff8a80}}
"""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a core is drawn, in pixels: ``size`` of its tile, ``digits`` of its CPU numbers.

    ``digits`` is 0 where numbers could not be read; every group of cores then has the ranges of its CPUs beside it.
    """

    size: int
    digits: float

    @classmethod
    def of(cls, cores: Sequence[Core]) -> Scale:
        steps = ((4, 88), (16, 64), (64, 46), (256, 40), (400, 24), (len(cores), 17))
        size = next(size for most, size in steps if len(cores) <= most)
        widest = max(len(core.cpus) * len(str(core.cpus[-1])) for core in cores)
        digits = min(size * 0.24, 1.4 * size / widest)
        return cls(size, digits if size >= 40 and digits >= 8 else 0)

    def room(self, core: Core) -> float:
        """Return the height for tags, above the CPU numbers or the SMT siblings."""
        return self.size * (0.62 if self.digits or len(core.cpus) > 1 else 1)


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
        lines = [(frame.label, y + pad + text - 3, text)] if frame.label else []
        lines += [(line, top + frame.content.height + 12 * n + 11, RANGE) for n, line in enumerate(frame.lines)]
        return (
            f'<rect class="{group.kind}" {_at(x, y, wide, high)} rx="6"/>'
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


def tile(view: View, core: Core, x: float, y: float, scale: Scale) -> str:
    """Draw one core: colours and tags of its owners above, one column per SMT sibling below, pale if in no slice.

    A borrowed core has a corner in the borrower's colour, with its tag.
    """
    owners, use, size = view.owners(core), view.use(core), scale.size
    names = " + ".join(map(view.label, owners)) or WORDS[use]
    title = f"core {core.number}, CPUs {format_cpulist(core.cpus)}: {names}"
    title += f", core type {core.kind}" if core.kind else ""
    guest = view.borrower(core)
    title += "" if guest is None else f"; {_guest_name(view, guest)} computes here now"
    radius = size * (0.42 if core.kind else 0.12)
    column, strip, band = size / len(core.cpus), size * 0.36, scale.room(core) / max(1, len(owners))
    shapes = []
    for n, index in enumerate(owners):
        row, member = view.rank(index)
        fill, top = fill_of(row, member), y + n * band
        shapes.append(f'<rect {_at(x, top, size, size - n * band)} fill="{colour(row)[0]}"/>')
        if fill.startswith("url"):  # numbers are read on the plain colour
            shapes.append(f'<rect {_at(x, top, size, band)} fill="{fill}"/>')
    if not owners:
        shapes.append(f'<rect class="{use}" {_at(x + 0.5, y + 0.5, size - 1, size - 1)} rx="{radius:.1f}"/>')
    if guest is not None:
        shapes.append(_corner(view, guest, x, y, size))
    for n, cpu in enumerate(core.cpus):
        left = x + n * column
        if owners and not view.in_slice(cpu):
            shapes.append(f'<rect class="resting" {_at(left, y + size - strip, column - 1.5, strip - 1.5)} rx="2"/>')
        ground = "load bare" if not view.in_slice(cpu) else "load"
        place = _at(left + 1, y + size * 0.92, column - 2, size * 0.07)
        shapes.append(f'<rect class="{ground}" data-cpu="{cpu}" {place}/>')
    whose = " ".join(_mention(view, index) for index in owners)
    return (
        f'<g class="cell" data-tags="{whose}"{_guest_tag(view, guest)}><title>{escape(title)}</title>'
        f'<g style="clip-path:inset(0 round {radius:.1f}px)">{"".join(shapes)}</g>'
        f"{_tile_text(view, core, x, y, scale)}</g>"
    )


def _mention(view: View, index: int) -> str:
    """Return how a tile names a worker to the page's script: ``A``, or ``A.17`` where A are many."""
    return view.tag(index) + (f".{view.rank(index)[1]}" if view.summed_up else "")


def _corner(view: View, guest: int | Use, x: float, y: float, size: float) -> str:
    """Draw the upper right half of a tile of ``size`` in the colour of whoever computes there without owning it."""

    def half(start: float) -> str:
        right = x + size
        return f'points="{x + start:.1f},{y:.1f} {right:.1f},{y:.1f} {right:.1f},{y + size - start:.1f}"'

    fill = f'class="{guest}"' if isinstance(guest, Use) else f'fill="{fill_of(*view.rank(guest))}"'
    return f'<polygon class="gap" {half(0.2 * size - 2)}/><polygon {fill} {half(0.2 * size)}/>'


def _guest_name(view: View, guest: int | Use) -> str:
    return "another server's worker" if isinstance(guest, Use) else view.label(guest)


def _guest_tag(view: View, guest: int | Use | None) -> str:
    return "" if guest is None or isinstance(guest, Use) else f' data-guest="{_mention(view, guest)}"'


def _at(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'


def text_at(words: str, x: float, y: float, size: float, style: str = "") -> str:
    return f'<text {style} x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}">{escape(words)}</text>'


def _tile_text(view: View, core: Core, x: float, y: float, scale: Scale) -> str:
    """Write the owners' tags, and the CPU numbers below them where they can be read."""
    owners, size, guest = view.owners(core), scale.size, view.borrower(core)
    marks = [(view.tag(index), f'style="fill:{colour(view.rank(index)[0])[1]}"') for index in owners]
    if len(marks) > 3:
        marks = [(f"{len(owners)}x", marks[0][1])]
    if not marks:
        use = view.use(core)
        mark = {Use.RESERVED: "R", Use.BARRED: "x", Use.SHARED: "~", Use.ELSEWHERE: "…"}.get(use, "")
        marks = [(mark, f'class="on-{use}"')]
    room = scale.room(core)
    large = min(room * 0.72 / len(marks) + 1, *(1.3 * size / max(1, len(mark)) for mark, _ in marks))
    words = []
    centre = x + size / 2
    if guest is not None:  # the borrower's corner needs room
        large, centre = large * 0.75, x + size * (0.25 if scale.digits else 0.3)
    if guest is not None and scale.digits:
        if isinstance(guest, Use):
            mark, ink = "…", f'class="on-{guest}"'
        else:
            mark, ink = view.tag(guest), f'style="fill:{colour(view.rank(guest)[0])[1]}"'
        there = min(large, size * 0.4 / len(mark))
        words.append(text_at(mark, x + size * 0.77, y + size * 0.2 + there * 0.36, there, f'{ink} font-weight="650"'))
    for n, (mark, ink) in enumerate(marks):
        middle = y + (n + 0.5) * room / len(marks) + large * 0.36
        words.append(text_at(mark, centre, middle, large, f'{ink} font-weight="650"'))
    column = size / len(core.cpus)
    for n, cpu in enumerate(core.cpus if scale.digits else ()):
        ink = 'class="label"' if owners and not view.in_slice(cpu) else marks[-1][1]
        middle = y + size * 0.81 + scale.digits * 0.36
        words.append(text_at(str(cpu), x + (n + 0.5) * column - 0.5, middle, scale.digits, ink))
    return "".join(words)


def _head(view: View) -> Box:
    def draw(x: float, y: float) -> str:
        title = text_at(view.title, x, y + 16, 17, 'font-weight="650"')
        return title + text_at(view.summary(), x, y + 36, 13, 'class="label"')

    return Box(len(view.summary()) * 7, 40, draw)


def key(view: View) -> list[tuple[str, str]]:
    """Return each mark that occurs, drawn in a square of 16 pixels, and what it means."""
    cores = view.topology.cores
    seen = {view.use(core) for core in cores}
    plain, corner = f'<rect {_at(0, 0, 16, 16)} rx="2" fill="{PALETTE[0][0]}"/>', 'points="3,0 16,0 16,13"'
    marks = [
        (f'<rect class="{use}" {_at(0.5, 0.5, 15, 15)} rx="2"/>', WORDS[use])
        for use in Use
        if use in seen and use is not Use.OWNED
    ]
    if any(view.owners(core) and not view.in_slice(cpu) for core in cores for cpu in core.cpus):
        resting = f'<rect class="resting" {_at(0.5, 0.5, 15, 15)} rx="2"/>'
        marks.append((plain + resting, "SMT sibling kept free"))
    if any(core.kind for core in cores):
        marks.append((f'<rect class="idle" {_at(0.5, 0.5, 15, 15)} rx="7"/>', "slower core type"))
    if any(view.borrower(core) is not None for core in cores):
        guest = f'<polygon fill="{PALETTE[1][0]}" {corner}/>'
        marks.append((plain + guest, "borrowed: the corner's worker computes here now"))
    return marks


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


def swatch(row: int) -> str:
    """Draw the tag of a row of workers on its colour, 28 pixels wide and 19 high."""
    label = text_at(tag(row), 14, 14, 12, f'text-anchor="middle" font-weight="650" style="fill:{colour(row)[1]}"')
    return f'<rect {_at(0, 0, 28, 19)} rx="4" fill="{fill_of(row)}"/>{label}'


def _describe(row: Row) -> str:
    many = len(row.members) > 1
    who = f"worker {row.worker} · pid {row.pid}" if row.pid else row.worker if many else f"worker {row.worker}"
    words = [f"{row.model} {row.version}".strip(), who if many or row.pid or not row.model else ""]
    words.append(f"{row.threads} {'thread' if row.threads == '1' else 'threads'}{' each' * many}")
    cpus = f"{'CPU' if row.cpus.isdigit() else 'CPUs'} {shortened(row.cpus)}"
    words += [cpus if row.pinned else f"anywhere in {cpus}", f"NUMA {row.numa_nodes}" if row.numa_nodes else ""]
    return " · ".join(word for word in words if word)
