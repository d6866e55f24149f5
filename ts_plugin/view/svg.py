"""The core map drawn as SVG, for documents and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, isqrt, sqrt

from ts_plugin.machine.cpulist import format_cpulist, short_cpulist
from ts_plugin.machine.topology import Core
from ts_plugin.machine.words import count
from ts_plugin.view.view import WORDS, Group, Use, View, Worker, tag

__all__ = ["PALETTE", "colour", "fill_of", "svg", "text_at"]

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


def colour(index: int) -> tuple[str, str]:
    """Return fill and text colour of a worker; they come round again after the palette's end, tags never do."""
    return PALETTE[index % len(PALETTE)]


PAD, GAP, WIDTH = 10, 8, 1120

STYLE = """
.ts-cores{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.ts-cores .page{fill:#fff}.ts-cores .package{fill:#f4f5f7;stroke:#d4d8dd}.ts-cores .node{fill:#fff;stroke:#d4d8dd}
.ts-cores .l3{fill:none;stroke:#c3c9d0;stroke-dasharray:2 3}.ts-cores text{fill:#1c2430}.ts-cores .label{fill:#5a6675}
.ts-cores .idle{fill:#fff;stroke:#9aa5b1}.ts-cores .reserved{fill:#5a6675}.ts-cores .barred{fill:#e3e6ea}
.ts-cores .shared{fill:#cfe3f1;stroke:#7fa8c4}.ts-cores .resting{fill:#fff;opacity:.88}
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
.ts-cores .gap{fill:#12161c}}
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """How large a core is drawn, in pixels: ``size`` of its tile, ``digits`` of its CPU numbers, 0 for none."""

    size: int
    digits: float

    @classmethod
    def of(cls, cores: Sequence[Core]) -> _Scale:
        steps = ((4, 88), (16, 64), (64, 46), (256, 36), (400, 24), (len(cores), 17))
        size = next(size for most, size in steps if len(cores) <= most)
        widest = max(len(core.cpus) * len(str(core.cpus[-1])) for core in cores)
        digits = min(size * 0.24, 1.4 * size / widest)
        return cls(size, digits if size >= 34 and digits >= 7 else 0)

    def room(self, core: Core) -> float:
        """Return the height for tags, above the CPU numbers or the SMT siblings."""
        return self.size * (0.62 if self.digits or len(core.cpus) > 1 else 1)


@dataclass(frozen=True, slots=True)
class _Box:
    """A drawn rectangle of known size, to be placed at any point."""

    width: float
    height: float
    draw: Callable[[float, float], str]


def svg(view: View, *, legend: bool = True) -> str:
    """Return the picture as an SVG document, light or dark as its reader prefers; without ``legend`` only the map."""
    scale = _Scale.of(view.topology.cores)
    body = _stack([_group_box(view, group, scale, "package") for group in view.packages()], WIDTH)
    parts = [_head(view)] if legend else []
    parts.append(body)
    parts += [_key(view), _legend(view)] if legend else [_key(view)]
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
        f"<style>{STYLE}</style>{_patterns(view)}"
        f'<rect class="page" width="100%" height="100%"/>{"".join(drawn)}</svg>\n'
    )


def _patterns(view: View) -> str:
    """Return the fills: plain colours, then the same with dots, bars, ..."""
    marks = (
        "",
        '<circle cx="4" cy="4" r="1.6"/>',
        '<rect width="8" height="2.4"/>',
        '<rect width="2.4" height="8"/>',
        '<path d="M0 8L8 0" stroke-width="2"/>',
        '<path d="M0 0h4v4h-4zM4 4h4v4h-4z"/>',
    )
    fills = []
    for index in range(len(PALETTE), len(view.workers)):
        fill, ink = colour(index)
        mark = marks[index // len(PALETTE) % len(marks)]
        fills.append(
            f'<pattern id="ts-{index}" width="8" height="8" patternUnits="userSpaceOnUse"><rect width="8" height="8" '
            f'fill="{fill}"/><g fill="{ink}" stroke="{ink}" stroke-width="0" opacity=".24">{mark}</g></pattern>'
        )
    return f"<defs>{''.join(fills)}</defs>"


def fill_of(index: int) -> str:
    return colour(index)[0] if index < len(PALETTE) else f"url(#ts-{index})"


def _group_box(view: View, group: Group, scale: _Scale, kind: str) -> _Box:
    inner = {"package": "node", "node": "l3", "l3": "l3"}[kind]
    if group.groups:
        inner = "l3" if group.groups[0].label.startswith("L3") else inner
        content = _stack([_group_box(view, part, scale, inner) for part in group.groups], WIDTH - 2 * PAD)
    else:
        content = _grid(view, group.cores, scale)
    head = 18 if kind != "l3" or scale.size >= 24 else 0
    pad = PAD if kind != "l3" else 6
    text = 12 if kind != "l3" else 10
    label = group.label if len(group.label) * text * 0.56 < content.width else group.label.split(" · ")[0]

    def draw(x: float, y: float) -> str:
        words = text_at(label, x + pad, y + pad + text - 3, text, 'class="label"')
        return (
            f'<rect class="{kind}" {_at(x, y, content.width + 2 * pad, content.height + 2 * pad + head)} rx="6"/>'
            + (words if head else "")
            + content.draw(x + pad, y + pad + head)
        )

    return _Box(content.width + 2 * pad, content.height + 2 * pad + head, draw)


def _stack(boxes: Sequence[_Box], width: float) -> _Box:
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
    return _Box(longest, sum(heights) + GAP * (len(rows) - 1), draw)


def _grid(view: View, cores: Sequence[Core], scale: _Scale) -> _Box:
    """Place the cores of one domain in a rectangle about twice as wide as high."""
    count, goal = len(cores), sqrt(2 * len(cores))
    columns = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - goal))
    if not 0.6 <= columns / goal <= 1.5 or count <= 3:
        columns = count if count <= 3 else isqrt(2 * count - 1) + 1
    step = scale.size + 3

    def draw(x: float, y: float) -> str:
        return "".join(
            _tile(view, core, x + n % columns * step, y + n // columns * step, scale) for n, core in enumerate(cores)
        )

    return _Box(columns * step - 3, ceil(count / columns) * step - 3, draw)


def _tile(view: View, core: Core, x: float, y: float, scale: _Scale) -> str:
    """Draw one core: colours and tags of its owners above, one column per SMT sibling below, pale if in no slice.

    A borrowed core has a corner in the borrower's colour, with its tag.
    """
    owners, use, size = view.owners(core), view.use(core), scale.size
    names = " + ".join(f"{tag(index)} ({view.workers[index].name})" for index in owners) or WORDS[use]
    title = f"core {core.number}, CPUs {format_cpulist(core.cpus)}: {names}"
    title += f", core type {core.kind}" if core.kind else ""
    guest = view.borrower(core)
    title += "" if guest is None else f"; {_guest_name(view, guest)} computes here now"
    radius = size * (0.42 if core.kind else 0.12)
    column, strip, band = size / len(core.cpus), size * 0.36, scale.room(core) / max(1, len(owners))
    text = _tile_text(view, core, x, y, scale)
    shapes = [
        f'<rect {_at(x, y + n * band, size, size - n * band)} fill="{fill_of(index)}"/>'
        for n, index in enumerate(owners)
    ]
    if not owners:
        shapes.append(f'<rect class="{use}" {_at(x + 0.5, y + 0.5, size - 1, size - 1)} rx="{radius:.1f}"/>')
    if guest is not None:
        shapes.append(_corner(guest, x, y, size))
    for n, cpu in enumerate(core.cpus):
        left = x + n * column
        if owners and not view.in_slice(cpu):
            shapes.append(f'<rect class="resting" {_at(left, y + size - strip, column - 1.5, strip - 1.5)} rx="2"/>')
        ground = "load bare" if not view.in_slice(cpu) else "load"
        place = _at(left + 1, y + size * 0.92, column - 2, size * 0.07)
        shapes.append(f'<rect class="{ground}" data-cpu="{cpu}" {place}/>')
    who = " ".join(tag(index) for index in owners)
    return (
        f'<g class="cell" data-tags="{who}"{_guest_tag(guest)}><title>{escape(title)}</title>'
        f'<g style="clip-path:inset(0 round {radius:.1f}px)">{"".join(shapes)}</g>{text}</g>'
    )


def _corner(guest: int | Use, x: float, y: float, size: float) -> str:
    """Draw the upper right half of a tile of ``size`` in the colour of whoever computes there without owning it."""

    def half(start: float) -> str:
        right = x + size
        return f'points="{x + start:.1f},{y:.1f} {right:.1f},{y:.1f} {right:.1f},{y + size - start:.1f}"'

    fill = f'class="{guest}"' if isinstance(guest, Use) else f'fill="{fill_of(guest)}"'
    return f'<polygon class="gap" {half(0.2 * size - 2)}/><polygon {fill} {half(0.2 * size)}/>'


def _guest_name(view: View, guest: int | Use) -> str:
    return "another server's worker" if isinstance(guest, Use) else f"{tag(guest)} ({view.workers[guest].name})"


def _guest_tag(guest: int | Use | None) -> str:
    return "" if guest is None or isinstance(guest, Use) else f' data-guest="{tag(guest)}"'


def _at(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'


def text_at(words: str, x: float, y: float, size: float, style: str = "") -> str:
    return f'<text {style} x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}">{escape(words)}</text>'


def _tile_text(view: View, core: Core, x: float, y: float, scale: _Scale) -> str:
    """Write the owners' tags, and the CPU numbers below them where they can be read."""
    owners, size, guest = view.owners(core), scale.size, view.borrower(core)
    marks = [(tag(index), f'style="fill:{colour(index)[1]}"') for index in owners]
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
            mark, ink = tag(guest), f'style="fill:{colour(guest)[1]}"'
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


