"""One real TorchServe server of our own: own ports, own directories, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from ts_plugin.config.file import read_config
from ts_plugin.machine.process import environment
from ts_plugin.trial.client import Client, RequestError, TorchServeError
from ts_plugin.trial.properties import LOOPBACK, PORTS, Property, free_ports, write_properties

WORKER_SCRIPT = "model_service_worker.py"
RETRY = "Retry worker: "  # org.pytorch.serve.wlm.WorkerThread, once per worker process that ended by itself


class TorchServe(Client):
    """A server from ``__enter__`` to ``__exit__``, with the given archives loaded and every worker READY.

        with TorchServe(mar, workers=2, properties={"cpu_launcher_enable": True, "plugins_path": plugins}) as server:
            server.predict("resnet18", photograph)

    ``workers`` is the number per archive; None leaves it to the archives and to TorchServe. ``properties`` are lines of
    config.properties and win over the defaults below; a value of None removes a default. ``environment`` is added to
    this process's; its TS_CORES_STATE_DIR is the server's own, so that it meets no other server. ``timeout`` bounds
    every wait for workers, in seconds.
    """

    def __init__(
        self,
        *archives: Path,
        workers: int | None = 1,
        properties: Mapping[str, Property | None] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 180.0,
    ) -> None:
        self.archives = tuple(Path(archive) for archive in archives)
        self.initial_workers = workers
        self.timeout = timeout
        self.ready_seconds: float | None = None  # from starting the command until every worker was READY
        self._wanted = dict(properties or {})
        self._environment = dict(environment or {})
        # Short on purpose: the workers' UNIX sockets lie in it, and a socket's path has room for 107 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="ts-cores-"))
        self.working_directory = self.directory
        self.model_store = self.directory / "model_store"
        self.state_directory = self.directory / "state"
        self.log_directory = self.directory / "logs"
        self.config = self.directory / "config.properties"
        self.python = Path(sys.executable)
        self.properties: Mapping[str, str] = {}
        self._command: subprocess.Popen[bytes] | None = None

    # ---- life

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
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
                    if attempt == 2 or "Address already in use" not in self.log():
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
        self.properties = read_config(self.config, environment).properties
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
        for archive in self.archives:
            self._store(archive)
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

    def wait_ready(self, name: str, workers: int | None = None) -> None:
        """Return once exactly ``workers`` workers of the model exist and all are READY; None takes its minWorkers.

        Raises:
            TorchServeError: not within ``timeout``, or workers keep dying (three restarts per worker).
        """
        deadline = time.monotonic() + self.timeout
        retries = self.log().count(RETRY)
        seen, wanted = list[str](), workers
        while True:
            with contextlib.suppress(RequestError):
                model = self.describe(name)
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
            shutil.rmtree(self.directory, ignore_errors=True)

    def _end_processes(self) -> None:
        if self._command is None:
            return
        for _ in range(5):  # until the frontend has started none anew
            if not (rest := self.processes()):
                break
            for process in rest:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _wait(rest, 5)
            for process in rest:  # the performance data that a JVM removes when it is not killed
                for file in Path("/tmp").glob(f"hsperfdata_*/{process.pid}"):
                    with contextlib.suppress(OSError):  # left there by another user's process of that number
                        file.unlink()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._command.wait(timeout=5)
        self._command = None

    # ---- its processes and files

    def processes(self) -> list[psutil.Process]:
        """Return all that have our directory in their environment, those of a worker whose frontend has ended too."""
        mark = str(self.log_directory)
        return [found for found in psutil.process_iter() if environment(found.pid).get("LOG_LOCATION") == mark]

    def workers(self) -> dict[int, list[str]]:
        """Return pid -> command line of every process of the server's that is a worker, not the wrapper of one.

        Workers that have lost their frontend and are about to end are among them.
        """
        found: dict[int, list[str]] = {}
        wrappers: set[int] = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = process.cmdline()
                if any(word.endswith(WORKER_SCRIPT) for word in words):
                    found[process.pid] = words
                    wrappers.update(parent.pid for parent in process.parents())
        return {pid: words for pid, words in found.items() if pid not in wrappers}

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

    def _complaint(self) -> str:
        """Return the last exception that a worker died of, as far as the log tells."""
        found: list[str] = re.findall(r" MODEL_LOG - ([\w.]*(?:Error|Exception): .*)", self.log())
        return found[-1] if found else "no exception in the log"

    def _tail(self, lines: int = 60) -> str:
        """Return the log's last lines without those about our own polling."""
        told = [line for line in self.log().splitlines() if "ACCESS_LOG" not in line and "TS_METRICS" not in line]
        return "\n--- last lines of the server's log\n" + "\n".join(told[-lines:])


def _wait(processes: list[psutil.Process], seconds: float) -> None:
    """Wait until they have ended, so long at most; whether their parent has taken note does not count.

    An orphan's parent is init, which may look every two seconds only.
    """
    deadline = time.monotonic() + seconds
    while not all(map(_ended, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
