"""The benchmark: its clients on a real socket, its figures on known inputs, its pictures, and one small real run."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from matplotlib import pyplot

from benchmarks.harness import archives
from benchmarks.measurement import load_picture, perf, pictures, points, probe, report, scaling
from benchmarks.measurement.ab import ab, parse_ab
from benchmarks.measurement.bench import jobs, parse
from benchmarks.measurement.exercises import exercises
from benchmarks.measurement.loads import LEAD_IN, counted
from benchmarks.measurement.measure import divide, saturated, setting
from benchmarks.measurement.points import (
    FULL,
    PROMISES,
    UNEVEN,
    Sample,
    compared,
    curve,
    must_show,
    pooled,
    promises_table,
)
from benchmarks.measurement.results import Config, Figures, Row, Scenario, markdown, ratio, rotated, spread, to_csv
from tests.eventually import PATIENCE, eventually
from ts_plugin.machine.topology import Core
from ts_plugin.trial.bare import Binding
from ts_plugin.trial.load import (
    Answer,
    LoadError,
    OpenLoop,
    closed_loop,
    percentile,
    poisson,
    take_turns,
)

SCENARIO = Scenario("resnet18", 2, 10)
FIGURES = Figures(
    requests=100,
    failed=0,
    requests_per_second=10.0,
    p50_ms=50.0,
    p90_ms=90.0,
    p99_ms=99.0,
    cpu_seconds_per_request=0.05,
    pss_mib=900.0,
    processes=4,
    threads=50,
    elsewhere_cpus=0.1,
)


def row(config: Config, repetition: int, **changes: Any) -> Row:
    return Row(config, SCENARIO, repetition, replace(FIGURES, **changes))


# ---- clients


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


@pytest.fixture
def body(tmp_path: Path) -> Path:
    file = tmp_path / "body"
    file.write_bytes(b"x" * 1000)
    return file


def test_ab_counts_what_the_server_answered(body: Path) -> None:
    with answering(lambda request: 200) as url:
        load = ab(url, body, requests=60, concurrency=3)
    assert (load.requests, load.failed) == (60, 0)
    assert 0 < load.p50_ms <= load.p90_ms <= load.p99_ms
    assert load.requests_per_second == pytest.approx(load.requests / load.seconds, rel=0.05)


def test_ab_counts_answers_other_than_2xx_as_failed(body: Path) -> None:
    with answering(lambda request: 503) as url:
        assert ab(url, body, requests=60, concurrency=3).failed == 60


def test_ab_refuses_fewer_requests_than_its_percentiles_need(body: Path) -> None:
    with pytest.raises(ValueError, match="at least 51"):
        ab("http://127.0.0.1:1/", body, requests=50, concurrency=1)


def test_ab_counts_refused_connections_as_failed(body: Path) -> None:
    assert ab("http://127.0.0.1:1/predictions/model", body, requests=60, concurrency=1).failed == 60


def test_ab_that_gives_up_says_why(body: Path) -> None:
    with pytest.raises(LoadError, match="invalid URL"):
        ab("127.0.0.1:1", body, requests=60, concurrency=1)


STDOUT = """\
Time taken for tests:   2.500 seconds
Complete requests:      100
Failed requests:        2
   (Connect: 0, Receive: 0, Length: 2, Exceptions: 0)
