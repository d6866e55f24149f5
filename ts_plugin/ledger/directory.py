"""Where the state of all servers of this user lies: a directory that no other user can enter, and the locks in it."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LOCK_TIMEOUT = 20.0  # seconds; TorchServe gives a worker 120 to start
FLOCK = struct.Struct("hhqqi")  # struct flock: type, whence, start, length, PID
YOURS = "set TS_CORES_STATE_DIR to a directory that is yours alone, the same for all your servers"


class LedgerError(OSError):
    """The state directory cannot be used; the message starts with the path and ends with the remedy."""


def state_directory(environment: Mapping[str, str] = os.environ) -> str:
    """Return the path of the directory: TS_CORES_STATE_DIR, or a place that follows from the user id alone.

    It follows neither TMPDIR nor XDG_RUNTIME_DIR: two servers started from different sessions must meet there.
    Another user may make that place first: then it is refused, like every directory that is not this user's alone.

    Raises:
        LedgerError: TS_CORES_STATE_DIR is relative.
    """
    chosen = environment.get("TS_CORES_STATE_DIR")
    if not chosen:
        return f"{'/dev/shm' if os.path.isdir('/dev/shm') else '/tmp'}/ts-cores-{os.getuid()}"
    if not os.path.isabs(chosen):
        # Every worker starts in the directory of its model, so each model would get a ledger of its own.
        raise LedgerError(
            f"{chosen}: TS_CORES_STATE_DIR is relative, which is another directory for every process that runs in "
            "another one; set it to an absolute path"
        )
    return os.path.normpath(chosen)


# One for each lock file: a record lock keeps processes apart, not the threads of one process.
_mutexes: dict[str, threading.Lock] = {}
os.register_at_fork(after_in_child=_mutexes.clear)  # whichever thread holds one lives in the parent only


class Directory:
    """The directory at ``path``, by default at ``state_directory``; it is made with the first file in it."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path

    @property
    def path(self) -> str:
        return state_directory() if self._path is None else self._path

    def open(self, name: str, flags: int) -> int:
        """Open a file in the directory, without following symbolic links; return its descriptor.

        Raises:
            FileNotFoundError: no such file, and ``flags`` do not say to make it.
            LedgerError: the directory cannot be made, is not this user's alone, or the file cannot be opened.
        """
        try:
            directory = _enter(self.path, create=bool(flags & os.O_CREAT))
            try:
                return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
            finally:
                os.close(directory)
        except FileNotFoundError:
            raise
        except OSError as error:
            if isinstance(error, LedgerError):
                raise
            raise self.error(error) from error

    def error(self, error: OSError) -> LedgerError:
        """Return what the user should be told of ``error``, which happened in this directory."""
        return LedgerError(f"{self.path}: {error.strerror or error}; {YOURS}")

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock file ``name``: no other process and no other thread does meanwhile.

        It is a record lock, which belongs to this process. A child that is forked meanwhile, in whatever way, does not
        share it, as it would share one of flock(2): it cannot keep the lock after its parent has let go of it or died.
        Closing any other descriptor of the file would release the lock, so nothing else in this process opens it.

        Source: man 2 fcntl_locking, "Advisory record locking".

        Raises:
            LedgerError: the directory cannot be used, or another process held the lock for LOCK_TIMEOUT seconds.
        """
        deadline = time.monotonic() + LOCK_TIMEOUT
        mutex = _mutexes.setdefault(f"{self.path}/{name}", threading.Lock())
        if not mutex.acquire(timeout=LOCK_TIMEOUT):
            raise self._held(name, f"another thread of this process ({os.getpid()})")
        try:
            lock = self._lock(name, deadline)
            try:
                yield
            finally:
                os.close(lock)
        finally:
            mutex.release()

    def _lock(self, name: str, deadline: float) -> int:
        """Return a descriptor of the locked file."""
        while True:
            lock = self.open(name, os.O_RDWR | os.O_CREAT)
            try:
                while not try_lock(lock):
                    if time.monotonic() > deadline:
                        raise self._held(name, f"process {holder(lock)}")
                    time.sleep(0.002)
                if self._lies_there(name, lock):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # removed while this process waited: others lock the file that has taken its place

    def _lies_there(self, name: str, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(f"{self.path}/{name}", follow_symlinks=False), os.fstat(file))
        except FileNotFoundError:
            return False

    def _held(self, name: str, holder: str) -> LedgerError:
        return LedgerError(
            f"{self.path}/{name}: held by {holder} for {LOCK_TIMEOUT:.0f} s; let it go on if it is stopped, or end it"
        )


def _enter(path: str, *, create: bool) -> int:
    """Return a descriptor of the directory ``path``, which ``create`` makes if need be.

    Raises:
        FileNotFoundError: it does not exist. LedgerError: it is not this user's alone. OSError: it cannot be used.
    """
    if create:
        os.makedirs(path, mode=0o700, exist_ok=True)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(directory)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.getuid():
            raise LedgerError(f"{path}: belongs to user {status.st_uid}, not {os.getuid()}; {YOURS}")
        if mode & 0o077:
            raise LedgerError(f"{path}: others may enter it (mode {mode:o}); chmod 700 it, or {YOURS}")
    except LedgerError:
        os.close(directory)
        raise
    return directory


def try_lock(file: int, start: int = 0, length: int = 0) -> bool:
    """Take the record lock on ``length`` bytes, 0 for all that follow, if no other process holds one there."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    return True


def holder(file: int, start: int = 0, length: int = 0) -> int:
    """Return the PID of another process that holds a record lock on some of the bytes, or 0."""
    question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, question))
    return 0 if kind == fcntl.F_UNLCK else int(pid)