def _head(view: View) -> _Box:
    def draw(x: float, y: float) -> str:
        title = text_at(view.title, x, y + 16, 17, 'font-weight="650"')
        return title + text_at(view.summary(), x, y + 36, 13, 'class="label"')

    return _Box(len(view.summary()) * 7, 40, draw)


def _key(view: View) -> _Box:
    """Explain the marks that occur."""
    seen = {view.use(core) for core in view.topology.cores}
    words = [(use.value, WORDS[use]) for use in Use if use in seen and use is not Use.OWNED]
    if any(view.owners(core) and not view.in_slice(cpu) for core in view.topology.cores for cpu in core.cpus):
        words.append(("resting", "SMT sibling kept free"))
    if any(core.kind for core in view.topology.cores):
        words.append(("round", "slower core type"))
    if any(view.borrower(core) is not None for core in view.topology.cores):
        words.append(("guest", "borrowed: the corner's worker computes here now"))

    def draw(x: float, y: float) -> str:
        drawn = []
        for name, word in words:
            if name == "resting":
                drawn.append(f'<rect {_at(x, y, 16, 16)} rx="2" fill="{PALETTE[0][0]}"/>')
            if name == "guest":
                drawn.append(f'<rect {_at(x, y, 16, 16)} rx="2" fill="{PALETTE[0][0]}"/>')
                drawn.append(f'<polygon fill="{PALETTE[1][0]}" points="{x + 3},{y} {x + 16},{y} {x + 16},{y + 13}"/>')
            else:
                shape, radius = ("idle", 7) if name == "round" else (name, 2)
                drawn.append(f'<rect class="{shape}" {_at(x + 0.5, y + 0.5, 15, 15)} rx="{radius}"/>')
            drawn.append(text_at(word, x + 22, y + 12.5, 12, 'class="label"'))
            x += 42 + len(word) * 6.4
        return "".join(drawn)

    return _Box(sum(42 + len(word) * 6.4 for _, word in words), 16 if words else 0, draw)


