"""`ts-cores compare`: its plan, its figures and its sentence on tables, its picture, its errors, and one real run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest
from rich.console import Console

from tests.browser import Browser
from tests.eventually import eventually
from tests.test_tune import QUICK, archive, refused, run
from ts_plugin.compare import command as command_module
from ts_plugin.compare import inside, perf
from ts_plugin.compare.comparison import Comparison, FormatError, Server
from ts_plugin.compare.picture import picture
from ts_plugin.compare.report import notes, table, verdict
from ts_plugin.compare.ways import ONE, SHARES, UNEVEN, Way, configured, contender, plan, share_name, workers_of
from ts_plugin.config.file import parse_config
from ts_plugin.errors import CommandError
from ts_plugin.trial import alone
from ts_plugin.trial.archive import read_archive
from ts_plugin.trial.spread import ratio, spread_of
from ts_plugin.trial.turns import FULL, LEAD_IN, Round, Sample
from ts_plugin.worker.start import OFF_VARIABLE

MACHINE = {
    "cpu_model": "Test <&>",
    "packages": 1,
    "numa_nodes": 1,
    "l3_domains": 1,
    "cores": 2,
    "cpus": 2,
    "cpuset": "0-1",
    "measured_cpus": 2,
    "quota": 1.0,
    "kernel": "6.1",
    "virtual_machine": True,
    "versions": {"torch": "2.9", "java": None},
}
LOADS = plan(600.0, 5, [2], request=0.05)


def sample(throughput: float, *latencies: float, rate: float | None = None, **changes: object) -> Sample:
    return replace(Sample(rate, throughput, tuple(sorted(latencies)), 0), **changes)  # type: ignore[arg-type]


def made(full: dict[Way, list[float]], alone: dict[Way, list[float]] | None = None, **changes: object) -> Comparison:
    """Return a comparison with these throughputs and latencies (seconds), one for each repetition."""
    rounds = [
        Round(way, FULL, repetition, (sample(value, 0.3),))
        for way, values in full.items()
        for repetition, value in enumerate(values)
    ]
    rounds += [
        Round(way, ONE, repetition, (sample(1 / value, value),))
        for way, values in (alone or {}).items()
        for repetition, value in enumerate(values)
    ]
    servers = {str(way): Server(8.0, 900) for way in full}
    found = Comparison(MACHINE, {"workers": [2]}, ("resnet",), LOADS, servers, tuple(rounds))
    return replace(found, **changes)  # type: ignore[arg-type]


def printed(found: Comparison) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(table(found))
    return capture.get()


# ---- the plan


@pytest.mark.parametrize("contenders", [2, 5])
@pytest.mark.parametrize("seconds", [60, 120, 240, 600, 3600])
@pytest.mark.parametrize("workers", [[2], [2, 3]], ids=["one model", "two"])
def test_the_plan_fits_the_time(seconds: float, contenders: int, workers: list[int]) -> None:
    loads = plan(seconds, contenders, workers, request=0.1)
    takes = contenders * sum((LEAD_IN + load.seconds) * load.repetitions for load in loads)
    assert takes <= seconds or [load.repetitions for load in loads] == [1] * (1 + len(workers))
    assert takes > seconds / 2 or seconds == 60
    assert [load.name for load in loads][:2] == [FULL, ONE]
    assert (UNEVEN in [load.name for load in loads]) == (len(workers) > 1)
    assert all(load.repetitions >= loads[-1].repetitions for load in loads)


def test_five_minutes_repeat_what_the_verdict_rests_on() -> None:
    loads = {load.name: load.repetitions for load in plan(225, 5, [2], request=0.05)}
    assert loads[FULL] == loads[ONE] == 3
    assert loads[share_name(0.5)] >= 1


def test_slow_requests_get_longer_loads() -> None:
    assert all(load.seconds >= 8 for load in plan(100, 2, [1], request=2.0))


def test_workers_are_those_asked_for_or_said_or_one_per_core(tmp_path: Path) -> None:
    plain, own = read_archive(archive(tmp_path)), read_archive(archive(tmp_path, name="own", config="minWorkers: 3\n"))
    models = json.dumps({"tiny-model": {"1.0": {"minWorkers": 7, "batchSize": 2}}})
    file = tmp_path / "config.properties"
    named = parse_config(file, f"models={models}\ndefault_workers_per_model=5\n".encode(), {})
    general = parse_config(file, b"default_workers_per_model=5\n", {})
    assert workers_of([plain, own], named, 2, 8) == [2, 2]
    assert workers_of([plain, own], named, None, 8) == [7, 3]
    assert workers_of([plain, own], general, None, 8) == [5, 3]
    assert workers_of([plain], None, None, 1) == [1]
    assert workers_of([plain], None, None, 64) == [4]
    assert configured(plain, named) == {"minWorkers": 7, "batchSize": 2}
    assert configured(own, named) == {}


def test_every_way_has_what_the_config_has_except_for_launcher_and_plug_in(tmp_path: Path) -> None:
    text = (
        b"cpu_launcher_enable=true\ncpu_launcher_args=--core-list 0,1\nplugins_path=/x\njob_queue_size=7\nmodels={}\n"
    )
    config = parse_config(tmp_path / "config.properties", text, {})
    found = {way: contender(way, ({},), threads=3, config=config) for way in Way}
    assert all(one.properties["job_queue_size"] == "7" for one in found.values())
    stock = (Way.DEFAULT, Way.THREADS, Way.LAUNCHER)
    assert all(OFF_VARIABLE in found[way].environment and "plugins_path" not in found[way].properties for way in stock)
    assert all(OFF_VARIABLE not in found[way].environment for way in set(Way) - set(stock))
    assert "cpu_launcher_enable" not in found[Way.DEFAULT].properties
    assert found[Way.THREADS].environment["OMP_NUM_THREADS"] == "3"
    assert found[Way.LAUNCHER].properties["cpu_launcher_args"] == "--core-list 0,1"
    assert found[Way.NEVER].properties["cpu_launcher_args"] == "--core-list 0,1 --lend never"


# ---- figures


def test_ratios_are_formed_within_a_repetition() -> None:
    found = ratio({0: 30.0, 1: 16.0, 2: 99.0}, {0: 10.0, 1: 5.0})  # the machine was busy the second time: both are slow
    assert found is not None
    assert (found.low, found.high, found.number) == (3.0, 3.2, 2)
    assert found.text() == "3.1 (3\N{EN DASH}3.2)"
    assert ratio({0: 1.0}, {1: 1.0}) is None
    assert ratio({0: 1.0}, {0: 0.0}) is None
    assert spread_of([]) is None


def test_a_p99_is_that_of_all_repetitions_together() -> None:
    rounds = tuple(
        Round(Way.OURS, share_name(0.5), number, (sample(10.0, *latencies, rate=10.0),))
        for number, latencies in enumerate(([0.01] * 98 + [0.09] * 2, [0.01] * 100))
    )
    spread = made({}, rounds=rounds).spread(Way.OURS, share_name(0.5), "p99")
    assert spread is not None
    assert (spread.low, spread.median, spread.high) == (0.01, 0.01, 0.09)


def test_the_sentence_has_numbers_and_spread() -> None:
    full = {Way.OURS: [42.0, 44.0, 40.0], Way.DEFAULT: [10.0, 11.0, 10.0], Way.THREADS: [42.5, 43.0, 41.0]}
    full |= {Way.LAUNCHER: [20.0, 22.0, 20.0]}
    alone = {Way.OURS: [0.07, 0.07, 0.08], Way.DEFAULT: [0.1, 0.1, 0.1]}
    assert verdict(made(full, alone)) == (
        "ts-cores: 4 (4–4.2) x the throughput of TorchServe's default at full load, 0.7 (0.7–0.8) x its latency for "
        "one request at a time; at full load within noise of threads only; 2 (2–2.1) x the throughput of TorchServe's "
        "launcher."
    )


def test_a_loss_is_said_like_a_win() -> None:
    assert "0.81 (0.8–0.82) x the throughput of TorchServe's default" in verdict(
        made({Way.OURS: [8.0, 8.2], Way.DEFAULT: [10.0, 10.0]})
    )


def test_one_repetition_knows_no_noise() -> None:
    told = verdict(made({Way.OURS: [8.0], Way.DEFAULT: [2.0], Way.THREADS: [8.0]}))
    assert "4 x the throughput of TorchServe's default" in told
    assert "measured once" in told
    assert "within noise" not in told


def test_what_could_not_run_or_keep_up_is_said() -> None:
    found = made({Way.OURS: [8.0, 8.0]})
    late = [
        Round(Way.DEFAULT, share_name(share), 0, (sample(1.0, 9.0, rate=10 * share, saturated=share > 0.3),), 0.9)
        for share in SHARES
    ]
    refused = Server(error="its workers keep dying")
    servers = {**found.servers, Way.LAUNCHER: refused, Way.DEFAULT: Server(9.0, 800)}
    found = replace(found, servers=servers, rounds=(*found.rounds, *late), interrupted=True)
    told = list(notes(found))
    assert "TorchServe's launcher could not run: its workers keep dying" in told
    assert "TorchServe's default cannot keep up with 5 requests/s, 0.5 of full load." in told
    assert any("Others used" in line and "0.9 at most" in line for line in told)
    assert any("Interrupted" in line for line in told)
    drawn = printed(found)
    assert drawn.count("cannot keep up") == 2
    assert "could not run" in drawn
    assert verdict(replace(found, rounds=tuple(late))) == "ts-cores was not measured."


# ---- the document and its picture


def whole() -> Comparison:
    """Return a comparison of all ways, all loads and two models."""
    loads = plan(600.0, 5, [2, 1], request=0.05)
    rounds = tuple(
        Round(
            way,
            load.name,
            repetition,
            (
                sample(5.0 + place, 0.1 + place / 50, 0.2, rate=10 * load.share or None),
                sample(3.0 if load.name != UNEVEN else 0.0, 0.2, rate=5 * load.share or None),
            ),
        )
        for place, way in enumerate(Way)
        for load in loads
        for repetition in range(2)
    )
    servers = {str(way): Server(8.0, 900) for way in Way}
    return Comparison(MACHINE, {"workers": [2, 1]}, ("a<&>", "b"), loads, servers, rounds)


def test_the_document_comes_back_as_it_was() -> None:
    found = whole()
    assert Comparison.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("", "no comparison", id="empty"),
        pytest.param("[]", "no comparison", id="a list"),
        pytest.param("{}", "no comparison", id="something else"),
        pytest.param('{"ts_cores_comparison": 9}', "format 9, and this ts-cores reads 1", id="newer"),
        pytest.param('{"ts_cores_comparison": 1, "models": ["m"]}', "no comparison", id="cut short"),
    ],
)
def test_another_file_is_no_comparison(text: str, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        Comparison.from_json(text)


def test_the_picture_shows_every_way_and_load_in_light_and_dark() -> None:
    drawn = picture(whole())
    root = ElementTree.fromstring(drawn)
    names = {"s": "http://www.w3.org/2000/svg"}
    words = [text.text or "" for text in root.findall(".//s:text", names)]
    assert {"a<&>", "b", "5/s", *map(share_name, SHARES)} <= set(words)
    assert all(words.count(way) >= 3 for way in Way)  # the legend, and the bars of two models
    assert len(root.findall(".//s:polyline", names)) == 2 * 2 * len(Way)
    assert "prefers-color-scheme:dark" in drawn
    assert "<script" not in drawn
    assert not re.search(r"\b(nan|inf)\b", drawn)


@pytest.mark.process
def test_texts_of_the_picture_do_not_lie_on_each_other(tmp_path: Path) -> None:
    found = whole()
    late = (
        replace(one, samples=tuple(replace(sample, saturated=True) for sample in one.samples))
        for one in found.rounds
        if one.contender != Way.OURS
    )
    found = replace(found, rounds=(*late, *(one for one in found.rounds if one.contender == Way.OURS)))
    file = tmp_path / "compare.svg"
    file.write_text(picture(found), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.open(file.as_uri())
        assert "open: cannot keep up" in browser.run("document.documentElement.textContent")
        assert browser.overlapping_texts() == []


@pytest.mark.parametrize("latencies", [[0.1], [0.1, 0.15], [0.05, 20.0]])
def test_an_axis_of_the_picture_has_numbers_enough_to_read_a_value(latencies: list[float]) -> None:
    drawn = picture(made({Way.OURS: [8.0]}, {Way.OURS: latencies}))
    assert 2 * 4 <= drawn.count('class="grid"') <= 2 * 12, "in two panels"


def test_a_picture_of_little_is_drawn_too() -> None:
    found = made({Way.OURS: [8.0]})
    ElementTree.fromstring(picture(found))
    ElementTree.fromstring(picture(replace(found, rounds=())))
    refused = replace(found, servers={**found.servers, Way.LAUNCHER: Server(error="no")})
    assert "could not run" in picture(refused)


# ---- inside, for --pictures


@pytest.mark.parametrize(
    ("resident", "ran", "expected"),
    [
        pytest.param({0: 100}, {0: 1}, 0.0, id="all local"),
        pytest.param({1: 100}, {0: 1}, 1.0, id="all remote"),
        pytest.param({0: 50, 1: 50}, {0: 2, 1: 2}, 0.5, id="wandering over both nodes"),
        pytest.param({0: 75, 1: 25}, {0: 4}, 0.25, id="bound, a quarter elsewhere"),
        pytest.param({}, {0: 1}, None, id="no numa_maps"),
        pytest.param({0: 1}, {}, None, id="never ran"),
    ],
)
def test_remote_share(resident: dict[int, int], ran: dict[int, int], expected: float | None) -> None:
    assert inside.remote_share(resident, ran) == expected


@pytest.mark.process
def test_a_look_inside_a_process_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "SAMPLES", 4)
    monkeypatch.setattr(inside, "PROFILE", 0.5)
    cpus = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            seen = inside.look([busy.pid], dict.fromkeys(cpus, 0))
        finally:
            busy.kill()
    assert seen["busy"].keys() == {str(cpu) for cpu in cpus}
    assert {len(shares) for shares in seen["busy"].values()} == {4}
    assert all(0 <= share <= 1 for shares in seen["busy"].values() for share in shares)
    assert any(share > 0.1 for shares in seen["busy"].values() for share in shares)
    assert all((seen[name] is None) == (name in seen["missing"]) for name in ("spinning", "core_bound"))
    picture = inside.drawn(replace(whole(), inside={Way.OURS: seen | {"core_bound": None, "moves": 3.25}}))
    words = [text.text or "" for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert any("core bound not known here" in line and "3.25/s" in line for line in words)


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


# ---- a busy machine


@pytest.mark.process
def test_a_busy_machine_is_refused_with_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "LOOK", 0.5)
    (cpu, *_) = os.sched_getaffinity(0)
    computes = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nprint(os.getpid(), flush=True)\nwhile True: pass"
    # Started by a process that ends: what this one starts would be its own trial's.
    starts = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {computes!r}])"
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        busy = psutil.Process(int(starter.stdout.readline()))
        try:
            starter.wait()
            with pytest.raises(CommandError, match=r"the machine is busy: others use [\d.]+ of the 1 CPUs.*--anyway"):
                alone.require_quiet({cpu}, anyway=False)
            assert alone.require_quiet({cpu}, anyway=True) > 0
        finally:
            busy.kill()


@pytest.mark.process
def test_what_we_started_is_not_others() -> None:
    code = "import time\nwhile time.process_time() < 1: pass"
    everywhere = range(4096)
    before, began = alone.others_seconds(everywhere), psutil.cpu_times()
    subprocess.run([sys.executable, "-c", code], check=True)
    used = alone.others_seconds(everywhere) - before
    after = psutil.cpu_times()
    whole = sum(getattr(after, name) - getattr(began, name) for name in ("user", "nice", "system"))
    assert used < whole - 0.5


# ---- the command

OURS = """
import os, time
from ts_plugin.handlers import CoreSliceMixin
from ts_plugin.worker import follower

