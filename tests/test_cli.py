"""The command: its output and exit status, in a process of its own where its streams or its end matter."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from tests.eventually import eventually
from tests.leases import lease_of
from tests.test_verdict import write_archive
from ts_plugin.cli.main import main
from ts_plugin.doctor import inspection
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import State
from ts_plugin.lending.words import HEAD, SLOT, Status, Words
from ts_plugin.machine import discovery, process
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.planning.policy import parse_launcher_args

pytestmark = pytest.mark.process

RUN = [sys.executable, "-c", "import sys; from ts_plugin.cli.main import main; sys.exit(main())"]
HANGS = 120.0  # seconds; no command of these tests computes for more than two
ALLOWED = discovery.read_allowance().cpus


@pytest.fixture(autouse=True)
def _quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the doctor look shortly for busy neighbours, which no test here is about."""
    monkeypatch.setattr(inspection, "SAMPLE", 0.02)


def ts_cores(*words: str | Path, status: int | None = 0, cwd: Path | None = None) -> tuple[str, str]:
    """Run the command in this process, which saves the start of one; return its stdout and stderr.

    ``status`` None lets it have any.
    """
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        with contextlib.chdir(cwd or "."), redirect_stdout(out), redirect_stderr(err):
            try:
                found = main(list(map(str, words)))
            except SystemExit as end:  # argparse
                found = int(end.code or 0)
        for stream in (out, err):
            stream.seek(0)
        shown, told = out.read(), err.read()
    assert status in (found, None), told
    return shown, told


def answer(*words: str | Path, status: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(ts_cores(*words, "--json", status=status)[0])
    return document


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A machine of 2 packages x 4 cores x 2 SMT siblings, as a sysfs tree."""
    cpu = tmp_path / "sys/devices/system/cpu"
    for number in range(16):
        topology = cpu / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        core = number % 8
        (topology / "core_cpus_list").write_text(f"{core},{core + 8}\n")
        (topology / "physical_package_id").write_text(f"{core // 4}\n")
        (topology / "core_id").write_text(f"{core % 4}\n")
    (cpu / "online").write_text("0-15\n")
    for node in range(2):
        directory = tmp_path / f"sys/devices/system/node/node{node}"
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(f"{node * 4}-{node * 4 + 3},{node * 4 + 8}-{node * 4 + 11}\n")
    (tmp_path / "sys/devices/system/node/online").write_text("0-1\n")
    return tmp_path


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A ledger of its own with two sleeping processes that hold a slice each; their pids."""
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(tmp_path / "state"))
    sleepers = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    try:
        demand = Demand(ALLOWED)
        slices = plan(discovery.read_topology(), [demand, demand]).slices
        leases = []
        for number, (sleeper, piece) in enumerate(zip(sleepers, slices, strict=True)):
            names = {"model": f"model{number}", "worker_id": str(9000 + number)}
            leases.append(lease_of(piece, sleeper.pid, server_pid=70 + number, demand=demand, **names))
        ledger = Ledger()
        with ledger.locked():
            ledger.write(State(generation=1, leases=tuple(leases)))
        yield [sleeper.pid for sleeper in sleepers]
    finally:
        for sleeper in sleepers:
            sleeper.communicate()


def test_plan_contract(tree: Path) -> None:
    document = answer("plan", "--workers", "2", "--sys-root", tree)
    assert set(document) == {"workers", "idle_cpus", "notes"}
    first, second = document["workers"]
    assert set(first) == {"worker", "cpus", "threads", "numa_nodes", "l3_domains", "packages", "pinned"}
    assert (first["worker"], first["cpus"], first["threads"]) == (0, [0, 1, 2, 3], 4)
    assert (second["worker"], second["cpus"], second["threads"]) == (1, [4, 5, 6, 7], 4)
    assert (first["numa_nodes"], second["packages"]) == ([0], [1])
    assert document["idle_cpus"] == []


@pytest.mark.parametrize(
    ("words", "cpus"),
    [
        pytest.param(["--launcher-args", "--use-logical-core"], [*range(4), *range(8, 12)], id="one word"),
        pytest.param(["--launcher-args", "--node_id 1 --ncores_per_instance 2"], [4, 5], id="several words"),
        pytest.param(["--launcher-args=--node-id 1"], [4, 5], id="with ="),
        pytest.param(["--launcher-args", ""], [0, 1, 2, 3], id="empty"),
    ],
)
def test_plan_takes_launcher_args(tree: Path, words: list[str], cpus: list[int]) -> None:
    assert answer("plan", "--workers", "2", "--sys-root", tree, *words)["workers"][0]["cpus"] == cpus


def test_plan_reports_idle_cpus_and_why(tree: Path) -> None:
    document = answer("plan", "--workers", "2", "--sys-root", tree, "--launcher-args", "--ncores-per-instance 3")
    held = [cpu for worker in document["workers"] for cpu in worker["cpus"]]
    assert len(held) == 6
    assert set(document["idle_cpus"]).isdisjoint(held)
    assert document["idle_cpus"]
    noted = answer("plan", "--workers", "1", "--sys-root", tree, "--launcher-args", "--ninstances 4")
    assert set(parse_launcher_args("--ninstances 4").notes) <= set(noted["notes"])


