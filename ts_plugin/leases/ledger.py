"""The machine-wide registry: which worker holds which slice. One small file, one lock, no daemon.

All TorchServe servers of a user on this machine share it, so it lies at a place that follows from the user id alone.
A lease ends with its process; who reads the ledger sees living workers only.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from ts_plugin.machine import process
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.machine.process import Identity
from ts_plugin.planning.planner import Demand, Slice
from ts_plugin.planning.policy import Allocator, Memory, OmpRuntime, Pin, Policy

__all__ = [
    "LEASE_VARIABLE",
    "Lease",
    "Ledger",
    "LedgerError",
    "Refusal",
    "Server",
    "State",
    "pack_lease",
    "state_directory",
    "unpack_lease",
]

VERSION = 1
LOCK_TIMEOUT = 20.0  # seconds; TorchServe gives a worker 120 to start
LEASE_VARIABLE = "TS_CORES_LEASE"  # in the environment of every worker that the launcher bound: the ledger's back-up


class LedgerError(OSError):
    """The ledger cannot be used; the message starts with the path and ends with the remedy."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker owns a slice. ``moves`` counts how often it had to leave all its NUMA nodes.

    ``limit`` are the CPUs that taskset, say, holds it to; None if it may use whatever its cpuset has, now and later.
    """

    pid: int
    start_time: int
    model: str
    version: str
    worker_id: str
    server_pid: int | None
    demand: Demand
    slice: Slice
    moves: int = 0
    notes: tuple[str, ...] = ()
    limit: frozenset[int] | None = None

    @property
    def identity(self) -> Identity:
        return Identity(self.pid, self.start_time)

    def __str__(self) -> str:
        return f"worker {self.worker_id} of {self.model} {self.version}"


@dataclass(frozen=True, slots=True)
class Server:
    """A TorchServe frontend and what its config.properties asks for.

    ``allowed`` are the CPUs that it and its workers may use: the frontend itself may be moved aside.
    ``limit`` is the same as a lease's.
    ``error`` says why its workers must serve unbound, a typo in ``cpu_launcher_args`` for example.
    """

    pid: int
    start_time: int
    policy: Policy
    allowed: frozenset[int]
    error: str | None = None
    limit: frozenset[int] | None = None

    @property
    def identity(self) -> Identity:
        return Identity(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker serves unbound; one that was started past the launcher cannot say so in its environment."""

    pid: int
    start_time: int
    reason: str

    @property
    def identity(self) -> Identity:
        return Identity(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class State:
    """The content of the ledger; ``generation`` grows with every change, ``notes`` are the planner's."""

    generation: int = 0
    servers: tuple[Server, ...] = ()
    leases: tuple[Lease, ...] = ()
    reserved: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def living(self) -> State:
        """Return this state without the processes that have ended; what the plan for the last of them said ends too."""
        leases = tuple(lease for lease in self.leases if lease.identity.alive())
        return replace(
            self,
            servers=tuple(server for server in self.servers if server.identity.alive()),
            leases=leases,
            reserved=self.reserved if leases else frozenset(),
            notes=self.notes if leases else (),
            refusals=tuple(refusal for refusal in self.refusals if refusal.identity.alive()),
        )

    def lease_of(self, pid: int) -> Lease | None:
        return next((lease for lease in self.leases if lease.pid == pid), None)


def state_directory(environment: Mapping[str, str] = os.environ) -> str:
    """Return the directory of the ledger: TS_CORES_STATE_DIR, or a place that follows from the user id alone.

    It follows neither TMPDIR nor XDG_RUNTIME_DIR: two servers started from different sessions must meet there.
    """
    chosen = environment.get("TS_CORES_STATE_DIR")
    if chosen:
        return os.path.abspath(chosen)
    base = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"
    return f"{base}/ts-cores-{os.getuid()}"


_locks: set[int] = set()  # open lock files of this process


def _release_in_child() -> None:
    """Close what a child forked in the middle shares: it would hold the lock on after its parent's death."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_release_in_child)


class Ledger:
    """The ledger file in ``directory``; nothing is touched before the first read or lock."""

    def __init__(self, directory: str | None = None) -> None:
        self.directory = state_directory() if directory is None else directory
        # Containers may share the directory, but a PID means nothing outside its namespace.
        self._name = f"ledger-{os.stat('/proc/self/ns/pid').st_ino}"
        self.stale = False  # whether what `locked` yielded last is not what the file says

    @property
    def path(self) -> str:
        return f"{self.directory}/{self._name}.json"

    def version(self) -> tuple[int, int]:
        """Return a value that changes with every write; costs one system call."""
        try:
            status = os.stat(self.path)
        except OSError:
            return (0, 0)
        return (status.st_ino, status.st_mtime_ns)

    def read(self) -> State:
        """Return the living part of the ledger, without a lock; a missing or damaged ledger is empty.

        Raises:
            LedgerError: the directory is not this user's alone.
        """
        return self.read_all().living()

    def read_all(self) -> State:
        """Return what ``read`` returns, and the leases and servers whose process has ended since the last write."""
        if not os.path.lexists(self.directory):
            return State()
        return self._load() or State()

    @contextmanager
    def locked(self) -> Iterator[State]:
        """Yield the living part of the ledger while no other process can change it.

        A missing or damaged ledger is rebuilt from the environments of the workers that run.

        Raises:
            LedgerError: the directory cannot be used, or another process held the lock for LOCK_TIMEOUT seconds.
        """
        lock = self._open(f"{self._name}.lock", os.O_RDWR | os.O_CREAT)
        _locks.add(lock)
        try:
            self._wait_for(lock)
            written = self._load()
            state = (_recover(self.directory) if written is None else written).living()
            self.stale = state != written
            yield state
        finally:
            _locks.discard(lock)
            os.close(lock)

    def write(self, state: State) -> None:
        """Replace the content; the caller holds the lock. A reader sees the old content or the new, never a part.

        Raises:
            LedgerError: no space, or no permission; the old content stands.
        """
        draft = f"{self._name}.new"
        text = json.dumps({"version": VERSION, **_pack_state(state)}, separators=(",", ":")).encode()
        try:
            file = self._open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                view = memoryview(text)
                while view:
                    view = view[os.write(file, view) :]
            finally:
                os.close(file)
            os.replace(f"{self.directory}/{draft}", self.path)
            self.stale = False
        except LedgerError:
            raise
        except OSError as error:
            raise self._error(error) from error

    def _wait_for(self, lock: int) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LedgerError(
                        f"{self.directory}/{self._name}.lock: held by another process for {LOCK_TIMEOUT:.0f} s; "
                        f"find it with: fuser {self.directory}/{self._name}.lock"
                    ) from None
                time.sleep(0.002)

    def _load(self) -> State | None:
        """Return the content; None where there is none, or none that this version can read."""
        try:
            file = self._open(f"{self._name}.json", os.O_RDONLY)
        except FileNotFoundError:
            return None
        with open(file, "rb") as stream:
            text = stream.read()
        try:
            data = json.loads(text)
            return _unpack_state(data) if data["version"] == VERSION else None
        except Exception:  # noqa: BLE001 - damage has no limits: no content may keep a worker from starting
            return None

    def _open(self, name: str, flags: int) -> int:
        """Open a file in the directory, which is made if need be, without following a planted link."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(directory)
                if status.st_uid != os.getuid():
                    raise PermissionError(f"belongs to user {status.st_uid}, not {os.getuid()}")
                if stat.S_IMODE(status.st_mode) & 0o077:
                    raise PermissionError(f"others may enter it (mode {stat.S_IMODE(status.st_mode):o})")
                return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
            finally:
                os.close(directory)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> LedgerError:
        reason = error.strerror or str(error)
        return LedgerError(
            f"{self.directory}: {reason}; chmod 700 it, or set TS_CORES_STATE_DIR to a directory that is yours alone"
        )


def _recover(directory: str) -> State:
    """Rebuild the leases of the workers that the launcher bound: each carries its own in its environment.

    Workers that claimed their slice themselves enter it again by themselves when they see it gone.
    """
    leases = []
    servers: dict[int, Server] = {}
    for pid in process.pids():
        environment = process.environment(pid)
        text = environment.get(LEASE_VARIABLE)
        if text is None or state_directory(environment) != directory or process.owner(pid) != os.getuid():
            continue
        try:
            lease = unpack_lease(text)
            if lease.pid != pid:
                continue  # a child of the worker, which inherited the variable
            mask = tuple(sorted(os.sched_getaffinity(pid)))
        except Exception:  # noqa: BLE001 - anybody may have put anything there
            continue
        cores = replace(lease.slice, cpus=mask) if lease.slice.pinned else lease.slice
        leases.append(replace(lease, slice=cores))
        if lease.server_pid is not None and (frontend := process.identify(lease.server_pid)):
            demand = lease.demand
            servers[frontend.pid] = Server(
                frontend.pid, frontend.start_time, demand.policy, demand.allowed, limit=lease.limit
            )
    return State(servers=tuple(servers.values()), leases=tuple(leases))


# ---- values to JSON and back: sets of CPUs as CPU lists, defaults left out -----------------------


def pack_lease(lease: Lease) -> str:
    """Return ``lease`` as the text that LEASE_VARIABLE carries."""
    return json.dumps(_pack(lease), separators=(",", ":"))


def _pack(value: Any) -> Any:
    if isinstance(value, frozenset):
        return format_cpulist(value)
    if isinstance(value, tuple):
        return [_pack(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {
            field.name: _pack(item)
            for field in fields(value)
            if (item := getattr(value, field.name)) is not field.default and item != field.default
        }
    return value


def _pack_state(state: State) -> dict[str, Any]:
    packed: dict[str, Any] = _pack(state)
    return packed


def _unpack_state(data: dict[str, Any]) -> State:
    state: State = _unpack(State, {name: value for name, value in data.items() if name != "version"})
    numbers = [state.generation, *(number for lease in state.leases for number in (lease.pid, lease.start_time))]
    if not all(isinstance(number, int) for number in numbers):
        raise TypeError("a number is not a number")
    return state


def unpack_lease(text: str) -> Lease:
    """Return the lease that ``pack_lease`` packed.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: ``text`` is something else.
    """
    lease: Lease = _unpack(Lease, json.loads(text))
    return lease


def _unpack(kind: Any, data: dict[str, Any]) -> Any:
    return kind(**{name: READERS.get(name, _plain)(value) for name, value in data.items()})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


READERS: dict[str, Callable[[Any], Any]] = {  # by field name, which means one thing wherever it stands
    "servers": lambda items: tuple(_unpack(Server, item) for item in items),
    "leases": lambda items: tuple(_unpack(Lease, item) for item in items),
    "refusals": lambda items: tuple(_unpack(Refusal, item) for item in items),
    "demand": lambda item: _unpack(Demand, item),
    "slice": lambda item: _unpack(Slice, item),
    "policy": lambda item: _unpack(Policy, item),
    "pin": Pin,
    "memory": Memory,
    "allocator": Allocator,
    "omp_runtime": OmpRuntime,
    **dict.fromkeys(("allowed", "held", "limit", "node_ids", "core_list", "reserved"), parse_cpulist),
}
