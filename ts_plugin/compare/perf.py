"""What the CPU time of running processes went into, by ``perf``; a reason instead of a figure where it may not."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Time inside an OpenMP runtime's own code is waiting at barriers: the work that it runs lies in other libraries.
OPENMP = re.compile(r"lib(gomp|iomp5|omp)\b")
YIELD = re.compile(r"sched_yield")
SECONDS_TO_REPORT = 120


class Unavailable(Exception):
    """The figure cannot be had on this machine; the message is the reason."""


def spinning(pids: Sequence[int], *, seconds: float) -> float:
    """Return the share (0 to 1) of the processes' CPU time spent spinning in OpenMP barriers or in sched_yield.

    Raises:
        Unavailable: no perf, not permitted, or nothing was sampled.
    """
    perf = _perf()
    with tempfile.TemporaryDirectory() as scratch:
        data = str(Path(scratch) / "perf.data")
        # cpu-clock needs no PMU: virtual machines have it too.
        record = [perf, "record", "-q", "-e", "cpu-clock", "-F", "199", "-p", _list(pids), "-o", data]
        _run([*record, "--", "sleep", f"{seconds:g}"], seconds + 30)
        report = [perf, "report", "-i", data, "--stdio", "-q", "-t", ";", "-F", "overhead,dso,sym"]
        return parse_spinning(_run(report, SECONDS_TO_REPORT))


def parse_spinning(report: str) -> float:
    """Return the spinning share in a perf report with fields ``overhead;dso;symbol``.

    Raises:
        Unavailable: the report has no samples.
    """
    total = spun = 0.0
    for line in report.splitlines():
        share, _, where = line.partition(";")
        if not re.fullmatch(r"\s*[\d.]+%\s*", share):
            continue
        dso, _, symbol = where.partition(";")
        percent = float(share.strip().rstrip("%"))
        total += percent
        if OPENMP.search(dso) or YIELD.search(symbol):
            spun += percent
    if not total:
        raise Unavailable("perf took no samples")
    return spun / total


def core_bound(pids: Sequence[int], *, seconds: float) -> float:
    """Return the top-down share (0 to 1) of pipeline slots that were Core Bound: short of execution units.

    Raises:
        Unavailable: no perf, not permitted, or no PMU that has the metric (most virtual machines).

    Source: perf-stat(1), "-M tma_core_bound"; Yasin, "A Top-Down Method for Performance Analysis", ISPASS 2014.
    """
    command = [_perf(), "stat", "-x", ";", "-M", "tma_core_bound", "-p", _list(pids), "--", "sleep", f"{seconds:g}"]
    return parse_core_bound(_run(command, seconds + 30))


def parse_core_bound(output: str) -> float:
    """Return the share in ``perf stat -x ;`` output: the number before ``%  tma_core_bound``.

    Raises:
        Unavailable: there is no such number.
    """
    found = re.search(r"([\d.]+);\s*%\s+tma_core_bound", output)
    if found is None:
        raise Unavailable("the CPU's performance counters are not available here (no tma_core_bound)")
    return float(found[1]) / 100


def _perf() -> str:
    perf = shutil.which("perf")
    if perf is None:
        raise Unavailable("perf is not installed (apt-get install linux-perf)")
    return perf


def _list(pids: Sequence[int]) -> str:
    return ",".join(str(pid) for pid in pids)


def _run(command: list[str], timeout: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(command[:2])} did not end within {timeout:g} s") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
        raise Unavailable(f"{Path(command[0]).name} {command[1]}: {reason}")
    return done.stdout + done.stderr