@pytest.mark.parametrize(
    ("workers", "words", "said"),
    [
        pytest.param("3", "", True, id="4 + 2 + 2"),
        pytest.param("3", "--equal", False, id="3 + 3 + 2"),
        pytest.param("3", "--ncores-per-instance 4,1,1", False, id="asked for"),
        pytest.param("2", "", False, id="4 + 4"),
    ],
)
def test_plan_says_why_equal_workers_get_unequal_slices(tree: Path, workers: str, words: str, said: bool) -> None:
    notes = answer("plan", "--workers", workers, "--sys-root", tree, "--launcher-args", words)["notes"]
    assert any(note.endswith("--equal makes them equal") for note in notes) is said


@pytest.mark.parametrize(
    ("models", "words", "said"),
    [
        pytest.param(("a=3",), "", True, id="4 + 2 + 2"),
        pytest.param(("a=3",), "--equal", False, id="asked for"),
        pytest.param(("a=3",), "--equal --use-logical-core", False, id="a core is two threads"),
        pytest.param(("a=1", "b=2"), "", True, id="of two models"),
        pytest.param(("a=1:cores=1", "b=3"), "", False, id="3 + 2 + 2 beside a fixed size"),
        pytest.param(("a=1:share=3", "b=2"), "", False, id="4 + 2 + 2 by share"),
    ],
)
def test_plan_says_why_workers_of_one_share_get_unequal_slices(
    tree: Path, models: tuple[str, ...], words: str, said: bool
) -> None:
    wanted = [word for model in models for word in ("--model", model)]
    notes = answer("plan", *wanted, "--sys-root", tree, "--launcher-args", words)["notes"]
    assert any(note.endswith("--equal makes them equal") for note in notes) is said


def test_plan_for_several_models(tree: Path) -> None:
    models = ("bert=1:share=3", "tiny=2:cores=1", "rest=1")
    words = ["plan", "--sys-root", str(tree), *(word for model in models for word in ("--model", model))]
    workers = answer(*words)["workers"]
    assert [(worker["model"], worker["threads"]) for worker in workers[1:3]] == [("tiny", 1), ("tiny", 1)]
    assert workers[0]["threads"] > workers[3]["threads"]
    shown, _ = ts_cores(*words)
    assert all(name in shown for name in ("bert", "tiny", "rest"))


def test_plan_under_a_quota(tree: Path) -> None:
    workers = answer("plan", "--workers", "2", "--quota", "3", "--sys-root", tree)["workers"]
    assert [worker["pinned"] for worker in workers] == [False, False]
    assert sum(worker["threads"] for worker in workers) == 3


def test_plan_draws_the_machine(tree: Path) -> None:
    shown, _ = ts_cores("plan", "--workers", "2", "--sys-root", tree)
    assert "2 workers on 8 of 8 cores" in shown
    assert "package 1 · NUMA node 1" in shown
    ts_cores("plan", "--workers", "2", "--sys-root", tree, "--svg", tree / "plan.svg")
    assert "2 workers on 8 of 8 cores" in (tree / "plan.svg").read_text(encoding="utf-8")


def test_plan_has_a_line_per_model_where_workers_are_many(tree: Path) -> None:
    words = ["plan", "--model", "bert=50", "--model", "tiny=4", "--sys-root", str(tree)]
    short, long = (ts_cores(*words, *more)[0] for more in ([], ["--all"]))
    rows = [line.split()[:4] for line in short.splitlines()]
    assert ["A", "bert", "50", "workers"] in rows
    assert ["B", "tiny", "4", "workers"] in rows
    assert long.count("bert") == 50
    assert len(short.splitlines()) < 25
    drawn = [ts_cores(*words, "--svg", "-", *more)[0] for more in ([], ["--all"])]
    assert [text.count(">bert · ") for text in drawn] == [1, 50]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        pytest.param(["--launcher-args", "--node-id 7"], "NUMA node 7 does not exist", id="no such node"),
        pytest.param(["--launcher-args", "--nodeid 7"], "did you mean --node-id?", id="a typo"),
        pytest.param(["--sys-root", "/nowhere"], "/nowhere", id="no such machine"),
    ],
)
def test_plan_that_does_not_exist(tree: Path, words: list[str], complaint: str) -> None:
    root = [] if "--sys-root" in words else ["--sys-root", str(tree)]
    shown, error = ts_cores("plan", "--workers", "2", *root, *words, status=2)
    assert shown == ""
    assert complaint in error
    assert error.count("\n") == 1


