"""The machine-wide registry: which worker holds which slice. One small file, one lock, no daemon.

All TorchServe servers of a user on this machine share it. A lease ends with its process, so readers see living workers
only.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from ts_plugin.leases.directory import Directory, StateError, state_directory
from ts_plugin.machine import process
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.machine.process import Identity
from ts_plugin.planning.planner import Demand, Slice
from ts_plugin.planning.policy import Allocator, Lend, Memory, OmpRuntime, Pin, Policy

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

LedgerError = StateError  # whatever keeps a worker from the ledger
VERSION = 1
LEASE_VARIABLE = "TS_CORES_LEASE"  # in the environment of every worker that the launcher bound; _recover reads it


@dataclass(frozen=True, slots=True)
class _OfProcess:
    """An entry that ends with its process."""

    pid: int
    start_time: int

    @property
    def identity(self) -> Identity:
        return Identity(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Lease(_OfProcess):
    """A worker owns a slice. ``moves`` counts how often it had to leave all its NUMA nodes.

    ``limit`` are the CPUs that taskset, for example, restricts it to; None if it may use all that its cpuset has.
    """

    model: str
    version: str
    worker_id: str
    server_pid: int | None
    demand: Demand
    slice: Slice
    moves: int = 0
    notes: tuple[str, ...] = ()
    limit: frozenset[int] | None = None

    def __str__(self) -> str:
        return f"worker {self.worker_id} of {self.model} {self.version}"


@dataclass(frozen=True, slots=True)
class Server(_OfProcess):
    """A TorchServe frontend and what its config.properties asks for.

    ``allowed`` are the CPUs that it and its workers may use: the frontend itself may be moved aside.
    ``limit`` is the same as a lease's.
    ``error`` says why its workers must serve unbound, a typo in ``cpu_launcher_args`` for example.
    """

    policy: Policy
    allowed: frozenset[int]
    error: str | None = None
    limit: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Refusal(_OfProcess):
    """Why a worker serves unbound; one that was started past the launcher cannot say so in its environment."""

    reason: str


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

    def neighbours(self, lease: Lease) -> tuple[Lease, ...]:
        """Return the workers whose slices lend to that of ``lease``, nearest first."""
        own = lease.slice
        others = [other for other in self.leases if other.slice.reach == own.reach and other.pid != lease.pid]

        def distance(other: Lease) -> tuple[bool, int]:
            return other.slice.l3_domains != own.l3_domains, abs(other.slice.cpus[0] - own.cpus[0])

        return tuple(sorted(others, key=distance)) if own.reach else ()


class Ledger:
    """The ledger in ``directory``; nothing is touched before the first read or lock."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = Directory(directory)
        self._chosen = ""
        self.needs_write = False  # the dead are in the file that `locked` read, or the file was rebuilt

    @property
    def _name(self) -> str:
        """How the names of this ledger's files begin; chosen once.

        Other machines and containers may share the directory, and a PID means nothing there. Release 0.1.0 left out the
        machine. As long as a server or worker lives in the ledger that it made, everybody stays there: workers in two
        ledgers would own the same cores.
        """
        if self._chosen:  # no functools.cached_property: its lock would be held for ever in a child forked meanwhile
            return self._chosen
        namespace, boot = os.stat("/proc/self/ns/pid").st_ino, process.boot()
        old = f"ledger-{namespace}"
        present = State()
        with suppress(LedgerError):  # whoever opens a file in this directory next hears of it
            present = (self._load(old) or State()).living()
        self._chosen = old if present.servers or present.leases or not boot else f"ledger-{boot}-{namespace}"
        return self._chosen

    @property
    def directory(self) -> str:
        return self._directory.path

    def beside(self, what: str) -> tuple[Directory, str]:
        """Return where another file of the same machine and PID namespace lies, for ``Directory.open``."""
        return self._directory, self._name.replace("ledger", what)

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
        return self._load(self._name) or State()

    @contextmanager
    def locked(self) -> Iterator[State]:
        """Yield the living part of the ledger while no other process can change it.

        A missing or damaged ledger is rebuilt from the environments of the workers that run.

        Raises:
            LedgerError: the directory cannot be used, or another process holds the lock for too long.
        """
        with self._directory.locked(f"{self._name}.lock"):
            written = self._load(self._name)
            state = (_recover(self.directory) if written is None else written).living()
            self.needs_write = state != written
            self._announce(state.generation)  # whoever wrote it may have died before this
            yield state

    def write(self, state: State) -> None:
        """Replace the content; the caller holds the lock. A reader sees the old content or the new, never a part.

        Raises:
            LedgerError: no space, or no permission; the old content stands.
        """
        draft = f"{self._name}.new"
        text = json.dumps({"version": VERSION, **_pack_state(state)}, separators=(",", ":")).encode()
        file = self._directory.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                view = memoryview(text)
                while view:
                    view = view[os.write(file, view) :]
            finally:
                os.close(file)
            os.replace(f"{self.directory}/{draft}", self.path)
            self.needs_write = False
            self._announce(state.generation)
        except OSError as error:
            raise self._directory.error(error) from error

    def _announce(self, generation: int) -> None:
        """Tell those who lend (``lending.words``, the first word) which plan holds; they read it at every region."""
        directory, name = self.beside("lending")
        with suppress(OSError):  # without the file nobody lends; with a wrong one neither
            file = directory.open(name, os.O_WRONLY)
            try:
                os.pwrite(file, struct.pack("=Q", generation), 0)
            finally:
                os.close(file)

    def _load(self, name: str) -> State | None:
        """Return the content of the file ``name``; None where there is none, or none that this version can read."""
        try:
            file = self._directory.open(f"{name}.json", os.O_RDONLY)
        except FileNotFoundError:
            return None
        with open(file, "rb") as stream:
            text = stream.read()
        try:
            data = json.loads(text)
            return _unpack_state(data) if data["version"] == VERSION else None
        except Exception:  # noqa: BLE001 - whatever the file contains, workers must start
            return None


