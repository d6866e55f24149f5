"""One real TorchServe server of our own: own ports, own directories, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from ts_plugin.machine.process import environment
from ts_plugin.trial.client import Client, RequestError, TorchServeError, model_path
from ts_plugin.trial.properties import LOOPBACK, PORTS, Property, free_ports, read_properties, write_properties

__all__ = ["WORKER_SCRIPT", "TorchServe"]

WORKER_SCRIPT = "model_service_worker.py"
RETRY = "Retry worker: "  # org.pytorch.serve.wlm.WorkerThread, once per worker process that ended by itself


class TorchServe(Client):
    """A server from ``__enter__`` to ``__exit__``, with the given archives loaded and every worker READY.

        with TorchServe(mar, workers=2, properties={"cpu_launcher_enable": True, "plugins_path": plugins}) as server:
            server.predict("resnet18", photograph)

    ``workers`` is the number per archive; None leaves it to the archives and to TorchServe. ``properties`` are lines of
    config.properties and win over the defaults below; a value of None removes a default. ``environment`` is added to
    this process's. ``state_directory`` is the TS_CORES_STATE_DIR, by default the server's own, so that it meets no
    other server; share one to make them meet. ``model_store`` is by default an own directory with links to the
    archives. ``snapshot`` starts from that file as it is (a file of ``snapshots()``, say) instead of writing
    config.properties; relative paths in it are looked up from ``working_directory``, by default the server's own.
    ``keep`` leaves the directory in place. ``timeout`` bounds every wait for workers, in seconds.
    """

    def __init__(
        self,
        *archives: Path,
        workers: int | None = 1,
        properties: Mapping[str, Property | None] | None = None,
        environment: Mapping[str, str] | None = None,
        state_directory: Path | None = None,
        model_store: Path | None = None,
        snapshot: Path | None = None,
        working_directory: Path | None = None,
        python: Path | str = sys.executable,
        keep: bool = False,
        timeout: float = 180.0,
    ) -> None:
        self.archives = tuple(Path(archive) for archive in archives)
        self.initial_workers = workers
        self.timeout = timeout
        self.keep = keep
        self.python = Path(python)
        self.snapshot = snapshot
        self.ready_seconds: float | None = None  # from starting the command until every worker was READY
        self._wanted = dict(properties or {})
        self._environment = dict(environment or {})
        # Short on purpose: the workers' UNIX sockets lie in it, and a socket's path has room for 107 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="ts-cores-"))
        self.model_store = model_store or self.directory / "model_store"
        self.state_directory = state_directory or self.directory / "state"
        self.log_directory = self.directory / "logs"
        self.working_directory = working_directory or self.directory
        self.config = snapshot or self.directory / "config.properties"
        self.properties: dict[str, str] = {}
        self._command: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}

    # ---- life

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the server and return once every worker is READY.

        Raises:
            TorchServeError: the server ended, or a worker was not READY within ``timeout``; nothing is left running.
        """
        try:
            for attempt in range(3):
                self._launch()
                try:
                    self._wait_for_management()
                    break
                except TorchServeError:  # a port taken between our choice and the server's bind
                    if self.snapshot or attempt == 2 or "Address already in use" not in self.log():
                        raise
                    self._end_processes()
            for archive in self.archives:
                self.wait_ready(archive.stem, self.initial_workers)
            self.ready_seconds = time.monotonic() - self._started
        except BaseException:
            self.stop()
            raise
        return self

    def _launch(self) -> None:
        for directory in (self.model_store, self.log_directory, self.directory / "tmp"):
            directory.mkdir(parents=True, exist_ok=True)
        if not self.snapshot:
            for archive in self.archives:
                self._store(archive)
            self._write_config()
        environment = os.environ | {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # the stock launcher runs "python"
            "TEMP": str(self.directory / "tmp"),
            "TMPDIR": str(self.directory / "tmp"),
            "LOG_LOCATION": str(self.log_directory),
            "METRICS_LOCATION": str(self.log_directory),
            "TS_CORES_STATE_DIR": str(self.state_directory),
        }
        environment |= self._environment
        self.properties = read_properties(self.config)
        if self.properties.get("enable_envvars_config") == "true":
            named = {name: environment.get(f"TS_{name.upper()}") for name in PORTS}
            self.properties |= {name: value for name, value in named.items() if value}
        script = self.python.parent / "torchserve"  # an environment that only borrows torchserve has none
        command = [str(script)] if script.exists() else [str(self.python), "-m", "ts.model_server"]
        command += ["--start", "--foreground", "--ts-config"]
        self._started = time.monotonic()
        with self.console.open("wb") as console:
            self._command = subprocess.Popen(
                [*command, str(self.config)],
                cwd=self.working_directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours; stop() tells the server
            )

    def _store(self, archive: Path) -> None:
        link = self.model_store / archive.name
        if not link.exists():
            link.symlink_to(archive.resolve(strict=True))

    def _write_config(self) -> None:
        ports = free_ports(len(PORTS))
        defaults: dict[str, Property | None] = {
            name: f"http://{LOOPBACK}:{port}" if name.endswith("_address") else port
            for name, port in zip(PORTS, ports, strict=True)
        }
        defaults |= {
            "model_store": self.model_store,
            "load_models": ",".join(archive.name for archive in self.archives) or None,
            "default_workers_per_model": self.initial_workers if self.archives else None,
            "disable_token_authorization": True,
            "enable_model_api": True,  # 0.12 refuses to register models otherwise
        }
        write_properties(self.config, defaults | self._wanted)

    def _wait_for_management(self) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self.management("GET", "/models")
                return
            except RequestError as error:
                if error.status:
                    raise
            self._require_alive(deadline, "the management API did not answer")
            time.sleep(0.05)

    def wait_ready(self, name: str, workers: int | None = None, *, version: str | None = None) -> None:
        """Return once exactly ``workers`` workers of the model exist and all are READY; None takes its minWorkers.

        Raises:
            TorchServeError: not within ``timeout``, or workers keep dying (three restarts per worker).
        """
        deadline = time.monotonic() + self.timeout
        retries = self.log().count(RETRY)
        seen, wanted = list[str](), workers
        while True:
            with contextlib.suppress(RequestError):
                model = self.describe(name, version=version)
                seen = [worker["status"] for worker in model["workers"]]
                wanted = int(model["minWorkers"]) if wanted is None else wanted
                if len(model["workers"]) == wanted and all(state == "READY" for state in seen):
                    return
                if self.log().count(RETRY) - retries >= 3 * max(wanted, 1):
                    raise TorchServeError(f"the workers of {name} keep dying: {self._complaint()}{self._tail()}")
            self._require_alive(deadline, f"the workers of {name} are not all READY (wanted {wanted}, see {seen})")
            time.sleep(0.1)

    def _require_alive(self, deadline: float, complaint: str) -> None:
        if self._command is None or self._command.poll() is not None:
            raise TorchServeError(f"{complaint}: the server ended{self._tail()}")
        if time.monotonic() > deadline:
            raise TorchServeError(f"{complaint} within {self.timeout:g} s{self._tail()}")

    def stop(self) -> None:
        """End the server and every process of its; do nothing if it does not run.

        By SIGKILL: after SIGTERM TorchServe 0.12 waits two seconds for requests that are not there.
        """
        try:
            self._end_processes()
        finally:
            if not self.keep:
                shutil.rmtree(self.directory, ignore_errors=True)

    def kill_frontend(self) -> None:
        """SIGKILL the Java process and return once all others have ended by themselves; ``start`` may follow.

        Raises:
            TorchServeError: a worker outlived its frontend by 30 seconds.
        """
        workers = [process for process in self.tree() if process.pid in self.workers()]
        os.kill(self.pid, signal.SIGKILL)
        left = _wait(workers, 30)
        self._end_processes()
        if left:
            raise TorchServeError(f"workers outlived their frontend: {[process.pid for process in left]}")

    def _end_processes(self) -> None:
        if self._command is None:
            return
        tree = self.tree()  # parents first: the frontend starts no worker anew
        # A worker behind TorchServe's own launcher outlives its frontend, in another session: _marked finds it.
        for _ in range(5):
            known = dict.fromkeys([*tree, *self._marked(), *self._seen.values()])
            rest = [process for process in known if not _ended(process)]
            for process in rest:
                _signal(process, signal.SIGKILL)
            _wait(rest, 5)
            if not self._marked():
                break
        for process in tree:  # the performance data that a JVM removes when it is not killed
            for file in Path("/tmp").glob(f"hsperfdata_*/{process.pid}"):
                with contextlib.suppress(OSError):  # left there by another user's process of that number
                    file.unlink()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._command.wait(timeout=5)
        self._command = None
        self._seen.clear()

    # ---- its models; Client has the requests that wait for nothing

    def register(self, archive: Path, *, workers: int = 1, name: str | None = None, **parameters: Property) -> str:
        """Load another archive, wait until its workers are READY and return the model's name.

        ``parameters`` go into the query as they are (``batch_size=4``).
        """
        self._store(archive)
        query: dict[str, Property] = {"url": archive.name, "initial_workers": workers, "synchronous": "true"}
        query |= parameters
        if name:
            query["model_name"] = name
        self.management("POST", "/models", query)
        self.wait_ready(name or archive.stem, workers)
        return name or archive.stem

    def scale(
        self,
        name: str,
        minimum: int,
        maximum: int | None = None,
        *,
        synchronous: bool = True,
        wait: bool = True,
        version: str | None = None,
    ) -> None:
        """Set the number of workers; ``wait`` returns only when exactly ``minimum`` are READY."""
        query: dict[str, Property] = {
            "min_worker": minimum,
            "max_worker": max(minimum, maximum or minimum),
            "synchronous": str(synchronous).lower(),
        }
        for attempt in range(3):
            try:
                self.management("PUT", model_path(name, version), query)
                break
            except RequestError as error:  # TorchServe's own race with whatever else looks at its list of workers
                if attempt == 2 or "ConcurrentModificationException" not in error.body:
                    raise
        if wait:
            self.wait_ready(name, minimum, version=version)

    # ---- its processes and files

    @property
    def pid(self) -> int:
        """The pid of the frontend, the Java process.

        Raises:
            TorchServeError: the server does not run.
        """
        for process in self.tree():
            if _name(process) == "java":
                return process.pid
        raise TorchServeError(f"the server does not run{self._tail()}")

    def tree(self) -> list[psutil.Process]:
        """Return the started command and all its descendants, parents first."""
        if self._command is None:
            return []
        try:
            root = psutil.Process(self._command.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            tree = self._marked()
        self._seen.update((process.pid, process) for process in tree)
        return tree

    def workers(self) -> dict[int, list[str]]:
        """Return pid -> command line of every process of the server's that is a worker, not the wrapper of one.

        Workers that have lost their frontend and are about to end are among them.
        """
        found: dict[int, list[str]] = {}
        wrappers: set[int] = set()
        self.tree()
        for process in list(self._seen.values()):
            if not process.is_running():
                continue
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = process.cmdline()
                if any(word.endswith(WORKER_SCRIPT) for word in words):
                    found[process.pid] = words
                    wrappers.update(parent.pid for parent in process.parents())
        return {pid: words for pid, words in found.items() if pid not in wrappers}

    def _marked(self) -> list[psutil.Process]:
        """Return every process of this user with our directory in its environment, also one whose parent has ended."""
        mark = str(self.log_directory)
        return [found for found in psutil.process_iter() if environment(found.pid).get("LOG_LOCATION") == mark]

    @property
    def console(self) -> Path:
        """The file with everything that the server wrote to stdout and stderr, ts_log included."""
        return self.directory / "console.log"

    def log(self) -> str:
        """Return the console's text so far; empty before the start."""
        try:
            return self.console.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def snapshots(self) -> list[Path]:
        """Return the snapshots that the server has written, oldest first."""
        return sorted((self.log_directory / "config").glob("*.cfg"), key=lambda file: file.stat().st_mtime_ns)

    def _complaint(self) -> str:
        """Return the last exception that a worker died of, as far as the log tells."""
        found: list[str] = re.findall(r" MODEL_LOG - ([\w.]*(?:Error|Exception): .*)", self.log())
        return found[-1] if found else "no exception in the log"

    def _tail(self, lines: int = 60) -> str:
        """Return the log's last lines without those about our own polling."""
        told = [line for line in self.log().splitlines() if "ACCESS_LOG" not in line and "TS_METRICS" not in line]
        return "\n--- last lines of the server's log\n" + "\n".join(told[-lines:])


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return which of them have not ended after a time; whether their parent has taken note does not count.

    An orphan's parent is init, which may look every two seconds only.
    """
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if not _ended(process)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
