"""The core map as one live HTML page for browsers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from html import escape
from importlib import resources

from ts_plugin.view.rows import Row, all_notes, row, rows
from ts_plugin.view.svg import Frame, machine
from ts_plugin.view.tiles import STYLE, Scale, key, patterns, swatch, tile
from ts_plugin.view.view import Group, View

Ticks = Mapping[int, tuple[int, int]]


def html(view: View, *, ticks: Ticks | None = None, before: Ticks | None = None, reload: float | None = None) -> str:
    """Return the picture as one page without external assets.

    Served by a TorchServe server it keeps itself up to date and asks for the token when the server wants one.
    ``ticks`` are each CPU's (busy, total) clock ticks since boot, ``before`` those of an earlier look: from the two the
    page draws utilisation; where it keeps itself up to date it has the earlier ones itself. ``reload`` makes a page
    that is read from a file load itself again every so many seconds.
    """
    template = resources.files("ts_plugin.view").joinpath("page.html").read_text(encoding="utf-8")
    scale = Scale.of(view.topology.cores)
    fields = {
        "style": STYLE,
        "title": escape(view.title),
        "summary": escape(view.summary()),
        "place": escape(_place(view)),
        "patterns": patterns(view),
        "width": f"{machine(view, scale).width:.0f}",
        "map": "".join(_group(view, group, scale) for group in view.packages()),
        "key": "".join(f"<li>{_svg('key', 16, 16, mark)} {escape(words)}</li>" for mark, words in key(view)),
        "rows": "".join(_rows(view)),
        "unbound": "".join(f"<li><b>pid {pid}</b> {escape(why)}</li>" for pid, why in view.unbound),
        "notes": "".join(
            f"<li>{f'<b>{tags}</b> ' if tags else ''}{escape(note)}</li>" for tags, note in all_notes(view)
        ),
        "ticks": json.dumps(ticks or {}),
        "before": json.dumps(before or {}),
        "reload": json.dumps(reload),
    }
    return re.sub(r"{{(\w+)}}", lambda match: fields[match[1]], template)


def _place(view: View) -> str:
    """Return where and when this is: the host, the server if it is one's alone, and the time with its zone."""
    words = [view.host, "" if view.server_pid is None else f"server {view.server_pid}"]
    words += [datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")] if view.host else []
    return " · ".join(word for word in words if word)


def _group(view: View, group: Group, scale: Scale) -> str:
    """Draw a package, NUMA node or L3 domain as a box of the size that it has in `svg`; narrow pages break its rows."""
    frame = Frame.of(view, group, scale)
    tiles = (_svg("", scale.size, scale.size, tile(view, core, 0, 0, scale)) for core in group.cores)
    inside = "".join([*(_group(view, part, scale) for part in group.groups), *tiles])
    label = f"<h3>{escape(frame.label)}</h3>" if frame.label else ""
    cpus = f"<p>{'<br>'.join(frame.lines)}</p>" if frame.lines else ""
    return (
        f'<div class="box {group.kind}" style="width:{frame.width + 2 * frame.pad}px">{label}'
        f'<div class="{"boxes" if group.groups else "tiles"}">{inside}</div>{cpus}</div>'
    )


def _svg(name: str, width: int, height: int, drawn: str) -> str:
    return (
        f'<svg class="{name} ts-cores" width="{width}" height="{height}" viewBox="0 0 {width} {height}">{drawn}</svg>'
    )


def _rows(view: View) -> Iterator[str]:
    """Yield the table's rows; under that of a model with many workers those of its workers, which a click unfolds."""
    for number, one in enumerate(rows(view)):
        drawn = _svg("swatch", 28, 19, swatch(number))
        if not view.summed_up:
            yield _row(one, one.tag, drawn, escape(one.worker))
            continue
        yield _row(one, one.tag, drawn, f'<button aria-expanded="false">{escape(one.worker)}</button>')
        for place, index in enumerate(one.members):
            single = row(view, (index,))
            yield _row(single, f"{one.tag}.{place}", "", escape(single.worker), "hidden")


def _row(row: Row, tag: str, swatch: str, worker: str, state: str = "") -> str:
    cells = {
        "": swatch,
        "model": f"<b>{escape(row.model)}</b> <small>{escape(row.version)}</small>" if row.model else "",
        "worker": worker,
        "pid": row.pid,
        "CPUs": f"{_breakable(row.cpus)}{'' if row.pinned else ' <small>not pinned</small>'}",
        "threads": row.threads,
        "NUMA": row.numa_nodes,
        "L3": row.l3_domains,
        "moves": row.moves,
        "computes on": _breakable(row.now),
    }
    drawn = "".join(f'<td data-head="{head}">{cell}</td>' for head, cell in cells.items())
    return f'<tr tabindex="0" data-tag="{tag}" {state}>{drawn}</tr>'


def _breakable(cpus: str) -> str:
    return cpus.replace(",", ",<wbr>")
