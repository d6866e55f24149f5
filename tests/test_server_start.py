"""The way in, on real servers: what starts pinned, what stays as it was, and what serves all the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hatch_build
from benchmarks.harness import archives
from benchmarks.harness.server import TorchServe
from tests.eventually import eventually
from tests.impatience import sitecustomize
from tests.test_cli import ts_cores
from ts_plugin.machine import discovery, process
from ts_plugin.machine.cpulist import parse_cpulist
from ts_plugin.trial.properties import PORTS, Property, free_ports

pytestmark = pytest.mark.server

FRONTEND = Path(__file__).resolve().parent.parent / "ts_plugin" / "frontend"
PINNED: dict[str, Property] = {"plugins_path": FRONTEND, "cpu_launcher_enable": True}
ALLOWED = discovery.read_allowance().cpus
CORES = len(discovery.read_topology().cores_of(ALLOWED))


OPENMP_BINDING = {"OMP_PROC_BIND": "true", "GOMP_CPU_AFFINITY": "0"}  # collapses masks where nobody removes it


@pytest.fixture(scope="module")
def server() -> Iterator[TorchServe]:
    """One pinned server with two workers of a stock handler, for the tests that only look."""
    with TorchServe(archives.facts(), workers=2, properties=PINNED, environment=OPENMP_BINDING) as started:
        yield started


def facts(server: TorchServe, name: str = "facts") -> dict[int, dict[str, Any]]:
    """Return pid -> what that worker says of itself, for every worker of the model."""
    workers = {int(worker["pid"]) for worker in server.describe(name)["workers"]}
    found: dict[int, dict[str, Any]] = {}
    for _ in range(50 * len(workers)):
        answer = json.loads(server.predict(name, b'{"sleep": 0.05}'))
        found[answer["pid"]] = answer
        if found.keys() == workers:
            break
    assert found.keys() == workers
    return found


def masks(answer: dict[str, Any]) -> set[frozenset[int]]:
    return {parse_cpulist(mask) for mask in answer["masks"].values()}


def assert_pinned(server: TorchServe, name: str = "facts") -> None:
    """Hold every worker, its threads and the core map against each other."""
    answers = facts(server, name)
    cores = server.cores()
    assert cores["enabled"] is True
    assert cores["unbound"] == []
    slices = {piece["pid"]: piece for piece in cores["slices"] if piece["model"] == name}
    assert slices.keys() == answers.keys()
    for pid, answer in answers.items():
        assert masks(answer) == {frozenset(slices[pid]["cpus"])}
        assert answer["threads"] == slices[pid]["threads"] == answer["threads_at_load"]
    owned = [cpu for piece in cores["slices"] for cpu in piece["cpus"]]
    assert set(owned) <= ALLOWED
    if len(cores["slices"]) <= CORES:
        assert len(owned) == len(set(owned))


def assert_stock(server: TorchServe, name: str = "facts") -> None:
    """No worker is bound and none was started by anything of ours."""
    for answer in facts(server, name).values():
        assert masks(answer) == {frozenset(os.sched_getaffinity(0))}
        assert "OMP_NUM_THREADS" not in answer["environment"]
        assert answer["argv"][0].endswith("/ts/model_service_worker.py")


def test_workers_own_their_cores(server: TorchServe) -> None:
    assert_pinned(server)


def test_openmp_binding_is_removed_and_the_log_says_so(server: TorchServe) -> None:
    for answer in facts(server).values():
        assert not answer["environment"].keys() & OPENMP_BINDING.keys()
    for variable in OPENMP_BINDING:
        assert f"{variable} removed" in server.log()


def test_core_map(server: TorchServe) -> None:
    cores = server.cores()
    assert [sorted(piece) for piece in cores["slices"]] == 2 * [sorted(cores["slices"][0])]
    pieces = sorted(cores["slices"], key=lambda piece: piece["worker_id"])
    assert [(piece["model"], piece["version"], piece["worker_id"]) for piece in pieces] == [
        ("facts", "1.0", "9000"),
        ("facts", "1.0", "9001"),
    ]
    assert all(piece["threads"] == len(piece["cpus"]) for piece in pieces)


def test_core_map_for_people(server: TorchServe) -> None:
    page = server.management("GET", "/cores", accept="text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert server.management("GET", "/cores", {"format": "html"}).lstrip().lower().startswith("<!doctype html>")
    assert json.loads(server.management("GET", "/cores", {"format": "json"}, accept="text/html"))["enabled"] is True


def test_one_process_per_worker(server: TorchServe) -> None:
    tree = [process for process in server.processes() if process.pid != server.pid]
    under_java = [process.pid for process in tree if server.pid in {parent.pid for parent in process.parents()}]
    assert sorted(under_java) == sorted(server.workers()) == sorted(facts(server))


def test_worker_sees_what_a_stock_worker_sees(server: TorchServe) -> None:
    for answer in facts(server).values():
        assert answer["executable"] == sys.executable
        assert answer["argv"][0].endswith("/ts/model_service_worker.py")
        assert answer["cwd"] == answer["model_dir"]
        assert answer["ppid"] == server.pid


def test_metric_collector_passes_through(server: TorchServe) -> None:
    assert re.search(
        r"CPUUtilization\.Percent:[\d.]+\|#Level:Host", (server.log_directory / "ts_metrics.log").read_text()
    )


def restarted(server: TorchServe, directory: Path, *, plugin: bool) -> TorchServe:
    """Return a server, yet to be started, from a snapshot of ``server``, which still runs: on other ports."""
    text = server.snapshots()[-1].read_text()
    for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True):
        text = re.sub(rf"(?m)^({name}=.*?)\d+$", rf"\g<1>{port}", text)
    if not plugin:
        text = re.sub(r"(?m)^plugins_path=.*\n", "", text)
    snapshot = directory / "snapshot.cfg"
    snapshot.write_text(text)
    here = Path(os.environ["TS_CORES_STATE_DIR"])  # which a stock server knows nothing of
    return TorchServe(archives.facts(), workers=2, snapshot=snapshot, state_directory=None if plugin else here)


def test_snapshot_comes_up_pinned(server: TorchServe, tmp_path: Path) -> None:
    with restarted(server, tmp_path, plugin=True) as again:
        assert_pinned(again)


def test_snapshot_without_plugin_serves(server: TorchServe, tmp_path: Path) -> None:
    """It is a stock server. Our ledger judges neither its workers nor those of a server with another ledger."""
    with restarted(server, tmp_path, plugin=False) as again:
        assert_stock(again)
        assert "run_cpu" not in again.log()
        assert_not_judged(again, "a TorchServe without ts-cores", hooked=False)
        assert_not_judged(server, f"the ledger in {server.state_directory}", hooked=True)


def assert_not_judged(server: TorchServe, whose: str, *, hooked: bool) -> None:
    """Ask about both workers of a server from this process's ledger, which is not theirs."""
    elsewhere = {one["pid"]: one["whose"] for one in json.loads(ts_cores("show", "--json")[0])["elsewhere"]}
    workers = sorted(server.workers())
    assert len(workers) == 2
    assert [elsewhere.get(pid) for pid in workers] == [whose] * 2
    findings = json.loads(ts_cores("doctor", "--json", status=None)[0])["findings"]
    errors = [one["what"] for one in findings if one["severity"] == "error"]
    assert [what for what in errors if any(str(pid) in what for pid in workers)] == []
    assert any(path.endswith("/ts-cores.jar") for path in process.opened(server.pid)) == hooked