Non-2xx responses:      3
Requests per second:    40.00 [#/sec] (mean)
"""
PERCENTILES = "Percentage served,Time in ms\n0,1.5\n50,20.250\n90,30.5\n99,44.125\n"


def test_parse_ab() -> None:
    load = parse_ab(STDOUT, PERCENTILES)
    assert (load.requests, load.failed, load.seconds, load.requests_per_second) == (100, 5, 2.5, 40.0)
    assert (load.p50_ms, load.p90_ms, load.p99_ms) == (20.25, 30.5, 44.125)


@pytest.mark.parametrize(
    ("stdout", "percentiles", "complaint"),
    [
        pytest.param("", PERCENTILES, "Complete requests", id="no output"),
        pytest.param(
            STDOUT.replace("Requests per second", "X"), PERCENTILES, "Requests per second", id="a line missing"
        ),
        pytest.param(STDOUT, "", "no percentiles", id="empty CSV"),
        pytest.param(STDOUT, "Percentage served,Time in ms\n50,20\n", "no percentiles", id="CSV cut short"),
    ],
)
def test_parse_ab_says_what_is_missing(stdout: str, percentiles: str, complaint: str) -> None:
    with pytest.raises(LoadError, match=complaint):
        parse_ab(stdout, percentiles)


def test_closed_loop_opens_a_connection_per_request() -> None:
    peers = set()

    def answer(request: BaseHTTPRequestHandler) -> int:
        peers.add(request.client_address)
        return 500 if len(peers) == 3 else 200

    with answering(answer) as url:
        load = closed_loop(url, b"body", requests=10, concurrency=1)
    assert (load.requests, load.failed, len(peers)) == (10, 1, 10)


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

    with answering(answer) as url, OpenLoop(url, b"body", rate=50) as loop:
        assert others.wait(30)
        answers = loop.stop()
    assert all(each.good for each in answers)
    assert [each.due for each in answers] == pytest.approx([number / 50 for number in range(len(answers))])
    assert answers[0].at > answers[1].at


def test_an_abandoned_open_loop_does_not_wait() -> None:
    left, asked = threading.Event(), threading.Event()
    in_time = []

    def answer(request: BaseHTTPRequestHandler) -> int:
        asked.set()
        in_time.append(left.wait(10))
        return 200

    with answering(answer) as url:
        with OpenLoop(url, b"body", rate=10):
            assert asked.wait(30)
        left.set()
    assert all(in_time), "the loop waited for an answer that came after it was left"


def test_open_loop_counts_refused_connections_as_failed() -> None:
    answers = OpenLoop("http://127.0.0.1:1/predictions/model", b"", rate=100).run(0.1)
    assert answers
    assert not any(each.good for each in answers)


def test_open_loop_keeps_to_given_arrivals() -> None:
    arrivals = [0.0, 0.01, 0.011, 0.2]
    with answering(lambda request: 200) as url:
        answers = OpenLoop(url, b"body", arrivals=arrivals).run(PATIENCE / 30)
    assert [each.due for each in answers] == arrivals
    assert all(each.good for each in answers)


@pytest.mark.parametrize("given", [{}, {"rate": 1.0, "arrivals": [0.0]}], ids=["nothing", "both"])
def test_open_loop_wants_a_rate_or_arrivals(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        OpenLoop("http://127.0.0.1:1/", b"", **given)


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
    ],
)
def test_saturated(latencies: list[float], expected: bool) -> None:
    answers = [Answer(number / 10, latency, True) for number, latency in enumerate(latencies)]
    assert saturated(answers, 10) is expected


def test_a_failed_request_means_saturated() -> None:
    assert saturated([Answer(0, 0.1, True), Answer(0.1, 0.1, False)], 10)


# ---- figures from /proc and perf


def process(proc: Path, pid: int, *, threads: dict[int, dict[str, str]], ticks: int = 100) -> None:
    """Write what the kernel would say of a process into the tree ``proc``."""
    for thread, files in threads.items():
        task = proc / str(pid) / "task" / str(thread)
        task.mkdir(parents=True)
        for name, text in files.items():
            (task / name).write_text(text)
    (proc / str(pid) / "stat").write_text(f"{pid} (a) b) S 1 1 1 0 -1 0 0 0 0 0 {ticks} 20 3 4 20 0 1 0 5 0 0\n")


STATUS = "Name:\tx\nCpus_allowed_list:\t0-3\nvoluntary_ctxt_switches:\t{}\nnonvoluntary_ctxt_switches:\t{}\n"
SCHED = "x (1, #threads: 1)\nse.nr_migrations                             :     {}\n"


def test_snapshots_differ_by_what_happened_in_between(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    process(before, 7, threads={7: {"status": STATUS.format(10, 5), "sched": SCHED.format(3)}}, ticks=100)
    new = {"status": STATUS.format(4, 2), "sched": SCHED.format(1)}
    process(after, 7, threads={7: {"status": STATUS.format(30, 6), "sched": SCHED.format(8)}, 9: new}, ticks=300)
    found = probe.snapshot([7, 4040], proc=after).since(probe.snapshot([7], proc=before))
    assert found == (200 / os.sysconf("SC_CLK_TCK"), 24, 3, 6)


def test_migrations_are_unknown_without_the_scheduler_s_file(tmp_path: Path) -> None:
    process(tmp_path, 7, threads={7: {"status": STATUS.format(1, 1)}})
    assert probe.snapshot([7], proc=tmp_path).migrations is None


def test_pages_by_node(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "numa_maps").write_text(
        "7f00 default anon=3 N0=2 N1=1 kernelpagesize_kB=4\n"
        "7f10 default file=/x N1=1 kernelpagesize_kB=2048\n"
        "7f20 default\n"
    )
    assert probe.pages(7, proc=tmp_path) == {0: 8, 1: 2052}
    assert probe.pages(8, proc=tmp_path) == {}


@pytest.mark.parametrize(
    ("resident", "ran", "expected"),
    [
        pytest.param({0: 100}, {0: 1.0}, 0.0, id="all local"),
        pytest.param({1: 100}, {0: 1.0}, 1.0, id="all remote"),
        pytest.param({0: 50, 1: 50}, {0: 2.0, 1: 2.0}, 0.5, id="wandering over both nodes"),
        pytest.param({0: 75, 1: 25}, {0: 4.0}, 0.25, id="bound, a quarter elsewhere"),
        pytest.param({}, {0: 1.0}, None, id="no numa_maps"),
        pytest.param({0: 1}, {}, None, id="never ran"),
    ],
)
def test_remote_share(resident: dict[int, int], ran: dict[int, float], expected: float | None) -> None:
    assert probe.remote_share(resident, ran) == (None if expected is None else pytest.approx(expected))


def test_trace_knows_where_threads_ran() -> None:
    where: dict[tuple[int, int], list[tuple[int, float] | None]] = {
        (7, 7): [(0, 0.1), (2, 0.2), None, (2, 0.1)],
        (7, 8): [None, (3, 0.2), (3, 0.2), (0, 0.1)],
        (9, 9): [(1, 0.5)] * 4,
    }
    trace = probe.Trace([0.1, 0.3, 0.5, 0.7], {}, where)
    nodes = {0: 0, 1: 0, 2: 1, 3: 1}
    assert trace.node_seconds(7, nodes) == {0: pytest.approx(0.2), 1: pytest.approx(0.7)}
    assert trace.moves(nodes) == 2
    assert trace.moves({cpu: cpu for cpu in range(4)}) == 2


def test_the_sampler_sees_this_process_on_a_cpu_it_may_use() -> None:
    with probe.Sampler([os.getpid()], interval=0.02) as trace:
        busy = (os.getpid(), threading.get_native_id())
        assert eventually(lambda: math.factorial(2000) > 0 and any(trace.where.get(busy, [])))
    allowed = os.sched_getaffinity(0)
    assert {place[0] for place in trace.where[busy] if place} <= allowed
    assert allowed <= trace.usage.keys()
    lengths = {len(shares) for shares in trace.usage.values()} | {len(places) for places in trace.where.values()}
    assert lengths == {len(trace.times)}
    assert all(0 <= share <= 1 for shares in trace.usage.values() for share in shares)


REPORT = """\
    40.00%;libgomp-1.so.1.0.0;[.] 0x0000000000020ab0
    10.00%;[kernel.kallsyms];[k] do_sched_yield
    50.00%;libtorch_cpu.so;[.] mkl_blas_avx512_sgemm_kernel_0
"""


def test_spinning_is_time_in_the_openmp_runtime_and_in_sched_yield() -> None:
    assert perf.parse_spinning(REPORT) == pytest.approx(0.5)
    with pytest.raises(perf.Unavailable, match="no samples"):
        perf.parse_spinning("# nothing\n")


def test_core_bound() -> None:
    assert perf.parse_core_bound("12;;x;1;100.00;23.5;%  tma_core_bound\n") == pytest.approx(0.235)
    with pytest.raises(perf.Unavailable, match="performance counters"):
        perf.parse_core_bound("<not supported>;;slots;0;100.00;;\n")


# ---- rows and their ratios


def test_ratios_compare_within_a_repetition() -> None:
    rows = [
        row(Config.DEFAULT, 0, requests_per_second=10.0),
        row(Config.TS_CORES, 0, requests_per_second=30.0),
        row(Config.DEFAULT, 1, requests_per_second=5.0),  # the machine was busy: both are slower
        row(Config.TS_CORES, 1, requests_per_second=16.0),
        row(Config.TS_CORES, 2, requests_per_second=99.0),  # without a partner
    ]
    found = ratio(rows, Config.TS_CORES, Config.DEFAULT, SCENARIO, "requests_per_second")
    assert found is not None
    assert (found.low, found.high, found.number) == (3.0, 3.2, 2)
    assert found.text(2) == "3.10 (3.00\N{EN DASH}3.20)"


def test_a_void_row_counts_nowhere() -> None:
    rows = [row(Config.DEFAULT, 0, failed=1), row(Config.TS_CORES, 0)]
    assert spread(rows, Config.DEFAULT, SCENARIO, "requests_per_second") is None
    assert ratio(rows, Config.TS_CORES, Config.DEFAULT, SCENARIO, "requests_per_second") is None
    assert "void: 1 requests failed" in markdown(rows)


def test_rows_survive_json_in_the_published_schema() -> None:
    rows = [row(Config.TS_CORES, 1, ready_seconds=4.5), Row(Config.LAUNCHER, SCENARIO, 0, error="died\nlog")]
    flat = [each.to_json() for each in rows]
    assert [Row.from_json(json.loads(json.dumps(each))) for each in flat] == rows
    names = {"config", "model", "workers", "concurrency", "repetition"}
    assert names | {"requests_per_second", "p50_ms", "p99_ms", "failed"} <= flat[0].keys()
    assert flat[1].keys() == names | {"error"}


def test_tables() -> None:
    rows = [row(Config.DEFAULT, 0), row(Config.CEILING, 0), Row(Config.LAUNCHER, SCENARIO, 0, error="died | \nlog")]
    table = markdown(rows).splitlines()
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
    assert table[0] == "**resnet18, 2 workers, 10 concurrent requests**"
    assert sum("could not run: died" in line for line in table) == 1
    lines = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [line["config"] for line in lines] == ["default", "ceiling", "launcher"]
    assert [line["requests_per_second"] for line in lines] == ["10.0", "10.0", ""]
    assert lines[2]["error"] == "died | "


def test_every_configuration_is_first_once() -> None:
    configs = list(Config)
    assert [rotated(configs, repetition)[0] for repetition in range(len(configs))] == configs
    assert all(sorted(rotated(configs, repetition)) == sorted(configs) for repetition in range(7))


def test_configurations_of_a_cell_are_neighbours_in_time() -> None:
    other = Scenario("transformer", 1, 10)
    order = list(jobs([Config.DEFAULT, Config.TS_CORES], [SCENARIO, other], 2))
    assert [(job.scenario, job.config) for job in order] == [
        (SCENARIO, Config.DEFAULT),
        (SCENARIO, Config.TS_CORES),
        (other, Config.DEFAULT),
        (other, Config.TS_CORES),
        (SCENARIO, Config.TS_CORES),
        (SCENARIO, Config.DEFAULT),
        (other, Config.TS_CORES),
        (other, Config.DEFAULT),
    ]


def test_without_options_the_run_is_the_tutorial_s() -> None:
    options = parse([])
    assert (options.models, options.workers, options.concurrency, options.requests) == (["resnet50"], [4], 100, 10_000)
    assert options.configs == list(Config)
    assert options.command == "./dev bench"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--requests 10", "at least 51"),
        ("--workers 0", "0 is not positive"),
        ("--mar absent.mar", "absent.mar: no such file"),
        ("--config fast", "invalid Config value: 'fast'"),
    ],
)
def test_bad_options(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words.split())
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


# ---- slices of the ceiling, the exercises, the gaps


def cores(packages: int, per_package: int, *, siblings: bool) -> list[Core]:
    total = packages * per_package
    return [
        Core((n, n + total) if siblings else (n,), package=n // per_package, node=n // per_package, l3=n // per_package)
        for n in range(total)
    ]


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        pytest.param(1, [(0, 1, 2, 3)], id="one"),
        pytest.param(2, [(0, 1), (2, 3)], id="two, a node each"),
        pytest.param(3, [(0,), (1,), (2, 3)], id="three"),
        pytest.param(6, [(0,), (1,), (2,), (3,), (0,), (1,)], id="more than cores"),
    ],
)
def test_the_ceiling_s_bindings(workers: int, expected: list[tuple[int, ...]]) -> None:
    assert divide(cores(2, 2, siblings=True), workers) == [Binding(cpus, len(cpus)) for cpus in expected]


def test_the_exercises_say_why_they_are_missing() -> None:
    found = list(exercises(cores(1, 2, siblings=False)))
    assert ["no SMT" in (one.missing or "") for one in found] == [True, False]
    assert "one NUMA node" in (found[1].missing or "")


def test_the_exercises_compare_the_same_cores() -> None:
    smt, numa = exercises(cores(2, 2, siblings=True))
    assert [binding for _, binding in smt.bindings] == [Binding((0, 4, 1, 5), 4), Binding((0, 1), 2)]
    assert [binding for _, binding in numa.bindings] == [Binding(None, 2), Binding((0, 1), 2)]


@pytest.mark.parametrize(
    ("answered", "expected"),
    [
        pytest.param([], 10.0, id="silence"),
        pytest.param([2, 4, 6, 8], 2.0, id="even"),
        pytest.param([1, 9], 8.0, id="in the middle"),
        pytest.param([7, 9], 7.0, id="at the start"),
        pytest.param([-1, 1, 12], 9.0, id="answers outside do not count"),
        pytest.param([8, 1, 4], 4.0, id="unsorted"),
    ],
)
def test_longest_gap(answered: list[float], expected: float) -> None:
    assert scaling.longest_gap(answered, 0, 10) == expected


# ---- pictures and reports


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A directory with results.json and traces.json of a made-up run on two CPUs."""
    rows = [
        row(
            config,
            repetition,
            requests_per_second=speed + repetition,
            rate_per_second=5.0,
            rate_p50_ms=20.0,
            rate_p99_ms=40.0,
        )
        for repetition in range(2)
        for config, speed in ((Config.DEFAULT, 9.0), (Config.TS_CORES, 31.0), (Config.CEILING, 36.0))
    ]
    rows.append(Row(Config.LAUNCHER, SCENARIO, 0, error="workers keep dying <&>"))
    worker = {"masks": {"7": "0-1"}, "pages": {"0": 1024}, "node_seconds": {"0": 1.0}}
    trace = {
        "times": [0.1, 0.3, 0.5],
        "usage": {"0": [0.5, 1.0, 1.0], "1": [0.1, 0.0, 0.9]},
    }
    traces = [
        {
            "config": config,
            "model": "resnet18",
            "workers_wanted": 2,
            "workers": {"7": worker, "8": worker},
            "trace": trace,
        }
        for config in ("default", "ts-cores")
    ]
    answers = tuple((n / 5, 0.1, n != 7) for n in range(40))
    run = scaling.Scaling("ts-cores", 5.0, 2.0, 3.0, 5.0, 5.1, 8.0, answers)
    machine = {
        "cpu_model": "Test",
        "packages": 1,
        "numa_nodes": 1,
        "cores": 2,
        "cpus": 2,
        "allowed_cpus": "0-1",
        "cgroup_cpu_quota": None,
        "memory_mib": 1024,
        "kernel": "6.1",
        "virtual_machine": True,
        "versions": {"torch": "2"},
        "topology": [{"cpus": "0", "package": 0, "numa_node": 0, "l3_domain": 0}],
        "unavailable": {"core_bound_share": "no PMU"},
    }
    found = {
        "machine": machine,
        "rows": [each.to_json() for each in rows],
        "scaling": [run.to_json(), {"config": "launcher", "error": "did not start\nlog"}],
        "exercises": [{"title": "SMT", "missing": "no SMT"}],
        "command": "./dev bench",
    }
    (tmp_path / "results.json").write_text(json.dumps(found))
    (tmp_path / "traces.json").write_text(json.dumps(traces))
    return tmp_path


def test_report_files(measured: Path) -> None:
    made = {file.name for file in report.write(measured)}
    assert made == {file.name for file in measured.iterdir()} - {"traces.json"}
    drawn = [file for file in measured.iterdir() if file.suffix == ".png"]
    assert len(drawn) == 6
    for file in drawn:
        head = file.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
        assert (width, height > 100) == (pictures.WIDTH * pictures.DPI, True)
    page = (measured / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == 6
    assert not re.search(r"\b(src|href)=(?!'data:)", page)
    assert "workers keep dying &lt;&amp;&gt;" in page
    text = (measured / "results.md").read_text()
    assert "| default | 9.5 (9.0\N{EN DASH}10.0) |" in text
    assert "no SMT" in text
    assert "core_bound_share: no PMU" in text
    assert len((measured / "results.csv").read_text().splitlines()) == 8


def test_report_of_a_run_that_measured_nothing(measured: Path) -> None:
    found = json.loads((measured / "results.json").read_text())
    (measured / "results.json").write_text(json.dumps(found | {"rows": [], "scaling": [], "exercises": []}))
    (measured / "traces.json").unlink()
    made = {file.name for file in report.write(measured)}
    assert made == {"results.json", "results.csv", "results.md", "report.html"}


def test_the_palette_tells_every_configuration_apart() -> None:
    assert pictures.COLOURS.keys() == set(Config)
    assert len(set(pictures.COLOURS.values())) == len(Config)


# ---- latency against load


def sample(config: Config, repetition: int, *latencies: float, **changes: Any) -> Sample:
    given: dict[str, Any] = {"stage": "resnet50, 2 workers", "point": "some load", "latencies_ms": latencies}
    return Sample(config=config, repetition=repetition, **given | changes)


def test_lending_is_ts_cores_with_one_word_more() -> None:
    alone, lending = (
        setting(config, workers=2, cores=2, launcher_args="") for config in (Config.TS_CORES, Config.LENDING)
    )
    assert lending.properties == alone.properties | {"cpu_launcher_args": "--lend auto"}
    both = setting(Config.LENDING, workers=2, cores=2, launcher_args="--core-list 0,1").properties
    assert both["cpu_launcher_args"] == "--core-list 0,1 --lend auto"


def test_the_lead_in_counts_for_nothing() -> None:
    """Two answers per second: slow ones before the lead-in ends, then fast ones; the last comes after the end."""
    answers = [Answer(n / 2, 0.4 if n / 2 < LEAD_IN else 0.1, True) for n in range(int(2 * LEAD_IN) + 8)]
    found = counted(answers, sample(Config.DEFAULT, 0, rate=2.0), 4.0)
    assert found.latencies_ms == (100.0,) * 8
    assert found.requests_per_second == pytest.approx(2.0, rel=0.1)
    assert (found.failed, found.saturated, found.steady) == (0, False, True)


def test_a_failed_answer_is_counted_and_the_load_was_too_much() -> None:
    answers = [Answer(LEAD_IN + n, 0.1, n != 2) for n in range(4)]
    found = counted(answers, sample(Config.DEFAULT, 0, rate=1.0, failed=1), 4.0)
    assert (len(found.latencies_ms), found.failed, found.saturated, found.steady) == (3, 2, True, False)


def test_nothing_but_failures_is_a_sample_without_figures() -> None:
    found = counted([Answer(LEAD_IN, 0.1, False)], sample(Config.DEFAULT, 0), 1.0)
    assert (found.mean_ms, found.p99_ms, found.requests_per_second, found.failed) == (None, None, None, 1)


def test_samples_survive_json() -> None:
    found = [sample(Config.TS_CORES, 1, 5.0, 7.0, rate=3.0, saturated=True), sample(Config.LAUNCHER, 0, error="died")]
    flat = [each.to_json() for each in found]
    assert flat[0]["config"] == "ts-cores"
    assert flat[0]["mean_ms"] == 6.0
    assert [Sample.from_json(json.loads(json.dumps(each))) for each in flat] == found


def ratios(samples: list[Sample], figure: str, *bases: Config) -> tuple[float, float, float] | None:
    found = compared(samples, "resnet50, 2 workers", "some load", figure, Config.LENDING, bases)
    return (found.low, found.median, found.high) if found else None


def test_loads_are_compared_within_a_repetition_with_the_best_base() -> None:
    found = [
        sample(Config.DEFAULT, 0, 10.0),
        sample(Config.TS_CORES, 0, 20.0),
        sample(Config.LENDING, 0, 5.0),
        sample(Config.DEFAULT, 1, 80.0),
        sample(Config.TS_CORES, 1, 40.0),
        sample(Config.LENDING, 1, 60.0),
        sample(Config.LENDING, 2, 1.0),  # without a partner
        sample(Config.TS_CORES, 3, 1.0, saturated=True),  # says how long one measured
        sample(Config.LENDING, 3, 60.0),
    ]
    assert ratios(found, "mean_ms", Config.DEFAULT, Config.TS_CORES) == (0.5, 1.0, 1.5)
    assert ratios(found, "mean_ms", Config.DEFAULT) == (0.5, 0.625, 0.75)
    assert ratios(found, "mean_ms", Config.LAUNCHER) is None


def test_the_better_throughput_is_the_higher_one() -> None:
    found = [
        sample(config, 0, 1.0, requests_per_second=speed)
        for config, speed in ((Config.DEFAULT, 4.0), (Config.TS_CORES, 10.0), (Config.LENDING, 9.0))
    ]
    assert ratios(found, "requests_per_second", Config.DEFAULT, Config.TS_CORES) == (0.9, 0.9, 0.9)


def test_a_p99_is_that_of_all_repetitions_together() -> None:
    """99 and 101 fast answers and one slow one per repetition, or none: of 200 two may be slow."""
    found = [
        sample(Config.TS_CORES, 0, *[10.0] * 100),
        sample(Config.TS_CORES, 1, *[10.0] * 100),
        sample(Config.LENDING, 0, *[10.0] * 98, 90.0, 90.0),
        sample(Config.LENDING, 1, *[10.0] * 100),
    ]
    assert ratios(found, "p99_ms", Config.TS_CORES) == (1.0, 1.0, 9.0)
    together = pooled([each for each in found if each.config is Config.LENDING], "p99_ms")
    assert together is not None
    assert (together.low, together.median, together.high) == (10.0, 10.0, 90.0)


def everything_kept(**changes: float) -> list[Sample]:
    """Samples of a run of must_show in which ts-cores is three times as fast in everything."""
    return [
        Sample(stage.name, point.name, config, 0, None, (latency,), 1000 / latency)
        for stage in must_show(seconds=1)
        for point in stage.points
        for config in stage.configs
        if config in point.configs
        for latency in [changes.get(point.name, 20.0) if config is Config.LENDING else 60.0]
    ]


def test_every_promise_is_measured_by_the_run() -> None:
    table, kept = promises_table(everything_kept())
    lines = table.splitlines()[2:]
    assert len(lines) == len(PROMISES) + 1
    assert kept
    assert all(line.endswith("| holds |") for line in lines)
    assert all("| 0.33 | ≤" in line or "| 3.00 | ≥" in line for line in lines[:-1])


@pytest.mark.parametrize("number", range(len(PROMISES)))
def test_a_promise_that_is_missed_is_said(number: int) -> None:
    promise = PROMISES[number]
    worse = everything_kept(**{promise.point: 60 * 1.5})
    table, kept = promises_table(worse)
    assert not kept
    assert table.splitlines()[2 + number].endswith("| MISSED |")
    untouched = [
        line for line, other in zip(table.splitlines()[2:], PROMISES, strict=False) if other.point != promise.point
    ]
    assert all(line.endswith("| holds |") for line in untouched)


def test_what_was_not_measured_or_lost_was_not_kept() -> None:
    assert not promises_table([])[1]
    lost = everything_kept()
    assert not promises_table([*lost, replace(lost[-1], config=Config.LENDING, repetition=1, failed=1)])[1]


def test_the_loads_of_the_curve() -> None:
    stages = curve("resnet18", workers=2, seconds=10, configs=[Config.TS_CORES, Config.LENDING])
    assert [(stage.workers, stage.beside, stage.shares) for stage in stages] == [
        (2, None, True),
        (1, "resnet18", False),
    ]
    assert [point.share for point in stages[0].points] == [None, 0.2, 0.5, 0.8, None]
    assert [point.clients for stage in stages for point in stage.points] == [1, None, None, None, 8, 2]
    assert len({stage.name for stage in [*stages, *must_show(seconds=1)]}) == len(stages) + 4


def test_three_repetitions_of_the_promises_take_eleven_minutes() -> None:
    once = sum(
        LEAD_IN + point.seconds
        for stage in must_show(seconds=parse(["--must-show"]).seconds)
        for point in stage.points
        for config in stage.configs
        if config in point.configs
    )
    assert 3 * once < 10.5 * 60  # and two for eleven servers' starts


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--loads --must-show", "two runs"),
        ("--must-show --model resnet18", "its own configurations"),
    ],
)
def test_loads_that_do_not_go_together(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words.split())
    assert complaint in capsys.readouterr().err