def _recover(directory: str) -> State:
    """Rebuild the leases of the workers that the launcher bound: each carries its own in its environment.

    Workers that claimed their slice themselves enter it again by themselves when they see it gone.
    """
    leases = []
    servers: dict[int, Server] = {}
    for pid in process.pids():
        environment = process.environment(pid)
        text = environment.get(LEASE_VARIABLE)
        if text is None or process.owner(pid) != os.getuid():
            continue
        try:
            lease = unpack_lease(text)
            if lease.pid != pid:
                continue  # a child of the worker, which inherited the variable
            if state_directory(environment) != directory:
                continue  # a worker of another ledger
            mask = tuple(sorted(os.sched_getaffinity(pid)))
        except Exception:  # noqa: BLE001 - a variable can contain anything
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
        raise TypeError("a generation, PID or start time is not an integer")
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


def _unpack_all(kind: Any, items: list[dict[str, Any]]) -> Any:
    return tuple(_unpack(kind, item) for item in items)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# How to read a field, by its name, which means the same in every class above; _plain reads the fields not named here.
READERS: dict[str, Callable[[Any], Any]] = {
    "servers": partial(_unpack_all, Server),
    "leases": partial(_unpack_all, Lease),
    "refusals": partial(_unpack_all, Refusal),
    "demand": partial(_unpack, Demand),
    "slice": partial(_unpack, Slice),
    "policy": partial(_unpack, Policy),
    "pin": Pin,
    "lend": Lend,
    "memory": Memory,
    "allocator": Allocator,
    "omp_runtime": OmpRuntime,
    "allowed": parse_cpulist,
    "held": parse_cpulist,
    "reach": parse_cpulist,
    "limit": parse_cpulist,
    "reserved": parse_cpulist,
    "node_ids": parse_cpulist,
    "core_list": parse_cpulist,
}
