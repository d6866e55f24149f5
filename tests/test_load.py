"""The clients of a trial, on real sockets; and what counts of a load."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ts_plugin.trial.ab import ab, parse_ab
from ts_plugin.trial.load import Answer, Body, LoadError, open_loop, percentile, poisson, take_turns
from ts_plugin.trial.turns import LEAD_IN, MOST_LATENCIES, counted, saturated, thinned


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], int]) -> Iterator[str]:
    """A server that reads a POST and answers with the status that ``answer`` returns; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answer(self))
            self.send_header("Content-Length", "2")
            if self.request_version == "HTTP/1.0":  # as ab -k asks
                self.send_header("Connection", "keep-alive")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/predictions/model"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_open_loop_goes_on_while_an_answer_is_late() -> None:
    others = threading.Event()
    numbers = itertools.count()

    def answer(request: BaseHTTPRequestHandler) -> int:
        number = next(numbers)
        if number == 0:
            others.wait(30)  # the first answer waits until the fifth request has come
        elif number == 4:
            others.set()
        return 200

    arrivals = [number / 50 for number in range(6)]
    with answering(answer) as url:
        answers = open_loop(url, b"body", arrivals)
    assert all(each.good for each in answers)
    assert [each.due for each in answers] == arrivals
    assert answers[0].at > answers[1].at


def test_open_loop_counts_refused_connections_as_failed() -> None:
    answers = open_loop("http://127.0.0.1:1/predictions/model", b"", [0.0, 0.01])
    assert [each.good for each in answers] == [False, False]


def test_open_loop_keeps_to_given_arrivals() -> None:
    arrivals = [0.0, 0.01, 0.011, 0.2]
    with answering(lambda request: 200) as url:
        answers = open_loop(url, b"body", arrivals)
    assert [each.due for each in answers] == arrivals
    assert all(each.good for each in answers)


def test_poisson_arrivals_are_the_same_for_the_same_seed() -> None:
    found = poisson(20, 500, seed=3)
    assert found == poisson(20, 500, seed=3) != poisson(20, 500, seed=4)
    assert len(found) == 10_000
    assert found == sorted(found)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    # Exponential: a part 1 / e of the gaps is longer than their mean. At a fixed rate none is.
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.02)


def test_clients_take_turns_on_kept_connections() -> None:
    peers = set()
    lock = threading.Lock()
    inside = [0]
    together = []

    def answer(request: BaseHTTPRequestHandler) -> int:
        peers.add(request.client_address)
        with lock:
            inside[0] += 1
            together.append(inside[0])
            number = len(together)
        threading.Event().wait(0.005)
        with lock:
            inside[0] -= 1
        return 500 if number == 3 else 200

    with answering(answer) as url:
        answers = take_turns(url, b"body", clients=2, seconds=0.5)
    assert len(peers) == 2
    assert max(together) <= 2
    assert len(answers) == len(together) > 4
    assert [each.good for each in answers].count(False) == 1
    assert all(each.due < 0.5 for each in answers)


def test_clients_that_take_turns_count_refused_connections_as_failed() -> None:
    answers = take_turns("http://127.0.0.1:1/predictions/model", b"", clients=1, seconds=0.05)
    assert answers
    assert not any(each.good for each in answers)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        pytest.param([5.0], 50, 5.0, id="one value"),
        pytest.param([1, 2, 3, 4], 50, 2, id="even"),
        pytest.param(list(range(1, 101)), 99, 99, id="a hundred"),
        pytest.param([3, 1, 2], 99, 3, id="unsorted"),
        pytest.param([1, 2], 0, 1, id="lowest"),
    ],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        pytest.param([0.1] * 40, False, id="keeps up"),
        pytest.param([0.1 + 0.05 * number for number in range(40)], True, id="a queue that grows"),
        pytest.param([2.0] * 40, False, id="slow but steady"),
        pytest.param([0.01] * 30 + [0.03] * 10, False, id="jitter below the interval"),
        pytest.param([0.01] * 300 + [0.4] * 100, False, id="a burst in a long load"),
    ],
)
def test_saturated(latencies: list[float], expected: bool) -> None:
    answers = [Answer(number / 10, latency, True) for number, latency in enumerate(latencies)]
    assert saturated(answers, 10) is expected


def test_a_failed_request_means_saturated() -> None:
    assert saturated([Answer(0, 0.1, True), Answer(0.1, 0.1, False)], 10)


BODY = Body(b"x" * 1000)