def plain():  # TorchServe wants one class in the file
    class Plain:
        def initialize(self, context):
            self.initialized = True
            with open("SEEN", "a") as seen:
                print("TS_CORES_OFF" in os.environ, follower.current() is not None, file=seen)
        def handle(self, data, context):
            time.sleep(0.02)
            return [1] * len(data)
    return Plain

class Handler(CoreSliceMixin, plain()):
    pass
"""


@pytest.fixture
def body(tmp_path: Path) -> Path:
    file = tmp_path / "body.bin"
    file.write_bytes(b"{}")
    return file


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``ts-cores compare`` in a directory and with a cache of its own; others on this machine do not matter."""

    def start(*words: object, anyway: bool = True) -> subprocess.Popen[str]:
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "tmp").mkdir(exist_ok=True)
        return subprocess.Popen(
            [*QUICK, "compare", *map(str, words), *(["--anyway"] if anyway else [])],
            cwd=tmp_path / "here",
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def left_over(tmp_path: Path) -> list[object]:
    """Return what a trial left behind: files in its directories, and processes that its mark names."""
    mark = f"{alone.MARK}={tmp_path / 'cache' / 'ts-cores'}".encode()
    found: list[object] = [*(tmp_path / "tmp").iterdir()]
    for process in psutil.process_iter():
        try:
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        pytest.param([], 2, "--demo, or --show FILE", id="nothing"),
        pytest.param(["{mar}", "--demo"], 2, "one of these", id="too much"),
        pytest.param(["{mar}"], 1, "--body FILE", id="no body"),
        pytest.param(["{absent}", "--body", "{body}"], 1, "No such file", id="absent archive"),
        pytest.param(["{mar}", "--body", "{body}", "--config", "{absent}"], 1, "No such file", id="absent config"),
        pytest.param(["{mar}", "{mar}", "--body", "{body}"], 1, "two archives of this name", id="twice"),
        pytest.param(["--show", "{body}"], 1, "no comparison", id="show something else"),
        pytest.param(["{mar}", "--body", "{body}", "--out", "{absent}/x.json"], 1, "--out FILE.json", id="nowhere"),
        pytest.param(["{mar}", "--body", "{body}", "--out", "x.svg"], 1, "the picture's name", id="picture"),
    ],
)
def test_what_makes_no_sense_is_said(
    tmp_path: Path, body: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, told: str
) -> None:
    files = {"mar": archive(tmp_path), "body": body, "absent": tmp_path / "absent"}
    given = [*(word.format(**files) for word in words), *(["--anyway"] if "--show" not in words else [])]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    monkeypatch.delattr(command_module, "alone")  # it does not come so far
    monkeypatch.chdir(here)
    found, out, err = refused(tmp_path, "compare", *given)
    assert (found, out) == (status, "")
    assert told in err
    assert not list(here.iterdir())


