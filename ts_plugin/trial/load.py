"""Clients: closed loops, and an open loop at a fixed rate or with Poisson arrivals."""

from __future__ import annotations

import contextlib
import http.client
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

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


def open_loop(
    url: str,
    body: bytes,
    arrivals: Iterable[float],
    *,
    patience: float = 60.0,
    most: int | None = None,
    content_type: str = CONTENT_TYPE,
) -> list[Answer]:
    """Send a request at each of ``arrivals``, whether or not earlier ones were answered; they are seconds, in order.

    Return every answer in the order of sending. A closed loop slows down with the server and so hides its queue; this
    one does not. A request that waits longer than ``patience`` seconds has failed. No more are sent once ``most`` wait:
    what was asked is known then, and a queue takes as long to drain as it is long.
    """
    target = urllib.parse.urlsplit(url)
    sent = queue.SimpleQueue[float | None]()
    answers: list[Answer] = []
    clients: list[threading.Thread] = []
    began = time.monotonic()

    def client() -> None:
        connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=patience)
        with contextlib.closing(connection):
            while (due := sent.get()) is not None:
                good = False
                try:
                    good = _post(connection, target.path, body, {"Content-Type": content_type})
                except (OSError, http.client.HTTPException):
                    connection.close()  # the next request opens it again
                answers.append(Answer(due, time.monotonic() - began - due, good))

    for number, due in enumerate(arrivals):
        time.sleep(max(began + due - time.monotonic(), 0.0))
        waiting = number - len(answers)
        if most is not None and waiting >= most:
            break
        if waiting >= len(clients):  # a thread for each request would take longer than many requests
            clients.append(threading.Thread(target=client, daemon=True))
            clients[-1].start()
        sent.put(due)
    for _ in clients:
        sent.put(None)
    for thread in clients:
        thread.join()
    return sorted(answers, key=lambda answer: answer.due)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the smallest value that at least ``percent`` % do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    return sorted(values)[max(ceil(len(values) * percent / 100), 1) - 1]
