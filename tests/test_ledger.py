"""The ledger: what is written is read, what is damaged is rebuilt, what is not ours is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.eventually import eventually
from ts_plugin.leases import directory
from ts_plugin.leases.ledger import LEASE_VARIABLE, Lease, Ledger, LedgerError, Server, State, pack_lease, unpack_lease
from ts_plugin.machine import process
from ts_plugin.planning.planner import Demand, Slice
from ts_plugin.planning.policy import Allocator, Memory, OmpRuntime, Pin, Policy


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "state"))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as child:
        yield child
        child.kill()


def lease_for(pid: int, cpus: tuple[int, ...] = (0,), policy: Policy | None = None) -> Lease:
    identity = process.identify(pid)
    assert identity is not None
    demand = Demand(frozenset({0, 1, 2}), policy or Policy(), quota=2.5, cores=2, share=1.5, held=frozenset({1}))
    cores = Slice(cpus, len(cpus), (0,), (0,), (0,), pinned=True)
    return Lease(pid, identity.start_time, "resnet", "1.0", "9000", None, demand, cores, moves=1, notes=("a note",))


EVERYTHING = Policy(
    node_ids=frozenset({1}),
    core_list=frozenset({2, 3}),
    cores_per_worker=(4, 2),
    logical=True,
    reserve_cores=2,
    pin=Pin.ALWAYS,
    memory=Memory.BIND,
    allocator=Allocator.JEMALLOC,
    omp_runtime=OmpRuntime.INTEL,
    notes=("superseded",),
)


@pytest.mark.parametrize("policy", [Policy(), EVERYTHING], ids=["defaults", "everything"])
def test_what_is_written_is_read(ledger: Ledger, policy: Policy) -> None:
    lease = lease_for(os.getpid(), policy=policy)
    server = Server(lease.pid, lease.start_time, policy, frozenset({0, 1}), error="typo")
    state = State(7, (server,), (lease,), reserved=frozenset({1}), notes=("note",))
    with ledger.locked() as before:
        assert before == State()
        ledger.write(state)
    assert ledger.read() == state
    assert unpack_lease(pack_lease(lease)) == lease


def test_a_lease_ends_with_its_process(ledger: Ledger, sleeper: subprocess.Popen[bytes]) -> None:
    state = State(leases=(lease_for(sleeper.pid), lease_for(os.getpid())))
    with ledger.locked():
        ledger.write(state)
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait()
    assert [lease.pid for lease in ledger.read().leases] == [os.getpid()]


def test_a_reused_pid_is_not_taken_for_its_owner(ledger: Ledger) -> None:
    earlier = lease_for(os.getpid())
    earlier = unpack_lease(pack_lease(earlier).replace(str(earlier.start_time), str(earlier.start_time - 1)))
    with ledger.locked():
        ledger.write(State(leases=(earlier,)))
    assert ledger.read().leases == ()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"garbage",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"version": 0, "cores": "all"}',
        b'{"version": 99}',
        b'{"version": 1, "leases": [{}]}',
        b'{"version": 1, "leases": 3}',
        b'{"version": 1, "reserved": "3-0"}',
        b'{"version": 1, "surprise": true}',
        b'{"version": 1, "leases": [{"pid": "x"}]}',
        b'{"version": 1, "generation": "x"}',
        b'{"version": 1, "generation": null}',
        b"[" * 200_000,
    ],
)
def test_a_damaged_ledger_is_rebuilt_from_the_workers_that_run(ledger: Ledger, damage: bytes) -> None:
    with ledger.locked():
        ledger.write(State())
    with subprocess.Popen(["sleep", "600"]) as first:
        lease = lease_for(first.pid)
        first.kill()
    # A worker carries its lease in its environment; the PID is known only after the start, as with execve.
    script = 'export TS_CORES_LEASE=$(printf "$LEASE" $$ $(cut -d" " -f22 /proc/$$/stat)); exec sleep 600'
    template = json.dumps(json.loads(pack_lease(lease)) | {"pid": 111, "start_time": 222})
    template = template.replace("111", "%d").replace("222", "%d")
    settings = {"LEASE": template, "TS_CORES_STATE_DIR": ledger.directory}
    with (
        subprocess.Popen(["sh", "-c", script], env={**os.environ, **settings}) as worker,
        subprocess.Popen(["sh", "-c", script], env={**os.environ, "LEASE": template}) as stranger,
    ):
        try:
            for started in (worker, stranger):
                while LEASE_VARIABLE not in process.environment(started.pid):
                    assert started.poll() is None
            os.sched_setaffinity(worker.pid, {max(os.sched_getaffinity(0))})
            Path(ledger.path).write_bytes(damage)
            assert ledger.read() == State()
            with ledger.locked() as state:
                found = state.leases
            assert [lease.pid for lease in found] == [worker.pid], "not the one with another state directory"
            assert found[0].slice.cpus == (max(os.sched_getaffinity(0)),), "the mask in force is the slice"
        finally:
            worker.kill()
            stranger.kill()


def test_the_directory_is_made_for_this_user_alone(ledger: Ledger) -> None:
    with ledger.locked():
        ledger.write(State())
    assert stat.S_IMODE(os.stat(ledger.directory).st_mode) == 0o700


def test_a_directory_that_others_may_enter_is_refused_and_left_alone(ledger: Ledger) -> None:
    os.mkdir(ledger.directory)
    os.chmod(ledger.directory, 0o1777)
    with pytest.raises(LedgerError, match=r"others may enter it \(mode 1777\); chmod 700 it"), ledger.locked():
        pass
    assert stat.S_IMODE(os.stat(ledger.directory).st_mode) == 0o1777


def test_a_planted_link_is_not_followed(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", ledger.directory)
    with pytest.raises(LedgerError, match=r"state: .*; .*set TS_CORES_STATE_DIR"), ledger.locked():
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_planted_ledger_link_is_not_followed(ledger: Ledger, tmp_path: Path) -> None:
    with ledger.locked():
        pass
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (os.path.basename(ledger.path), os.path.basename(ledger.path).replace(".json", ".new")):
        os.symlink(victim, f"{ledger.directory}/{name}")
        with pytest.raises(LedgerError, match="symbolic link"), ledger.locked():
            ledger.write(State())
        os.unlink(f"{ledger.directory}/{name}")
    assert victim.read_text() == "precious"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's directory")
def test_another_users_directory_is_refused(ledger: Ledger) -> None:
    os.mkdir(ledger.directory)
    os.chown(ledger.directory, 4242, 4242)
    with pytest.raises(LedgerError, match="belongs to user 4242"), ledger.locked():
        pass


def test_a_full_disk_leaves_the_old_content(ledger: Ledger) -> None:
    old = State(leases=(lease_for(os.getpid()),))
    with ledger.locked():
        ledger.write(old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with ledger.locked(), pytest.raises(LedgerError, match=r"state: .*; .*set TS_CORES_STATE_DIR"):
            ledger.write(State(notes=("x" * 1000,)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ledger.read() == old


def test_a_file_in_the_directorys_place_is_an_error_with_the_path(ledger: Ledger) -> None:
    Path(ledger.directory).write_text("")
    with pytest.raises(LedgerError, match=f"^{ledger.directory}: "), ledger.locked():
        pass


def test_a_lock_that_is_never_released_ends_in_an_error(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "LOCK_TIMEOUT", 0.1)
    with ledger.locked():
        other = Ledger(ledger.directory)
        with pytest.raises(LedgerError, match="held by another thread of this process"), other.locked():
            pass
    with Ledger(ledger.directory).locked():
        pass


FORKING = """
import ctypes, os, signal, sys, threading, time
from ts_plugin.leases.ledger import Ledger
ledger = Ledger(sys.argv[1])
def fork():  # as os.fork() does it, or as a library in C does it, of which Python knows nothing
    return os.fork() if sys.argv[2] == "Python" else ctypes.PyDLL(None).fork()
