"""One trial at a time on a machine, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from ts_plugin.errors import CommandError
from ts_plugin.machine import cpu_time
from ts_plugin.machine.process import environment
from ts_plugin.trial.store import cache_directory

MARK = "TS_CORES_TRIAL"  # in the environment of everything that we start: a killed trial leaves servers behind
QUIET = 0.15  # of the CPUs that others may use
LOOK = 2.0  # seconds


@contextlib.contextmanager
def alone(command: str) -> Iterator[Path]:
    """Keep other trials away, end what a killed one left behind, and let SIGTERM and SIGHUP end this one tidily.

    The cache directory of ``command`` comes out. Mark and handlers stay until the process ends.

    Raises:
        CommandError: another trial runs.
    """
    cache = cache_directory()
    (cache / command).mkdir(parents=True, exist_ok=True)
    with (cache / "trial.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(
                f"another `ts-cores tune` or `compare` measures here ({lock.name}); wait for its end"
            ) from None
        left = [found for found in psutil.process_iter() if environment(found.pid).get(MARK) == str(cache)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        os.environ[MARK] = str(cache)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end)
        yield cache / command


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def others_seconds(cpus: Collection[int]) -> float:
    """Return the CPU seconds that ``cpus`` worked since boot, without those of this process and its descendants.

    Only differences mean something; what a descendant worked that ended in between counts as others'.
    """
    busy = sum(worked for cpu, (worked, _) in cpu_time.ticks().items() if cpu in cpus) / os.sysconf("SC_CLK_TCK")
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            spent = process.cpu_times()
            busy -= spent.user + spent.system + spent.children_user + spent.children_system
    return busy


def require_quiet(cpus: Collection[int], *, anyway: bool) -> float:
    """Return how many CPUs others use now.

    Raises:
        CommandError: too many, and not ``anyway``; the message names who.
    """
    before = others_seconds(cpus)
    watched = [(process, spent) for process in psutil.process_iter() if (spent := _spent(process)) is not None]
    began = time.monotonic()
    time.sleep(LOOK)
    seconds = time.monotonic() - began
    used = max(others_seconds(cpus) - before, 0.0) / seconds
    if used <= QUIET * len(cpus) or anyway:
        return used
    grown = [((_spent(process) or spent) - spent, process) for process, spent in watched]
    most = sorted((item for item in grown if item[0] > 0.05 * seconds), key=lambda item: -item[0])[:3]
    names = ", ".join(f"{_name(process)} (pid {process.pid}): {spent / seconds:.1f}" for spent, process in most)
    raise CommandError(
        f"the machine is busy: others use {used:.1f} of the {len(cpus)} CPUs that would be measured on"
        f"{f', {names}' if names else ''}; wait for their end, or measure beside them with --anyway"
    )


def _spent(process: psutil.Process) -> float | None:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return "ended"
