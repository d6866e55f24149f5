"""Chaos in its short form, and that its watcher would see what it watches for."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks.checks import chaos, watch
from benchmarks.checks.watch import Look, Meetings, Thread, Worker
from tests.eventually import eventually
from ts_plugin.ledger.file import Ledger
from ts_plugin.lending import library
from ts_plugin.lending.words import Words
from ts_plugin.machine import process

pytestmark = pytest.mark.process

ALLOWED = frozenset(os.sched_getaffinity(0))
CORES = sorted(watch.physical_cores(ALLOWED), key=min)
PATIENCE = 20.0  # seconds: that everything is right again within 2 is measured, not tested
BUSY = 1 << 31
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores to overlap on")

COMPUTES = """
import sys, threading
end = threading.Thread(target=sys.stdin.read, daemon=True)
end.start()
print("computes", flush=True)
while end.is_alive():
    pass
"""

Start = Callable[[], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that computes on a CPU; it may run where this one may."""
    started = []

    def begin() -> int:
        child = subprocess.Popen([sys.executable, "-c", COMPUTES], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"computes\n"
        return child.pid

    yield begin
    for child in started:
        child.communicate()


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., Path]:
    """Write the words of workers: PID and user of each slot in turn."""

    def write(*slots: tuple[int, int], started: int = 0) -> Path:
        text = bytes(64)
        for pid, user in slots:
            start_time = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
            text += struct.pack("=IIIiQ40x", user, 1, 0, pid, start_time + started)
        file = tmp_path / "words"
        file.write_bytes(text.ljust(64 + 1024 * 64, b"\0"))
        return file

    return write


@pytest.mark.server
def test_a_little_chaos_breaks_no_promise() -> None:
    report = chaos.run(minutes=0.25, seed=2026, grace=PATIENCE)
    assert report.violations == []
    assert report.failed_requests == []
    assert sum(report.actions.values()) >= 3
    assert report.answered > 0
    if len(CORES) > 1:
        assert report.wide > 0, "the watcher saw no slice borrowed"


@needs_two_cores
def test_the_watcher_sees_overlaps_and_idle_cores(start: Start) -> None:
    pids = start(), start()
    assert look(*pids).complaints().keys() == {"overlap"}
    for pid, core in zip(pids, (CORES[0], ALLOWED - CORES[0]), strict=True):
        bind(pid, core)
    assert look(*pids).complaints() == {}
    assert look(pids[0]).complaints().keys() == {watch.IDLE}


def test_words_are_those_of_living_workers(words: Callable[..., Path], start: Start, tmp_path: Path) -> None:
    owner, idle, wide = start(), start(), start()
    file = words((owner, 3 | BUSY), (idle, 0), (wide, 3))
    assert watch.words(file) == {owner: wide, idle: 0, wide: wide}
    assert watch.words(words((owner, 2), (idle, 0), started=1)) == {}, "an earlier process with the same PID"
    assert watch.words(tmp_path / "missing") == watch.words(None) == {}
    (tmp_path / "empty").touch()  # it is just being made
    assert watch.words(tmp_path / "empty") == {}


def test_the_words_are_where_workers_write_them(tmp_path: Path) -> None:
    me = process.identify(os.getpid())
    assert me is not None
    words = Words(Ledger(str(tmp_path)))
    worker = library.Worker(words.memory, words.locks, words.slot, pid=me.pid, start_time=me.start_time)
    (file,) = tmp_path.glob(chaos.WORDS)
    assert watch.words(file) == {me.pid: me.pid}
    worker.end()
    assert watch.words(file) == {me.pid: 0}
    worker.close()
    words.close()


def test_a_worker_is_watched_until_it_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "LISTS", 0.0)
    pid = start()
    listed, looks = [pid], list[Look]()

    def look_at(pids: Iterable[int]) -> Look:
        looks.append(look(*pids))
        return looks[-1]

    stage = SimpleNamespace(report=chaos.Report(), grace=PATIENCE, tampered=False, look=look_at)
    stage.workers, stage.complaints = lambda: listed, Look.complaints
    watcher = chaos.Watcher(cast(chaos.Chaos, stage))

    def sees_it() -> bool:
        watcher._observe()
        return bool(looks[-1].workers)

    assert sees_it()
    listed.clear()  # its frontend was killed
    assert sees_it()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not sees_it())