def tell(word):
    os.write(1, word.encode() + b"\\n")
"""


@contextmanager
def forking(ledger: Ledger, code: str, kind: str = "Python") -> Iterator[subprocess.Popen[str]]:
    """Run ``code`` after FORKING in a process of its own; end it afterwards, and what it forked."""
    arguments = [sys.executable, "-c", FORKING + code, ledger.directory, kind]
    started = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield started
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["Python", "C"])
def test_a_child_forked_under_the_lock_does_not_keep_it(ledger: Ledger, kind: str) -> None:
    code = """
with ledger.locked():
    if not fork():
        signal.pause()
with ledger.locked():
    tell("locked again")
signal.pause()
"""
    with forking(ledger, code, kind) as parent:
        assert line_of(parent) == "locked again"
        with ledger.locked():
            pass


@pytest.mark.parametrize("kind", ["Python", "C"])
def test_a_child_does_not_keep_the_lock_of_a_parent_that_was_killed(ledger: Ledger, kind: str) -> None:
    code = """
with ledger.locked():
    if fork():
        tell("forked")
    signal.pause()
"""
    with forking(ledger, code, kind) as parent:
        assert line_of(parent) == "forked"
        parent.kill()
        parent.wait()
        with ledger.locked():
            pass


def test_a_child_that_leaves_the_block_takes_no_lock_from_its_parent(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
with ledger.locked():
    child = fork()
    if child:
        tell(f"the child ended with {os.waitpid(child, 0)[1]}")
        signal.pause()
os._exit(0)
"""
    monkeypatch.setattr(directory, "LOCK_TIMEOUT", 0.1)
    with forking(ledger, code) as parent:
        assert line_of(parent) == "the child ended with 0"
        with pytest.raises(LedgerError, match=f"held by process {parent.pid} for"), ledger.locked():
            pass