def test_plan_for_a_config(tree: Path, tmp_path: Path) -> None:
    """The models that a server with the file would load, with as many workers as it would start."""
    for name, config in (("bert", "minWorkers: 1\nmaxWorkers: 4\ncpu: {share: 3}\n"), ("tiny", None)):
        write_archive(tmp_path / f"{name}.mar", name, config)
    lines = [
        "default_workers_per_model=4",
        f"model_store={tmp_path}",
        "load_models=bert.mar,tiny.mar",
        "models={'tiny': {'1.0': {'minWorkers': 2}}}",
        "cpu_launcher_args=--reserve-cores 1",
    ]
    file = tmp_path / "config.properties"
    file.write_text("\n".join(lines))
    document = answer("plan", "--config", file, "--sys-root", tree)
    assert [worker["model"] for worker in document["workers"]] == ["bert", "tiny", "tiny"]
    threads = [worker["threads"] for worker in document["workers"]]
    assert sum(threads) == 7
    assert threads[0] > threads[1]
    assert "1 worker for bert (model-config.yaml)" in document["notes"]
    assert "2 workers for tiny (models=)" in document["notes"]
    more = answer("plan", "--config", file, "--sys-root", tree, "--model", "other=1", "--launcher-args", "--equal")
    assert len(more["workers"]) == 4
    assert sum(worker["threads"] for worker in more["workers"]) == 8, "the command line wins over the file"


def test_plan_for_a_config_without_models_has_its_workers(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "config.properties").write_text("default_workers_per_model=3\n")
    document = answer("plan", "--config", tmp_path / "config.properties", "--sys-root", tree)
    assert len(document["workers"]) == 3
    assert "the file loads no model: 3 workers of one (default_workers_per_model)" in document["notes"]


def test_plan_for_a_config_counts_cpus_like_the_jvm(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "config.properties").write_text("vmargs=-Xmx1g -XX:ActiveProcessorCount=3\n")
    words = ["plan", "--sys-root", str(tree), "--config", str(tmp_path / "config.properties")]
    assert len(answer(*words)["workers"]) == 3
    (tmp_path / "config.properties").write_text("")
    assert len(answer(*words)["workers"]) == 16
    assert len(answer(*words, "--quota", "2.5")["workers"]) == 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("models={", "models is not the JSON", id="no start"),
        pytest.param("model_snapshot={'models':{}}", "no worker starts", id="nothing to plan"),
        pytest.param(
            "default_workers_per_model=99999", "it starts 99999, and a plan takes at most 4096", id="too many"
        ),
        pytest.param(None, "No such file", id="no file"),
    ],
)
def test_plan_for_a_config_that_has_none(tree: Path, tmp_path: Path, text: str | None, complaint: str) -> None:
    if text is not None:
        (tmp_path / "config.properties").write_text(text)
    words = ["plan", "--config", str(tmp_path / "config.properties"), "--sys-root", str(tree)]
    _, error = ts_cores(*words, status=2)
    assert complaint in error


WRONG = [
    pytest.param(["plan"], "plan needs --workers N, --model NAME=N or --config FILE", id="no number"),
    pytest.param(["plan", "--workers", "0"], "must be a whole number from 1 to", id="no worker"),
    pytest.param(["plan", "--workers", "x"], "not 'x'", id="not a number"),
    pytest.param(["plan", "--workers", "\u00b2"], "not '\u00b2'", id="superscript two"),
    pytest.param(["plan", "--workers", "-1"], "not '-1'", id="a negative number"),
    pytest.param(
        ["plan", "--workers", "100000"], "from 1 to 4096, not '100000'", id="more workers than can be planned"
    ),
    pytest.param(["plan", "--workers", f"{10**23 - 1}"], "from 1 to 4096", id="more workers than a C integer"),
    pytest.param(["plan", "--workers", "9" * 5000], "from 1 to 4096", id="a number of 5,000 digits"),
    pytest.param(
        ["plan", "--workers", "2", "--svg", ""], "must name a file or directory", id="no file for the picture"
    ),
    pytest.param(["plan", "--workers", "2", "--svg", "."], "name a file in it", id="a directory for the picture"),
    pytest.param(
        ["plan", "--workers", "2", "--svg", "a.png"], "writes SVG and nothing else; name it a.svg", id="a PNG"
    ),
    pytest.param(["show", "--html", "a.svg"], "writes HTML and nothing else; name it a.html", id="a page named svg"),
    pytest.param(["show", "--watch", "--html", "-"], "stdout is none; name a file", id="a live page on stdout"),
    pytest.param(["plan", "--workers", "2", "--sys-root", ""], "must name a file or directory", id="no root"),
    pytest.param(["plan", "--workers", "2", "--sys-root", __file__], "is a file; unpack it", id="a file as the root"),
    pytest.param(
        ["plan", "--workers", "2", "--launcher-args", '"--node-id 0"'], "leave these quotes out", id="quotes around all"
    ),
    pytest.param(
        ["plan", "--workers", "2", "--launcher-args", f"--reserve-cores {10**23}"],
        "from 0 to 65535",
        id="a huge reserve",
    ),
    pytest.param(["plan", "--model", "bert"], "must be NAME=N", id="a model without a number"),
    pytest.param(["plan", "--model", "bert=2:cpus=3"], "must be NAME=N", id="no such wish"),
    pytest.param(["plan", "--model", "bert=2:share=nan"], "a number above 0, not 'nan'", id="no share"),
    pytest.param(
        ["plan", "--model", "a=4000", "--model", "b=97"], "at most 4096 workers, not 4097", id="a sum too large"
    ),
    pytest.param(["plan", "--workers", "2", "--quota", "0"], "a number above 0, not '0'", id="no quota"),
    pytest.param(["show", "--html", ""], "must name a file or directory", id="no file for the page"),
    pytest.param(["show", "--server", "-5"], "not '-5'", id="a negative PID"),
    pytest.param(["show", "--watch", "--json"], "leave one of them out", id="two kinds of output"),
    pytest.param(["show", "--watch"], "add --html FILE", id="live, but not on a terminal"),
    pytest.param(["doctor", "--config", ""], "must name a file or directory", id="no config"),
    pytest.param(
        ["doctor", "--config", "/etc"], "name the file in it: --config /etc/config.properties", id="a directory"
    ),
    pytest.param(["doctor", "--config", "/nowhere"], "`ts-cores init /nowhere` writes one", id="no such config"),
    pytest.param(["doctor", "--config", "/dev/null/x"], "Not a directory; name another file", id="below a file"),
    pytest.param(["doctor", "--config", "x" * 300], "File name too long", id="a config with too long a name"),
    pytest.param(["init", ""], "must name a file or directory", id="no file to write"),
    pytest.param(["init", "two\nlines"], "use a simpler name", id="a name that TorchServe cannot read"),
    pytest.param(["nonsense"], "invalid choice", id="no such command"),
    pytest.param([], "required: COMMAND", id="nothing"),
]


