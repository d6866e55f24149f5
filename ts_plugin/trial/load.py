"""Clients: closed loops, and an open loop at a fixed rate or with Poisson arrivals."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Self

__all__ = [
    "Answer",
    "Body",
    "LoadError",
    "OpenLoop",
    "in_threads",
    "percentile",
    "poisson",
    "take_turns",
]

CONTENT_TYPE = "application/octet-stream"
ANSWER_SECONDS = 120  # how long any client waits for one answer: TorchServe's own default_response_timeout


class LoadError(RuntimeError):
    """The client itself failed; the message has its output and the remedy."""


@dataclass(frozen=True, slots=True)
class Body:
    """What every request sends."""

    content: bytes
    type: str = CONTENT_TYPE


def in_threads(*work: Callable[[], None]) -> None:
    """Do all of ``work`` at once, and return when it is done."""
    threads = [threading.Thread(target=task, daemon=True) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _post(connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]) -> bool:
    """Send one request and read its answer; return whether that is 2xx.

    Raises:
        OSError, http.client.HTTPException: there is none.
    """
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    answer.read()
    return 200 <= answer.status < 300


@dataclass(frozen=True, slots=True)
class Answer:
    """One request. Seconds: ``due`` since the loop began, ``latency`` since it was *due*, even if it was sent later.

    A closed loop's request is due when its client has the answer to the one before.
    """

    due: float
    latency: float
    good: bool

    @property
    def at(self) -> float:
        """When the answer was there, in seconds since the loop began."""
        return self.due + self.latency


def take_turns(
    url: str, body: bytes, *, clients: int, seconds: float, content_type: str = CONTENT_TYPE
) -> list[Answer]:
    """Send for that long from kept-alive connections, each its next request when it has the answer to the one before.

    Return every answer in the order of sending, those that came after the end too.
    """
    target = urllib.parse.urlsplit(url)
    answers: list[Answer] = []
    began = time.monotonic()

    def client() -> None:
        connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            while (due := time.monotonic() - began) < seconds:
                good = False
                try:
                    good = _post(connection, target.path, body, {"Content-Type": content_type})
                except (OSError, http.client.HTTPException):
                    connection.close()  # the next request opens it again
                    time.sleep(0.1)  # and a server that is gone is not asked as fast as that can be refused
                answers.append(Answer(due, time.monotonic() - began - due, good))

    in_threads(*[client] * clients)
    return sorted(answers, key=lambda answer: answer.due)


def poisson(rate: float, seconds: float, *, seed: int) -> list[float]:
    """Return when requests of independent users arrive, in seconds since the beginning: the same for the same seed.

    Their number is ``rate * seconds``, rounded; given their number, a Poisson process' arrivals are uniform.
    """
    chance = random.Random(seed)
    return sorted(chance.uniform(0, seconds) for _ in range(round(rate * seconds)))


class OpenLoop:
    """A client that sends every ``1 / rate`` seconds, or at ``arrivals``, whether or not earlier ones were answered.

    A closed loop slows down with the server and so hides its queue; this one does not. It runs from ``with`` on;
    ``stop`` waits for the outstanding answers, the end of ``with`` does not. A request without an answer after
    ``patience`` seconds has failed. It sends no more once ``most`` requests wait for their answers: what was asked is
    known then, and a queue takes as long to drain as it is long.
    """

    def __init__(
        self,
        url: str,
        body: bytes,
        *,
        rate: float | None = None,
        arrivals: Iterable[float] | None = None,
        patience: float = 60.0,
        content_type: str = CONTENT_TYPE,
        most: int | None = None,
    ) -> None:
        if (rate is None) == (arrivals is None):
            raise ValueError(f"rate {rate} and arrivals {arrivals}: give one of them")
        target = urllib.parse.urlsplit(url)
        self._due = (number / rate for number in itertools.count()) if rate else iter(arrivals or ())
        self.patience = patience
        self._most = most
        self._address = str(target.hostname), target.port
        self._request = (
            f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._answers: list[Answer] = []
        self._ended = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.began = 0.0  # time.monotonic() of the first request

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._abandoned.set()
        self._ended.set()
        self._thread.join()

    def stop(self) -> list[Answer]:
        """Send no more and return every answer in the order of sending."""
        self._ended.set()
        self._thread.join()
        return sorted(self._answers, key=lambda answer: answer.due)

    def run(self, seconds: float) -> list[Answer]:
        """Send for that long and return every answer."""
        with self:
            time.sleep(seconds)
            return self.stop()

    async def _run(self) -> None:
        sent: set[asyncio.Task[None]] = set()
        for due in self._due:
            while not self._ended.is_set() and (pause := self.began + due - time.monotonic()) > 0:
                await asyncio.sleep(min(pause, 0.1))
            sent = {task for task in sent if not task.done()}
            if self._ended.is_set() or (self._most is not None and len(sent) >= self._most):
                break
            sent.add(asyncio.create_task(self._one(due)))
        while not self._abandoned.is_set() and any(not task.done() for task in sent):
            await asyncio.wait(sent, timeout=0.1)
        for task in sent:
            task.cancel()
        for _, writer in self._idle:
            writer.close()

    async def _one(self, due: float) -> None:
        good = False
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(self.patience):
                good = 200 <= await self._exchange() < 300
        self._answers.append(Answer(due, time.monotonic() - self.began - due, good))

    async def _exchange(self) -> int:
        while self._idle:
            connection = self._idle.pop()
            if not connection[0].at_eof():
                break
            connection[1].close()
        else:
            connection = await asyncio.open_connection(*self._address)
        reader, writer = connection
        try:
            writer.write(self._request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = re.search(r"^content-length:\s*(\d+)", head, re.MULTILINE)
            if length is None:
                raise ValueError(f"an answer without Content-Length: {head!r}")
            await reader.readexactly(int(length[1]))
        except BaseException:
            writer.close()
            raise
        self._idle.append(connection)
        return int(head.split(" ", 2)[1])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the smallest value that at least ``percent`` % do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    return sorted(values)[max(ceil(len(values) * percent / 100), 1) - 1]