def test_children_forked_at_any_moment_neither_keep_the_lock_nor_lose_the_way_to_it(ledger: Ledger) -> None:
    """A thread locks all the time, as the follower's may, while the main one forks, as a DataLoader does."""
    code = """
def lock():
    while True:
        with Ledger(sys.argv[1]).locked():
            pass
threading.Thread(target=lock, daemon=True).start()
children = []
for _ in range(200):
    child = os.fork()
    if not child:
        with ledger.locked():
            tell("child")
        signal.pause()
    children.append(child)
signal.pause()
"""
    with forking(ledger, code) as parent:
        assert [line_of(parent) for _ in range(200)] == ["child"] * 200
        parent.kill()
        parent.wait()
        with ledger.locked():
            pass


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
with ledger.locked():
    tell("locked")
    signal.pause()
"""
    with ExitStack() as held:
        held.enter_context(ledger.locked())
        with forking(ledger, code) as waiting:
            assert eventually(lambda: any(file.endswith(".lock") for file in open_files(waiting.pid)))
            shutil.rmtree(ledger.directory)
            held.close()
            assert line_of(waiting) == "locked"
            monkeypatch.setattr(directory, "LOCK_TIMEOUT", 0.1)
            with pytest.raises(LedgerError, match=f"held by process {waiting.pid} for"), ledger.locked():
                pass


def open_files(pid: int) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def test_the_place_follows_from_the_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TS_CORES_STATE_DIR", raising=False)
    place = Ledger().directory
    monkeypatch.setenv("TMPDIR", "/somewhere/else")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/12345")
    assert Ledger().directory == place
    assert str(os.getuid()) in place


CLAIMANT = Path(__file__).with_name("claimant.py")


def test_a_relative_place_is_refused_in_every_working_directory(tmp_path: Path) -> None:
    """A worker runs in the directory of its model, so each model would have a ledger, and slices would overlap."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        answer = subprocess.run(
            [sys.executable, str(CLAIMANT)],
            cwd=tmp_path / name,
            env={**os.environ, "TS_CORES_STATE_DIR": "state"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        reason = json.loads(answer.stdout)["error"]
        assert reason.startswith("state: TS_CORES_STATE_DIR is relative")
        assert reason.endswith("set it to an absolute path")
        assert list((tmp_path / name).iterdir()) == []
