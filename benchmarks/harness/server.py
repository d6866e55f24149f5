"""A server of ts_plugin.trial to which tests and checks do more: scale and register models, kill it, start it anew."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import javaproperties
import psutil

from ts_plugin.trial import torchserve
from ts_plugin.trial.client import RequestError, TorchServeError
from ts_plugin.trial.properties import Property


def read_properties(file: Path) -> dict[str, str]:
    """Return the properties of a config file or snapshot, as Java reads them."""
    with file.open("rb") as stream:
        return dict(javaproperties.load(stream))


class TorchServe(torchserve.TorchServe):
    """``state_directory`` is the TS_CORES_STATE_DIR, by default the server's own; servers that share one meet.

    ``snapshot`` starts from that file as it is (a file of ``snapshots()``, say) instead of writing config.properties;
    relative paths in it are looked up from ``working_directory``, by default the server's own. ``python`` is the
    interpreter of an environment with TorchServe.
    """

    def __init__(
        self,
        *archives: Path,
        state_directory: Path | None = None,
        snapshot: Path | None = None,
        working_directory: Path | None = None,
        python: Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*archives, **options)
        self.state_directory = state_directory or self.state_directory
        self.working_directory = working_directory or self.working_directory
        self.config = snapshot or self.config
        self.python = python or self.python
        self._own_config = snapshot is None

    def _write_config(self) -> None:
        if self._own_config:
            super()._write_config()

    # ---- its APIs, which may want a token

    def management(
        self, method: str, path: str, query: Mapping[str, Property] | None = None, *, accept: str = "*/*"
    ) -> str:
        """Return the text that the management API answers to ``method path?query``."""
        url = f"{self.management_url}{path}?{urllib.parse.urlencode(query or {})}"
        return self.ask(method, url, {"Accept": accept}, timeout=self.timeout).decode()

    def ask(
        self, method: str, url: str, headers: Mapping[str, str], *, body: bytes | None = None, timeout: float
    ) -> bytes:
        api = "management" if url.startswith(self.management_url) else "inference"
        return super().ask(method, url, {**headers, **self._token(api)}, body=body, timeout=timeout)

    def _token(self, api: str) -> dict[str, str]:
        if self.properties.get("disable_token_authorization") == "true":
            return {}
        try:
            keys = json.loads((self.working_directory / "key_file.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # about to be written
            return {}
        return {"Authorization": f"Bearer {keys[api]['key']}"}

    @property
    def inference_url(self) -> str:
        return self.properties["inference_address"]

    @property
    def management_url(self) -> str:
        return self.properties["management_address"]

    def metrics(self) -> str:
        """Return ``GET /metrics`` in Prometheus' text format."""
        return self.ask("GET", f"{self.properties['metrics_address']}/metrics", {}, timeout=self.timeout).decode()

    def predict_workflow(self, name: str, body: bytes) -> bytes:
        """Return a workflow's answer to ``body``; raises what ``predict`` raises."""
        url = f"{self.inference_url}/wfpredict/{urllib.parse.quote(name)}"
        return self.ask("POST", url, {"Content-Type": "application/octet-stream"}, body=body, timeout=self.timeout)

    def register(self, archive: Path, *, workers: int = 1, name: str | None = None) -> str:
        """Load another archive, wait until its workers are READY and return the model's name."""
        self._store(archive)
        query: dict[str, Property] = {"url": archive.name, "initial_workers": workers, "synchronous": "true"}
        if name:
            query["model_name"] = name
        self.management("POST", "/models", query)
        self.wait_ready(name or archive.stem, workers)
        return name or archive.stem

    def unregister(self, name: str, *, version: str | None = None) -> None:
        self.management("DELETE", f"/models/{name}/{version}" if version else f"/models/{name}")

    def scale(self, name: str, workers: int, *, synchronous: bool = True, wait: bool = True) -> None:
        """Set the number of workers; ``wait`` returns only when exactly so many are READY."""
        query: dict[str, Property] = {"min_worker": workers, "max_worker": workers}
        query |= {"synchronous": str(synchronous).lower()}
        for attempt in range(3):
            try:
                self.management("PUT", f"/models/{name}", query)
                break
            except RequestError as error:  # TorchServe's own race with whatever else looks at its list of workers
                if attempt == 2 or "ConcurrentModificationException" not in error.body:
                    raise
        if wait:
            self.wait_ready(name, workers)

    # ---- its processes and files

    @property
    def pid(self) -> int:
        """The pid of the frontend, the Java process.

        Raises:
            TorchServeError: the server does not run.
        """
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "java":
                    return process.pid
        raise TorchServeError(f"the server does not run{self._tail()}")

    def kill_frontend(self) -> None:
        """SIGKILL the Java process and return once all workers have ended by themselves; ``start`` may follow.

        Raises:
            TorchServeError: a worker outlived its frontend by 30 seconds.
        """
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while (left := self.workers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._end_processes()
        if left:
            raise TorchServeError(f"workers outlived their frontend: {sorted(left)}")

    def snapshots(self) -> list[Path]:
        """Return the snapshots that the server has written, oldest first."""
        return sorted((self.log_directory / "config").glob("*.cfg"), key=lambda file: file.stat().st_mtime_ns)
