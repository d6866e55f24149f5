"""TorchServe's HTTP APIs, as far as we use them."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ts_plugin.trial.properties import Property

__all__ = ["Client", "RequestError", "TorchServeError", "model_path"]


class TorchServeError(RuntimeError):
    """The server did not do what it was asked; the message ends with the tail of its log."""


class RequestError(TorchServeError):
    """An HTTP answer other than 2xx; ``status`` is its code (0: no answer at all), ``body`` its text."""

    def __init__(self, request: str, status: int, body: str) -> None:
        super().__init__(f"{request}: HTTP {status}: {body.strip()[:2000]}")
        self.status = status
        self.body = body


class Client:
    """Requests to the server whose ``properties`` these are; ``working_directory`` has its tokens, if it wants any."""

    properties: dict[str, str]
    working_directory: Path
    timeout: float  # seconds, of every request to the management API

    def unregister(self, name: str, *, version: str | None = None) -> None:
        self.management("DELETE", model_path(name, version))

    def describe(self, name: str, *, version: str | None = None) -> dict[str, Any]:
        """Return ``GET /models/NAME``: the default version, or the given one."""
        answer: list[dict[str, Any]] = json.loads(self.management("GET", model_path(name, version)))
        return answer[0]

    def cores(self) -> dict[str, Any]:
        """Return ``GET /cores``, the ts-cores hook's core map."""
        answer: dict[str, Any] = json.loads(self.management("GET", "/cores"))
        return answer

    def predict(
        self, name: str, body: bytes, *, timeout: float = 120.0, content_type: str = "application/octet-stream"
    ) -> bytes:
        """Return the model's answer to ``body``.

        Raises:
            RequestError: an answer other than 2xx, or none.
        """
        headers = self._token("inference") | {"Content-Type": content_type}
        return _request("POST", self.prediction_url(name), headers, body=body, timeout=timeout)

    def predict_workflow(self, name: str, body: bytes, *, timeout: float = 120.0) -> bytes:
        """Return a workflow's answer to ``body``; raises what ``predict`` raises."""
        headers = self._token("inference") | {"Content-Type": "application/octet-stream"}
        url = f"{self.inference_url}/wfpredict/{urllib.parse.quote(name)}"
        return _request("POST", url, headers, body=body, timeout=timeout)

    def prediction_url(self, name: str) -> str:
        return f"{self.inference_url}/predictions/{urllib.parse.quote(name)}"

    def management(
        self, method: str, path: str, query: Mapping[str, Property] | None = None, *, accept: str = "*/*"
    ) -> str:
        """Return the text that the management API answers to ``method path?query``."""
        url = self.management_url + path
        headers = self._token("management") | {"Accept": accept}
        if query:
            url += "?" + urllib.parse.urlencode({key: str(value) for key, value in query.items()})
        return _request(method, url, headers, timeout=self.timeout).decode()

    def metrics(self) -> str:
        """Return ``GET /metrics`` in Prometheus' text format."""
        return _request("GET", f"{self.properties['metrics_address']}/metrics", {}, timeout=self.timeout).decode()

    def _token(self, api: str) -> dict[str, str]:
        """Return the header that lets a request pass where the server wants a token."""
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


def _request(method: str, url: str, headers: dict[str, str], *, body: bytes | None = None, timeout: float) -> bytes:
    """Return the body of the answer; ``timeout`` in seconds.

    Raises:
        RequestError: an answer other than 2xx, or none.
    """
    asked = urllib.request.Request(url, data=body, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never a proxy to loopback
    try:
        with opener.open(asked, timeout=timeout) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        raise RequestError(f"{method} {url}", error.code, error.read().decode(errors="replace")) from None
    except OSError as error:  # refused, reset, timed out
        raise RequestError(f"{method} {url}", 0, str(error)) from None


def model_path(name: str, version: str | None = None) -> str:
    """Return the path of a model in the management API."""
    path = f"/models/{urllib.parse.quote(name)}"
    return f"{path}/{urllib.parse.quote(version)}" if version else path
