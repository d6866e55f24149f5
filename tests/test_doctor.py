"""Every check of the doctor on facts that it must find, and on a healthy machine that it must leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hatch_build
from tests.eventually import eventually
from tests.leases import lease_of
from tests.machines import machine
from ts_plugin.config.file import Config, parse_config, read_config
from ts_plugin.config.served import Stored
from ts_plugin.doctor import inspection
from ts_plugin.doctor.checks import JAVA_NEEDED, examine
from ts_plugin.doctor.finding import Finding, Severity
from ts_plugin.doctor.inspection import Inspection, Interpreter, inspect
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Server, State
from ts_plugin.ledger.unbound import JAR, Unbound
from ts_plugin.machine.topology import Allowance
from ts_plugin.planning.planner import Demand
from ts_plugin.planning.policy import Policy

EIGHT = frozenset(range(8))
PROPERTIES = {
    "cpu_launcher_enable": "true",
    "plugins_path": "/plugins",
    "model_store": "/models",
    "load_models": "a.mar",
    "default_workers_per_model": "2",
    "disable_token_authorization": "true",
}
MODELS = {"models": "{'a': {'1.0': {'minWorkers': 2, 'maxWorkers': 2}}}", "default_workers_per_model": "0"}
HEALTHY = Inspection(
    java="17.0.15",
    torchserve="0.12.0",
    interpreter=Interpreter("/venv/bin/python"),
    config=Config(Path("/etc/config.properties"), PROPERTIES),
    plugins=frozenset({JAR}),
    store={"a.mar": Stored("a")},
    topology=machine(cores=8),
    allowance=Allowance(EIGHT),
)
LEASE = lease_of((0, 1), 41, start_time=1, model="resnet18", server_pid=40, demand=Demand(EIGHT))


@pytest.fixture(autouse=True)
def _quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the doctor look shortly for busy neighbours, which only one test here is about."""
    monkeypatch.setattr(inspection, "SAMPLE", 0.02)


def config(**properties: str) -> Config:
    return Config(Path("/etc/config.properties"), PROPERTIES | properties)


def without(*names: str) -> Config:
    return Config(Path("/etc/config.properties"), {k: v for k, v in PROPERTIES.items() if k not in names})


def trouble(seen: Inspection) -> list[Finding]:
    return [one for one in examine(seen) if one.severity is not Severity.NOTE]


def test_a_healthy_machine_has_no_trouble() -> None:
    assert trouble(HEALTHY) == []


@pytest.mark.parametrize("release", ["11.0.2", "17.0.15", "21.0.8", "25"])
def test_every_java_that_the_jar_runs_on_will_do(release: str) -> None:
    assert trouble(replace(HEALTHY, java=release)) == []
    assert str(JAVA_NEEDED) == hatch_build.JAVA_RELEASE


