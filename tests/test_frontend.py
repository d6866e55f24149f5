"""The frontend hook: what it makes of Python's answers, in a real JVM; the jar that carries it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import hatch_build
from benchmarks.harness.server import read_properties
from ts_plugin.frontend import server
from ts_plugin.ledger.file import Ledger
from ts_plugin.machine import discovery
from ts_plugin.trial.properties import write_properties

pytestmark = pytest.mark.process

JAR = "ts_plugin/frontend/ts-cores.jar"
LAUNCHER = "/somewhere/bin/ts-cores-python"
GOOD = f"""echo '{{"python": "{LAUNCHER}", "warnings": []}}'"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the hook left behind in one JVM: two properties, its log lines, and how its Python was called."""

    python: str
    enable: str
    log: tuple[str, ...]
    calls: tuple[str, ...]


@pytest.fixture(scope="session")
def probe(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The class path of the probe, the hook and TorchServe's frontend."""
    classes = tmp_path_factory.mktemp("probe")
    path = f"{checkout / JAR}:{hatch_build.find_model_server()}"
    source = str(checkout / "tests" / "HookProbe.java")
    subprocess.run([hatch_build.find_javac(), "-proc:none", "-cp", path, "-d", str(classes), source], check=True)
    return f"{classes}:{path}"


def take_over(
    probe: str, directory: Path, answer: str, *, environment: dict[str, str] | None = None, **properties: str | None
) -> Outcome:
    """Construct the hook where ``answer``, a shell script, is the server's python; None removes a property."""
    python, calls = directory / "python", directory / "calls"
    python.write_text(f'#!/bin/sh\nfor word; do echo "$word" >>{calls}; done\n{answer}\n')
    python.chmod(0o755)
    config = directory / "config.properties"
    write_properties(config, {"model_store": directory, "cpu_launcher_enable": "true", **properties})
    home = hatch_build.find_model_server().parents[2]
    done = subprocess.run(
        ["java", f"-Dmodel_server_home={home}", "-cp", probe, "HookProbe", "-f", str(config), "--python", str(python)],
        cwd=directory,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    left = directory / "left"
    left.write_text(done.stdout)
    log = tuple(line for line in done.stdout.splitlines() if "org.tscores" in line)
    words = tuple(calls.read_text().splitlines()) if calls.exists() else ()
    return Outcome(read_properties(left)["python"], read_properties(left)["cpu_launcher_enable"], log, words)


def test_take_over(probe: str, tmp_path: Path) -> None:
    outcome = take_over(probe, tmp_path, GOOD)
    assert outcome.python == LAUNCHER
    # Once, although TorchServe constructs the class once per endpoint type.
    assert outcome.calls == ("-P", "-m", "ts_plugin.frontend.server", "takeover", "--launcher-args=")
    assert [re.sub(r".* - ", "", line) for line in outcome.log] == [
        "ts-cores: every worker gets its own cores; see GET /cores on the management API"
    ]


def test_stock_launcher_stays_off_in_every_snapshot(probe: str, tmp_path: Path) -> None:
    outcome = take_over(probe, tmp_path, GOOD)
    assert outcome.enable not in ("true", "")  # java.lang.Boolean.parseBoolean: everything but "true" is false
    again = take_over(probe, tmp_path, GOOD, cpu_launcher_enable=outcome.enable)
    assert again == Outcome(LAUNCHER, outcome.enable, again.log, outcome.calls * 2)


@pytest.mark.parametrize("value", ["false", "", "typo", None])
def test_not_enabled(probe: str, tmp_path: Path, value: str | None) -> None:
    outcome = take_over(probe, tmp_path, GOOD, cpu_launcher_enable=value)
    assert outcome == Outcome(str(tmp_path / "python"), value or "", (), ())


@pytest.mark.parametrize(
    ("file", "variable", "listens", "expected"),
    [
        pytest.param(None, "true", "true", LAUNCHER, id="on"),
        pytest.param("true", "false", "true", "", id="off"),
        pytest.param("ts-cores", "false", "true", "", id="off-over-a-snapshot"),
        pytest.param(None, "true", "false", "", id="not-listened-to"),
    ],
)
def test_environment(probe: str, tmp_path: Path, file: str | None, variable: str, listens: str, expected: str) -> None:
    switch = {"TS_CPU_LAUNCHER_ENABLE": variable}
    outcome = take_over(
        probe, tmp_path, GOOD, environment=switch, cpu_launcher_enable=file, enable_envvars_config=listens
    )
    assert outcome.python == (expected or str(tmp_path / "python"))


def test_launcher_args_reach_python_as_they_are(probe: str, tmp_path: Path) -> None:
    text = f"--node_id 0; touch {tmp_path}/shell $(id) \"quoted\" 'too' *"
    outcome = take_over(probe, tmp_path, GOOD, cpu_launcher_args=text)
    assert outcome.calls[-1] == f"--launcher-args={text}"
    assert not (tmp_path / "shell").exists()


def test_warnings_and_stderr_are_logged(probe: str, tmp_path: Path) -> None:
    answer = json.dumps({"python": LAUNCHER, "warnings": ["did you mean --node-id?", "second"]})
    outcome = take_over(probe, tmp_path, f"echo odd >&2; echo '{answer}'")
    assert outcome.python == LAUNCHER
    levels = [re.sub(r".*\[(\w+) *\].* - ", r"\1 ", line) for line in outcome.log]
    assert levels[:3] == ["WARN ts-cores: odd", "ERROR ts-cores: did you mean --node-id?", "ERROR ts-cores: second"]


@pytest.mark.parametrize(
    ("answer", "reason", "remedy"),
    [
        pytest.param(
            "echo python: No module named ts_plugin >&2; exit 1",
            "No module named ts_plugin (exit status 1)",
            "pip install the checkout or a wheel of ts-cores into the environment of ",
            id="not-installed",
        ),
        pytest.param(
            "echo Traceback >&2; echo 'ValueError: boom' >&2; exit 1",
            "ValueError: boom (exit status 1)",
            "run it by hand: ",
            id="crash",
        ),
        pytest.param("kill -9 $$", "(exit status 137)", "run it by hand: ", id="killed"),
        pytest.param("echo '{\"pyth'", "", "", id="half-an-answer"),
        pytest.param("", "", "", id="no-answer"),
        pytest.param("echo '[]'", "", "", id="no-object"),
        pytest.param("echo '{}'", "", "", id="empty-object"),
    ],
)
def test_serves_unbound_with_one_line(probe: str, tmp_path: Path, answer: str, reason: str, remedy: str) -> None:
    outcome = take_over(probe, tmp_path, answer)
    assert outcome.python == str(tmp_path / "python")
    assert outcome.enable not in ("true", "")
    (line,) = outcome.log
    assert "[ERROR]" in line
    assert "workers are served unbound: " in line
    assert reason in line
    assert remedy in line


def test_pipes_held_open_or_full_do_not_stop_the_server(probe: str, tmp_path: Path) -> None:
    # A megabyte is more than a pipe holds; the sleeping grandchild keeps stdout and stderr open for a minute.
    outcome = take_over(probe, tmp_path, f"sleep 60 & echo $! >{tmp_path}/pid; yes | head -c 1000000 >&2; exit 3")
    os.kill(int((tmp_path / "pid").read_text()), 9)
    assert "(exit status 3)" in outcome.log[0]


def test_jar_is_what_its_source_says(checkout: Path, tmp_path: Path) -> None:
    source = checkout / "ts_plugin" / "frontend" / "java"
    hatch_build.build_jar(hatch_build.find_javac(), hatch_build.find_model_server(), source, tmp_path / "a.jar")
    assert (tmp_path / "a.jar").read_bytes() == (checkout / JAR).read_bytes(), "stale: run ./dev setup"
    with zipfile.ZipFile(tmp_path / "a.jar") as jar:
        assert jar.namelist() == [
            "META-INF/services/org.pytorch.serve.servingsdk.ModelServerEndpoint",
            "org/tscores/CoresEndpoint.class",
            "org/tscores/DrainingAggregator.class",
            "org/tscores/DrainingWorkLoadManager.class",
        ]


def test_jar_runs_on_every_java_that_torchserve_runs_on(checkout: Path) -> None:
    """A class that is newer than the JVM ends the server: PluginsManager lets the UnsupportedClassVersionError out."""
    with zipfile.ZipFile(checkout / JAR) as jar:
        # The JVM specification, 4.1: the major version, 55 for Java 11, is bytes 6 and 7 of every class file.
        versions = {int.from_bytes(jar.read(name)[6:8]) for name in jar.namelist() if name.endswith(".class")}
    assert versions == {55}


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(hatch_build.JarError, match=r"default-jdk-headless.*JAVA_HOME"):
        hatch_build.find_javac()
    compiler = tmp_path / "bin" / "javac"
    compiler.parent.mkdir()
    compiler.touch(0o755)
    assert hatch_build.find_javac() == str(compiler)


def test_compiler_refuses(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "Wrong.java").write_text("class Wrong { int x = missing; }")
    server = hatch_build.find_model_server()
    with pytest.raises(hatch_build.JarError, match=r"exit status 1\n.*cannot find symbol"):
        hatch_build.build_jar(hatch_build.find_javac(), server, tmp_path, tmp_path / "a.jar")
    assert not (tmp_path / "a.jar").exists()


def test_the_log_says_what_is_not_known_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = discovery.read_topology()
    monkeypatch.setattr(discovery, "read_topology", lambda: replace(known, notes=("/sys: missing",)))
    ledger = Ledger(str(tmp_path / "state"))
    assert "/sys: missing" in server.take_over(ledger, os.getpid(), "")["warnings"]
    assert [one.pid for one in ledger.read().servers] == [os.getpid()]