@pytest.mark.process
def test_ab_counts_what_the_server_answered() -> None:
    answered = itertools.count()

    def answer(request: BaseHTTPRequestHandler) -> int:
        next(answered)
        threading.Event().wait(0.002)
        return 200

    with answering(answer) as url:
        found = ab(url, BODY, 3, 1.0)
    assert 0 < len(found.latencies) <= next(answered)
    assert (found.failed, found.rate, found.saturated) == (0, None, False)
    assert 0 < found.throughput < 3 / 0.002
    assert list(found.latencies) == sorted(found.latencies)


@pytest.mark.process
def test_ab_counts_answers_other_than_2xx_as_failed() -> None:
    with answering(lambda request: 503) as url:
        found = ab(url, BODY, 3, 1.0)
    assert found.failed > 0
    assert found.throughput == 0


@pytest.mark.process
def test_ab_that_gives_up_says_why() -> None:
    with pytest.raises(LoadError, match="invalid URL"):
        ab("127.0.0.1:1", BODY, 1, 1.0)


STDOUT = """\
Time taken for tests:   2.500 seconds
Complete requests:      100
Failed requests:        2
   (Connect: 0, Receive: 0, Length: 2, Exceptions: 0)
Non-2xx responses:      3
Requests per second:    40.00 [#/sec] (mean)
"""
TABLE = "starttime\tseconds\tctime\tdtime\tttime\twait\nx\t1\t0\t20\t44\t20\nx\t1\t0\t20\t20\t20\n"


def test_parse_ab() -> None:
    found = parse_ab(STDOUT, TABLE)
    assert (found.failed, found.latencies) == (5, (0.020, 0.044))
    assert found.throughput == pytest.approx(38.0)


@pytest.mark.parametrize(
    ("stdout", "table", "complaint"),
    [
        pytest.param("", TABLE, "Complete requests", id="no output"),
        pytest.param(STDOUT.replace("Requests per second", "X"), TABLE, "Requests per second", id="a line missing"),
        pytest.param(STDOUT, "", "no column ttime", id="empty table"),
    ],
)
def test_parse_ab_says_what_is_missing(stdout: str, table: str, complaint: str) -> None:
    with pytest.raises(LoadError, match=complaint):
        parse_ab(stdout, table)


def test_an_open_loop_stops_where_the_queue_only_grows() -> None:
    """And what waits longer than its patience has failed."""
    leave = threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> int:
        leave.wait(30)
        return 200

    with answering(answer) as url:
        answers = open_loop(url, b"body", [0.0] * 50, most=4, patience=1.0)
        leave.set()
    assert 4 <= len(answers) < 50
    assert not any(each.good for each in answers)


def test_the_lead_in_counts_for_nothing() -> None:
    """Two answers per second: slow ones before the lead-in ends, then fast ones; the last comes after the end."""
    answers = [Answer(n / 2, 0.4 if n / 2 < LEAD_IN else 0.1, True) for n in range(int(2 * LEAD_IN) + 8)]
    found = counted(answers, 4.0, rate=2.0)
    assert found.latencies == (0.1,) * 8
    assert found.throughput == pytest.approx(2.0, rel=0.1)
    assert (found.failed, found.saturated) == (0, False)


def test_a_failed_answer_is_counted_and_the_load_was_too_much() -> None:
    found = counted([Answer(LEAD_IN + n, 0.1, n != 2) for n in range(4)], 4.0, rate=1.0)
    assert (len(found.latencies), found.failed, found.saturated) == (3, 1, True)


def test_nothing_but_failures_has_no_latency() -> None:
    found = counted([Answer(LEAD_IN, 0.1, False)], 1.0)
    assert (found.latencies, found.throughput, found.failed) == ((), 0.0, 1)


def test_a_queue_that_was_full_before_the_lead_in_ended_has_latencies() -> None:
    found = counted([Answer(n / 100, 0.1 + n / 10, True) for n in range(40)], 4.0, rate=100.0)
    assert (len(found.latencies), found.latencies[0]) == (20, 2.1)


def test_few_answers_are_counted_to_the_last_one() -> None:
    """Two clients, an answer every 4 seconds each, and a load of 3 seconds: half an answer per second, not none."""
    answers = [Answer(0.0, 4.0, True), Answer(0.0, 4.0, True)]
    assert counted(answers, 1.5).throughput == pytest.approx(0.5)
    assert counted(answers, 1.5).latencies == (4.0,)


def test_thinned_latencies_keep_their_percentiles() -> None:
    many = [float(number) for number in range(1, 10_001)]
    kept = thinned(many)
    assert len(kept) == MOST_LATENCIES
    assert kept[-1] == 10_000
    assert percentile(kept, 50) == pytest.approx(5000, rel=0.01)
    assert percentile(kept, 99) == pytest.approx(9900, rel=0.01)
    assert thinned(many[:7]) == tuple(many[:7])
