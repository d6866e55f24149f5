"""The core map drawn for a terminal with rich: `ts-cores show` and `ts-cores plan`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import ceil

from rich.box import ROUNDED, SIMPLE
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.console import Group as Stack
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ts_plugin.machine.cpulist import short_cpulist
from ts_plugin.machine.topology import Core
from ts_plugin.machine.words import count
from ts_plugin.view.rows import all_notes, rows
from ts_plugin.view.tiles import colour
from ts_plugin.view.view import WORDS, Group, Use, View

BARS = " ▁▂▃▄▅▆▇█"
STYLES = {
    Use.SHARED: ("~", "black on #a9cde5"),
    Use.ELSEWHERE: ("…", "black on #b9c1ca"),
    Use.IDLE: ("·", "dim"),
    Use.RESERVED: ("R", "white on #5a6675"),
    Use.BARRED: ("x", "dim strike"),
}
WIDEST = 160  # columns that the map takes at most, and every line that is piped
DETAILED = 64  # cores up to which every tile carries its CPU numbers


def make_console() -> Console:
    """Return stdout, as wide as COLUMNS or the terminal say; piped, lines end at WIDEST."""
    if sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return Console(highlight=False)  # follows a terminal that is resized
    return Console(highlight=False, width=shutil.get_terminal_size((WIDEST, 24)).columns)  # COLUMNS=0 says nothing


def tell(*shown: RenderableType) -> None:
    """Print on stdout, without the blanks that fill up the lines of a table, unless it is a terminal."""
    console = make_console()
    with console.capture() as captured:
        for drawn in shown:
            console.print(drawn)
    text = captured.get()
    if not console.is_terminal:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    sys.stdout.write(text)


def utilisation(before: Mapping[int, tuple[int, int]], after: Mapping[int, tuple[int, int]]) -> dict[int, float]:
    """Return the busy share (0 to 1) of every CPU between two readings of `machine.cpu_time.ticks`."""
    return {
        cpu: (busy - before[cpu][0]) / (total - before[cpu][1])
        for cpu, (busy, total) in after.items()
        if cpu in before and total > before[cpu][1]
    }


class Map:
    """The picture as something that rich prints; ``load`` adds a bar per CPU (busy share, 0 to 1).

    What is wrong stands above the map, notes between the map and the workers, which may be many.
    """

    def __init__(self, view: View, load: Mapping[int, float] | None = None) -> None:
        self._view = view
        self._load = load
        self._detailed = len(view.topology.cores) <= DETAILED
        self._digits = len(str(max(view.topology.online, default=0)))
        self._rows = rows(view)
        letters = max((len(row.tag) for row in self._rows), default=1)
        self._mark = letters + any(len(view.owners(core)) > 1 for core in view.topology.cores)
        self._guest = letters + 1 if view.users is not None else 0  # columns for "←B", whether there is one or not

        self._labels: dict[str, int] = {}
        for package in view.packages():
            for group in (*package.groups, *(part for node in package.groups for part in node.groups)):
                kind = group.label.split()[0]
                self._labels[kind] = max(len(group.label), self._labels.get(kind, 0))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self._view.title, "bold"), "  ", (self._view.summary(), "dim"))
        for pid, reason in self._view.unbound:
            yield Text.assemble(("unbound ", "bold red"), f"pid {pid}: {reason}")
        for package in self._view.packages():
            yield Panel(
                self._group(package, min(options.max_width, WIDEST) - 6),
                title=package.label,
                title_align="left",
                box=ROUNDED,
                expand=False,
            )
        yield from self._key(console)
        for tags, note in all_notes(self._view):
            yield Text.assemble((f"note on {tags} " if tags else "note ", "bold"), note)
        if self._rows:
            yield self._workers()
        if self._view.summed_up:
            words = "a line per model, in the map large and small letters in turn; --all lists each"
            yield Text(f"{count(len(self._view.workers), 'worker')}: {words}", "dim")
        if self._view.ledger:
            yield Text(f"ledger {self._view.ledger}", "dim")

    def _group(self, group: Group, width: int) -> RenderableType:
        if not group.groups:
            return self._tiles(group.cores, width)
        table = Table.grid(padding=(0, 2))
        for part in group.groups:
            label = part.label.ljust(self._labels[part.label.split()[0]])
            table.add_row(Text(label, "dim"), self._group(part, width - len(label) - 4))
        return table

    def _tiles(self, cores: Sequence[Core], width: int) -> Text:
        """Draw the cores in rows of equal length that fit into ``width`` columns; no tile is ever broken."""
        tiles = [self._tile(core) for core in cores]
        gap = " " if self._detailed else ""
        width -= 0 if self._detailed else 30
        fitting = max(1, width // (max(len(tile) for tile in tiles) + len(gap)))
        per_row = ceil(len(tiles) / ceil(len(tiles) / fitting))
        rows = [Text(gap).join(tiles[start : start + per_row]) for start in range(0, len(tiles), per_row)]
        if not self._detailed:
            for number, row in enumerate(rows):
                part = cores[number * per_row : (number + 1) * per_row]
                row.append(f"  {short_cpulist(cpu for core in part for cpu in core.cpus)}", "dim")
        return Text("\n").join(rows)

    def _tile(self, core: Core) -> Text:
        owners = self._view.owners(core)
        mark, style = self._tagged(owners[0]) if owners else STYLES[self._view.use(core)]
        mark += "+" * (len(owners) > 1)
        tile = Text(style=style, no_wrap=True)
        if not self._detailed:
            busiest = max((self._load or {}).get(cpu, 0.0) for cpu in core.cpus)
            tile.append(mark.center(self._mark), self._borrower(core)[1])
            return tile.append(_bar(busiest) if self._load is not None else "")
        tile.append(f" {mark.ljust(self._mark)}")
        if self._guest:
            who, ground = self._borrower(core)
            tile.append(who.ljust(self._guest), ground)
        for cpu in core.cpus:
            resting = bool(owners) and not self._view.in_slice(cpu)
            tile.append(" " + str(cpu).rjust(self._digits), "dim" if resting else None)
            if self._load is not None:
                tile.append(_bar(self._load.get(cpu, 0.0)))
        return tile.append(" ")

    def _borrower(self, core: Core) -> tuple[str, str | None]:
        """Return the mark of the worker that computes on a core without owning it, and its style."""
        guest = self._view.borrower(core)
        if guest is None:
            return "", None
        mark, style = STYLES[guest] if isinstance(guest, Use) else self._tagged(guest)
        return f"←{mark}", style

    def _tagged(self, index: int) -> tuple[str, str]:
        """Return the tag of a worker and its style; every other one of a row is written small."""
        row, member = self._view.rank(index)
        fill, ink = colour(row)
        mark = self._view.tag(index)
        return mark.lower() if member % 2 else mark, f"{ink} on {fill}"

    def _key(self, console: Console) -> Iterable[Text]:
        """Explain the marks that occur, those by colour or brightness only where there is any."""
        seen = {self._view.use(core) for core in self._view.topology.cores}
        key = Text()
        for use in Use:
            if use in seen and use is not Use.OWNED:
                mark, style = STYLES[use]
                key.append(f" {mark} ", style).append(f" {WORDS[use]}   ", "dim")
        styled = console.color_system is not None
        if self._detailed and styled and self._view.resting():
            key.append("dim number", "dim").append(" SMT sibling kept free   ", "dim")
        if (self._detailed or (styled and not console.no_color)) and self._view.borrowed():
            words = "B computes on A's core" if self._detailed else "the colour shows who computes there"
            key.append(" A←B " if self._detailed else " A ", "reverse").append(f" borrowed: {words} now", "dim")
        if key:
            yield key

    def _workers(self) -> Table:
        """List the workers; a column that would be empty is left out."""
        columns = {
            "model": [f"{row.model} {row.version}".strip() for row in self._rows],
            "worker": [row.worker for row in self._rows],
            "pid": [row.pid for row in self._rows],
            "CPUs": [row.cpus + ("" if row.pinned else " (not pinned)") for row in self._rows],
            "threads": [row.threads for row in self._rows],
            "NUMA": [row.numa_nodes for row in self._rows],
            "L3": [row.l3_domains for row in self._rows],
            "moves": [row.moves for row in self._rows],
            "now on": [row.now for row in self._rows],
        }
        shown = {head: cells for head, cells in columns.items() if any(cells) or head in ("NUMA", "L3")}
        table = Table(box=SIMPLE, pad_edge=False, header_style="dim")
        for head in ("", *shown):
            right = head in ("pid", "threads", "moves")
            table.add_column(head, justify="right" if right else "left", overflow="fold")
        for row, *cells in zip(self._rows, *shown.values(), strict=True):
            mark, style = self._tagged(row.members[0])
            table.add_row(Text(f" {mark} ", style), *cells)
        return table


def reasons_table(who: str, reasons: Sequence[tuple[str, str]]) -> RenderableType:
    """Draw what `explain` found: a heading stands once, before the first of its sentences."""
    table = Table.grid(padding=(0, 2))
    before = ""
    for about, text in reasons:
        table.add_row(Text(f"  {'' if about == before else about}", "dim"), text)
        before = about
    return Stack(Text(who, "bold"), table)


def _bar(share: float) -> str:
    return BARS[min(len(BARS) - 1, round(share * (len(BARS) - 1)))]