def test_the_picture_and_tables_of_loads(measured: Path) -> None:
    loads = [
        Sample(
            stage.name,
            point.name,
            config,
            repetition,
            10.0 * point.share if point.share else None,
            (50.0 + repetition, 60.0),
            12.0,
            saturated=config is Config.DEFAULT and point.share == 0.8,
        )
        for stage in curve("resnet18", workers=2, seconds=1, configs=list(Config)[:-1])
        for point in stage.points
        for config in stage.configs
        for repetition in range(2)
    ]
    loads.append(Sample(loads[0].stage, loads[0].point, Config.LAUNCHER, 2, error="keep dying <&>\nlog"))
    found = json.loads((measured / "results.json").read_text()) | {"rows": [], "must_show": False}
    found |= {"loads": [each.to_json() for each in loads]}
    (measured / "results.json").write_text(json.dumps(found))
    assert "latency_against_load.png" in {file.name for file in report.write(measured)}
    picture = (measured / "latency_against_load.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20]) == pictures.WIDTH * pictures.DPI
    text = (measured / "results.md").read_text()
    assert "open loop at 0.2 of capacity (2/s)" in text
    assert "could not run: keep dying" in text
    assert text.count(", saturated") == 1
    assert "What lending cores must reach" not in text
    page = (measured / "report.html").read_text()
    assert "keep dying &lt;&amp;&gt;" in page
    assert "latency_against_load.png" not in page  # it is inside


def test_bars_stand_beside_their_names() -> None:
    """TorchServe's launcher cannot serve two models: its bar is missing in one of two panels that share their names."""
    full, uneven = (Sample("s", point, Config.LAUNCHER, 0, latencies_ms=(1.0,)) for point in (FULL, UNEVEN))
    samples = [replace(full, config=one, requests_per_second=20.0 + n) for n, one in enumerate(load_picture.NAMES)]
    samples += [
        replace(uneven, requests_per_second=None, latencies_ms=(), error="no"),
        replace(uneven, config=Config.DEFAULT, requests_per_second=7.0),
    ]
    figure, panels = pyplot.subplots(1, 2, sharey=True)
    configs = [config for config in Config if config in load_picture.NAMES]
    for panel, point in zip(panels, (FULL, UNEVEN), strict=True):
        load_picture._bars(panel, configs, [one for one in samples if one.point == point], "")
        for bar in panel.patches:
            config = configs[round(bar.get_y() + bar.get_height() / 2)]
            (mine,) = (one for one in samples if (one.point, one.config) == (point, config))
            assert bar.get_width() == mine.requests_per_second
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == [load_picture.NAMES[config] for config in configs]
    assert [text.get_text().strip() for text in panels[1].texts].count("could not run") == 1
    pyplot.close(figure)


def test_the_report_of_the_promises(measured: Path) -> None:
    found = json.loads((measured / "results.json").read_text()) | {"rows": [], "must_show": True}
    found |= {"loads": [each.to_json() for each in everything_kept()[1:]]}  # without the first load's default
    (measured / "results.json").write_text(json.dumps(found))
    assert "latency_against_load.png" not in {file.name for file in report.write(measured)}
    text = (measured / "results.md").read_text()
    assert text.startswith("**What lending cores must reach**")
    assert "| not measured | ≤ 1.10 | MISSED |" in text
    assert text.count("| holds |") == len(PROMISES)


def test_a_line_per_load_for_every_configuration_that_ran() -> None:
    found = points.points_table(
        [sample(Config.TS_CORES, 0, 5.0, rate=3.0), sample(Config.LENDING, 0, 4.0, rate=3.0, failed=2)]
    )
    assert "| ts-cores | 5.0 / 5.0 / 5.0 |" in found
    assert "| ts-cores --lend auto | 4.0 / 4.0 / 4.0, 2 failed |" in found


# ---- one real run


def _rows(results: Path) -> int:
    return len(json.loads(results.read_text())["rows"])


def test_a_real_run_interrupted_keeps_its_rows_and_leaves_no_process(tmp_path: Path, checkout: Path) -> None:
    archives.transformer()
    out = tmp_path / "out"
    words = (
        "--model transformer --workers 2 --requests 51 --concurrency 2 --seconds 1 --config ceiling --config ts-cores"
    )
    command = [sys.executable, "-m", "benchmarks.measurement.bench", *words.split(), "--repetitions=50", f"--out={out}"]
    running = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        results = out / "results.json"
        eventually(lambda: running.poll() is not None or (results.exists() and _rows(results) >= 2), patience=240)
        # Into the middle of a row: with its server or its bare processes.
        assert eventually(lambda: len(psutil.Process(running.pid).children(recursive=True)) >= 2)
        descendants = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=120)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, output
    # A bare process that was being started when the interrupt came ends with its stdin.
    _, left = psutil.wait_procs(descendants, timeout=PATIENCE)
    assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]
    found = json.loads(results.read_text())
    assert found["interrupted"]
    rows = [Row.from_json(flat) for flat in found["rows"]]
    assert [each.config for each in rows[:2]] == [Config.TS_CORES, Config.CEILING]
    assert all(each.valid for each in rows[:2]), output
    served = rows[0].figures
    assert served is not None
    assert (served.requests, served.failed, served.processes) == (51, 0, 4)
    assert served.pss_mib > 100
    assert (out / "report.html").exists()
    assert (out / "throughput.png").exists()


