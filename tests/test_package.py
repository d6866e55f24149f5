"""The source distribution, the wheel that is built from it, and an environment with this wheel alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hatch_build
from benchmarks.harness import archives
from benchmarks.harness.server import TorchServe
from tests.eventually import eventually
from ts_plugin import __version__
from ts_plugin.trial.properties import Property

pytestmark = pytest.mark.process

JAR = "ts_plugin/frontend/ts-cores.jar"
BARE = re.compile(r"pip install (?:-\S+ )*[\"']?ts-cores\b")


def build(source: Path, out: Path, target: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build ``source`` as pip does, but with the hatchling and the torchserve of this environment."""
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def built(source: Path, out: Path, target: str) -> Path:
    done = build(source, out, target)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="session")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(checkout, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a release has it: built from the source distribution, which has all that it needs."""
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on; without it, 3.12 warns
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(source)
    (unpacked,) = source.iterdir()
    return built(unpacked, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel. What it depends on is borrowed: torch alone is gigabytes.

    The path to the borrowed packages comes last, and brings no editable installation of this checkout.
    """
    root = tmp_path_factory.mktemp("environment")
    python = root / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--python", str(python), str(wheel)],
        check=True,
    )
    (site,) = root.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{hatch_build.find_model_server().parents[2]}\n")
    return python


def command(python: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python.parent / words[0], *words[1:]],
        cwd=python.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_without_a_jdk_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    done = build(checkout, tmp_path, "wheel", PATH=str(tmp_path), JAVA_HOME="")
    assert done.returncode == 1
    assert "default-jdk-headless" in done.stderr
    assert "Traceback" not in done.stderr


LIBRARY = f"ts_plugin/lending/regions-{os.uname().machine}.so"
needs_library = pytest.mark.skipif(
    os.uname().machine not in hatch_build.PROCESSORS, reason="nobody lends cores on this processor"
)