def test_not_enabled_is_stock() -> None:
    with TorchServe(archives.facts(), properties={**PINNED, "cpu_launcher_enable": False}) as server:
        assert_stock(server)
        cores = server.cores()
        assert (cores["enabled"], cores["slices"]) == (False, [])


def test_enabled_by_environment_with_tokens_and_dependencies(tmp_path: Path) -> None:
    properties: dict[str, Property | None] = {
        "plugins_path": FRONTEND,
        "enable_envvars_config": True,
        "disable_token_authorization": None,
        "install_py_dep_per_model": True,
    }
    archive = archive_with_dependency(tmp_path)
    with TorchServe(archive, properties=properties, environment={"TS_CPU_LAUNCHER_ENABLE": "true"}) as server:
        cores = server.cores()
        assert cores["enabled"] is True
        assert [piece["model"] for piece in cores["slices"]] == [archive.stem]
        assert server.predict(archive.stem, b"{}") == b"installed by pip"
        with pytest.raises(urllib.error.HTTPError, match="400") as refusal:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{server.management_url}/cores")
        assert json.loads(refusal.value.read())["type"] == "InvalidKeyException"
        refusal.value.close()


def archive_with_dependency(directory: Path) -> Path:
    """Return an archive that needs a wheel of its own, which no index has."""
    wheel = directory / "of_its_own-1.0-py3-none-any.whl"
    about = "of_its_own-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as parts:
        parts.writestr("of_its_own.py", 'ANSWER = "installed by pip"\n')
        parts.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: of-its-own\nVersion: 1.0\n")
        parts.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        parts.writestr(f"{about}/RECORD", "")
    (directory / "requirements.txt").write_text(f"--no-index\n{wheel}\n")
    handler = directory / "handler.py"
    handler.write_text(
        "def handle(data, context):\n    import of_its_own\n\n    return [of_its_own.ANSWER for _ in data or ()]\n"
    )
    words = ["--model-name", "dependent", "--version", "1.0", "--handler", str(handler)]
    words += ["--requirements-file", str(directory / "requirements.txt"), "--export-path", str(directory)]
    subprocess.run([Path(sys.executable).with_name("torch-model-archiver"), *words], check=True)
    return directory / "dependent.mar"


def test_typo_serves_unbound_and_says_so() -> None:
    with TorchServe(archives.facts(), properties={**PINNED, "cpu_launcher_args": "--node-idd 0"}) as server:
        (answer,) = facts(server).values()
        assert masks(answer) == {frozenset(os.sched_getaffinity(0))}
        assert server.cores()["unbound"][0]["pid"] == answer["pid"]
        assert "--node-idd" in server.cores()["unbound"][0]["reason"]
        (line,) = [line for line in server.log().splitlines() if "org.tscores" in line and "ERROR" in line]
        assert "--node-id" in line.replace("--node-idd", "")  # the nearest match


