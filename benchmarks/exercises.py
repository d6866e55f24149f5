"""The tutorial's two single-process exercises: SMT siblings against whole cores, one NUMA node against unbound.

Source: "Grokking PyTorch Intel CPU performance from first principles", the PyTorch tutorials. Where the machine has
no SMT or a single node there is nothing to compare: the exercise says so and no number is made up.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import archives
from ts_plugin.machine.discovery import read_allowance, read_topology
from ts_plugin.machine.topology import Core
from ts_plugin.trial.bare import Bare, Binding
from ts_plugin.trial.spread import spread_of

REPETITIONS = 3
WARM_UP, SECONDS = 2.0, 10.0


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


def run(exercise: Exercise, archive: Path, body: bytes) -> dict[str, list[float]]:
    """Return the median milliseconds of a request in each repetition; the order is turned round in every one."""
    found: dict[str, list[float]] = {name: [] for name, _ in exercise.bindings}
    for repetition in range(REPETITIONS):
        for name, binding in exercise.bindings[:: -1 if repetition % 2 else 1]:
            with Bare(archive, body, [binding]) as bare:
                bare.work(WARM_UP)
                found[name].append(1000 * statistics.median(bare.work(SECONDS)))
    return found


def main() -> None:
    topology, allowance = read_topology(), read_allowance()
    for exercise in exercises(topology.cores_of(allowance.cpus)):
        print(exercise.title)
        if exercise.missing:
            print(f"  {exercise.missing}")
            continue
        for name, medians in run(exercise, archives.resnet("resnet50"), archives.photograph()).items():
            spread = spread_of(medians)
            print(f"  {name}: {spread.text() if spread else 'nothing'} ms per request")


def _bind(cpus: tuple[int, ...]) -> Binding:
    return Binding(cpus, len(cpus))


if __name__ == "__main__":
    main()