@pytest.mark.process
@pytest.mark.parametrize(
    ("parts", "words", "told"),
    [
        pytest.param(
            {"load": "raise ValueError('no weights')"}, [], "cannot be loaded: ValueError: no weights", id="fails"
        ),
        pytest.param(
            {"handle": "raise ValueError('no image')"}, [], "rejects the body: ValueError: no image", id="refused"
        ),
        pytest.param({}, ["--workers", "4096"], "fewer --workers", id="memory"),
    ],
)
def test_what_cannot_be_measured_is_said(
    tmp_path: Path,
    body: Path,
    command: Callable[..., subprocess.Popen[str]],
    parts: dict[str, str],
    words: list[str],
    told: str,
) -> None:
    status, out, err = run(command(archive(tmp_path, **parts), "--body", body, *words))
    assert (status, out) == (1, "")
    assert told in err
    assert "Traceback" not in err
    assert not list((tmp_path / "here").iterdir())
    assert not left_over(tmp_path)


@pytest.mark.server
def test_interrupted_it_gives_what_there_is_and_goes_on(
    tmp_path: Path, body: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    """With an archive whose handler is ours: it owns cores in the rows of ts-cores, and in those of TorchServe none."""
    seen = tmp_path / "seen"
    path = archive(tmp_path)
    with zipfile.ZipFile(path, "a") as parts, pytest.warns(UserWarning, match="Duplicate name"):
        parts.writestr("handler.py", OURS.replace("SEEN", str(seen)))
    words = [path, "--body", body, "--minutes", "0.05", "--workers", "1"]
    file = tmp_path / "here" / "compare-tiny-model.json"
    cache = tmp_path / "cache" / "ts-cores" / "compare"

    def stored() -> int:
        return sum(len(json.loads(one.read_text()).get("rounds", {})) for one in cache.glob("[!.]*.json"))

    process = command(*words)
    assert eventually(lambda: process.poll() is not None or stored() >= 2, patience=240)
    process.send_signal(signal.SIGINT)
    status, out, err = run(process)
    assert status == 130, err
    assert "x the throughput of TorchServe's default" in out
    before = Comparison.from_json(file.read_text())
    assert before.interrupted
    assert {one.contender for one in before.rounds} >= {Way.OURS, Way.DEFAULT}
    assert not left_over(tmp_path)

    status, out, err = run(command(*words))
    assert status == 0, err
    found = Comparison.from_json(file.read_text())
    assert not found.interrupted
    assert set(found.rounds) >= set(before.rounds)
    assert all(found.samples(way, load) for way in (Way.OURS, Way.DEFAULT) for load in (FULL, ONE))
    assert all(one.samples[0].throughput > 0 for one in found.rounds)
    ElementTree.parse(file.with_suffix(".svg"))
    assert not left_over(tmp_path)
    facts = set(seen.read_text().splitlines())
    assert facts == {"True False", "False True"}  # told to claim nothing or not, and holding a lease or not

    file.with_suffix(".svg").unlink()
    status, shown, err = run(command("--show", file, anyway=False))
    assert (status, err) == (0, "")
    assert verdict(found) in shown
    assert file.with_suffix(".svg").exists()
    assert "measured before" in run(command(*words))[2]
