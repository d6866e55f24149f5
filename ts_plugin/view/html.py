"""The core map as one live HTML page for browsers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from html import escape
from importlib import resources

from ts_plugin.machine.cpulist import short_cpulist
from ts_plugin.view.svg import colour, fill_of, svg, text_at
from ts_plugin.view.view import View, tag

__all__ = ["html"]


Ticks = Mapping[int, tuple[int, int]]


def html(view: View, *, ticks: Ticks | None = None, before: Ticks | None = None, reload: float | None = None) -> str:
    """Return the picture as one page without external assets.

    Served by a TorchServe server it keeps itself up to date and asks for the token when the server wants one.
    ``ticks`` are each CPU's (busy, total) clock ticks since boot, ``before`` those of an earlier look: from the two the
    page draws utilisation; where it keeps itself up to date it has the earlier ones itself. ``reload`` makes a page
    that is read from a file load itself again every so many seconds.
    """
    template = resources.files("ts_plugin.view").joinpath("page.html").read_text(encoding="utf-8")
    fields = {
        "title": escape(view.title),
        "summary": escape(view.summary()),
        "place": escape(_place(view)),
        "map": svg(view, legend=False),
        "rows": "".join(_row(view, index) for index in range(len(view.workers))),
        "unbound": "".join(f"<li><b>pid {pid}</b> {escape(why)}</li>" for pid, why in view.unbound),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in view.notes),
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


def _row(view: View, index: int) -> str:
    worker = view.workers[index]
    piece, (_, ink) = worker.slice, colour(index)
    label = text_at(tag(index), 16, 15.5, 13, f'text-anchor="middle" font-weight="650" style="fill:{ink}"')
    swatch = (
        '<svg class="swatch ts-cores" viewBox="0 0 32 22" aria-hidden="true">'
        f'<rect width="32" height="22" rx="5" fill="{fill_of(index)}"/>{label}</svg>'
    )
    pinned = "" if piece.pinned else " <small>not pinned</small>"
    cells = (
        swatch,
        f"<b>{escape(worker.model or worker.name)}</b> <small>{escape(worker.version)}</small>",
        escape(worker.worker_id),
        "" if worker.pid is None else str(worker.pid),
        f"{short_cpulist(piece.cpus).replace(',', ',<wbr>')}{pinned}",
        str(piece.threads),
        short_cpulist(piece.numa_nodes),
        short_cpulist(piece.l3_domains),
        str(worker.moves or ""),
        _now(view, index),
        "<br>".join(escape(note) for note in worker.notes),
    )
    return f'<tr tabindex="0" data-tag="{tag(index)}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _now(view: View, index: int) -> str:
    """Return what a worker computes on now, borrowed CPUs behind a plus."""
    now = view.computes_on(index)
    if now is None:
        return ""
    own, borrowed = (short_cpulist(cpus).replace(",", ",<wbr>") for cpus in now)
    borrowed = f" <b>+ {borrowed}</b> <small>borrowed</small>" if borrowed else ""
    return f"{own}{borrowed}" or "<small>idle</small>"
