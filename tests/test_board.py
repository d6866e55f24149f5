"""The board with real processes: who computes where, and that nothing is left of a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from ts_plugin.leases.board import Board, Entry, Records, Totals, thread_places
from ts_plugin.leases.directory import Directory, StateError
from ts_plugin.machine.process import Identity
from ts_plugin.planning.width import Measured, Record

OTHER = textwrap.dedent("""
    import json, sys
    from ts_plugin.leases.board import Board
    from ts_plugin.leases.directory import Directory
    board = Board(Directory(sys.argv[1]), "board")
    for line in sys.stdin:
        print(json.dumps(eval(line, {"board": board})), flush=True)
""")


class Other:
    """Another process with the same board; ``ask`` evaluates an expression there."""

    def __init__(self, state: Path) -> None:
        command = [sys.executable, "-c", OTHER, str(state)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, expression: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(expression, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(Directory(str(tmp_path)), "board")
    yield board
    board.close()


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Callable[[], Other]]:
    tmp_path.chmod(0o700)
    started: list[Other] = []

    def start() -> Other:
        started.append(Other(tmp_path))
        return started[-1]

    yield start
    for other in started:
        other.end()


@pytest.fixture
def other(another: Callable[[], Other]) -> Other:
    return another()


def test_an_idle_slice_is_lent(board: Board, other: Other) -> None:
    assert board.borrow([2, 3])
    assert not other.ask("board.borrow([3])")
    assert other.ask("board.borrow([4])")
    board.release()
    assert other.ask("board.borrow([3])")


def test_a_slice_whose_owner_computes_is_not_lent(board: Board, other: Other) -> None:
    assert board.take([0, 1, 7], patience=0)
    assert not other.ask("board.borrow([7])")
    assert not other.ask("board.borrow([5, 6, 7])")
    board.give_back([])
    assert other.ask("board.borrow([5, 6])"), "a refused slice is not held in part"


def test_what_is_given_back_is_free_and_the_rest_is_not(board: Board, other: Other) -> None:
    assert board.take([0], patience=0)
    assert board.borrow([1])
    assert board.borrow([2])
    board.give_back([1])
    assert [other.ask(f"board.borrow([{cpu}])") for cpu in (0, 1, 2)] == [False, True, False]


def test_an_owner_that_waits_comes_before_the_next_borrower(
    board: Board, other: Other, another: Callable[[], Other]
) -> None:
    third = another()
    assert other.ask("board.borrow([4, 5])")
    taken: list[bool] = []
    owner = threading.Thread(target=lambda: taken.append(board.take([4, 5], patience=60)))
    owner.start()
    time.sleep(0.05)  # it waits now; if not, the test still holds
    assert not third.ask("board.borrow([4, 5])")
    other.ask("board.release()")
    owner.join()
    assert taken == [True]
    assert not third.ask("board.borrow([4])")


def test_an_owner_whose_patience_ends_keeps_the_right(board: Board, other: Other, another: Callable[[], Other]) -> None:
    assert other.ask("board.borrow([4, 5])")
    assert not board.take([4, 5], patience=0.01)
    assert board.users([3, 4, 5]) == {other.process.pid: (4, 5)}
    other.ask("board.release()")
    assert not another().ask("board.borrow([4])"), "the owner computes there although it could not take the place"


def test_a_killed_process_computes_nowhere(board: Board, other: Other) -> None:
    assert other.ask("board.take([0, 1], patience=0) and board.borrow([2])")
    other.process.send_signal(signal.SIGKILL)
    assert board.take([0, 1], patience=60)
    eventually(lambda: board.borrow([2]))


def test_a_forked_child_holds_nothing(board: Board, other: Other) -> None:
    assert board.take([0], patience=0)
    child = os.fork()
    if not child:
        time.sleep(600)
        os._exit(0)
    try:
        assert not other.ask("board.borrow([0])")
        board.release()
        assert other.ask("board.borrow([0])")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_deleted_board_is_noticed(board: Board, tmp_path: Path) -> None:
    assert not board.lost
    (tmp_path / "board").unlink()
    assert board.lost


def test_a_slot_is_taken_as_long_as_its_process_lives(board: Board, other: Other, another: Callable[[], Other]) -> None:
    assert other.ask("board.take_slot()") == 0
    assert board.take_slot() == 1
    board.release()
    third = another()
    assert third.ask("board.take_slot()") == 2, "a slot outlives the requests of its process"
    other.end()
    assert another().ask("board.take_slot()") == 0


def test_threads_of_two_workers_are_different_places() -> None:
    places = [set(thread_places(slot, 5000)) for slot in range(3)]
    assert not places[0] & places[1]
    assert not places[1] & places[2]
    assert min(places[0]) > 8192, "no CPU has such a number"


MEASURED = (Measured(1, 0.11, 3.5), Measured(2, 0.06, 0.0))
ENTRIES = [
    pytest.param(Entry(Identity(7, 9), Record(1, 4, 8)), id="nothing served"),
    pytest.param(
        Entry(Identity(7, 2**60), Record(2**32 - 1, 4, 8, MEASURED, 2.5, 3.0, 1e6, 1e5, None), Totals(9, 2, 0.5, 0.25)),
        id="busy",
    ),
    pytest.param(Entry(Identity(7, 9), Record(1, 4, 8, MEASURED, 2.5, 3.0, 1e6, 1e5, 1e6 + 1)), id="idle"),
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, entry: Entry) -> None:
    records = Records(Directory(str(tmp_path / "state")), "records")
    reader = Records(Directory(str(tmp_path / "state")), "records")
    records.write(0, entry)
    assert reader.read(0) == entry
    assert reader.idle_since(0) == entry.record.idle_since
    assert reader.slots() == {entry.worker: 0}
    assert reader.read(1) is None


def test_a_worker_that_left_and_came_again_has_the_lower_slot(tmp_path: Path) -> None:
    records = Records(Directory(str(tmp_path / "state")), "records")
    records.write(0, Entry(Identity(7, 9), Record(1, 4, 8)))
    records.write(1, Entry(Identity(7, 9), Record(1, 0, 8)))
    assert records.slots() == {Identity(7, 9): 0}


def test_more_widths_than_a_record_holds(tmp_path: Path) -> None:
    records = Records(Directory(str(tmp_path / "state")), "records")
    many = tuple(Measured(cores, 1.0, 1.0) for cores in range(1, 40))
    records.write(0, Entry(Identity(7, 9), Record(1, 1, 1, many)))
    records.write(1, Entry(Identity(8, 9), Record(2, 1, 1)))
    assert [entry and entry.record.model for entry in map(records.read, (0, 1))] == [1, 2]
    first = records.read(0)
    assert first is not None
    assert first.record.measured == many[: len(first.record.measured)] != ()


def test_a_record_is_never_read_in_part(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path / "state"))
    records, reader = Records(directory, "records"), Records(directory, "records")
    records.write(0, Entry(Identity(7, 9), Record(0, 0, 0)))
    done = threading.Event()

    def write() -> None:
        for number in range(3000):
            measured = tuple(Measured(number, number, number) for _ in range(8))
            records.write(0, Entry(Identity(7, 9), Record(number, number, number, measured, number, number, number)))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        entry = reader.read(0)
        if entry is not None:
            record = entry.record
            numbers = {record.model, record.cores, record.width, record.rate, record.seen, record.at}
            numbers |= {value for one in record.measured for value in (one.cores, one.seconds, one.weight)}
            assert len(numbers) == 1
            seen |= numbers
    writer.join()
    assert seen


def test_a_worker_that_was_killed_while_it_wrote_has_no_record(tmp_path: Path) -> None:
    records = Records(Directory(str(tmp_path / "state")), "records")
    records.write(0, Entry(Identity(7, 9), Record(1, 1, 1)))
    (file,) = (tmp_path / "state").iterdir()
    with file.open("r+b") as stream:
        stream.write((3).to_bytes(8, sys.byteorder))  # an odd version
    assert records.read(0) is None


def test_a_reader_sees_locks_and_makes_nothing(tmp_path: Path, another: Callable[[], Other]) -> None:
    missing = Directory(str(tmp_path / "state"))
    for kind in (Board, Records):
        with pytest.raises(FileNotFoundError):
            kind(missing, "board", reading=True)
        with pytest.raises(FileNotFoundError):
            kind(Directory(str(tmp_path)), "nothing", reading=True)
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)
    owner, borrower = another(), another()
    assert owner.ask("board.take([0, 1], patience=0)")
    assert borrower.ask("board.borrow([2, 3])")
    reader = Board(Directory(str(tmp_path)), "board", reading=True)
    assert reader.users(range(5)) == {owner.process.pid: (0, 1), borrower.process.pid: (2, 3)}
    reader.close()
    assert not borrower.ask("board.borrow([0])"), "a reader that closes takes nobody's locks away"


def test_records_that_are_just_being_made_are_none(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "records").touch()
    with pytest.raises(FileNotFoundError, match="records"):
        Records(Directory(str(tmp_path)), "records", reading=True)
    Records(Directory(str(tmp_path)), "records").write(0, Entry(Identity(7, 9), Record(1, 4, 8)))
    reader = Records(Directory(str(tmp_path)), "records", reading=True)
    assert reader.slots() == {Identity(7, 9): 0}
    with pytest.raises(TypeError, match="read-write"):
        reader.write(0, Entry(Identity(8, 9), Record(1, 4, 8)))


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="file"):
        Board(Directory(str(tmp_path / "file")), "board")
    with pytest.raises(StateError, match="file"):
        Records(Directory(str(tmp_path / "file")), "records")
