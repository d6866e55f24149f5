"""`ts-cores tune`: its parts on tables, its errors, and once from end to end with the real server."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from tests.claimants import CORES
from tests.eventually import eventually
from tests.machines import machine
from ts_plugin.cli.main import main
from ts_plugin.errors import CommandError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.unbound import Unbound
from ts_plugin.machine.process import memory
from ts_plugin.machine.tree import Tree
from ts_plugin.trial import room
from ts_plugin.trial.archive import copy_with, read_archive
from ts_plugin.trial.bare import OPTIMIZE, Bare, BareError, Binding, explained
from ts_plugin.trial.load import Body
from ts_plugin.trial.room import Room
from ts_plugin.trial.store import Store
from ts_plugin.trial.turns import pace
from ts_plugin.tune import command as command_module
from ts_plugin.tune import measure
from ts_plugin.tune.advise import gain
from ts_plugin.tune.asked import Wanted
from ts_plugin.tune.choose import choose
from ts_plugin.tune.command import shortlist
from ts_plugin.tune.confirm import pick
from ts_plugin.tune.values import Cell, Choice, Confirmed, Profile, Result, Target, fitting

HANDLER = """
import time
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        {load}
        self.initialized = True
    def handle(self, data, context):
        {handle}
        time.sleep(0.04 + 0.002 * len(data))
        return [1] * len(data)
"""
BODY = b"{}"
QUICK = [sys.executable, "-P", str(Path(__file__).with_name("quick.py"))]


def archive(directory: Path, *, load: str = "pass", handle: str = "pass", config: str = "", name: str = "tiny") -> Path:
    """Return an archive without a model: its handler sleeps for 40 ms and 2 ms per request."""
    path = directory / f"{name}.mar"
    manifest = {"model": {"modelName": f"{name}-model", "modelVersion": "1.0", "handler": "handler.py"}}
    manifest |= {"runtime": "python", "archiverVersion": "0.12.0"}  # type: ignore[dict-item]
    if config:
        manifest["model"]["configFile"] = "model-config.yaml"
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        parts.writestr("handler.py", HANDLER.format(load=load, handle=handle))
        if config:
            parts.writestr("model-config.yaml", config)
    return path


@pytest.fixture
def body(tmp_path: Path) -> Path:
    file = tmp_path / "body.bin"
    file.write_bytes(BODY)
    return file


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``ts-cores tune`` with a cache of its own; other servers of this machine do not matter to it."""

    def start(*words: object, anyway: bool = True) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*QUICK, "tune", *map(str, words), *(["--anyway"] if anyway else [])],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def run(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def refused(directory: Path, *words: object) -> tuple[int, str, str]:
    """Run ``ts-cores`` in this process, with its output in files: a command that fails may give up its stdout."""
    files = [directory / "stdout", directory / "stderr"]
    with files[0].open("w") as out, files[1].open("w") as err, redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(list(map(str, words)))
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
    return status, files[0].read_text(), files[1].read_text()


def choice(workers: int = 1, threads: int = 1, batch: int = 1) -> Choice:
    return Choice(workers, threads, batch, 5, 10.0, 7.0, 0.1, 1 << 30)


# ---- its parts


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])],
)
def test_thread_counts_end_with_a_whole_node(cores: int, expected: list[int]) -> None:
    assert measure.thread_counts(cores) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [(999, 0), (1000, 1), (1299, 1), (1300, 2), (1900, 4)], ids=lambda value: str(value)
)
def test_how_many_processes_fit_into_memory(limit: int, expected: int) -> None:
    assert fitting(limit, 1000, 300) == expected


@pytest.mark.parametrize(
    ("fit", "expected"),
    [
        pytest.param(7, [[(4, 1), (2, 2), (1, 4)]], id="all at once"),
        pytest.param(4, [[(4, 1), (2, 2)], [(1, 4)]], id="in two groups"),
        pytest.param(2, [[(4, 1)], [(2, 2)], [(1, 2)]], id="fewer instances than cores"),
        pytest.param(1, [[(4, 1)], [(2, 1)], [(1, 1)]], id="one worker"),
    ],
)
def test_processes_run_at_once_as_far_as_memory_goes(fit: int, expected: list[list[tuple[int, int]]]) -> None:
    assert measure.together([(4, 1), (2, 2), (1, 4)], fit) == expected