@pytest.mark.parametrize(
    ("change", "severity", "subject", "words"),
    [
        pytest.param({"java": None}, "error", "java", "no java", id="no java"),
        pytest.param({"java": "1.8.0_292"}, "error", "java", "1.8.0_292", id="java 8"),
        pytest.param({"java": "10.0.2"}, "error", "java", "10.0.2", id="java 10"),
        pytest.param({"torchserve": None}, "error", "torchserve", "not installed", id="no torchserve"),
        pytest.param({"torchserve": "0.11.1"}, "warning", "torchserve", "0.11.1", id="old torchserve"),
        pytest.param({"interpreter": None}, "error", "python", "no torchserve on PATH", id="no command"),
        pytest.param(
            {"interpreter": Interpreter("/p", frozenset({"ts_plugin"}))}, "error", "python", "/p", id="other venv"
        ),
        pytest.param(
            {"interpreter": Interpreter("/p", frozenset({"yaml"}))}, "error", "python", "yaml", id="no PyYAML"
        ),
        pytest.param({"config": None}, "warning", "config", "no config.properties", id="no config"),
        pytest.param(
            {"config": config(cpu_launcher_enable="false")}, "error", "config", "'false', not true", id="switched off"
        ),
        pytest.param({"config": without("plugins_path")}, "error", "plug-in", "no plugins_path", id="no path"),
        pytest.param({"plugins": None}, "error", "plug-in", "no directory", id="path is no directory"),
        pytest.param({"plugins": frozenset({"x.jar"})}, "error", "plug-in", f"no {JAR}", id="jar elsewhere"),
        pytest.param({"jar": False}, "error", "plug-in", "missing in the installed package", id="no jar"),
        pytest.param(
            {"config": config(cpu_launcher_args="--node-idd 0")},
            "error",
            "cpu_launcher_args",
            "did you mean --node-id?",
            id="a typo",
        ),
        pytest.param({"config": config(cpu_launcher_args="--node-id 7")}, "error", "plan", "node 7", id="no such node"),
        pytest.param(
            {"config": without("default_workers_per_model")}, "warning", "workers", "says nothing for a", id="no number"
        ),
        pytest.param(
            {"config": without("default_workers_per_model", "load_models")},
            "warning",
            "workers",
            "default_workers_per_model says nothing",
            id="no number and no model",
        ),
        pytest.param(
            {"config": config(default_workers_per_model="some")}, "error", "config", "no whole number", id="no integer"
        ),
        pytest.param(
            {"config": config(default_workers_per_model="9")}, "warning", "workers", "9 workers", id="too many"
        ),
        pytest.param(
            {"config": config(load_models="all"), "store": {name: Stored(name) for name in "abcde"}},
            "warning",
            "workers",
            "2 workers for each of a, b, c, d, e (default_workers_per_model): 10 workers for 8 cores",
            id="too many models",
        ),
        pytest.param(
            {"config": config(models='{"a": {"1.0": {"minWorkers": 50}}}')},
            "warning",
            "workers",
            "50 workers for a (models=): 50 workers for 8 cores",
            id="too many in models",
        ),
        pytest.param(
            {"store": {"a.mar": Stored("a", settings={"minWorkers": 9, "maxWorkers": 9})}},
            "warning",
            "workers",
            "9 workers for a (model-config.yaml): 9 workers",
            id="too many in an archive",
        ),
        pytest.param(
            {"store": {"a.mar": Stored("a", settings={"minWorkers": 9})}},
            "warning",
            "config",
            "minWorkers: 9 and maxWorkers: None in its model-config.yaml count for nothing",
            id="minWorkers alone",
        ),
        pytest.param({"config": config(models="{")}, "error", "config", "models is not the JSON", id="no JSON"),
        pytest.param(
            {"config": config(default_worker_per_model="1")},
            "warning",
            "config",
            "no property default_worker_per_model; did you mean default_workers_per_model?",
            id="a misspelt property",
        ),
        pytest.param(
            {"config": config(number_of_cpu="1")}, "warning", "config", "mean number_of_gpu?", id="another of them"
        ),
        pytest.param(
            {"config": Config(Path("x"), PROPERTIES | {"cpu-launcher-args": ""})},
            "warning",
            "config",
            "did you mean cpu_launcher_args?",
            id="dashes in a name",
        ),
        pytest.param(
            {"config": config(install_py_dep_per_model="true ")},
            "warning",
            "config",
            "reads false; a blank at its end is part of it",
            id="a switch with a blank",
        ),
        pytest.param(
            {"config": config(enable_metrics_api="yes")}, "warning", "config", "TorchServe reads false", id="yes"
        ),
        pytest.param(
            {"config": config(metrics_mode="promethues")}, "warning", "config", "metrics_mode='prom", id="a mode"
        ),
        pytest.param(
            {"config": config(max_response_size="10MB")}, "error", "config", "no whole number", id="read by workers"
        ),
        pytest.param(
            {"unusable": {"inference_address": "no host"}}, "error", "config", "inference_address=: no host", id="host"
        ),
        pytest.param({"absent": {"load_models": "' b.mar'"}}, "error", "config", "' b.mar' is not", id="a blank"),
        pytest.param({"topology": None}, "error", "topology", "cannot be read", id="no /sys"),
        pytest.param(
            {"allowance": Allowance(EIGHT, 2.0), "config": config(cpu_launcher_args="--pin always")},
            "warning",
            "quota",
            "2 CPUs' worth",
            id="pinned under a quota",
        ),
        pytest.param(
            {"environment": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}},
            "warning",
            "cpuset",
            "neither a CPU limit nor CPUs of its own",
            id="a pod with a request alone",
        ),
        pytest.param({"environment": {"OMP_PROC_BIND": "true"}}, "warning", "OpenMP", "OMP_PROC_BIND", id="trap"),
        pytest.param(
            {"environment": {"LD_PRELOAD": "/x/libiomp5.so"}}, "warning", "OpenMP", "libiomp5", id="two runtimes"
        ),
        pytest.param({"preload_notes": ("no lib",)}, "warning", "preload", "no lib", id="no allocator"),
        pytest.param({"no_lending": "no .so"}, "warning", "lending", "no .so", id="no library"),
        pytest.param(
            {"config": config(management_address="http://0.0.0.0:8081")}, "warning", "token", "0.0.0.0", id="open"
        ),
        pytest.param({"ledger_error": "/x: read-only"}, "error", "ledger", "/x: read-only", id="no ledger"),
        pytest.param(
            {"state": State(servers=(Server(40, 1, Policy(), EIGHT, "a typo"),))},
            "error",
            "server",
            "typo",
            id="server",
        ),
        pytest.param(
            {"unbound": (Unbound(7, "why"),)}, "error", "worker", "1 worker unbound (pid 7): why", id="unbound"
        ),
        pytest.param({"astray": ((41, 3),)}, "warning", "worker", "3 threads of worker 41", id="astray"),
        pytest.param(
            {"busy": ((9, "make", EIGHT, 0.93),)}, "warning", "neighbours", "make (pid 9) uses 93%", id="busy"
        ),
    ],
)
def test_finds(change: dict[str, Any], severity: str, subject: str, words: str) -> None:
    found = [one for one in trouble(replace(HEALTHY, **change)) if one.subject == subject]
    assert len(found) == 1
    assert found[0].severity == severity
    assert words in found[0].what
    assert found[0].why or found[0].change or subject in ("ledger", "preload")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"config": config(management_address="unix:/tmp/x")}, id="a socket"),
        pytest.param({"config": without("disable_token_authorization")}, id="tokens"),
        pytest.param({"allowance": Allowance(EIGHT, 2.0)}, id="a quota"),
        pytest.param({"environment": {"OMP_NUM_THREADS": "4"}}, id="a thread count"),
        pytest.param({"environment": {"OMP_PROC_BIND": "false", "KMP_AFFINITY": "disabled"}}, id="no binding"),
        pytest.param(
            {"environment": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "allowance": Allowance(EIGHT, 2.0)},
            id="a pod with a limit",
        ),
        pytest.param(
            {"environment": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "allowance": Allowance(frozenset({0, 1, 2}))},
            id="a pod with CPUs of its own",
        ),
        pytest.param({"java": "21"}, id="java 21"),
        pytest.param(
            {
                "config": config(
                    default_workers_per_model="8", models='{"a": {"1.0": {"minWorkers": 1, "maxWorkers": 8}}}'
                )
            },
            id="models says fewer",
        ),
        pytest.param(
            {"config": replace(without("default_workers_per_model"), properties=PROPERTIES | MODELS)},
            id="models alone says how many",
        ),
        pytest.param({"config": config(plugin_of_mine="x")}, id="a property of another plug-in"),
        pytest.param(
            {"busy": ((9, "make", frozenset({7}), 0.9),), "state": State(leases=(LEASE,))}, id="busy on other cores"
        ),
    ],
)
def test_leaves_alone(change: dict[str, Any]) -> None:
    assert trouble(replace(HEALTHY, **change)) == []


