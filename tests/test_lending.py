"""Lending between real processes that compute with torch, by the words of a state directory."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.borrower import Borrower
from tests.eventually import eventually
from ts_plugin.ledger.directory import LedgerError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import State
from ts_plugin.lending import library, words
from ts_plugin.lending.words import BUSY, HEAD, SIZE, SLOT, Status, Words
from ts_plugin.machine import process
from ts_plugin.machine.process import Identity

pytestmark = pytest.mark.process

ALLOWED = sorted(os.sched_getaffinity(0))
FREE, NOBODY_IDLE, LONG_REGIONS, OTHER_PLAN = range(4)
Start = Callable[[], Borrower]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lending") / "state"


@pytest.fixture(scope="module")
def started(state: Path) -> Iterator[list[Borrower]]:
    """All borrowers of these tests: to load torch takes seconds, so those that live are used again.

    Four at first, as many as one test needs; the tests that kill one come last.
    """
    borrowers = [Borrower(state) for _ in range(4)]
    for one in borrowers:
        one.wait()
    yield borrowers
    for one in borrowers:
        one.close()


@pytest.fixture
def start(started: list[Borrower], state: Path) -> Iterator[Start]:
    """Return a function that returns a borrower which has just started, as far as anybody can see.

    The one with the last slot first: where that is killed, its slot is the next that is taken.
    """
    living = [one for one in started if one.process.poll() is None]
    idle = sorted(living, key=lambda one: -one.slot)
    Ledger(str(state)).write(State())

    def start() -> Borrower:
        if idle:
            return idle.pop(0)
        started.append(Borrower(state).wait())
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.ask("reset")


class Sight:
    """The words of a state directory, as another process sees them."""

    def __init__(self, state: Path) -> None:
        (file,) = state.glob("lending-*")
        with file.open("r+b") as stream:
            self.memory = mmap.mmap(stream.fileno(), SIZE)

    def slot(self, slot: int) -> tuple[int, ...]:
        found: tuple[int, ...] = SLOT.unpack_from(self.memory, HEAD.size + slot * SLOT.size)
        return found

    def user(self, slot: int) -> int:
        """Return slot + 1 of who computes on the slice; negative inside a region."""
        word = self.slot(slot)[0]
        return -(word & ~BUSY) if word & BUSY else word


def lend(*workers: Borrower, cpus: list[int] | None = None) -> None:
    """Let all of them lend to each other: one thread each, on one of ``cpus`` each, and idle by now."""
    for number, one in enumerate(workers):
        others = [
            (other.slot, 1, None if cpus is None else [cpus[place]])
            for place, other in enumerate(workers)
            if other is not one
        ]
        one.ask("plan", 0, 1, None if cpus is None else [cpus[number]], others)
    for one in workers:
        one.ask("end")
        one.ask("typical", 10.0)


def begin_wide(worker: Borrower, threads: int, budget: float = 0.0) -> None:
    """Begin a request on ``threads`` threads; right after its owner's request a slice is not lent yet."""
    begun: int = 0

    def begins() -> bool:
        nonlocal begun
        if begun:
            worker.ask("end")
        begun = worker.ask("begin", threads, budget)["threads"]
        return begun == threads

    assert eventually(begins), f"a request began on {begun} threads, not on {threads}: not all slices are lent"


@pytest.fixture
def pair(start: Start) -> tuple[Borrower, Borrower]:
    first, second = start(), start()
    lend(first, second)
    return first, second


def test_an_idle_slice_is_borrowed_and_goes_back_with_the_request(pair: tuple[Borrower, Borrower], state: Path) -> None:
    sight = Sight(state)
    for worker, other in (pair, pair[::-1], pair):
        begin_wide(worker, 2)
        assert worker.ask("compute", 5)["threads"] == 2
        assert sight.user(other.slot) == worker.slot + 1
        answer = worker.ask("end")
        assert (answer["began"], answer["ended"], answer["handed_back"]) == (2, 2, 0)
        assert answer["regions"] >= 5
        assert answer["borrowed"] > 0
        assert [sight.user(one.slot) for one in pair] == [0, 0]
        assert worker.ask("compute", 1)["threads"] == 1


def test_a_borrower_gives_back_inside_its_request(pair: tuple[Borrower, Borrower]) -> None:
    first, second = pair
    begin_wide(first, 2)
    first.send("compute until", 1)
    assert second.ask("begin", 2, 0.0) == {"threads": 1, "forced": -1}, "while the first one's request goes on"
    assert first.answer()["threads"] == 1
    second.ask("end")
    assert first.ask("compute", 3)["threads"] == 1, "never wider again in the same request"
    answer = first.ask("end")
    assert (answer["began"], answer["ended"], answer["handed_back"] + answer["lost"]) == (2, 1, 1)