def test_no_instance_crosses_a_node() -> None:
    topology = machine(packages=1, nodes=2, cores=3)
    found = Room(topology, topology.online, 6, (3, 3))
    assert [found.instances(threads) for threads in (1, 2, 3)] == [6, 2, 2]
    assert all(len(one.numa_nodes) == 1 for one in found.slices(2, 2))


def test_a_quota_bounds_how_many_instances_compute() -> None:
    topology = machine(packages=1, nodes=1, cores=8)
    assert Room(topology, topology.online, 2, (8,), quota=2.5).instances(1) == 2


def row(throughput: float, p99: float, own: Choice | None = None) -> tuple[Confirmed, ...]:
    return (Confirmed("default" if own is None else str(own), own, throughput, 0.1, p99 / 2, p99, 0, 5.0),)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param(Target(), 2, id="the most throughput"),
        pytest.param(Target(p99=0.2), 1, id="the most within the bound"),
        pytest.param(Target(p99=0.05), 0, id="none within: the nearest"),
        pytest.param(Target(rate=5.0), 0, id="the rate is served: the chooser's order"),
        pytest.param(Target(rate=70.0), 2, id="the rate is too high for all but the last"),
    ],
)
def test_what_was_measured_decides(target: Target, expected: int) -> None:
    found = [row(50, 0.1, choice(1)), row(80, 0.15, choice(2)), row(120, 0.9, choice(2, 1, 8)), row(500, 0.01)]
    assert pick(found, [target]) == expected


def test_throughputs_within_the_noise_leave_the_chooser_its_order() -> None:
    assert pick([row(100, 0.1, choice(1)), row(102, 0.1, choice(2))], [Target()]) == 0


def test_the_real_server_gets_the_best_its_other_batch_and_another_division() -> None:
    ranked = [[choice(2, 1, 4)], [choice(2, 1, 8)], [choice(2, 1, 2)], [choice(1, 2, 4)], [choice(1, 2, 8)]]
    assert shortlist(ranked) == [(choice(2, 1, 4),), (choice(2, 1, 8),), (choice(1, 2, 4),)]
    assert shortlist(ranked[:1]) == [(choice(2, 1, 4),)]


@pytest.mark.parametrize("phase", [0.0, 0.1, 0.2, 0.29])
def test_batches_come_as_a_whole_and_the_pace_is_even(phase: float) -> None:
    """Two workers, 8 answers each every 0.3 s, one later: 53.3 per second, wherever one starts to count."""
    times = [worker * 0.13 + 0.3 * batch for worker in (0, 1) for batch in range(40) for _ in range(8)]
    seen = [time for time in times if phase <= time < phase + 3.5]
    assert pace(seen, 3.5) == pytest.approx(16 / 0.3, rel=0.02)
    assert pace([1.0, 2.0], 4.0) == 0.5


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param([0.8, 0.8, 0.8, 0.8], 1.25, id="faster"),
        pytest.param([0.99, 0.99, 0.99, 0.99], None, id="by less than 3 %"),
        pytest.param([0.5, 1.5, 0.6, 1.6], None, id="within the spread"),
        pytest.param([1.2, 1.2, 1.2, 1.2], None, id="slower"),
        pytest.param([0.8, 0.8], None, id="hardly measured"),
    ],
)
def test_advice_needs_a_gain_beyond_the_spread(changed: list[float], expected: float | None) -> None:
    assert gain([(1.0, seconds) for seconds in changed]) == expected


def test_the_store_outlives_whoever_wrote_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "store.json"
    Store(file).add("cell 1 1 1", [3, 0.5, 0.0])
    Store(file).add("cell 1 1 1", [3, 0.6, 0.0])
    assert Store(file).rounds("cell 1 1 1") == [[3, 0.5, 0.0], [3, 0.6, 0.0]]
    assert Store(file, fresh=True).rounds("cell 1 1 1") == []
    file.write_text(file.read_text()[:-5])
    assert Store(file).rounds("cell 1 1 1") == []


