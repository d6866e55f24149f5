"""The ledger, machine-wide: which worker holds which slice. One small file, one lock, no daemon.

All TorchServe servers of a user on this machine share it. A lease ends with its process, so readers see living workers
only.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from ts_plugin.ledger.codec import LEASE_VARIABLE, pack_state, unpack_lease, unpack_state
from ts_plugin.ledger.directory import Directory, LedgerError, state_directory
from ts_plugin.ledger.model import Server, State
from ts_plugin.machine import process

VERSION = 1


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

    def announce(self) -> None:
        """Make the directory if need be, and tell those who lend which plan holds.

        Raises:
            LedgerError: see ``locked``.
        """
        with self.locked():
            pass  # it has

    def write(self, state: State) -> None:
        """Replace the content; the caller holds the lock. A reader sees the old content or the new, never a part.

        Raises:
            LedgerError: no space, or no permission; the old content stands.
        """
        draft = f"{self._name}.new"
        text = json.dumps({"version": VERSION, **pack_state(state)}, separators=(",", ":")).encode()
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
            return unpack_state(data) if data["version"] == VERSION else None
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
