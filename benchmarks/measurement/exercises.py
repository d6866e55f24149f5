"""The tutorial's two single-process exercises: SMT siblings against whole cores, one NUMA node against unbound.

Source: "Grokking PyTorch Intel CPU performance from first principles", the PyTorch tutorials. Where the machine has
no SMT or a single node there is nothing to compare: the exercise says so and no number is made up.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ts_plugin.machine.topology import Core
from ts_plugin.trial.bare import Bare, Binding

__all__ = ["Exercise", "exercises", "run"]


@dataclass(frozen=True, slots=True)
class Exercise:
    """Two bindings of one process; ``missing`` says why there are none on this machine."""

    title: str
    bindings: tuple[tuple[str, Binding], ...] = ()
    missing: str | None = None


def exercises(cores: Sequence[Core]) -> Iterator[Exercise]:
    """Yield both exercises for the allowed cores of this machine."""
    title = "SMT siblings against whole cores"
    node = min(core.node for core in cores)
    local = [core for core in cores if core.node == node]
    if any(len(core.cpus) > 1 for core in local):
        everything = tuple(cpu for core in local for cpu in core.cpus)
        whole = tuple(core.number for core in local)
        yield Exercise(
            title,
            (
                (f"every CPU of node {node}: {len(everything)} threads on {len(local)} cores", _bind(everything)),
                (f"one CPU per core of node {node}: {len(whole)} threads on {len(local)} cores", _bind(whole)),
            ),
        )
    else:
        yield Exercise(title, missing=f"this machine has no SMT: each of its {len(cores)} allowed cores is one CPU")

    title = "one NUMA node against unbound"
    nodes = sorted({core.node for core in cores})
    if len(nodes) > 1:
        whole = tuple(core.number for core in local)
        yield Exercise(
            title,
            (
                (f"unbound: {len(whole)} threads, anywhere on nodes {nodes}", Binding(None, len(whole))),
                (f"bound to node {node}: {len(whole)} threads", _bind(whole)),
            ),
        )
    else:
        yield Exercise(
            title, missing=f"this machine has one NUMA node: all of its {len(cores)} allowed cores are local"
        )


def run(exercise: Exercise, archive: Path, body: bytes, *, repetitions: int, seconds: float) -> dict[str, Any]:
    """Measure the exercise, the order turned round in every repetition, and return what results.json says of it."""
    if exercise.missing:
        return {"title": exercise.title, "missing": exercise.missing}
    found: dict[str, list[float]] = {name: [] for name, _ in exercise.bindings}
    for repetition in range(repetitions):
        for name, binding in exercise.bindings[:: 1 if repetition % 2 == 0 else -1]:
            with Bare(archive, body, [binding]) as bare:
                bare.work(min(seconds, 2))  # warm-up
                found[name].append(1000 * statistics.median(bare.work(seconds)))
    return {"title": exercise.title, "model": archive.stem, "median_ms_per_request": found}


def _bind(cpus: tuple[int, ...]) -> Binding:
    return Binding(cpus, len(cpus))