def test_free_memory_is_the_tightest_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/self/mountinfo": "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "3000000\n",
        "sys/fs/cgroup/a/memory.current": "2500000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 100000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(room, "Tree", lambda root: Tree(str(tmp_path)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4000 * 1024))
    assert room.free_memory() == 600000
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("max\n")
    assert room.free_memory() == 4000 * 1024


def test_memory_of_a_process_counts_shared_pages_in_parts() -> None:
    whole, private = memory(os.getpid()) or (0, 0)
    assert 0 < private <= whole
    assert memory(2**22 + 1) is None


# ---- archives


def test_a_copy_has_other_settings_and_keeps_the_rest(tmp_path: Path) -> None:
    path = archive(tmp_path, config="minWorkers: 3\ncpu: {share: 2}\nmine: kept\n")
    before = read_archive(path)
    changed = copy_with(before, tmp_path / "copy.mar", {"minWorkers": 1, "batchSize": 4, "cpu": {"cores": 2}})
    after = read_archive(changed)
    assert after.settings == {"mine": "kept", "minWorkers": 1, "batchSize": 4, "cpu": {"share": 2, "cores": 2}}
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed) as new:
        assert set(new.namelist()) == set(old.namelist())
        assert new.read("handler.py") == old.read("handler.py")


def test_a_copy_gets_settings_where_there_were_none(tmp_path: Path) -> None:
    changed = copy_with(read_archive(archive(tmp_path)), tmp_path / "copy.mar", {"batchSize": 4})
    with zipfile.ZipFile(changed) as parts:
        manifest = json.loads(parts.read("MAR-INF/MANIFEST.json"))
        assert yaml.safe_load(parts.read(manifest["model"]["configFile"])) == {"batchSize": 4}


def _no_zip(path: Path) -> None:
    path.write_bytes(b"not an archive")


def _no_manifest(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("handler.py", "")


def _no_json(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("MAR-INF/MANIFEST.json", "{")


def _cut(path: Path) -> None:
    archive(path.parent, name=path.stem)
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("breaks", [_no_zip, _no_manifest, _no_json, _cut])
def test_a_broken_archive_is_named(tmp_path: Path, breaks: Callable[[Path], None]) -> None:
    path = tmp_path / "broken.mar"
    breaks(path)
    with pytest.raises(CommandError, match=r"broken\.mar: .*torch-model-archiver"):
        read_archive(path)


def test_an_asynchronous_handler_cannot_be_profiled(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="asynchronous"):
        read_archive(archive(tmp_path, config="asyncCommunication: true\n"))


# ---- one bare process


@pytest.mark.process
def test_a_bare_process_batches_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    handle = "import tempfile; tempfile.mkdtemp(); open('seen', 'a').write(f'{len(data)} ')"
    model = tmp_path / "model"
    with zipfile.ZipFile(archive(tmp_path, handle=handle)) as parts:
        parts.extractall(model)
    with Bare(model, BODY, [Binding(None, 1)]) as bare:
        assert len(bare.work(0, batch=3, fewest=2)) == 2
        assert len(bare.work(0, batch=1)) == 1
        assert list((tmp_path / "tmp").iterdir())
    assert (model / "seen").read_text() == "3 3 1 "
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("stage", "reason", "told"),
    [
        pytest.param("load", "ModuleNotFoundError: x", "loaded: ModuleNotFoundError: x; install it here", id="module"),
        pytest.param("load", "ValueError: x", "cannot be loaded: ValueError: x; a TorchServe worker", id="load"),
        pytest.param("load", "RuntimeError: Found no NVIDIA driver", "needs a GPU (RuntimeError: Found", id="gpu"),
        pytest.param("handle", "RuntimeError: Found no NVIDIA driver", "needs a GPU (RuntimeError: Found", id="late"),
        pytest.param("handle", "ValueError: x", "rejects the body: ValueError: x; give one", id="body"),
    ],
)
def test_what_a_handler_raises_is_explained(tmp_path: Path, stage: str, reason: str, told: str) -> None:
    assert told in explained(read_archive(archive(tmp_path)), BareError(stage, reason))


@pytest.mark.process
def test_a_refused_batch_is_reported_with_why_and_the_process_goes_on(tmp_path: Path) -> None:
    """One refused by TorchServe, because the handler answers too few, and one by the handler itself."""
    handle = "if len(data) == 2: raise ValueError('no image')\n        if len(data) == 1: data = []"
    path = archive(tmp_path, handle=handle)
    with Bare(path, BODY, [Binding(None, 1)]) as bare:
        for batch, reason in ((2, "ValueError: no image"), (1, "mismatched")):
            with pytest.raises(BareError, match=reason) as caught:
                bare.work(0, batch=batch)
            assert caught.value.stage == "handle"
            assert "rejects the body" in explained(read_archive(path), caught.value)
        assert len(bare.work(0, batch=3)) == 1


@pytest.mark.process
def test_what_is_no_torchscript_cannot_be_frozen(tmp_path: Path) -> None:
    """Advice passes over it."""
    path = archive(tmp_path, load="import torch; self.model = torch.nn.Linear(1, 1)")
    bare = Bare(path, BODY, [Binding(None, 1)], change=OPTIMIZE)
    with pytest.raises(BareError, match="ScriptModule") as caught, bare:
        pass
    assert caught.value.stage == "load"


# ---- where it may measure


@pytest.mark.skipif(CORES < 2, reason="one core is either held or free")
def test_only_cores_that_no_live_worker_holds_are_used(
    state: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = frozenset(start(cores=1).facts()["cpus"])
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(state))
    monkeypatch.setattr(room, "unbound_workers", lambda state: [])  # whoever else serves on this machine
    found = room.find_room()
    assert held
    assert found.cpus.isdisjoint(held)
    assert found.cores == CORES - 1
    assert room.find_room(anyway=True).cores == CORES


def test_workers_without_a_slice_may_be_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "unbound_workers", lambda state: [Unbound(4711, "stock", elsewhere="a TorchServe")])
    with pytest.raises(CommandError, match=r"1 TorchServe worker without a slice .*4711.*--anyway"):
        room.find_room()
    assert room.find_room(anyway=True).cpus


