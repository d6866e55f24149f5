"""What happens inside a server under full load, for --pictures: CPUs over time, moves, remote memory, stalls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ts_plugin.compare import perf
from ts_plugin.compare.comparison import Comparison
from ts_plugin.machine import cpu_time, process
from ts_plugin.trial.spread import figure
from ts_plugin.view.tiles import text_at

SAMPLES, EVERY = 20, 0.25  # of every CPU and thread, and seconds between two
PROFILE = 3.0  # seconds of each of perf's two looks
SECONDS = SAMPLES * EVERY + 2 * PROFILE + 3.0  # that a server is under load for it
WIDTH, PAD, LEFT = 760, 16, 60
STYLE = """
.ts-inside{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.ts-inside .page{fill:#fff}.ts-inside text{fill:#1c2430}.ts-inside .label{fill:#5a6675}.ts-inside .idle{fill:#eef0f3}
@media(prefers-color-scheme:dark){.ts-inside .page{fill:#12161c}.ts-inside text{fill:#e6e9ed}
.ts-inside .label{fill:#9aa6b4}.ts-inside .idle{fill:#20262e}}
"""


def look(pids: Sequence[int], node_of: Mapping[int, int]) -> dict[str, Any]:
    """Return what the workers ``pids``, which are under load, do on CPUs of the nodes ``node_of``.

    ``busy``: CPU -> its share of every interval. ``moves``: between CPUs, of all threads, per second. ``remote``: the
    chance that memory lies on another node than the thread. ``core_bound`` and ``spinning``: shares of CPU time. None:
    this machine cannot tell, and ``missing`` has the reasons.
    """
    busy: dict[int, list[float]] = {cpu: [] for cpu in node_of}
    ran: Counter[int] = Counter()
    before, moved, began = cpu_time.ticks(), _moves(pids), time.monotonic()
    for _ in range(SAMPLES):
        time.sleep(EVERY)
        now = cpu_time.ticks()
        for cpu, shares in busy.items():
            worked, whole = (after - start for after, start in zip(now[cpu], before[cpu], strict=True))
            shares.append(round(worked / max(whole, 1), 2))
        before = now
        for pid in pids:
            for tid in process.threads(pid):
                place = process.last_cpu(pid, tid) if process.state(pid, tid) == "R" else None
                if place is not None and place in node_of:
                    ran[node_of[place]] += 1
    moves, seconds = _moves(pids), time.monotonic() - began
    found: dict[str, Any] = {
        "busy": {str(cpu): shares for cpu, shares in busy.items()},
        "moves": None if moved is None or moves is None else round((moves - moved) / seconds, 2),
        "remote": remote_share(sum((_pages(pid) for pid in pids), Counter()), ran),
        "missing": {},
    }
    for name, read in (("spinning", perf.spinning), ("core_bound", perf.core_bound)):
        try:
            found[name] = round(read(pids, seconds=PROFILE), 3)
        except perf.Unavailable as reason:
            found[name], found["missing"][name] = None, str(reason)
    return found


def remote_share(resident: Mapping[int, int], ran: Mapping[int, int]) -> float | None:
    """Return the chance that an access from where threads ran meets memory of another node; both by node, any unit."""
    memory, looks = sum(resident.values()), sum(ran.values())
    if not memory or not looks:
        return None
    return round(1 - sum(resident.get(node, 0) / memory * (each / looks) for node, each in ran.items()), 3)


def _moves(pids: Sequence[int]) -> int | None:
    found = [process.migrations(pid, tid) for pid in pids for tid in process.threads(pid)]
    counted = [number for number in found if number is not None]
    return sum(counted) if counted else None


def _pages(pid: int) -> Counter[int]:
    """Return NUMA node -> KiB; nothing on a kernel without NUMA."""
    found: Counter[int] = Counter()
    for node, pages, size in process.numa_pages(pid) or ():
        found[node] += pages * size
    return found


def drawn(found: Comparison) -> str:
    """Return an SVG document: for each way a row per CPU, dark where it was busy, and the other figures above it."""
    y, parts = float(PAD), []
    for way in found.ways:
        if (seen := found.inside.get(way)) is None:
            continue
        shares = {
            name: "not known here" if seen[key] is None else f"{100 * seen[key]:.0f} %"
            for name, key in (("remote memory", "remote"), ("core bound", "core_bound"), ("spinning", "spinning"))
        }
        moves = "not known here" if seen["moves"] is None else f"{figure(seen['moves'])}/s"
        words = ", ".join(f"{name} {value}" for name, value in {"moves between CPUs": moves, **shares}.items())
        parts += [text_at(way, PAD, y + 12, 14, 'font-weight="650"'), text_at(words, PAD, y + 30, 12, 'class="label"')]
        y += 40
        high = max(min(16.0, 320 / len(seen["busy"])), 2.0)
        for place, (cpu, values) in enumerate(seen["busy"].items()):
            wide = (WIDTH - LEFT - PAD) / len(values)
            if place % max(round(14 / high), 1) == 0:
                parts.append(text_at(f"CPU {cpu}", PAD, y + min(high, 12) - 1, 10, 'class="label"'))
            for step, share in enumerate(values):
                box = f'x="{LEFT + step * wide:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high - 0.5:.1f}"'
                parts.append(f'<rect class="idle" {box}/><rect fill="#0072B2" opacity="{share:.2f}" {box}/>')
            y += high
        parts.append(text_at(f"{SAMPLES * EVERY:g} seconds of full load", LEFT, y + 13, 10.5, 'class="label"'))
        y += 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ts-inside" role="img" viewBox="0 0 {WIDTH} {y:.0f}" '
        f'width="{WIDTH}" height="{y:.0f}"><title>Inside: {escape(", ".join(found.models))}</title>'
        f'<style>{STYLE}</style><rect class="page" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )
