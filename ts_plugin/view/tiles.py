"""What a core looks like: colours, patterns and tiles, for the picture of its own and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.topology import Core
from ts_plugin.view.view import WORDS, Use, View, tag

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


def _fill(row: int, member: int = 0) -> str:
    """Return the fill of a worker: its row's colour, with a pattern that tells it from its neighbours in the row."""
    mark = _mark(row, member)
    return f"url(#ts-{row % len(PALETTE)}-{mark})" if mark else colour(row)[0]


def patterns(view: View) -> str:
    """Return the fills with dots, bars, ... that `_fill` names in this picture."""
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


def tile(view: View, core: Core, x: float, y: float, scale: Scale) -> str:
    """Draw one core: colours and tags of its owners above, one column per SMT sibling below, pale if in no slice.

    A borrowed core has a corner in the borrower's colour, with its tag.
    """
    owners, use, size = view.owners(core), view.use(core), scale.size
    names = " + ".join(map(view.label, owners)) or WORDS[use]
    title = f"core {core.number}, CPUs {format_cpulist(core.cpus)}: {names}"
    title += f", core type {core.kind}" if core.kind else ""
    guest = view.borrower(core)
    if guest is not None:
        who = "another server's worker" if isinstance(guest, Use) else view.label(guest)
        title += f"; {who} computes here now"
    radius = size * (0.42 if core.kind else 0.12)
    column, strip, band = size / len(core.cpus), size * 0.36, scale.room(core) / max(1, len(owners))
    shapes = []
    for n, index in enumerate(owners):
        row, member = view.rank(index)
        fill, top = _fill(row, member), y + n * band
        shapes.append(f'<rect {at(x, top, size, size - n * band)} fill="{colour(row)[0]}"/>')
        if fill.startswith("url"):  # numbers are read on the plain colour
            shapes.append(f'<rect {at(x, top, size, band)} fill="{fill}"/>')
    if not owners:
        shapes.append(f'<rect class="{use}" {at(x + 0.5, y + 0.5, size - 1, size - 1)} rx="{radius:.1f}"/>')
    if guest is not None:
        shapes.append(_corner(view, guest, x, y, size))
    for n, cpu in enumerate(core.cpus):
        left = x + n * column
        if owners and not view.in_slice(cpu):
            shapes.append(f'<rect class="resting" {at(left, y + size - strip, column - 1.5, strip - 1.5)} rx="2"/>')
        ground = "load bare" if not view.in_slice(cpu) else "load"
        place = at(left + 1, y + size * 0.92, column - 2, size * 0.07)
        shapes.append(f'<rect class="{ground}" data-cpu="{cpu}" {place}/>')
    whose = f'data-tags="{" ".join(_mention(view, index) for index in owners)}"'
    whose += "" if guest is None or isinstance(guest, Use) else f' data-guest="{_mention(view, guest)}"'
    return (
        f'<g class="cell" {whose}><title>{escape(title)}</title>'
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

    fill = f'class="{guest}"' if isinstance(guest, Use) else f'fill="{_fill(*view.rank(guest))}"'
    return f'<polygon class="gap" {half(0.2 * size - 2)}/><polygon {fill} {half(0.2 * size)}/>'


def at(x: float, y: float, width: float, height: float) -> str:
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


def key(view: View) -> list[tuple[str, str]]:
    """Return each mark that occurs, drawn in a square of 16 pixels, and what it means."""
    cores = view.topology.cores
    seen = {view.use(core) for core in cores}
    plain, corner = f'<rect {at(0, 0, 16, 16)} rx="2" fill="{PALETTE[0][0]}"/>', 'points="3,0 16,0 16,13"'
    marks = [
        (f'<rect class="{use}" {at(0.5, 0.5, 15, 15)} rx="2"/>', WORDS[use])
        for use in Use
        if use in seen and use is not Use.OWNED
    ]
    if view.resting():
        resting = f'<rect class="resting" {at(0.5, 0.5, 15, 15)} rx="2"/>'
        marks.append((plain + resting, "SMT sibling kept free"))
    if any(core.kind for core in cores):
        marks.append((f'<rect class="idle" {at(0.5, 0.5, 15, 15)} rx="7"/>', "slower core type"))
    if view.borrowed():
        guest = f'<polygon fill="{PALETTE[1][0]}" {corner}/>'
        marks.append((plain + guest, "borrowed: the corner's worker computes here now"))
    return marks


def swatch(row: int) -> str:
    """Draw the tag of a row of workers on its colour, 28 pixels wide and 19 high."""
    label = text_at(tag(row), 14, 14, 12, f'text-anchor="middle" font-weight="650" style="fill:{colour(row)[1]}"')
    return f'<rect {at(0, 0, 28, 19)} rx="4" fill="{_fill(row)}"/>{label}'
