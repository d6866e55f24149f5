"""Scaling 1 -> 2 -> 1 workers under an open loop: what fails, and the longest time without an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measurement.measure import Setting
from ts_plugin.trial.load import Answer, OpenLoop
from ts_plugin.trial.torchserve import RequestError, TorchServe, TorchServeError

__all__ = ["Scaling", "longest_gap", "scale", "table"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """One configuration's exercise; every time in seconds since the load began.

    ``up_at`` and ``down_at``: when the number of workers was changed; ``up_ready`` and ``down_ready``: when all wanted
    workers were READY for good. ``answers`` are (due, latency, good).
    """

    config: str
    rate: float
    up_at: float
    up_ready: float
    down_at: float
    down_ready: float
    ended: float
    answers: tuple[tuple[float, float, bool], ...]

    @property
    def failed(self) -> int:
        return sum(not good for _, _, good in self.answers)

    def gap(self, begin: float, end: float) -> float:
        return longest_gap([due + latency for due, latency, good in self.answers if good], begin, end)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "requests": len(self.answers),
            "failed": self.failed,
            "gap_before_s": self.gap(1.0, self.up_at),
            "gap_up_s": self.gap(self.up_at, self.down_at),
            "gap_down_s": self.gap(self.down_at, self.ended),
        }


def longest_gap(answered: Sequence[float], begin: float, end: float) -> float:
    """Return the longest time between ``begin`` and ``end`` in which no answer came, the edges included."""
    inside = [begin, *sorted(moment for moment in answered if begin < moment < end), end]
    return max(right - left for left, right in pairwise(inside))


def scale(archive: Path, body: bytes, config: str, given: Setting, *, rate: float, hold: float) -> Scaling:
    """Run the exercise; at least ``hold`` seconds follow each change, longer if the workers need longer.

    Raises:
        TorchServeError: the server did not start, or the workers were not READY within its timeout.
    """
    name = archive.stem
    with TorchServe(archive, workers=1, properties=given.properties, environment=given.environment) as server:
        for _ in range(4):  # warm-up
            server.predict(name, body)
        with OpenLoop(server.prediction_url(name), body, rate=rate) as loop:
            time.sleep(hold / 2)
            up_at, up_ready = _change(server, name, 2, loop.began, hold)
            down_at, down_ready = _change(server, name, 1, loop.began, hold)
            ended = time.monotonic() - loop.began
            answers = loop.stop()
    return Scaling(config, rate, up_at, up_ready, down_at, down_ready, ended, tuple(_plain(answers)))


def _change(server: TorchServe, name: str, workers: int, began: float, hold: float) -> tuple[float, float]:
    """Set the number of workers and return when that was asked and since when all have been READY.

    TorchServe's launcher restarts every worker some time after READY was said: only the last change counts.
    """
    asked = time.monotonic()
    server.scale(name, workers, workers, wait=False)
    ready: float | None = None
    while True:
        now = time.monotonic()
        ready = (ready or now) if _all_ready(server, name, workers) else None
        if ready is not None and now > asked + hold and now > ready + hold / 4:
            return asked - began, ready - began
        if now > asked + server.timeout:
            raise TorchServeError(f"{name}: not {workers} READY workers within {server.timeout:g} s")
        time.sleep(0.1)


def _all_ready(server: TorchServe, name: str, workers: int) -> bool:
    try:
        states = [worker["status"] for worker in server.describe(name)["workers"]]
    except RequestError:
        return False
    return len(states) == workers and all(state == "READY" for state in states)


def _plain(answers: Sequence[Answer]) -> list[tuple[float, float, bool]]:
    return [(round(answer.due, 4), round(answer.latency, 4), answer.good) for answer in answers]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the exercises as a Markdown table."""
    columns = ["configuration", "requests", "failed", "longest gap before / 1→2 / 2→1 s", "READY after 1→2 s"]
    lines = [f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"]
    for one in found:
        if "error" in one:
            lines.append(f"| {one['config']} | could not run: {one['error'].splitlines()[0]} | | | |\n")
            continue
        gaps = " / ".join(f"{one[gap]:.1f}" for gap in ("gap_before_s", "gap_up_s", "gap_down_s"))
        ready = one["up_ready"] - one["up_at"]
        lines.append(f"| {one['config']} | {one['requests']} | {one['failed']} | {gaps} | {ready:.1f} |\n")
    return "".join(lines)
