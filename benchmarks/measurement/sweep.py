"""An exhaustive sweep of the real server: all workers x cores x batches; what `ts-cores tune` must come close to.

``python -m benchmarks.measurement.sweep ARCHIVE --body FILE [--tuned JSON]``, where JSON is what ``ts-cores tune
--json`` printed: then the last line says how far its choice is from the best.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path

from ts_plugin.trial.archive import read_archive
from ts_plugin.trial.torchserve import TorchServe
from ts_plugin.tune.command import candidates
from ts_plugin.tune.confirm import Candidate, Model, clients_of, full_load, ours, start, warm_up
from ts_plugin.tune.measure import Body, thread_counts
from ts_plugin.tune.profile import Choice, Profile, Target
from ts_plugin.tune.room import Room, find_room

SECONDS = 5.0  # of full load, of which the first 1.5 do not count
DELAY = 10  # ms that a batch waits for others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--body", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--tuned", type=Path)
    options = parser.parse_args()
    room = find_room(anyway=True)
    models = [Model(read_archive(options.archive), Body(options.body.read_bytes()), Target())]
    tuned = _tuned(options.tuned)
    servers = list(everything(room, options.batches))
    if tuned is not None and all(one.choices != (tuned,) for one in servers):
        servers.append(_candidate(tuned))
    found = sweep(models, servers, options.repetitions)
    for title, values in sorted(found.items(), key=lambda item: -statistics.median(item[1])):
        print(f"{statistics.median(values):8.2f} requests/s  {title:34} {' '.join(f'{value:.2f}' for value in values)}")
    if tuned is not None:
        best = max(statistics.median(values) for values in found.values())
        part = statistics.median(found[str(tuned)]) / best
        print(f"tune's choice, {tuned}, has {part:.1%} of the best")


def everything(room: Room, batches: list[int]) -> list[Candidate]:
    """Return all divisions of the cores with all batches, and TorchServe's default."""
    nothing = Profile("", room.cores, room.node_cores, 0, 0, 0, True, ())
    (default,) = candidates([], [nothing], room, None)
    return [
        _candidate(Choice(workers, threads, batch, DELAY, 1.0, 1.0, 1.0, 0))
        for threads in thread_counts(room.node_cores)
        for workers in range(1, room.instances(threads) + 1)
        for batch in batches
    ] + [default]


def sweep(models: list[Model], servers: list[Candidate], repetitions: int) -> dict[str, list[float]]:
    """Return requests/s of every repetition by title; all servers stand side by side."""
    clients = clients_of(models, servers)
    with contextlib.ExitStack() as stack:
        running: dict[str, TorchServe] = {}
        for one in servers:
            running[one.title] = stack.enter_context(start(models, one, stack))
            warm_up(models, running[one.title], clients)
            print(f"{one.title} stands", file=sys.stderr)
        found: dict[str, list[float]] = {title: [] for title in running}
        for number in range(repetitions):
            for title in list(running)[:: -1 if number % 2 else 1]:
                (value,), failed = full_load(models, running[title], clients, SECONDS)
                found[title].append(value)
                if failed:
                    print(f"{title}: {failed} requests failed", file=sys.stderr)
        return found


def _candidate(choice: Choice) -> Candidate:
    return Candidate(str(choice), (choice,), ours(), 0)


def _tuned(path: Path | None) -> Choice | None:
    """Return the choice with the sweep's own delay: it is compared by workers, cores and batch."""
    if path is None:
        return None
    chosen = json.loads(path.read_text())["models"][0]["choice"]
    return Choice(chosen["workers"], chosen["threads"], chosen["batch"], DELAY, 1.0, 1.0, 1.0, 0)


if __name__ == "__main__":
    main()