def test_what_was_taken_between_two_regions_is_not_used_in_the_next(pair: tuple[Borrower, Borrower]) -> None:
    """Its owner does not wait for the borrower, whatever that does instead of computing."""
    first, second = pair
    begin_wide(first, 2)
    first.process.send_signal(signal.SIGSTOP)
    assert second.ask("begin", 1, 0.0)["forced"] == -1
    first.process.send_signal(signal.SIGCONT)
    assert first.ask("compute", 1)["threads"] == 1
    answer = first.ask("end")
    assert answer["ended"] == 1
    assert answer["handed_back"] + answer["lost"] == 1
    second.ask("end")


def stop_inside_a_region(worker: Borrower, lender: Borrower, sight: Sight) -> None:
    worker.send("long region", 4000)
    assert eventually(lambda: sight.user(lender.slot) == -(worker.slot + 1))
    worker.process.send_signal(signal.SIGSTOP)
    assert sight.user(lender.slot) == -(worker.slot + 1), "the region was over before it could be stopped"


def test_a_borrower_that_is_stopped_inside_a_region_holds_up_one_request(
    pair: tuple[Borrower, Borrower], state: Path
) -> None:
    first, second = pair
    begin_wide(first, 2)
    stop_inside_a_region(first, second, Sight(state))
    assert [second.ask("begin", 1, 0.0)["forced"], second.ask("end")["forced"]] == [first.slot, 1]
    for _ in range(5):
        assert [second.ask("begin", 1, 0.0)["forced"], second.ask("end")["forced"]] == [-1, 0]
    first.process.send_signal(signal.SIGCONT)
    assert first.answer()["sum"] == 4000
    assert first.ask("compute", 1)["threads"] == 1
    assert first.ask("end")["lost"] == 1


def test_another_plan_ends_all_loans_at_the_next_region(pair: tuple[Borrower, Borrower], state: Path) -> None:
    first, second = pair
    begin_wide(first, 2)
    Ledger(str(state)).write(State(generation=7))
    assert first.ask("compute", 1)["threads"] == 1
    assert first.ask("end")["stale"] == 1
    assert first.ask("begin", 2, 0.0)["threads"] == 1
    assert first.ask("end")["why"] == OTHER_PLAN
    first.ask("plan", 7, 1, None, [(second.slot, 1, None)])
    begin_wide(first, 2)
    first.ask("end")


def test_a_slice_that_becomes_smaller_has_fewer_threads_at_the_next_region(start: Start, state: Path) -> None:
    if len(ALLOWED) < 2:
        pytest.skip("needs two CPUs")
    worker = start()
    worker.ask("plan", 0, 2, ALLOWED[:2], [])
    worker.ask("end")
    worker.ask("begin", 2, 0.0)
    assert worker.ask("compute", 2)["threads"] == 2
    Ledger(str(state)).write(State(generation=7))
    os.sched_setaffinity(worker.pid, ALLOWED[:1])
    assert worker.ask("compute", 2) == {"threads": 1, "mask": ALLOWED[:1]}
    answer = worker.ask("end")
    assert (answer["ended"], answer["stale"]) == (1, 1)


def test_a_request_with_less_than_its_share_gets_some_from_who_has_more(start: Start) -> None:
    workers = [start() for _ in range(4)]
    first, second, *_ = workers
    lend(*workers)

    def gets_its_share() -> bool:
        """A request waits for a millisecond only, in which the other may not come to the end of its region."""
        begin_wide(first, 4)
        first.send("compute until", 2)
        threads = second.ask("begin", 4, 1.0)["threads"]
        left = first.answer()["threads"]
        second.ask("end")
        first.ask("end")
        return (threads, left) == (2, 2)  # its own, and one of the two that the first has borrowed more

    assert eventually(gets_its_share)


def test_only_the_team_reaches_borrowed_cpus(start: Start) -> None:
    if len(ALLOWED) < 2:
        pytest.skip("needs two CPUs")
    first, second = start(), start()
    cpus = ALLOWED[:2]
    lend(first, second, cpus=cpus)
    assert first.ask("compute", 1)["mask"] == cpus[:1]
    begin_wide(first, 2)
    assert first.ask("compute", 2) == {"threads": 2, "mask": cpus[:1]}
    assert frozenset(cpus[1:]) in first.masks()
    assert first.ask("fork") == {"threads": 1, "mask": cpus[:1]}
    assert first.ask("subprocess")["mask"] == cpus[:1]
    assert first.ask("compute", 1)["threads"] == 2, "the child has changed nothing"
    first.ask("end")
    assert eventually(lambda: frozenset(cpus[1:]) not in first.masks())


