"""One HTTP request to a TorchServe server, and what can go wrong with it."""

from __future__ import annotations

import urllib.error
import urllib.request

__all__ = ["RequestError", "TorchServeError", "request"]


class TorchServeError(RuntimeError):
    """The server did not do what it was asked; the message ends with the tail of its log."""


class RequestError(TorchServeError):
    """An HTTP answer other than 2xx; ``status`` is its code (0: no answer at all), ``body`` its text."""

    def __init__(self, request: str, status: int, body: str) -> None:
        super().__init__(f"{request}: HTTP {status}: {body.strip()[:2000]}")
        self.status = status
        self.body = body


def request(method: str, url: str, headers: dict[str, str], *, body: bytes | None = None, timeout: float) -> bytes:
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
