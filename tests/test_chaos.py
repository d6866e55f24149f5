"""Chaos in its short form, and that its watcher would see what it watches for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.checks import chaos, watch
from benchmarks.checks.watch import Held, Look, Meetings, Worker
from tests.eventually import eventually

ALLOWED = frozenset(os.sched_getaffinity(0))
CORES = sorted(watch.physical_cores(ALLOWED), key=min)
PATIENCE = 20.0  # seconds: that everything is right again within 2 is measured, not tested
RIGHT = 1 << 24
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores to overlap on")

# Locks the bytes argv[2:] of the file argv[1], says so, and computes until its input ends.
COMPUTES = """
import fcntl, sys, threading
file = open(sys.argv[1], "r+")
for byte in sys.argv[2:]:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, int(byte))
print("computes", flush=True)
threading.Thread(target=sys.stdin.read, daemon=True).start()
threads = threading.enumerate()
while threads[-1].is_alive():
    pass
"""

Start = Callable[..., int]


@pytest.fixture
def board(tmp_path: Path) -> Path:
    file = tmp_path / "board"
    file.touch()
    return file


@pytest.fixture
def start(board: Path) -> Iterator[Start]:
    """Start a process that computes on a CPU and holds some bytes of the board; it may run where this one may."""
    started = []

    def begin(*held: int) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", COMPUTES, str(board), *map(str, held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"computes\n"
        return process.pid

    yield begin
    for process in started:
        process.communicate()


def test_a_minute_of_chaos_breaks_no_promise() -> None:
    report = chaos.run(minutes=1, seed=2026, grace=PATIENCE)
    assert report.violations == []
    assert report.failed_requests == []
    assert sum(report.actions.values()) >= 3
    assert report.answered > 0
    if len(CORES) > 1:
        assert report.lending > 0, "the watcher saw no lock on the board"


@needs_two_cores
def test_the_watcher_sees_overlaps_and_idle_cores(start: Start) -> None:
    pids = start(), start()
    assert look(*pids).complaints().keys() == {"overlap"}
    for pid, core in zip(pids, (CORES[0], ALLOWED - CORES[0]), strict=True):
        bind(pid, core)
    assert look(*pids).complaints() == {}
    assert look(pids[0]).complaints().keys() == {watch.IDLE}


def test_locks_are_what_the_kernel_says_of_that_file(board: Path, start: Start, tmp_path: Path) -> None:
    wide, idle = start(3, 4, 7, RIGHT + 4), start()
    assert watch.locks(board) == {wide: Held(frozenset({3, 4, 7}), frozenset({4}))}
    (tmp_path / "other").touch()
    assert watch.locks(tmp_path / "other") == {}
    assert watch.locks(tmp_path / "missing") == {}
    seen = look(wide, idle, board=board).workers
    assert [seen[wide].wide, seen[idle].wide] == [True, False]


def test_who_waits_for_a_lock_does_not_hold_it(board: Path) -> None:
    inode = board.stat().st_ino
    table = f"""\
1: POSIX  ADVISORY  WRITE 11 fe:00:{inode} 0 3
1: -> POSIX  ADVISORY  WRITE 12 fe:00:{inode} 0 0
2: POSIX  ADVISORY  WRITE 11 fe:00:{inode} {RIGHT + 2} {RIGHT + 2}
3: FLOCK  ADVISORY  WRITE 13 fe:00:{inode} 0 EOF
4: POSIX  ADVISORY  WRITE 14 fe:00:{inode + 1} 0 0
5: POSIX  ADVISORY  WRITE 15 fe:00:{inode} {2 * RIGHT + 1} {2 * RIGHT + 1}
"""
    assert watch.locks(board, table) == {11: Held(frozenset(range(4)), frozenset({2})), 15: Held()}


@needs_two_cores
def test_the_watcher_sees_two_that_compute_on_one_cpu(board: Path, start: Start) -> None:
    cpu = min(ALLOWED)
    wide, owner = start(*ALLOWED, RIGHT + max(ALLOWED)), start(RIGHT + cpu)
    bind(owner, {cpu})
    meetings = Meetings()
    found: list[str] = []

    def met() -> bool:
        found.extend(meetings.next(look(wide, owner, board=board)))
        return bool(found)

    assert eventually(met)
    assert f"{owner} without leave" in found[0]


@needs_two_cores
def test_workers_that_compute_apart_do_not_meet(board: Path, start: Start) -> None:
    cpu, other = min(ALLOWED), max(ALLOWED)
    first, second = start(RIGHT + cpu), start(RIGHT + other)
    bind(first, {cpu})
    bind(second, {other})
    meetings = Meetings()
    for _ in range(2 * watch.MEETING_LOOKS):
        assert meetings.next(look(first, second, board=board)) == []
        time.sleep(watch.MEETING)


ONE, TWO = frozenset({0}), frozenset({0, 1})


def one_look(number: int, owner: Held, *, running: frozenset[int] = ONE, seconds: float = 0.5) -> Look:
    """Return the look ``number``, 0.1 s apart: a wide worker that computes, and the owner of CPU 0."""
    wide = Worker(11, frozenset({TWO}), TWO, seconds=0.1 * number, held=Held(TWO, frozenset({1})))
    own = Worker(12, frozenset({ONE}), running, seconds=seconds * 0.1 * number, held=owner)
    return Look(0.1 * number, {11: wide, 12: own}, ALLOWED)


WAITS = Held(right=ONE)


@needs_two_cores
@pytest.mark.parametrize(
    ("looks", "met"),
    [
        pytest.param([one_look(i, WAITS) for i in range(6)], 1, id="without leave"),
        pytest.param([one_look(i, WAITS) for i in range(3)], 0, id="too few looks"),
        pytest.param([one_look(i, Held(ONE, ONE)) for i in range(6)], 0, id="with leave"),
        pytest.param([one_look(i, WAITS, seconds=0.02) for i in range(6)], 0, id="polls for its slice"),
        pytest.param([one_look(i, Held()) for i in range(6)], 0, id="has held no lock yet"),
        pytest.param(
            [one_look(i, WAITS, running=ONE if i % 3 else frozenset()) for i in range(9)], 0, id="never for long"
        ),
        pytest.param([one_look(0, WAITS), *(one_look(i, Held()) for i in range(1, 6))], 1, id="has let go"),
    ],
)
def test_a_meeting(looks: list[Look], met: int) -> None:
    meetings = Meetings()
    assert sum(len(meetings.next(look)) for look in looks) == met


def test_threads_and_children_outside_are_seen() -> None:
    strays = Worker(11, frozenset({ONE, TWO}))
    assert "threads of one worker with different masks" in Look(0, {11: strays}, ONE).complaints()
    parent = Worker(11, frozenset({ONE}), children=TWO)
    assert watch.CHILD in Look(0, {11: parent}, ONE).complaints()
    wide = Worker(11, frozenset({TWO, ONE}), children=TWO, held=Held(TWO, ONE))
    assert Look(0, {11: wide}, ONE).complaints() == {}
    evicted = Worker(11, frozenset({TWO}), held=Held(frozenset({0, 5}), ONE))
    assert "a thread outside of what its worker holds" in Look(0, {11: evicted}, ONE).complaints()


def look(*pids: int, board: Path | None = None) -> Look:
    return watch.look(pids, board, allowed=ALLOWED, at=time.monotonic())


def bind(pid: int, cpus: frozenset[int] | set[int]) -> None:
    for tid in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(tid), cpus)
