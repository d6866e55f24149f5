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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.leases import lease_of
from ts_plugin.ledger import directory
from ts_plugin.ledger.codec import LEASE_VARIABLE, pack_lease, unpack_lease
from ts_plugin.ledger.directory import LedgerError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Lease, Server, State
from ts_plugin.machine import process
from ts_plugin.planning.planner import Demand
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
    demand = Demand(frozenset({0, 1, 2}), policy or Policy(), quota=2.5, cores=2, share=1.5, held=frozenset({1}))
    return lease_of(cpus, pid, model="resnet", demand=demand, moves=1, notes=("a note",))


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


@pytest.mark.process
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
    with pytest.raises(LedgerError, match="belongs to user 4242, not 0; set TS_CORES_STATE_DIR"), ledger.locked():
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
from ts_plugin.ledger.file import Ledger
ledger = Ledger(sys.argv[1])
def fork():  # as os.fork() does it, or as a library in C does it, of which Python knows nothing
    return os.fork() if sys.argv[2] == "Python" else ctypes.PyDLL(None).fork()
def tell(word):
    os.write(1, word.encode() + b"\\n")
def stay():  # whoever reads what the others tell sees the end of it when they end
    os.close(1)
    signal.pause()
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


@pytest.mark.process
@pytest.mark.parametrize("kind", ["Python", "C"])
def test_a_child_forked_under_the_lock_does_not_keep_it(ledger: Ledger, kind: str) -> None:
    code = """
with ledger.locked():
    if not fork():
        stay()
with ledger.locked():
    tell("locked again")
stay()
"""
    with forking(ledger, code, kind) as parent:
        assert line_of(parent) == "locked again"
        with ledger.locked():
            pass


@pytest.mark.process
@pytest.mark.parametrize("kind", ["Python", "C"])
def test_a_child_does_not_keep_the_lock_of_a_parent_that_was_killed(ledger: Ledger, kind: str) -> None:
    code = """
with ledger.locked():
    if fork():
        tell("forked")
    stay()
"""
    with forking(ledger, code, kind) as parent:
        assert line_of(parent) == "forked"
        parent.kill()
        parent.wait()
        with ledger.locked():
            pass