def with_launcher(directory: Path, first_line: str | None) -> dict[str, str]:
    """Put a launcher that does not run into ``directory``; return the environment in which it is the installed one."""
    launcher = directory / "ts-cores-python"
    launcher.write_text(f"{first_line or '#!/bin/sh'}\n")
    launcher.chmod(0o755 if first_line else 0o644)
    (directory / "ts_cores-0.dist-info").mkdir()
    (directory / "ts_cores-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: ts-cores\nVersion: 0\n")
    (directory / "ts_cores-0.dist-info" / "RECORD").write_text("ts-cores-python,,\n")
    here = str(FRONTEND.parent.parent)  # a distribution that is found before the one that is installed
    return {"PYTHONPATH": os.pathsep.join([str(directory), here])}


GONE = "#!/nowhere/bin/python"


@pytest.mark.parametrize(
    ("first_line", "reason"),
    [
        pytest.param(GONE, "is gone", id="interpreter-gone"),
        pytest.param("#!/bin/false", "exit status 1", id="does-not-run"),
        pytest.param("#!/bin/echo", "but TorchServe runs in", id="of-another-environment"),
        pytest.param(None, "Permission denied", id="not-executable"),
    ],
)
def test_what_a_launcher_is_refused_for(tmp_path: Path, first_line: str | None, reason: str) -> None:
    """As the hook asks, which shows the last line of what is said, and leaves workers to TorchServe if we fail.

    The environment was copied, its file system is mounted noexec, ...
    """
    environment = os.environ | with_launcher(tmp_path, first_line)
    command = [sys.executable, "-P", "-m", "ts_plugin.frontend.server", "takeover"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.splitlines()[-1]
    assert str(tmp_path / "ts-cores-python") in said
    assert reason in said


def test_relative_state_directory_serves_unbound_and_says_so() -> None:
    """Workers start in the directories of their models: each would take the path from there."""
    with TorchServe(archives.facts(), properties=PINNED, state_directory=Path("state")) as server:
        (answer,) = facts(server).values()
        assert masks(answer) == {frozenset(os.sched_getaffinity(0))}
        reason = "state: TS_CORES_STATE_DIR is relative"
        assert re.search(f"org.tscores.*{reason}.*; workers serve UNBOUND", server.log())
        assert re.search(f"worker 9000 serves UNBOUND: {reason}", server.log())
    environment = {**os.environ, "TS_CORES_STATE_DIR": "state"}
    command = [str(Path(sys.executable).with_name("ts-cores")), "show"]
    show = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert show.returncode == 1
    assert reason in show.stderr


def test_environment_without_package_serves_unbound_and_says_so(tmp_path: Path) -> None:
    """An interpreter with TorchServe and torch, but without ts-cores: borrowed packages bring no editable installs."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    site = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (site / "borrowed.pth").write_text(f"{hatch_build.find_model_server().parents[2]}\n")
    with TorchServe(archives.facts(), properties=PINNED, python=python) as server:
        assert_stock(server)
        (line,) = [line for line in server.log().splitlines() if "org.tscores" in line]
        assert f"pip install the checkout or a wheel of ts-cores into the environment of {python}" in line
        assert server.cores() == {"enabled": False, "slices": [], "unbound": []}


def test_a_state_directory_is_used_as_soon_as_it_can_be_and_made_again_when_it_was_deleted(tmp_path: Path) -> None:
    """At first it cannot be made, since a file is in its place: as when /dev/shm is full."""
    file, cpu = tmp_path / "a file", max(ALLOWED)
    file.touch()
    with TorchServe(
        archives.facts(),
        properties={**PINNED, "cpu_launcher_args": f"--core-list {cpu}"},
        state_directory=file / "state",
        environment=sitecustomize(tmp_path, "from ts_plugin.worker import late; late.PAUSE = 1.0"),
    ) as server:
        (unbound,) = facts(server).values()
        assert masks(unbound) == {frozenset(os.sched_getaffinity(0))}
        assert str(file) in server.cores()["unbound"][0]["reason"]
        assert str(file) in next(line for line in server.log().splitlines() if "org.tscores" in line)

        file.unlink()
        assert eventually(lambda: not server.cores()["unbound"], patience=60)  # the hook tries after 1 s, 2 s, 4 s, ...
        (bound,) = facts(server).values()
        assert bound["pid"] == unbound["pid"]
        assert masks(bound) == {frozenset({cpu})}
        assert bound["threads"] == 1
        (piece,) = server.cores()["slices"]
        assert (piece["pid"], piece["model"], piece["cpus"]) == (bound["pid"], "facts", [cpu])

        server.scale("facts", 0)  # now nobody but the frontend knows what its config.properties asks for
        assert eventually(lambda: not server.workers())
        shutil.rmtree(server.state_directory)
        server.scale("facts", 1)
        (again,) = facts(server).values()
        assert masks(again) == {frozenset({cpu})}
        assert_pinned(server)