def test_processes_and_workers_of_one_kind_are_one_finding() -> None:
    busy = tuple((100 + n, "make" if n else "perl", EIGHT, 0.5) for n in range(12))
    leases = tuple(replace(LEASE, pid=41 + n, worker_id=str(9000 + n), notes=("the same",)) for n in range(3))
    found = examine(replace(HEALTHY, busy=busy, astray=((41, 3), (42, 1)), state=State(leases=leases)))
    said = [one.what for one in found if one.subject in ("neighbours", "worker")]
    pids = ", ".join(str(100 + n) for n in range(1, 9))
    assert said == [
        "3 threads of worker 41, 1 threads of worker 42 may run outside their slice",
        "perl (pid 100) uses 50% of a CPU and may run on the workers' cores",
        f"make (pid {pids} and 3 more) uses 550% of a CPU and may run on the workers' cores",
        "worker 9000 of resnet18 1.0, worker 9001 of resnet18 1.0, worker 9002 of resnet18 1.0: the same",
    ]


def test_whose_variables_win_over_the_file_is_said() -> None:
    """Of those set here: TorchServe has no TS_BATCH_SIZE, its command reads the model store, and URLs need a switch."""
    mine = dict.fromkeys(("TS_DEBUG", "TS_BATCH_SIZE", "TS_ALLOWED_URLS", "TS_MODEL_STORE", "HOME"), "true")
    for text, told in (
        ("enable_envvars_config=true", ["TS_DEBUG"]),
        ("enable_envvars_config=true\nuse_env_allowed_urls=true", ["TS_ALLOWED_URLS, TS_DEBUG"]),
        ("enable_envvars_config=false", []),
    ):
        seen = replace(HEALTHY, config=parse_config(Path("config.properties"), text.encode(), mine))
        found = [one.what for one in examine(seen) if one.subject == "environment"]
        assert [what.partition(":")[0] for what in found] == told
        assert all("environment of this command" in what for what in found)