@pytest.mark.parametrize(("words", "complaint"), WRONG)
def test_wrong_input(tmp_path: Path, words: list[str], complaint: str) -> None:
    shown, error = ts_cores(*words, status=2, cwd=tmp_path)
    assert shown == ""
    assert complaint in error
    assert error.splitlines()[-1].startswith("ts-cores")
    assert list(tmp_path.iterdir()) == []


def test_show_nothing() -> None:
    document = answer("show")
    assert document["slices"] == []
    assert document["reserved_cpus"] == []
    assert document["idle_cpus"] == sorted(ALLOWED)


def test_show_contract(held: list[int]) -> None:
    document = answer("show")
    assert [piece["pid"] for piece in document["slices"]] == held
    first = document["slices"][0]
    assert {
        "model": "model0",
        "version": "1.0",
        "worker_id": "9000",
        "server_pid": 70,
        "moves": 0,
    }.items() <= first.items()
    keys = {"pid", "cpus", "threads", "numa_nodes", "l3_domains", "packages", "pinned", "notes"}
    assert keys <= set(first)
    assert document["idle_cpus"] == []
    only = answer("show", "--server", "71")
    assert [piece["pid"] for piece in only["slices"]] == held[1:]
    shown, _ = ts_cores("show")
    assert "model0" in shown
    assert str(held[1]) in shown


def test_show_tells_borrowed_cores(held: list[int]) -> None:
    """The second worker computes on the first one's slice, as far as the words say."""
    ledger = Ledger()
    with ledger.locked() as state:
        reach = frozenset(cpu for lease in state.leases for cpu in lease.slice.cpus)
        leases = tuple(replace(lease, slice=replace(lease.slice, reach=reach)) for lease in state.leases)
        if leases[0].slice.cpus == leases[1].slice.cpus:
            pytest.skip("two workers share the only core")
    borrowed = list(leases[0].slice.cpus)
    both = sorted([*borrowed, *leases[1].slice.cpus])
    borrower = subprocess.Popen(["sleep", "600"])
    try:
        identity = process.identify(borrower.pid)
        assert identity is not None
        second = replace(leases[1], pid=borrower.pid, start_time=identity.start_time)
        known = Words(ledger)
        for slot, (user, lease) in enumerate([(2, leases[0]), (2, second)]):
            entry = SLOT.pack(user, slot, 0, lease.pid, lease.start_time, 0, 0, 0)
            known.memory[HEAD.size + slot * SLOT.size : HEAD.size + (slot + 1) * SLOT.size] = entry
        known.publish(Status(9, 4, 1.5, 2, 3, 0.0006, 0.0004, times={1: 0.1, 2: 0.05}))
        known.close()
        with ledger.locked() as state:
            ledger.write(replace(state, leases=(leases[0], second)))
        lender, other = answer("show")["slices"]
        assert (lender["computes_on"], lender["lent_cpus"]) == ([], borrowed)
        assert (other["computes_on"], other["lent_cpus"]) == (both, [])
        shown, _ = ts_cores("show")
        assert f"{len(borrowed)} borrowed" in shown
        assert "A←B" in shown
        assert "lending: 4 requests of 9 computed on idle workers' cores, too (2.00 x as fast)" in " ".join(
            shown.split()
        )
        assert lender["lending"]["times_faster"] == 2.0
        assert lender["lending"]["mean_wait"] == pytest.approx(0.0002)
        assert other["lending"] is None, "it has told nothing"
        (alone,) = answer("show", "--server", "70")["slices"]
        assert alone["lent_cpus"] == borrowed, "whoever computes there, other servers' workers included"
        (worker,) = answer("explain", "model1")["workers"]
        assert (worker["computes_on"], worker["lending"]) == (both, None)
        assert any(reason["about"] == "width" for reason in worker["reasons"])
    finally:
        borrower.kill()
        borrower.wait()


