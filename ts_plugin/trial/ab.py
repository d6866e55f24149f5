"""A closed loop by Apache's ``ab``, the client of the tutorial."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ts_plugin.trial.load import ANSWER_SECONDS, Body, LoadError
from ts_plugin.trial.turns import Sample, thinned

MANY = 10_000_000  # requests: the time ends it


def ab(url: str, body: Body, clients: int, seconds: float) -> Sample:
    """Count what ab sees in so many seconds, over kept-alive connections; it has no lead-in.

    Without ``-k`` ab waits for the server to close the connection, which TorchServe does for no version of HTTP and no
    ``Connection`` header. ``-l``: answers may differ in length, floats have more digits.

    Raises:
        LoadError: ab is not installed, or it gave up.
    """
    program = shutil.which("ab")
    if program is None:
        raise LoadError("ab is not installed: apt-get install apache2-utils")
    with tempfile.TemporaryDirectory(prefix="ts-cores-") as scratch:
        sent, table = Path(scratch, "body"), Path(scratch, "requests.tsv")
        sent.write_bytes(body.content)
        command = [program, "-k", "-l", "-q", "-r", "-s", str(ANSWER_SECONDS), "-g", str(table)]
        command += ["-t", f"{max(round(seconds), 1)}", "-n", str(MANY), "-c", str(clients)]
        command += ["-p", str(sent), "-T", body.type, url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LoadError(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
        return parse_ab(done.stdout, table.read_text())


def parse_ab(stdout: str, table: str) -> Sample:
    """Return what ab measured: its counts from ``stdout``, its latencies from the table that ``-g`` writes.

    Raises:
        LoadError: a line or a column is missing.
    """

    def number(label: str, *, default: float | None = None) -> float:
        found = re.search(rf"^{re.escape(label)}:\s+([\d.]+)", stdout, re.MULTILINE)
        if found:
            return float(found[1])
        if default is None:
            raise LoadError(f"ab printed no {label!r}:\n{stdout[-500:]}")
        return default

    head, *rows = (line.split("\t") for line in table.splitlines() or [""])
    if "ttime" not in head:
        raise LoadError(f"ab's table has no column ttime: {table[:200]!r}")
    latencies = sorted(int(row[head.index("ttime")]) / 1000 for row in rows)
    requests = int(number("Complete requests"))
    # ab counts one request's connecting, reading and its exception each.
    failed = min(int(number("Failed requests") + number("Non-2xx responses", default=0)), requests)
    good = (requests - failed) / max(requests, 1)
    return Sample(None, good * number("Requests per second"), thinned(latencies), failed)