def test_a_budget_that_is_used_up_ends_the_loan(pair: tuple[Borrower, Borrower]) -> None:
    first, _ = pair
    begin_wide(first, 2, 0.05)
    assert first.ask("compute until", 1)["threads"] == 1
    answer = first.ask("end")
    assert (answer["late"], answer["handed_back"]) == (1, 1)


def test_long_regions_borrow_only_from_those_with_longer_requests(pair: tuple[Borrower, Borrower]) -> None:
    first, second = pair
    for _ in range(20):
        begin_wide(first, 2)
        first.ask("long region", 600)
        first.ask("end")
    second.ask("typical", 0.002)
    for _ in range(5):
        assert first.ask("begin", 2, 0.0)["threads"] == 1
        assert first.ask("end")["why"] in (LONG_REGIONS, NOBODY_IDLE)
    second.ask("typical", 100.0)
    begin_wide(first, 2)
    first.ask("end")


@contextmanager
def beginner(state: Path) -> Iterator[tuple[int, library.Worker]]:
    """A worker that starts, in this process; with its slot."""
    own, me = Words(Ledger(str(state))), process.identify(os.getpid())
    assert me is not None
    worker = library.Worker(own.memory, own.locks, own.slot, pid=me.pid, start_time=me.start_time)
    try:
        yield own.slot, worker
    finally:
        worker.close()
        own.close()


def test_a_worker_that_starts_lends_nothing(start: Start, state: Path) -> None:
    first = start()
    with beginner(state) as (slot, worker):
        first.ask("plan", 0, 1, None, [(slot, 1, None)])
        first.ask("end")
        for _ in range(5):
            assert first.ask("begin", 2, 0.0)["threads"] == 1
            assert first.ask("end")["why"] == NOBODY_IDLE
        worker.end()
        begin_wide(first, 2)
        first.ask("end")


# ---- the words ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_of_before_a_word_is_touched(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(LedgerError, match="too large"):
            Words(Ledger(str(tmp_path / "state")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Words(Ledger(str(tmp_path / "state"))).close()


def test_deleted_words_are_noticed_and_poisoned(tmp_path: Path) -> None:
    own = Words(Ledger(str(tmp_path / "state")))
    assert not own.lost
    shutil.rmtree(tmp_path / "state")
    assert own.lost
    own.poison()
    assert own.generation == words.NO_PLAN
    own.close()


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"7", b"\0" * 100, b'{"times": 1}', b'{"times": {}, "unknown": 1}', b'{"times": {"x": 1}}'],
)
def test_a_status_that_is_none(text: bytes) -> None:
    assert Status.unpack(text) is None


def test_a_status_is_read_as_it_was_written() -> None:
    status = Status(9, 4, 2.5, 3, 2, 0.001, 0.0007, 1, {1: 0.1, 2: 0.06}, "why", True)
    assert Status.unpack(status.pack()) == status
    many = Status(requests=5, times={n: n / 7 for n in range(1, 200)}, why="x" * 2000)
    short = Status.unpack(many.pack())
    assert short is not None
    assert (short.requests, short.times) == (5, {})


# ---- what is not trusted -------------------------------------------------------------------------------------


def run(code: str, *arguments: str) -> str:
    text = textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_torch_there_is_no_runtime_to_stand_before() -> None:
    assert "another OpenMP runtime" in run(
        "from ts_plugin.lending import library\nprint(library.load().regions_hook())\
\nprint(library.NO_HOOK[library.load().regions_hook()])"
    )