def test_the_worst_comes_first() -> None:
    severities = [one.severity for one in examine(replace(HEALTHY, java=None, config=None))]
    assert severities == sorted(severities, key=list(Severity).index)
    assert severities[0] is Severity.ERROR


def test_read_config(tmp_path: Path) -> None:
    """The TS_* variables win, where the file says so, and $$NAME$$ is replaced."""
    file = tmp_path / "config.properties"
    file.write_text("# a comment\nstore = $$HOME$$/store\nworkers=$$NONE$$\nenable_envvars_config=true\nx=1=2\n")
    environment = {"HOME": "/home/me", "TS_CPU_LAUNCHER_ENABLE": "true", "TS_X": "3", "TS_MODELS": "{}", "OTHER": "4"}
    config = read_config(file, environment)
    assert config.errors == ("workers: the variable NONE is not set; export NONE=...",)
    assert config.properties == {
        "store": "/home/me/store",
        "workers": "$$NONE$$",
        "enable_envvars_config": "true",
        "x": "1=2",
        "cpu_launcher_enable": "true",
    }
    file.write_text("x=1\n")
    assert read_config(file, environment).properties == {"x": "1"}


DUMP = """
import java.io.FileInputStream;
import java.util.*;
public class Dump {
  public static void main(String[] words) throws Exception {
    Properties found = new Properties();
    found.load(new FileInputStream(words[0]));
    for (String name : found.stringPropertyNames()) System.out.println(hex(name) + " " + hex(found.getProperty(name)));
  }
  static String hex(String text) {
    StringBuilder all = new StringBuilder("x");
    for (char each : text.toCharArray()) all.append(String.format("%04x", (int) each));
    return all.toString();
  }
}
"""

ODDITIES = (
    b"plain=1\ncolon:2\nblank 3\ntab\t4\nspaced = 5 \ncrlf=6\r\ncr=7\rfeed=\f8\nempty=\nnothing\n"
    b"latin=\xe9\nescape=\\u00e9\\t\\n\\\\\\q\npair=\\ud83d\\ude00\nna\\ me\\:\\==9\n"
    b'# comment=1\n  ! comment=2\n\nlong=a,\\\n    b,\\\r\n\tc\ncomment=\\\n#no\nquotes="--x 1"\n'
    b"twice=1\ntwice=2\n=no name\nutf8=\xc3\xa9\nlast=\\"
)