def test_show_writes_pictures(held: list[int], tmp_path: Path) -> None:
    ts_cores("show", "--svg", tmp_path / "a.svg", "--html", tmp_path / "a.html")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert str(held[0]) in (tmp_path / "a.html").read_text(encoding="utf-8")
    _, error = ts_cores("show", "--svg", tmp_path / "nowhere" / "a.svg", status=1)
    assert error.startswith(f"ts-cores: {tmp_path}/nowhere/a.svg: ")


@pytest.mark.parametrize("name", ["-", "/proc/self/fd/1", "a link like /dev/stdout"])
def test_a_picture_on_stdout(tree: Path, name: str, tmp_path: Path) -> None:
    if " " in name:  # not the real one, which a mistake would replace
        name = str(tmp_path / "stdout")
        os.symlink("/proc/self/fd/1", name)
    words = ["plan", "--workers", "2", "--sys-root", str(tree), "--svg", name]
    shown = subprocess.run([*RUN, *words], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("<svg")
    assert shown.endswith("</svg>\n")
    with (tmp_path / "log").open("w") as log:  # a file, which whoever opened it goes on writing to
        print("before", file=log, flush=True)
        subprocess.run([*RUN, "show", "--html", name], stdout=log, check=True)
        os.write(log.fileno(), b"after")
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert text.startswith("before\n<!")
    assert text.endswith("after")


def test_what_is_no_file_is_not_replaced_by_one(tree: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["plan", "--workers", "2", "--sys-root", tree, "--svg"]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE, text=True) as reader:
        try:
            ts_cores(*words, fifo)
            assert fifo.is_fifo()
            assert reader.communicate(timeout=HANGS)[0].startswith("<svg")
        finally:
            reader.kill()
    (tmp_path / "target.svg").touch()
    link, dangling = tmp_path / "link.svg", tmp_path / "dangling.svg"
    link.symlink_to("target.svg")
    dangling.symlink_to("new.svg")
    ts_cores(*words, link)
    ts_cores(*words, dangling)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert (tmp_path / "target.svg").read_text(encoding="utf-8").startswith("<svg")
    assert (tmp_path / "new.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize("words", [["plan", "--workers", "2"], ["show", "--json"], ["plugin-path"]])
def test_closed_streams(words: list[str]) -> None:
    """``>&-``, as from some supervisors: no traceback; the exit status is what is left."""
    for closing in (">&-", "2>&-", ">&- 2>&- <&-"):
        done = subprocess.run(
            ["bash", "-c", f'"$@" {closing}', "bash", *RUN, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["plan", "--workers", "2"], ["plan", "--workers", "2", "--json"]])
def test_output_to_a_full_disk(words: list[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([*RUN, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "ts-cores: stdout: No space left on device\n")


def test_a_state_directory_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(tmp_path / "slip"))
    for words in (["show"], ["show", "--json"]):
        _, error = ts_cores(*words)
        assert error == f"ts-cores: {tmp_path}/slip: not there, so no worker uses it; TS_CORES_STATE_DIR names it\n"


def test_models_and_nameless_workers_in_one_plan(tree: Path) -> None:
    shown, _ = ts_cores("plan", "--workers", "1", "--model", "bert=1", "--sys-root", tree)
    rows = [line.split() for line in shown.splitlines()]
    assert ["A", "0", "0-3", "4", "0", "0"] in rows
    assert ["B", "bert", "1", "4-7", "4", "1", "1"] in rows


def test_show_watch_keeps_a_page_up_to_date(held: list[int], tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    watch = subprocess.Popen([*RUN, "show", "--watch", "--html", str(page)])
    try:
        assert eventually(page.exists)
        first = page.stat().st_ino
        assert eventually(lambda: page.stat().st_ino != first), "it is written anew, and appears complete"
    finally:
        watch.terminate()
        watch.wait()


def test_json_and_a_picture_at_once(held: list[int], tree: Path, tmp_path: Path) -> None:
    assert answer("plan", "--workers", "2", "--sys-root", tree, "--svg", tmp_path / "a.svg")["workers"]
    assert answer("show", "--svg", tmp_path / "b.svg", "--html", tmp_path / "c.html")["slices"]
    assert {file.name for file in tmp_path.glob("?.*")} == {"a.svg", "b.svg", "c.html"}


def test_show_a_server_that_is_not_there(held: list[int]) -> None:
    for words in ([], ["--json"]):
        shown, error = ts_cores("show", "--server", "999999", *words, status=1)
        assert shown == ""
        assert "no TorchServe frontend with PID 999999" in error
        assert error.endswith("there are: 70, 71\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("words", [["show"], ["explain", "model0"], ["doctor"]], ids=lambda words: words[0])
def test_output_where_a_character_cannot_be_printed(held: list[int], encoding: str, words: list[str]) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*RUN, *words], capture_output=True, env=environment, check=False)
    assert b"Traceback" not in done.stderr
    assert done.stdout.decode(encoding)


def test_piped_lines_are_neither_cut_nor_endless(held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    ledger = Ledger()
    note = "a sentence of many words which goes on and on, " * 20
    with ledger.locked() as state:
        ledger.write(replace(state, leases=tuple(replace(lease, notes=(note,)) for lease in state.leases)))
    for command in ("show", "doctor"):
        lines = ts_cores(command, status=0)[0].splitlines()
        assert max(map(len, lines)) <= 160
        assert not [line for line in lines if line != line.rstrip()]
        assert " ".join("\n".join(lines).split()).count("goes on and on,") >= 20


@pytest.mark.parametrize("columns", ["0", "", "wide"])
def test_columns_that_are_none(tree: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "2 workers on 8 of 8 cores" in ts_cores("plan", "--workers", "2", "--sys-root", tree)[0]


def test_piped_sentences_stand_in_one_line(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    shown, _ = ts_cores("plan", "--workers", "1", "--sys-root", tree, "--launcher-args", "--ninstances 4 --log-path x")
    notes = answer("plan", "--workers", "1", "--sys-root", tree, "--launcher-args", "--ninstances 4 --log-path x")[
        "notes"
    ]
    assert max(map(len, notes)) > 70
    assert [note for note in notes if f"note {note}" not in shown.splitlines()] == []


def test_show_survives_a_closed_pipe(held: list[int]) -> None:
    """The reader has seen enough: no complaint, with rich's output (which has its own idea of the status) or ours."""
    for words in (["show"], ["show", "--json"]):
        piped = ["bash", "-c", '"$@" | true', "bash", *RUN, *words]
        assert subprocess.run(piped, capture_output=True, text=True, check=True).stderr == ""


def test_show_with_an_unusable_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(tmp_path / "file"))
    _, error = ts_cores("show", status=1)
    assert error.startswith(f"ts-cores: {tmp_path}/file: ")
    assert error.count("\n") == 1


FRONTEND = """
exec 3<&0
[ -z "$2" ] || exec 9<"$2"
env ${3:+"$3"} cat - "$1/ts/model_service_worker.py" <&3 &
echo $!
wait
"""

WORKERS = [
    pytest.param({"hook": True}, None, "past the launcher", id="ours, past the launcher"),
    pytest.param({"variable": "TS_CORES_UNBOUND=a typo"}, None, "a typo", id="ours, refused by the launcher"),
    pytest.param({}, "a TorchServe without ts-cores", "", id="of a stock server"),
    pytest.param(
        {"hook": True, "variable": "TS_CORES_STATE_DIR=/other"}, "the ledger in /other", "", id="other ledger"
    ),
    pytest.param({"user": 65534}, "user 65534", "", id="another user's"),
]


@pytest.mark.parametrize(("frontend", "whose", "reason"), WORKERS)
def test_only_our_own_workers_are_judged(
    tmp_path: Path, frontend: dict[str, Any], whose: str | None, reason: str
) -> None:
    """A process that looks like a worker without a lease, below one that has the plug-in's jar open, or has not."""
    if "user" in frontend and os.geteuid() != 0:
        pytest.skip("only root can start another user's process")
    jar = tmp_path / "ts-cores.jar"
    jar.touch()
    words = [str(tmp_path), str(jar) if frontend.get("hook") else "", frontend.get("variable", "")]
    started = subprocess.Popen(
        ["bash", "-c", FRONTEND, "bash", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ),
        user=frontend.get("user"),
    )
    try:
        assert started.stdout is not None
        pid = int(started.stdout.readline())
        assert eventually(lambda: process.command_line(pid)[:1] == ["cat"])
        shown = answer("show")
        judged = [one["reason"] for one in shown["unbound"] if one["pid"] == pid]
        elsewhere = [one["whose"] for one in shown["elsewhere"] if one["pid"] == pid]
        assert shown["ledger"].startswith(os.environ["TS_CORES_STATE_DIR"])
        findings = json.loads(ts_cores("doctor", "--json", status=None)[0])["findings"]
        blamed = [one for one in findings if one["severity"] == "error" and str(pid) in one["what"]]
        assert [shown["ledger"] in one["what"] for one in findings if one["subject"] == "ledger"] == [True]
        if whose is None:
            assert len(judged) == len(blamed) == 1
            assert reason in judged[0]
            assert elsewhere == []
        else:
            assert elsewhere == [whose]
            assert judged == blamed == []
            drawn, _ = ts_cores("show")
            assert f"not judged here: 1 worker of {whose} (pid {pid})" in drawn
    finally:
        started.communicate()


def test_explain(held: list[int]) -> None:
    by_pid, _ = ts_cores("explain", str(held[1]))
    by_model, _ = ts_cores("explain", "model1")
    assert by_pid == by_model
    assert "worker 9001 of model1 1.0" in by_pid
    assert "shared with 1 other worker: model0 1.0" in by_pid
    (worker,) = answer("explain", "model1")["workers"]
    assert worker["pid"] == held[1]
    assert {"about": "size", "text": "shared with 1 other worker: model0 1.0"} in worker["reasons"]
    _, error = ts_cores("explain", "model2", status=1)
    assert "models with a slice: model0, model1" in error


def test_doctor(tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    config.write_text("cpu_launcher_enable=true\n")
    document = answer("doctor", "--config", config, status=1)
    assert document["config"] == str(config)
    found = [one for one in document["findings"] if one["subject"] == "plug-in"]
    assert found[0]["severity"] == "error"
    assert found[0]["change"].startswith("plugins_path=")
    shown, _ = ts_cores("doctor", "--config", config, status=1)
    assert "no plugins_path" in shown


BROKEN = [
    pytest.param(b"", "no cpu_launcher_enable", id="empty"),
    pytest.param(random.Random(0).randbytes(3000), "is not UTF-8", id="random bytes"),
    pytest.param("\ufeff{good}", "a byte order mark hides cpu_launcher_enable", id="a byte order mark"),
    pytest.param("{good}# Gr\u00f6\u00dfe\n".encode("latin-1"), "is not UTF-8", id="Latin-1, which stops the command"),
    pytest.param("{good}#\nx=\\u12", "Invalid \\u escape", id="half an escape"),
    pytest.param("{good}cpu_launcher_enable=true \n", "'true ', not true", id="a blank after true"),
    pytest.param("{good}default_workers_per_model=\u00b2\n", "is no whole number", id="superscript two"),
    pytest.param("{good}default_workers_per_model=2 \n", "'2 ' is no whole number", id="a blank after the number"),
    pytest.param("{good}default_workers_per_model=99999999999\n", "is no whole number", id="more than 32 bits"),
    pytest.param("{good}default_workers_per_model=-2\n", "-2 workers for each model", id="less than nothing"),
    pytest.param("{good}management_address=http://[bad:8081\n", "[bad: ", id="half a bracket"),
    pytest.param("{good}management_address=http://[::1]:8081\n", "is no address", id="IPv6, which TorchServe lacks"),
    pytest.param("{good}inference_address=http://127.0.0.1:99999\n", "is no address", id="no such port"),
    pytest.param("{good}model_store=/nowhere\n", "/nowhere is not there", id="no model store"),
    pytest.param("{good}load_models=a.mar,b=there.mar\n", "load_models: a.mar is not there", id="no such model"),
    pytest.param("{good}metrics_config=/nowhere.yaml\n", "/nowhere.yaml is not there", id="no metrics file"),
    pytest.param("{good}vmargs=$$NOBODY_SET_THIS$$\n", "NOBODY_SET_THIS is not set", id="no such variable"),
    pytest.param(
        "plugins_path : {plugins}\n{rest}", "does not find plugins_path", id="a colon, which hides the plug-in"
    ),
    pytest.param('{good}cpu_launcher_args="--node-id 0"\n', "leave these quotes out", id="quotes around the arguments"),
    pytest.param(
        "{good}cpu_launcher_args=--node\\\n   -idd 0", "did you mean --node-id?", id="a typo across two lines"
    ),
]


def good(directory: Path) -> dict[str, str]:
    """The parts of a config that has no fault: its model store is ``directory`` and has there.mar."""
    (directory / "there.mar").touch()
    plugins = ts_cores("plugin-path")[0].strip()
    rest = f"model_store={directory}\ndefault_workers_per_model=1\ncpu_launcher_enable=true\n"
    order = f"cpu_launcher_enable=true\nplugins_path={plugins}\nmodel_store={directory}\ndefault_workers_per_model=1\n"
    return {"good": order, "rest": rest, "plugins": plugins}


@pytest.mark.parametrize(("text", "complaint"), BROKEN)
def test_doctor_refuses_a_config_that_would_not_serve(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    content = text.encode() if isinstance(text, str) else text
    for name, part in good(tmp_path).items():
        content = content.replace(b"{%s}" % name.encode(), part.encode())
    (tmp_path / "config.properties").write_bytes(content)
    found = answer("doctor", "--config", tmp_path / "config.properties", status=1)["findings"]
    errors = [one for one in found if one["severity"] == "error"]
    assert [one for one in errors if complaint in one["what"]], errors


SOUND = [
    pytest.param("{good}", id="as init writes it"),
    pytest.param("{good}\n! a comment\n  # another\n", id="comments"),
    pytest.param("{good}cpu_launcher_enable : TRUE\n", id="a colon"),
    pytest.param("{good}cpu_launcher_args  --equal\n", id="blanks"),
    pytest.param("{good}cpu_launcher_args=--node\\\n   -id 0", id="two lines"),
    pytest.param("{good}cpu\\u005flauncher_args=--equal\n", id="an escape in a name"),
    pytest.param("{good}management_address=http\\://127.0.0.1\\:8081\n", id="escapes as in a snapshot"),
    pytest.param("\ufeff# a comment\n{good}", id="a byte order mark before a comment"),
    pytest.param("{good}load_models=there.mar,https://example.org/a.mar\n", id="a model to fetch"),
    pytest.param("{good}default_workers_per_model=0001\n", id="noughts"),
]


@pytest.mark.parametrize("text", SOUND)
def test_doctor_lets_pass_what_would_serve(tmp_path: Path, text: str) -> None:
    """Exit status 0, so that it can stand before a server; libraries and neighbours of this machine are its own."""
    (tmp_path / "config.properties").write_text(text.format(**good(tmp_path)), encoding="utf-8")
    shown, _ = ts_cores("doctor", "--json", "--config", tmp_path / "config.properties")
    assert [one for one in json.loads(shown)["findings"] if one["severity"] == "error"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_doctor_without_permission(tmp_path: Path) -> None:
    """As a user who may not read the file; the remedy is not to write another one."""
    (tmp_path / "config.properties").write_text("x=1\n")
    (tmp_path / "config.properties").chmod(0)
    script = (
        "import os, sys; from ts_plugin.doctor import checks, inspection; from ts_plugin.view import terminal;"
        "import javaproperties;"
        "from ts_plugin.cli.main import main; os.chdir(sys.argv[1]); os.setuid(65534);"
        "sys.exit(main(['doctor', '--config', 'config.properties']))"
    )
    tmp_path.chmod(0o755)
    # That user may not write the coverage either, and it would complain.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == "ts-cores: config.properties: Permission denied; let user 65534 read it\n"
    assert done.returncode == 2


def test_init_writes_what_the_doctor_accepts(tmp_path: Path) -> None:
    shown, _ = ts_cores("init", tmp_path)
    config = tmp_path / "config.properties"
    assert shown == f"{config}\n"
    text = config.read_text(encoding="utf-8")
    properties = dict(line.split("=", 1) for line in text.splitlines() if line and line[0] != "#")
    assert Path(properties["plugins_path"]) == Path(ts_cores("plugin-path")[0].strip())
    for name in ("plugins_path", "metrics_config", "model_store"):
        assert Path(properties[name]).is_absolute()
        assert Path(properties[name]).exists()
    errors = [
        one
        for one in json.loads(ts_cores("doctor", "--config", config, "--json", status=None)[0])["findings"]
        if one["severity"] == "error" and one["subject"] != "worker"
    ]
    assert errors == []
    assert (tmp_path / "metrics.yaml").is_file(), "a copy: workers start although the package is gone"


@pytest.mark.parametrize("name", ["größe", "a b", "a=b", "a#b:c", "a\\b"])
def test_init_in_a_directory_with_any_name(tmp_path: Path, name: str) -> None:
    """TorchServe's own reader finds the model store that was made for it."""
    (tmp_path / name).mkdir()
    ts_cores("init", tmp_path / name)
    script = "import sys; from ts.model_server import load_properties as read; print(read(sys.argv[1])['model_store'])"
    command = [sys.executable, "-c", script, str(tmp_path / name / "config.properties")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.removesuffix("\n")).is_dir()


def test_init_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    ts_cores("init", file)
    file.write_text("changed")
    _, error = ts_cores("init", file, status=1)
    assert "exists already" in error
    assert file.read_text() == "changed"


def test_init_here_by_default(tmp_path: Path) -> None:
    ts_cores("init", cwd=tmp_path)
    assert (tmp_path / "config.properties").is_file()


def test_init_in_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    shown, _ = ts_cores("init", f"{tmp_path}/new/")
    assert shown == f"{tmp_path}/new/config.properties\n"
    assert (tmp_path / "new" / "model_store").is_dir()


def test_the_version_in_short() -> None:
    assert ts_cores("-V") == ts_cores("--version")


def test_init_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, error = ts_cores("init", tmp_path / "file" / "x", status=1)
    assert "Not a directory" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "show", "explain", "doctor", "init", "plugin-path"])
def test_help_has_an_example(command: str) -> None:
    shown, _ = ts_cores(command, "--help")
    assert f"ts-cores {command}" in shown.partition("examples:")[2]


def test_plugin_path_has_the_jar() -> None:
    assert (Path(ts_cores("plugin-path")[0].strip()) / "ts-cores.jar").is_file()


def test_light_commands_import_neither_rich_nor_torch(tree: Path) -> None:
    script = (
        "import sys; from ts_plugin.cli.main import main\n"
        f"main(['plan', '--workers', '2', '--json', '--sys-root', {str(tree)!r}])\n"
        "assert not {'rich', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