@pytest.mark.process
def test_a_child_that_leaves_the_block_takes_no_lock_from_its_parent(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
with ledger.locked():
    child = fork()
    if child:
        tell(f"the child ended with {os.waitpid(child, 0)[1]}")
        stay()
os._exit(0)
"""
    monkeypatch.setattr(directory, "LOCK_TIMEOUT", 0.1)
    with forking(ledger, code) as parent:
        assert line_of(parent) == "the child ended with 0"
        with pytest.raises(LedgerError, match=f"held by process {parent.pid} for"), ledger.locked():
            pass


@pytest.mark.process
def test_children_forked_at_any_moment_do_not_keep_the_lock(ledger: Ledger) -> None:
    """A thread locks all the time, as the follower's may, while the main one forks, as a DataLoader does."""
    code = """
sys.setswitchinterval(1e-5)
forking = True
def lock():
    while forking:
        with Ledger(sys.argv[1]).locked():
            pass
thread = threading.Thread(target=lock)
thread.start()
for number in range(400):
    if not fork():
        if number % 40 == 0:
            with ledger.locked():
                tell("child")
        stay()
    time.sleep(0.001)
forking = False
thread.join()
with ledger.locked():
    tell("parent")
stay()
"""
    with forking(ledger, code) as parent:
        assert sorted(line_of(parent) for _ in range(11)) == ["child"] * 10 + ["parent"]


@pytest.mark.process
def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
with ledger.locked():
    tell("locked")
    stay()
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


VICTIM, OTHER = 60_000 + os.getpid() % 5_000, 65_000  # user ids that nobody has


def as_user(uid: int, act: Callable[[], str]) -> str:
    """Return what ``act`` returns, or the error that it raises, in a process of another user."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            answer = act()
        except OSError as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(sender, answer.encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def write_one_note() -> str:
    ledger = Ledger()
    with ledger.locked() as state:
        ledger.write(replace(state, generation=state.generation + 1))
    return ledger.directory


def read_generation() -> str:
    return str(Ledger().read().generation)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The place where the ledger of VICTIM lies if nobody minds."""
    monkeypatch.delenv("TS_CORES_STATE_DIR")
    path = as_user(VICTIM, lambda: Ledger().directory)
    yield path
    for taken in Path(path).parent.glob(f"{Path(path).name}*"):
        if taken.is_dir() and not taken.is_symlink():
            shutil.rmtree(taken)
        else:
            taken.unlink()


def plant(kind: str, path: str) -> str:
    if kind == "directory":
        os.mkdir(path)
    elif kind == "file":
        Path(path).touch()
    else:
        os.symlink("/etc", path)
    return "planted"


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run processes of other users")


@pytest.mark.process
@needs_root
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_a_place_that_another_user_took_is_refused_with_a_remedy_that_works(place: str, kind: str) -> None:
    assert as_user(OTHER, lambda: plant(kind, place)) == "planted"
    reason = as_user(VICTIM, write_one_note)
    assert reason.startswith(f"LedgerError: {place}: ")
    assert reason.endswith("set TS_CORES_STATE_DIR to a directory that is yours alone, the same for all your servers")
    assert "ledger" not in os.listdir(place if kind == "directory" else "/etc"), "nothing is written there"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_CORES_STATE_DIR", f"{place}-mine")
        assert as_user(VICTIM, write_one_note) == f"{place}-mine"


@pytest.mark.process
@needs_root
def test_another_user_cannot_take_the_place_away_once_it_is_used(place: str) -> None:
    assert as_user(VICTIM, write_one_note) == place
    assert "File exists" in as_user(OTHER, lambda: plant("directory", place))
    assert as_user(VICTIM, write_one_note) == place
    assert as_user(VICTIM, read_generation) == "2"


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this process run on another machine, as far as a ledger can tell."""
    return lambda boot: monkeypatch.setattr(process, "boot", lambda: boot)


def test_two_machines_that_share_a_directory_have_two_ledgers(
    tmp_path: Path, another_machine: Callable[[str], None], sleeper: subprocess.Popen[bytes]
) -> None:
    """A home directory on NFS: on both machines the first PID namespace has the same number."""
    ledgers = []
    for boot, pid in (("0123456789ab", os.getpid()), ("ba9876543210", sleeper.pid)):
        another_machine(boot)
        ledger = Ledger(str(tmp_path / "state"))
        with ledger.locked() as state:
            ledger.write(replace(state, generation=state.generation + 1, leases=(lease_for(pid),)))
        ledgers.append(ledger)
    assert [[lease.pid for lease in one.read_all().leases] for one in ledgers] == [[os.getpid()], [sleeper.pid]]
    assert [one.read_all().generation for one in ledgers] == [1, 1]


def test_the_ledger_of_a_running_older_release_is_shared_until_all_in_it_have_ended(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """After an upgrade under a running server: two ledgers would give the same cores away twice."""
    state = tmp_path / "state"
    old = state / f"ledger-{os.stat('/proc/self/ns/pid').st_ino}.json"
    ledger = Ledger(str(state))
    with ledger.locked() as before:
        ledger.write(replace(before, leases=(lease_for(sleeper.pid),)))
    Path(ledger.path).rename(old)
    newcomer, later = Ledger(str(state)), Ledger(str(state))
    assert [lease.pid for lease in newcomer.read().leases] == [sleeper.pid]
    assert newcomer.path == str(old)
    sleeper.kill()
    sleeper.wait()
    assert later.path == ledger.path
    assert newcomer.path == str(old), "whoever is there stays"


def test_where_the_machine_cannot_be_told_the_name_is_without_it(
    tmp_path: Path, another_machine: Callable[[str], None]
) -> None:
    another_machine("")
    assert Path(Ledger(str(tmp_path)).path).stem == f"ledger-{os.stat('/proc/self/ns/pid').st_ino}"


CLAIMANT = Path(__file__).with_name("claimant.py")


@pytest.mark.process
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
