"""From what was measured to what is read: CSV, Markdown, PNGs and one self-contained HTML page.

``python -m benchmarks.measurement.report DIR`` makes them anew from DIR/results.json and DIR/traces.json.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.measurement import load_picture, machine, pictures, scaling
from benchmarks.measurement.points import Sample, points_table, promises_table
from benchmarks.measurement.results import Row, markdown, to_csv

__all__ = ["main", "write"]

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1060px;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1,h2{line-height:1.2}img{max-width:100%;height:auto}figure{margin:1.5rem 0}figcaption{color:#5a6675}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .6rem;border-bottom:1px solid #d4d8dd;text-align:left;white-space:nowrap}
.note{color:#5a6675}code{background:#f4f5f7;padding:.1em .3em}
"""


def write(out: Path) -> list[Path]:
    """Write results.csv, results.md, the PNGs and report.html beside ``out``/results.json and return the files."""
    found = json.loads((out / "results.json").read_text())
    traces_file = out / "traces.json"
    traces = json.loads(traces_file.read_text()) if traces_file.exists() else []
    rows = [Row.from_json(flat) for flat in found["rows"]]
    (out / "results.csv").write_text(to_csv(rows))
    text = _markdown(found, rows)
    (out / "results.md").write_text(text)
    # The loads of --must-show are chosen for ratios: not every configuration gets each.
    made = load_picture.draw(out, [] if found.get("must_show") else _samples(found))
    made |= pictures.draw(out, rows, traces, found.get("scaling", []))
    (out / "report.html").write_text(_html(found, rows, {out / name: caption for name, caption in made.items()}))
    return [out / name for name in ("results.json", "results.csv", "results.md", "report.html", *made)]


def _samples(found: dict[str, Any]) -> list[Sample]:
    return [Sample.from_json(flat) for flat in found.get("loads", [])]


def _load_tables(found: dict[str, Any]) -> str:
    """Return the Markdown tables of a run with --loads or --must-show; empty for any other."""
    samples = _samples(found)
    tables = [points_table(samples)] if samples else []
    if samples and found.get("must_show"):
        tables.insert(0, f"**What lending cores must reach**\n\n{promises_table(samples)[0]}")
    return "\n".join(tables)


def exercise_lines(found: dict[str, Any]) -> list[str]:
    """Return what the single-process exercises found, one sentence each."""
    lines = []
    for one in found.get("exercises", []):
        if "missing" in one or "error" in one:
            lines.append(f"{one['title']}: not here. {(one.get('missing') or one['error']).splitlines()[0]}.")
            continue
        for name, values in one["median_ms_per_request"].items():
            low, high = min(values), max(values)
            middle = statistics.median(values)
            lines.append(f"{one['title']}, {one['model']}: {name}: {middle:.1f} ms ({low:.1f}\N{EN DASH}{high:.1f})")
    return lines


def missing_lines(found: dict[str, Any]) -> list[str]:
    """Return which figures could not be had and why."""
    return [f"{name}: {reason}" for name, reason in found["machine"]["unavailable"].items()]


def _markdown(found: dict[str, Any], rows: Sequence[Row]) -> str:
    parts = [text for text in (_load_tables(found), markdown(rows)) if text]
    if found.get("interrupted"):
        parts.append("Interrupted: this is what had been measured until then.\n")
    if found.get("scaling"):
        parts.append(f"**Scaling 1 -> 2 -> 1 under load**\n\n{scaling.table(found['scaling'])}")
    bullets = [*exercise_lines(found), *missing_lines(found)]
    if bullets:
        parts.append("".join(f"- {line}\n" for line in bullets))
    parts.append(
        f"Median (lowest\N{EN DASH}highest) over the repetitions; ratios are within one repetition. "
        f"{machine.summary(found['machine'])}.\nMade by `{found['command']}`.\n"
    )
    return "\n".join(parts)


def _html(found: dict[str, Any], rows: Sequence[Row], shown: dict[Path, str]) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>TorchServe on this machine</title><style>{STYLE}</style>",
        "<h1>TorchServe on this machine, with and without ts-cores</h1>",
        f"<p>{escape(machine.summary(found['machine']))}</p>",
        f"<p>Made by <code>{escape(found['command'])}</code></p>",
    ]
    if found.get("interrupted"):
        parts.append("<p><strong>Interrupted: this is what had been measured until then.</strong></p>")
    parts.append(f"<h2>Figures</h2>{_tables(_load_tables(found))}{_tables(markdown(rows))}")
    parts.append(
        "<p class='note'>Median (lowest to highest) over the repetitions; ratios are within one repetition.</p>"
    )
    if found.get("scaling"):
        parts.append(f"<h2>Scaling under load</h2>{_tables(scaling.table(found['scaling']))}")
    if lines := exercise_lines(found):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<h2>The tutorial's single-process exercises</h2><ul>{items}</ul>{_topology(found['machine'])}")
    parts.append("<h2>Pictures</h2>")
    for file, caption in shown.items():
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(
            f"<figure><img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    if lines := missing_lines(found):
        parts.append(f"<h2>Not available here</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")
    parts.append(
        f"<h2>All rows</h2><details><summary>{len(rows)} rows</summary><div class='wide'><pre>"
        f"{escape(to_csv(rows))}</pre></div></details></html>"
    )
    return "\n".join(parts)


def _topology(described: dict[str, Any]) -> str:
    names = ("cpus", "package", "numa_node", "l3_domain")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(core[name]))}</td>" for name in names) + "</tr>"
        for core in described["topology"]
    )
    return (
        f"<details><summary>The machine's {len(described['topology'])} cores</summary>"
        f"<table><tr>{head}</tr>{body}</table></details>"
    )


def _tables(text: str) -> str:
    """Return the HTML of Markdown that consists of pipe tables and bold lines, as results.py writes it."""
    parts = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line]
        if not lines or not lines[0].startswith("|"):
            parts += [f"<h3>{escape(line.strip('*'))}</h3>" for line in lines]
            continue
        cut = [[field.strip() for field in line.strip("|").split("|")] for line in lines]
        head = "".join(f"<th>{escape(field)}</th>" for field in cut[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(field)}</td>" for field in line) + "</tr>" for line in cut[2:])
        parts.append(f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>")
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measurement.report", description=write.__doc__)
    parser.add_argument("directory", type=Path, help="a directory that `./dev bench --out` wrote")
    for file in write(parser.parse_args().directory):
        print(file)


if __name__ == "__main__":
    main()