def test_a_real_run_of_the_loads(tmp_path: Path, checkout: Path) -> None:
    archives.transformer()
    configs = ("ts-cores", "ts-cores --lend auto")
    command = [sys.executable, "-m", "benchmarks.measurement.bench", "--loads", "--model=transformer", "--workers=1"]
    command += [f"--config={config}" for config in configs]
    command += ["--seconds=1", "--repetitions=1", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [Sample.from_json(flat) for flat in json.loads((tmp_path / "results.json").read_text())["loads"]]
    wanted = [
        (stage.name, point.name, config)
        for stage in curve("transformer", workers=1, seconds=1, configs=[Config(config) for config in configs])
        for point in stage.points
        for config in stage.configs
    ]
    overrun = {each.config for each in found if each.saturated}  # a busy machine: its higher rates are left out
    missing = set(wanted) - {(each.stage, each.point, each.config) for each in found}
    assert all(config in overrun and "0.2" not in point for _, point, config in missing), found
    assert all(each.error is None for each in found), found
    # Where the queue only grows, requests at its end are given up.
    assert all(each.saturated or (each.failed == 0 and each.latencies_ms) for each in found), found
    capacity = next(each.requests_per_second for each in found if each.point == "capacity")
    assert capacity
    shares = {
        "open loop at 0.2 of capacity": 0.2,
        "open loop at 0.5 of capacity": 0.5,
        "open loop at 0.8 of capacity": 0.8,
    }
    assert all(each.rate == pytest.approx(capacity * shares[each.point]) for each in found if each.rate)
    assert (tmp_path / "latency_against_load.png").exists()