@pytest.mark.process
def test_a_config_is_read_as_java_reads_it(tmp_path: Path) -> None:
    (tmp_path / "Dump.java").write_text(DUMP)
    (tmp_path / "odd.properties").write_bytes(ODDITIES)
    command = ["java", str(tmp_path / "Dump.java"), str(tmp_path / "odd.properties")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = (line.split() for line in done.stdout.splitlines())
    java = {_text(name): _text(value) for name, value in pairs}
    assert len(java) >= 20
    assert read_config(tmp_path / "odd.properties", {}).properties == java


def _text(code: str) -> str:
    return bytes.fromhex(code.removeprefix("x")).decode("utf-16-be")


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_file_that_torchserve_finds_itself_brings_no_plug_in(snapshot: bool) -> None:
    seen = replace(HEALTHY, found=True, config=config(model_snapshot="{}") if snapshot else HEALTHY.config)
    (found,) = [one for one in examine(seen) if "without --ts-config" in one.what]
    assert found.severity == ("warning" if snapshot else "note")
    assert ("newest snapshot" in found.what) is snapshot
    assert "torchserve --ncs --ts-config" in found.change


def test_a_variable_goes_before_the_file_that_is_named() -> None:
    assert HEALTHY.config is not None
    for named, there in ((str(HEALTHY.config.path), False), ("/etc/other", True)):
        seen = replace(HEALTHY, environment={"TS_CONFIG_FILE": named})
        assert any(one.what.startswith(f"TS_CONFIG_FILE={named} in") for one in examine(seen)) is there


@pytest.mark.process
def test_inspect_here(tmp_path: Path, checkout: Path) -> None:
    """On this machine, with the demo's own config and an installation that works."""
    (tmp_path / "config.properties").write_text(
        f"cpu_launcher_enable=true\nplugins_path={checkout}/ts_plugin/frontend\ndefault_workers_per_model=1\n"
        f"model_store={tmp_path}\nload_models=all\n"
    )
    (tmp_path / "a.mar").write_bytes(b"")
    seen = inspect(tmp_path / "config.properties")
    assert seen.interpreter is not None
    assert seen.interpreter.missing == frozenset()
    assert seen.java is not None
    assert seen.plugins == frozenset({JAR})
    assert seen.jar
    assert [(one.model, one.workers) for one in seen.startup.served] == [("a", 1)]
    assert seen.topology is not None
    assert seen.ledger_error is None
    assert [one for one in trouble(seen) if one.subject not in ("neighbours", "worker", "OpenMP")] == []


@pytest.mark.process
def test_inspect_sees_threads_outside_their_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(tmp_path / "state"))
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        cpus = sorted(os.sched_getaffinity(0))
        lease = lease_of(cpus[:1], sleeper.pid)
        ledger = Ledger()
        with ledger.locked():
            ledger.write(State(generation=1, leases=(lease,)))
        os.sched_setaffinity(sleeper.pid, cpus[:1])
        assert inspect(None).astray == ()
        os.sched_setaffinity(sleeper.pid, cpus)
        assert inspect(None).astray == (((sleeper.pid, 1),) if len(cpus) > 1 else ())
        with ledger.locked():
            lends = replace(lease, slice=replace(lease.slice, reach=frozenset(cpus)))
            ledger.write(State(generation=2, leases=(lends,)))
        assert inspect(None).astray == (), "it borrows"
    finally:
        sleeper.communicate()


@pytest.mark.process
def test_inspect_reports_an_unusable_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TS_CORES_STATE_DIR", str(tmp_path / "file"))
    error = inspect(None).ledger_error
    assert error is not None
    assert error.startswith(str(tmp_path / "file"))


@pytest.mark.process
@pytest.mark.parametrize("elsewhere", [False, True], ids=["a program", "a worker of another ledger"])
def test_inspect_sees_a_busy_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    """Nothing keeps the slices of two ledgers apart, so the other's worker is a neighbour like any other."""
    monkeypatch.setattr(inspection, "SAMPLE", 0.15)
    script = tmp_path / "ts" / ("model_service_worker.py" if elsewhere else "program.py")
    script.parent.mkdir()
    script.write_text("while True: pass")
    environment = dict(os.environ) | ({"TS_CORES_STATE_DIR": "/other"} if elsewhere else {})
    neighbour = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        assert eventually(lambda: neighbour.pid in [pid for pid, *_ in inspect(None).busy])
    finally:
        neighbour.kill()
        neighbour.wait()


def test_max_workers_is_explained_once() -> None:
    """TorchServe never adds workers by itself; the name suggests that it does."""
    both = '{"a": {"1.0": {"minWorkers": 1, "maxWorkers": 4}}, "b": {"1.0": {"minWorkers": 1, "maxWorkers": 4}}}'
    store = {"a.mar": Stored("a"), "b.mar": Stored("b")}
    seen = replace(HEALTHY, config=config(load_models="a.mar,b.mar", models=both), store=store)
    (note,) = [one for one in examine(seen) if "maxWorkers" in one.what]
    alone = replace(HEALTHY, config=config(default_workers_per_model="8", models="{a: {1.0: {minWorkers: 1}}}"))
    assert [one for one in examine(alone) if "maxWorkers" in one.what] == [], "it says none"
    assert note.what == "maxWorkers of a, b is above minWorkers"
    assert "adds none by itself" in note.why


def test_the_wishes_of_an_archive_are_planned() -> None:
    store = {"a.mar": Stored("a", settings={"cpu": {"cores": 30}})}
    assert any("30" in one.what for one in examine(replace(HEALTHY, store=store)) if one.subject == "plan")