def _legend(view: View) -> _Box:
    """List the workers with their tags, in as many columns as fit."""
    lines = [_describe(worker) for worker in view.workers] + [f"pid {pid} unbound: {why}" for pid, why in view.unbound]
    width = max((len(line) for line in lines), default=0) * 6.7 + 44
    columns = max(1, min(ceil(len(lines) / 8), int(WIDTH // width)))
    rows = ceil(len(lines) / columns)

    def draw(x: float, y: float) -> str:
        drawn = []
        for n, line in enumerate(lines):
            left, top = x + n // rows * width, y + n % rows * 24
            if n < len(view.workers):
                label = text_at(tag(n), left + 14, top + 14, 12, f'font-weight="650" style="fill:{colour(n)[1]}"')
                drawn.append(f'<g class="cell"><rect {_at(left, top, 28, 19)} rx="4" fill="{fill_of(n)}"/>{label}</g>')
            drawn.append(text_at(line, left + 36, top + 14, 12.5))
        return "".join(drawn)

    return _Box(width * columns, rows * 24, draw)


def _describe(worker: Worker) -> str:
    piece = worker.slice
    who = [worker.name] + ([f"worker {worker.worker_id} · pid {worker.pid}"] if worker.pid is not None else [])
    cpus = f"{'CPU' if len(piece.cpus) == 1 else 'CPUs'} {short_cpulist(piece.cpus)}"
    where = cpus if piece.pinned else f"anywhere in {cpus}"
    nodes = f"NUMA {format_cpulist(piece.numa_nodes)}" if piece.numa_nodes else ""
    return " · ".join(word for word in (*who, count(piece.threads, "thread"), where, nodes) if word)