@needs_two_cores
def test_the_watcher_sees_two_that_compute_on_one_cpu(words: Callable[..., Path], start: Start) -> None:
    cpu = min(ALLOWED)
    wide, owner = start(), start()
    bind(owner, {cpu})
    file = words((wide, 1), (owner, 1 | BUSY))
    meetings = Meetings()
    found: list[str] = []

    def met() -> bool:
        found.extend(meetings.next(look(wide, owner, file=file)))
        return bool(found)

    assert eventually(met)
    assert f"{owner} without leave" in found[0]


@needs_two_cores
def test_workers_that_compute_apart_do_not_meet(words: Callable[..., Path], start: Start) -> None:
    first, second = start(), start()
    bind(first, {min(ALLOWED)})
    bind(second, {max(ALLOWED)})
    file = words((first, 0), (second, 0))
    meetings = Meetings()
    for _ in range(2 * watch.MEETING):
        assert meetings.next(look(first, second, file=file)) == []
        time.sleep(2 * watch.COMPUTES)


ZERO, ONE, BOTH = frozenset({0}), frozenset({1}), frozenset({0, 1})
WIDE, OWNER = frozenset({11}), frozenset({12})
NOBODY = frozenset[int]()


def worker(
    pid: int,
    users: frozenset[int],
    *masks: frozenset[int],
    state: str = "R",
    seconds: float = 0.0,
    children: frozenset[int] = NOBODY,
    parent: int = 1,
) -> Worker:
    """Return a worker with a thread for each mask, the one that runs the model first."""
    threads = {pid + number: Thread(mask, state, seconds) for number, mask in enumerate(masks)}
    return Worker(pid, threads, users, children, parent)


def one_look(
    number: int, users: frozenset[int], *, owner: str = "R", gets: float = 0.1, team: bool = True, parent: int = 1
) -> Look:
    """Return a look: a worker whose team may run on CPU 0, too, and the owner of CPU 0, which gets so many seconds."""
    wide = worker(11, WIDE, ONE, ZERO if team else ONE, seconds=0.1 * number)
    own = worker(12, users, ZERO, state=owner, seconds=gets * number, parent=parent)
    return Look({11: wide, 12: own}, ALLOWED)


@needs_two_cores
@pytest.mark.parametrize(
    ("looks", "met"),
    [
        pytest.param([one_look(i, WIDE) for i in range(6)], 1, id="the owner without leave"),
        pytest.param([one_look(i, OWNER) for i in range(6)], 1, id="the borrower without leave"),
        pytest.param([one_look(i, NOBODY) for i in range(6)], 2, id="both without leave"),
        pytest.param([one_look(i, WIDE | OWNER) for i in range(6)], 0, id="both with leave in each look"),
        pytest.param([one_look(i, WIDE) for i in range(3)], 0, id="too few looks"),
        pytest.param([one_look(i, OWNER, team=False) for i in range(6)], 0, id="the borrower has left"),
        pytest.param([one_look(i, OWNER, team=not i % 3) for i in range(9)], 0, id="the team spins for a moment"),
        pytest.param([one_look(i, WIDE, parent=1 if i else 2) for i in range(6)], 0, id="its frontend was killed"),
        pytest.param([one_look(i, WIDE, gets=0.005) for i in range(6)], 0, id="parses a message"),
        pytest.param([one_look(i, WIDE, owner="R" if i % 4 else "S") for i in range(9)], 0, id="never for long"),
    ],
)
def test_a_meeting(looks: list[Look], met: int) -> None:
    meetings = Meetings()
    assert sum(len(meetings.next(look)) for look in looks) == met


def test_threads_and_children_outside_are_seen() -> None:
    apart = worker(11, WIDE, ZERO, ONE)
    assert watch.STRAY in Look({11: apart}, BOTH).complaints()
    parent = worker(11, WIDE, ZERO, children=BOTH)
    assert watch.CHILD in Look({11: parent}, ZERO).complaints()
    assert one_look(0, WIDE).complaints().get(watch.STRAY) is None
    assert watch.STRAY in one_look(0, OWNER).complaints()
    runs_model = worker(11, WIDE, BOTH, ZERO)
    assert "overlap" in Look({11: runs_model, 12: worker(12, WIDE, ZERO)}, BOTH).complaints()


@needs_two_cores
def test_stopped_threads_stay_where_they_were(start: Start) -> None:
    pid = start()
    os.sched_setaffinity(pid, {min(ALLOWED)})  # its first thread
    assert watch.STRAY in look(pid).complaints()
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: watch.STRAY not in look(pid).complaints())
    os.kill(pid, signal.SIGCONT)


def look(*pids: int, file: Path | None = None) -> Look:
    return watch.look(pids, file, allowed=ALLOWED)


def bind(pid: int, cpus: frozenset[int] | set[int]) -> None:
    for tid in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(tid), cpus)