OWN_LIBGOMP = """
import sys
if sys.argv[1] == "before":
    from sklearn.linear_model import LinearRegression
    from sklearn.cluster import KMeans
import torch
from ts_plugin.lending import library
print(repr(library.what_keeps_from_borrowing()))
from sklearn.linear_model import LinearRegression
from sklearn.cluster import KMeans
import numpy as np
print(repr(library.what_keeps_from_borrowing()))
chance = np.random.default_rng(0)
x = chance.random((2000, 3))
points = [[0.0], [0.1], [9.0], [9.1], [9.2]]
y = x @ [1.0, 2.0, 3.0] + 0.5
print(abs(LinearRegression().fit(x, y).predict([[1.0, 1.0, 1.0]])[0] - 6.5) < 1e-6)
print(sorted(np.bincount(KMeans(2, n_init=1, random_state=0).fit(points).labels_)) == [2, 3])
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_library_with_a_libgomp_of_its_own_stays_untouched(when: str) -> None:
    assert run(OWN_LIBGOMP, when).split("\n") == ["''", "''", "True", "True"]


STRANGE = """
void GOMP_parallel_sections(void (*)(void *), void *, unsigned, unsigned, unsigned);
void strange(void (*work)(void *)) { GOMP_parallel_sections(work, 0, 2, 2, 0); }
"""


def test_regions_that_cannot_be_watched_keep_a_worker_from_borrowing(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "strange.c").write_text(STRANGE)
    command = ["cc", "-shared", "-fPIC", "-fopenmp", "-O2", "-o", "strange.so", "strange.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = """
    import ctypes, sys, torch
    from ts_plugin.lending import library
    print(library.what_keeps_from_borrowing() or "nothing")
    ctypes.CDLL(sys.argv[1])
    print(library.what_keeps_from_borrowing() or "nothing")
    """
    before, after = run(code, str(tmp_path / "strange.so")).split("\n")
    assert before == "nothing"
    assert "GOMP_parallel_" in after


def test_a_library_that_is_missing_or_for_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "regions-none.so"
    monkeypatch.setattr(library, "path", lambda: broken)
    library.load.cache_clear()
    try:
        with pytest.raises(library.LibraryError, match="not there"):
            library.load()
        broken.write_bytes(b"no ELF file")
        with pytest.raises(library.LibraryError, match="cannot be loaded"):
            library.load()
    finally:
        library.load.cache_clear()


def test_the_layout_of_the_words_is_that_of_the_library(tmp_path: Path) -> None:
    """Python reads what the library writes: identity, use and time of a worker in slot 3."""
    memory = mmap.mmap(-1, SIZE)
    worker = library.Worker(memory, -1, 3, pid=4711, start_time=2**60)
    worker.plan(5, 2, None, [])
    worker.typical(0.5)
    user, wanted, asked, pid, start_time, idle_since, lent_at, request = SLOT.unpack_from(
        memory, HEAD.size + 3 * SLOT.size
    )
    assert (user, wanted, asked, pid, start_time, lent_at, request) == (4 | BUSY, 1, 0, 4711, 2**60, 0, 500_000_000)
    worker.end()
    user, wanted, _, _, _, idle_since, *_ = SLOT.unpack_from(memory, HEAD.size + 3 * SLOT.size)
    assert (user, wanted) == (0, 0)
    assert idle_since > 0
    assert struct.unpack_from("=QQ", memory) == (0, 1)
    worker.close()
    assert SLOT.unpack_from(memory, HEAD.size + 3 * SLOT.size)[1:4] == (1, 0, 0)


# ---- who is killed -------------------------------------------------------------------------------------------


def test_a_reader_sees_living_workers_and_makes_nothing(start: Start, state: Path, tmp_path: Path) -> None:
    assert words.look(Ledger(str(tmp_path / "state"))) is None
    assert not list(tmp_path.iterdir())
    ledger = Ledger(str(state))
    first, second = start(), start()
    lend(first, second)
    begin_wide(first, 2)
    seen = {identity.pid: one for identity, one in (words.look(ledger) or {}).items()}
    assert {first.pid, second.pid} <= set(seen)
    assert [isinstance(seen[one.pid].user, Identity) for one in (first, second)] == [True, True]
    assert [one.user and one.user.pid for one in (seen[first.pid], seen[second.pid])] == [first.pid] * 2
    assert [seen[first.pid].wanted, seen[second.pid].wanted] == [True, False]
    first.kill()
    seen = {identity.pid: one for identity, one in (words.look(ledger) or {}).items()}
    assert first.pid not in seen
    assert seen[second.pid].user is None


def test_a_borrower_that_is_killed_inside_a_region_leaves_nothing(pair: tuple[Borrower, Borrower], state: Path) -> None:
    first, second = pair
    sight = Sight(state)
    begin_wide(first, 2)
    stop_inside_a_region(first, second, sight)
    first.kill()
    assert second.ask("begin", 1, 0.0)["forced"] == -1, "nobody has to be driven off"
    second.ask("end")
    with beginner(state) as (slot, _):
        assert slot == first.slot


def test_what_a_killed_borrower_held_is_free_when_its_slot_is_taken_again(
    pair: tuple[Borrower, Borrower], state: Path
) -> None:
    first, second = pair
    sight = Sight(state)
    begin_wide(first, 2)
    first.kill()
    assert sight.user(second.slot) == first.slot + 1
    with beginner(state) as (slot, _):
        assert slot == first.slot
        assert sight.user(second.slot) == 0