# ---- the command


@pytest.mark.process
def test_other_commands_do_not_load_it() -> None:
    code = "import sys, ts_plugin.cli.main; print([one for one in sys.modules if one.startswith('ts_plugin.tune')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_target_that_cannot_be_met_is_no_success(
    tmp_path: Path, body: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = Profile("tiny.mar", 1, 1, 1 << 20, 1 << 20, 1 << 30, True, (Cell(1, 1, 1, 0.1, 0.0, 10),))
    target = Target(p99=0.01)
    ranked = choose(profile, target)
    (measured,) = row(10.0, 0.1, ranked[0])
    answer = Result("tiny", "1.0", profile, target, tuple(ranked), ranked[0], measured, (measured,))
    model = Wanted(read_archive(archive(tmp_path)), Body(BODY), target)
    file = tmp_path / "config.properties"
    options = argparse.Namespace(write=file, json=False, picture=None)
    assert command_module.report([model], [answer], options) == 1
    told = capsys.readouterr().out
    assert "comes nearest" in told
    assert "left as it is" in told
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        pytest.param(["{mar}"], "--body FILE", id="no body"),
        pytest.param(["{mar}", "--body", "{absent}"], "No such file", id="absent body"),
        pytest.param(["{absent}", "--body", "{body}"], "No such file", id="absent archive"),
        pytest.param(["{body}", "--body", "{body}"], "no model archive", id="no archive"),
        # What can be said without the archive comes first: it may be large, or not made yet.
        pytest.param(["{absent}", "--body", "{body}", "--p99", "soon"], "not 'soon'", id="p99"),
        pytest.param(["{absent}", "--body", "{body}", "--rate", "-1"], "not '-1'", id="rate"),
        pytest.param(["{absent}", "--body", "{body}", "--config", "/nowhere"], "/nowhere: No such", id="config"),
        pytest.param(["{absent}", "--body", "{body}", "--write", "/nowhere/c"], "directory /nowhere;", id="write"),
        pytest.param(["{absent}", "--body", "{body}", "--picture", "a.jpeg"], ".png or .svg", id="picture"),
        pytest.param(["{mar}", "{mar}", "--body", "{body}"], "two archives of this name", id="twice"),
        pytest.param(["{mar}", "{other}", "--body", "{body}", "--rate", "x=1"], "no archive is called x", id="name"),
    ],
)
def test_what_makes_no_sense_is_said(
    tmp_path: Path, body: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.delattr(command_module, "alone")  # it does not come so far
    files = {"mar": archive(tmp_path), "other": archive(tmp_path, name="other"), "body": body}
    given = [word.format(absent=tmp_path / "absent", **files) for word in words]
    status, out, err = refused(tmp_path, "tune", *given, "--anyway")
    assert (status, out) == (1, "")
    assert told in err


@pytest.mark.process
def test_no_memory_is_said_with_both_numbers(
    tmp_path: Path, body: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    status, _, err = run(command(archive(tmp_path), "--body", body, "--memory", "520M"))
    assert status == 1
    assert "one worker takes" in err
    assert "520 MiB may be used" in err


def test_cores_that_a_live_worker_holds_are_left_alone(
    tmp_path: Path,
    body: Path,
    state: Path,
    start: Callable[..., Any],
    command: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start().facts()
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(state))
    status, _, err = run(command(archive(tmp_path), "--body", body, anyway=False))
    assert status == 1
    assert "no free core" in err or "without a slice" in err  # the second where others serve here too
    assert "--anyway" in err


@pytest.mark.server
def test_from_end_to_end_and_again_after_being_killed(
    tmp_path: Path, body: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    """Killed while it profiles, the tuner goes on from what it had; then it sets what it found."""
    path = archive(tmp_path, config="minWorkers: 1\n")
    words = [path, "--body", body, "--minutes", "0.1", "--json", "--write", tmp_path / "config.properties"]
    (tmp_path / "config.properties").write_text("# mine\nload_models=all\n")
    process = command(*words)
    cache = tmp_path / "cache" / "ts-cores" / "tune"

    def kept() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for file in cache.glob("*.json"):
            found |= json.loads(file.read_text()).get("rounds", {})
        return found

    assert eventually(lambda: len(kept()) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = kept()

    status, out, err = run(command(*words))
    assert status == 0, err
    after = kept()
    for name, rounds in before.items():
        assert after[name][: len(rounds)] == rounds
    (answer,) = json.loads(out)["models"]
    assert answer["met"]
    assert {row["name"] for row in answer["confirmed"]} >= {"TorchServe's default"}
    assert all(row["throughput"] > 0 for row in answer["confirmed"])
    chosen = answer["choice"]
    assert chosen in [row["choice"] for row in answer["confirmed"]]
    with zipfile.ZipFile(path) as parts:
        config = yaml.safe_load(parts.read("model-config.yaml"))
    assert (config["minWorkers"], config["batchSize"]) == (chosen["workers"], chosen["batch"])
    assert read_archive(path.with_name("tiny.mar.before-tune")).settings == {"minWorkers": 1}
    assert "load_models=all" in (tmp_path / "config.properties").read_text()
    assert (tmp_path / "config.properties.before-tune").read_text() == "# mine\nload_models=all\n"


@pytest.mark.process
def test_a_handler_of_ours_leaves_a_bare_process_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(tmp_path / "state"))
    model = archive(tmp_path)
    with zipfile.ZipFile(model, "a") as parts, pytest.warns(UserWarning, match="Duplicate name"):
        parts.writestr(
            "handler.py",
            """
import os
import torch
from ts_plugin.handlers import CoreSliceMixin

def plain():
    class Plain:
        def initialize(self, context):
            self.initialized = True
        def handle(self, data, context):
            assert self.initialized and os.sched_getaffinity(0) == set(CPUS) and torch.get_num_threads() == 3
            return [1] * len(data)
    return Plain

class Handler(CoreSliceMixin, plain()):
    pass
""".replace("CPUS", str(sorted(os.sched_getaffinity(0)))),
        )
    with Bare(model, BODY, [Binding(tuple(os.sched_getaffinity(0)), 3)]) as bare:
        assert len(bare.work(0, fewest=2)) == 2
        assert Ledger().read().leases == ()