@needs_library
def test_a_wheel_is_built_without_a_c_compiler_too(checkout: Path, tmp_path: Path) -> None:
    """pip and uv install ziglang then; without that the wheel lends nothing, and the build says so."""
    elsewhere = {"PATH": str(tmp_path), "JAVA_HOME": str(Path(hatch_build.find_javac()).resolve().parents[1])}
    asked = "from hatchling.build import get_requires_for_build_wheel as asked; print(asked())"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=checkout, env=os.environ | elsewhere, capture_output=True, text=True
    )
    assert "ziglang" in done.stdout, done.stderr
    done = build(checkout, tmp_path / "wheel", "wheel", **elsewhere)
    assert done.returncode == 0, done.stderr
    assert "built without lending" in done.stderr + done.stdout
    (file,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(file) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_source_distribution_has_what_a_wheel_is_made_of(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {
        "LICENSE",
        "hatch_build.py",
        "handlers/slices.py",
        "ts_plugin/bin/ts-cores-python",
        "ts_plugin/frontend/java/org/tscores/CoresEndpoint.java",
        "ts_plugin/handlers/slices.py",
        "ts_plugin/lending/regions.c",
    } <= names


def test_wheel_has_what_it_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"ts_cores-{__version__}.dist-info/METADATA").decode()
    assert {JAR, "ts_plugin/frontend/server.py", "ts_plugin/view/page.html", "ts_plugin/handlers/slices.py"} <= names
    assert f"ts_cores-{__version__}.dist-info/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert not [name for name in names if name.endswith((".java", ".pyc", ".c"))]
    assert (LIBRARY in names) == (os.uname().machine in hatch_build.PROCESSORS)
    assert {name.partition("/")[0].removeprefix(f"ts_cores-{__version__}") for name in names} == {
        "ts_plugin",
        "handlers",
        ".data",
        ".dist-info",
    }


def test_installed_commands(installed: Path) -> None:
    assert command(installed, "ts-cores", "--version") == f"ts-cores {__version__}\n"
    plugins = Path(command(installed, "ts-cores", "plugin-path").strip())
    assert plugins.is_relative_to(installed.parents[1])
    assert (plugins / "ts-cores.jar").is_file()
    # The launcher passes through what is no worker.
    show = "import os, sys; print(os.getpid(), sys.prefix, sys.argv[1:])"
    with subprocess.Popen(
        [installed.parent / "ts-cores-python", "-I", "-c", show, "--option", "a b"], stdout=subprocess.PIPE, text=True
    ) as launched:
        assert launched.stdout is not None
        assert launched.stdout.read() == f"{launched.pid} {installed.parents[1]} ['--option', 'a b']\n"


def test_both_import_paths_lead_to_the_same_handlers(installed: Path) -> None:
    program = (
        "import sys, types; base = sys.modules['ts.torch_handler.base_handler'] = types.ModuleType('base_handler');"
        "base.BaseHandler = object;"  # the real one takes seconds to import torch
        "import handlers, ts_plugin.handlers as ours; from handlers import CoreSliceMixin;"
        "print(CoreSliceMixin is ours.CoreSliceMixin, ours.__file__)"
    )
    same, path = command(installed, "python", "-c", program).split()
    assert same == "True"
    assert Path(path).is_relative_to(installed.parents[1])


@pytest.mark.server
def test_a_server_with_the_installed_wheel_is_pinned(installed: Path, tmp_path: Path) -> None:
    """Its archive has a module named handlers, which must not hide ours."""
    archive = tmp_path / "facts.mar"
    shutil.copyfile(archives.facts(handler=archives.Handler.OURS), archive)
    with zipfile.ZipFile(archive, "a") as parts:
        parts.writestr("handlers.py", "raise ImportError('the module of the archive')\n")
    properties: dict[str, Property] = {
        "plugins_path": command(installed, "ts-cores", "plugin-path").strip(),
        "cpu_launcher_enable": True,
    }
    with TorchServe(archive, workers=2, properties=properties, python=installed) as server:
        assert eventually(lambda: len(server.cores()["slices"]) == 2)
        cores = server.cores()
        assert cores["unbound"] == []
        workers = server.workers()
        assert {piece["pid"] for piece in cores["slices"]} == set(workers)
        for piece in cores["slices"]:
            assert workers[piece["pid"]][1].startswith(str(installed.parents[1])), "a worker of this checkout"
            assert sorted(os.sched_getaffinity(piece["pid"])) == piece["cpus"]


def test_nobody_is_told_to_install_a_name_that_is_not_published(checkout: Path) -> None:
    """Somebody else could register it. A file or a checkout is what it says it is."""
    places = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "dev", "hatch_build.py"]
    files = [checkout / name for name in places]
    for directory in ("docs", "config", "ts_plugin", "handlers", "benchmarks"):
        files += [
            path
            for path in (checkout / directory).rglob("*")
            if path.suffix in ("", ".md", ".py", ".java", ".yaml", ".html", ".properties") and path.is_file()
        ]
    assert len(files) > 60
    assert BARE.search("pip install --no-deps ts-cores")
    for path in files:
        assert not BARE.search(path.read_text(encoding="utf-8")), path


def test_workflows_and_hooks_run_what_exists(checkout: Path) -> None:
    hooks = yaml.safe_load((checkout / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}, "nothing is fetched from elsewhere"
    for hook in hooks["repos"][0]["hooks"]:
        assert (checkout / hook["entry"].split()[0]).is_file()
    for name in ("test", "release"):
        workflow = yaml.safe_load((checkout / ".github" / "workflows" / f"{name}.yaml").read_text(encoding="utf-8"))
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        scripts = re.findall(r"(?:\./|\.ci/)\w+", "\n".join(step.get("run", "") for step in steps))
        assert scripts
        assert all((checkout / script).is_file() for script in scripts), scripts


def test_the_files_of_changes_become_a_section_of_the_changelog(checkout: Path, tmp_path: Path) -> None:
    for name in ("dev", "CHANGELOG.md"):
        shutil.copy(checkout / name, tmp_path)
    old = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    (tmp_path / "changes").mkdir()
    for name in ("b", "a"):
        (tmp_path / "changes" / f"{name}.md").write_text(f"- What {name} is about.\n")
    command = [str(tmp_path / "dev"), "changelog", "9.9.9"]
    subprocess.run(command, check=True)
    head, section, rest = (
        (tmp_path / "CHANGELOG.md")
        .read_text(encoding="utf-8")
        .partition("## 9.9.9\n\n- What a is about.\n- What b is about.\n\n")
    )
    assert section
    assert head + rest == old
    assert not (tmp_path / "changes").exists(), "the release workflow checks that"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "no fragment" in again.stderr
