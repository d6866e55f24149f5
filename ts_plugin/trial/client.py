"""TorchServe's HTTP APIs, as far as we use them."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any


class TorchServeError(RuntimeError):
    """The server did not do what it was asked; the message ends with the tail of its log."""


class RequestError(TorchServeError):
    """An HTTP answer other than 2xx; ``status`` is its code (0: no answer at all), ``body`` its text."""

    def __init__(self, request: str, status: int, body: str) -> None:
        super().__init__(f"{request}: HTTP {status}: {body.strip()[:2000]}")
        self.status = status
        self.body = body


class Client:
    """Requests to the server whose ``properties`` these are."""

    properties: Mapping[str, str]
    timeout: float  # seconds, of every request to the management API

    def describe(self, name: str) -> dict[str, Any]:
        """Return ``GET /models/NAME``."""
        answer: list[dict[str, Any]] = json.loads(self.management("GET", f"/models/{urllib.parse.quote(name)}"))
        return answer[0]

    def cores(self) -> dict[str, Any]:
        """Return ``GET /cores``, the ts-cores hook's core map."""
        answer: dict[str, Any] = json.loads(self.management("GET", "/cores"))
        return answer

    def predict(
        self, name: str, body: bytes, *, timeout: float = 120.0, content_type: str = "application/octet-stream"
    ) -> bytes:
        """Return the model's answer to ``body``; raises what ``ask`` raises."""
        return self.ask("POST", self.prediction_url(name), {"Content-Type": content_type}, body=body, timeout=timeout)

    def prediction_url(self, name: str) -> str:
        return f"{self.properties['inference_address']}/predictions/{urllib.parse.quote(name)}"

    def management(self, method: str, path: str) -> str:
        """Return the text that the management API answers to ``method path``; raises what ``ask`` raises."""
        return self.ask(method, self.properties["management_address"] + path, {}, timeout=self.timeout).decode()

    def ask(
        self, method: str, url: str, headers: Mapping[str, str], *, body: bytes | None = None, timeout: float
    ) -> bytes:
        """Return the body of the answer; ``timeout`` in seconds.

        Raises:
            RequestError: an answer other than 2xx, or none.
        """
        asked = urllib.request.Request(url, data=body, headers=dict(headers), method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never a proxy to loopback
        try:
            with opener.open(asked, timeout=timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise RequestError(f"{method} {url}", error.code, error.read().decode(errors="replace")) from None
        except OSError as error:  # refused, reset, timed out
            raise RequestError(f"{method} {url}", 0, str(error)) from None
