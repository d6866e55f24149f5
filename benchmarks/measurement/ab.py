"""A closed loop by Apache's ``ab``."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ts_plugin.trial.load import ANSWER_SECONDS, CONTENT_TYPE, Load, LoadError

__all__ = ["FEWEST_REQUESTS", "ab", "parse_ab"]

FEWEST_REQUESTS = 51


def ab(url: str, body: Path, *, requests: int, concurrency: int) -> Load:
    """Send ``requests`` POSTs of the file ``body``, always ``concurrency`` at once, over kept-alive connections.

    Without ``-k`` ab waits for the server to close the connection, which TorchServe does for no version of HTTP and no
    ``Connection`` header: use ``closed_loop`` there. ``-l``: answers may differ in length, floats have more digits.

    Raises:
        ValueError: fewer than 51 requests; ab then looks for its 99th percentile behind the end of its array.
        LoadError: ab is not installed, or it gave up.
    """
    if requests < FEWEST_REQUESTS:
        raise ValueError(f"{requests} requests are too few for ab's 99th percentile; send at least {FEWEST_REQUESTS}")
    program = shutil.which("ab")
    if program is None:
        raise LoadError("ab is not installed: apt-get install apache2-utils")
    with tempfile.NamedTemporaryFile(suffix=".csv") as percentiles:
        command = [program, "-k", "-l", "-q", "-r", "-s", str(ANSWER_SECONDS), "-e", percentiles.name]
        command += ["-n", str(requests), "-c", str(min(concurrency, requests))]
        command += ["-p", str(body), "-T", CONTENT_TYPE, url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LoadError(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
        return parse_ab(done.stdout, Path(percentiles.name).read_text())


def parse_ab(stdout: str, percentiles: str) -> Load:
    """Return what ab measured: its counts from ``stdout``, its latencies from the CSV that ``-e`` writes.

    Raises:
        LoadError: a line or a percentile is missing.
    """

    def number(label: str, *, default: float | None = None) -> float:
        found = re.search(rf"^{re.escape(label)}:\s+([\d.]+)", stdout, re.MULTILINE)
        if found:
            return float(found[1])
        if default is None:
            raise LoadError(f"ab printed no {label!r}:\n{stdout[-500:]}")
        return default

    table = {row[0]: float(row[1]) for row in list(csv.reader(io.StringIO(percentiles)))[1:] if len(row) == 2}
    if not {"50", "90", "99"} <= table.keys():
        raise LoadError(f"ab's CSV has no percentiles 50, 90 and 99: {percentiles[:200]!r}")
    requests = int(number("Complete requests"))
    failed = int(number("Failed requests") + number("Non-2xx responses", default=0))
    return Load(
        requests=requests,
        failed=min(failed, requests),  # ab counts one request's connecting, reading and its exception each
        seconds=number("Time taken for tests"),
        requests_per_second=number("Requests per second"),
        p50_ms=table["50"],
        p90_ms=table["90"],
        p99_ms=table["99"],
    )
