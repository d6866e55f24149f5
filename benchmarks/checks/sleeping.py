"""Many slices on a small machine with the real server, beside what the simulation says of them.

``./dev sleeping`` serves a handler whose parallel regions sleep instead of computing (harness/models/sleeps.py), with 8
and 16 workers under ``--pin never``: their slices are numbers of threads, one each, whatever the machine has. One
server lends, one does not; both get the same Poisson arrivals at the same time, which costs the machine little more
than the frontends. The simulation gets the service times that were measured. Other programs delay the waking of a
thread: on a busy machine the 99th percentiles say little.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import mean, median

from benchmarks.checks.simulation import Model, run
from benchmarks.harness import PLUGINS, archives
from ts_plugin.trial.load import open_loop, percentile, poisson, take_turns
from ts_plugin.trial.properties import Property
from ts_plugin.trial.torchserve import TorchServe

LOADS = (0.1, 0.3, 0.5, 0.7, 0.9)
WARM_UP = 5  # seconds in which workers learn, all of them at once and again one at a time
LEAD_IN = 2.0  # seconds of every load that do not count


def measure(workers: int, requests: int, loads: Sequence[float]) -> int:
    """Print one row for each load; return how many requests failed."""
    failed = 0
    with contextlib.ExitStack() as stack:
        urls = []
        for lend in ("never", "auto"):
            properties: dict[str, Property | None] = {
                "cpu_launcher_enable": True,
                "cpu_launcher_args": f"--pin never --lend {lend}",
                "plugins_path": PLUGINS,
            }
            server = stack.enter_context(TorchServe(archives.sleeps(), workers=workers, properties=properties))
            urls.append(server.prediction_url("sleeps"))
        for url in urls:
            for clients in (workers, 1):
                take_turns(url, b"{}", clients=clients, seconds=WARM_UP)
        alone, wide = (median(one.latency for one in take_turns(url, b"{}", clients=1, seconds=10)) for url in urls)
        model = Model(alone, (wide / alone - 1 / workers) / (1 - 1 / workers), (1,) * workers, noise=0.01)
        print(f"\n{workers} slices; a request takes {1e3 * alone:.0f} ms alone, {1e3 * wide:.0f} ms on all of them.\n")
        print("| load | requests | alone: mean / p99 ms | lending: mean / p99 ms | mean / p99 | simulated |")
        print("|---|---|---|---|---|---|", flush=True)
        for load in loads:
            seconds = LEAD_IN + requests * alone / load / workers
            arrivals = poisson(load * workers / alone, seconds, seed=1)
            with ThreadPoolExecutor() as pool:
                answers = list(pool.map(lambda url: open_loop(url, b"{}", arrivals), urls))  # noqa: B023 - ends in this turn
            failed += sum(not one.good for each in answers for one in each)
            times = [[1e3 * one.latency for one in each if one.due >= LEAD_IN and one.good] for each in answers]
            measured = [(mean(each), percentile(each, 99)) for each in times]
            (simulated,) = run([replace(model, load=load)], 10_000)
            cells = [f"{load:g}", str(len(times[0])), *(f"{a:.0f} / {b:.0f}" for a, b in measured)]
            for first, second in (measured, simulated):
                cells.append(f"{second[0] / first[0]:.2f} / {second[1] / first[1]:.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev sleeping", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--requests", type=int, default=400, help="that count, at each load (default 400)")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    options = parser.parse_args(arguments)
    failed = sum(measure(workers, options.requests, options.loads) for workers in options.workers)
    print(f"\n{failed} requests failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
