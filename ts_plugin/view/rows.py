"""The list of workers under a core map, and its notes: the words that every drawing of it shows."""

from __future__ import annotations

from dataclasses import dataclass

from ts_plugin.machine.cpulist import short_cpulist
from ts_plugin.machine.words import count
from ts_plugin.view.view import View

LONGEST = 48  # characters of a list of CPUs, where it may be shortened


@dataclass(frozen=True, slots=True)
class Row:
    """One line: a worker, or all workers of a model (``members``, positions in ``View.workers``).

    ``worker`` is its id, or for example ``200 workers``. ``now`` are the CPUs that they compute on: ``0-3 + 4-7
    borrowed``, ``idle``, or empty where that is not known. CPUs are as `short_cpulist` writes them, ``cpus`` of many
    workers `shortened`.
    """

    tag: str
    members: tuple[int, ...]
    model: str
    version: str
    worker: str
    pid: str
    cpus: str
    pinned: bool
    threads: str
    numa_nodes: str
    l3_domains: str
    moves: str
    now: str


def rows(view: View) -> tuple[Row, ...]:
    """Return a row for each worker, or for each model where there are more than `view.LISTED` workers."""
    return tuple(row(view, members) for members in view.listed())


def row(view: View, members: tuple[int, ...]) -> Row:
    """Return the row of these workers, which are of one model."""
    workers = [view.workers[index] for index in members]
    first, alone, slices = workers[0], len(workers) == 1, [worker.slice for worker in workers]
    threads = sorted({piece.threads for piece in slices})
    cpus = short_cpulist(cpu for piece in slices for cpu in piece.cpus)
    now = [both for index in members if (both := view.computes_on(index)) is not None]
    own, borrowed = (short_cpulist(cpu for both in now for cpu in both[which]) for which in (0, 1))
    return Row(
        view.tag(members[0]),
        members,
        first.model,
        first.version,
        first.worker_id if alone else count(len(workers), "worker"),
        str(first.pid) if alone and first.pid is not None else "",
        cpus if alone else shortened(cpus),
        all(piece.pinned for piece in slices),
        "-".join(map(str, dict.fromkeys((threads[0], threads[-1])))),
        short_cpulist(node for piece in slices for node in piece.numa_nodes),
        short_cpulist(domain for piece in slices for domain in piece.l3_domains),
        str(sum(worker.moves for worker in workers) or ""),
        (f"{own} + {borrowed} borrowed" if borrowed else own or "idle") if now else "",
    )


def shortened(cpus: str) -> str:
    """Return a long list of CPUs without its middle: ``0-1,4-5,...,508-509``."""
    if len(cpus) <= LONGEST:
        return cpus
    return f"{cpus[: LONGEST - 10].rpartition(',')[0]},...,{cpus.rpartition(',')[2]}"


def all_notes(view: View) -> tuple[tuple[str, str], ...]:
    """Return every note once, after the tags of the workers that it is about: ``""`` where it is about none."""
    about: dict[str, dict[str, None]] = {}
    for index, worker in enumerate(view.workers):
        for note in worker.notes:
            about.setdefault(note, {})[view.tag(index)] = None
    return (*(("", note) for note in view.notes), *((", ".join(tags), note) for note, tags in about.items()))
