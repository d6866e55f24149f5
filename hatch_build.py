"""Builds ts_plugin/frontend/ts-cores.jar, the frontend hook, while the wheel (or editable install) is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

JAVA_RELEASE = "11"  # the oldest that TorchServe 0.12 runs on; a class that is newer than the JVM ends the server


class JarError(RuntimeError):
    """The jar cannot be built; the message says what to install."""


class JarBuildHook(BuildHookInterface[Any]):
    """The custom build hook of hatchling that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the Java source and put the jar into the wheel, although git ignores it."""
        frontend = Path(self.root) / "ts_plugin" / "frontend"
        jar = frontend / "ts-cores.jar"
        try:
            build_jar(find_javac(), find_model_server(), frontend / "java", jar)
        except JarError as error:
            self.app.abort(f"ts-cores: {error}")
        build_data["artifacts"].append(str(jar.relative_to(self.root)))


def find_javac() -> str:
    """Return the Java compiler: JAVA_HOME's, else the one on PATH.

    Raises:
        JarError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    javac = (home and shutil.which("javac", path=f"{home}/bin")) or shutil.which("javac")
    if not javac:
        raise JarError(
            "no Java compiler: neither $JAVA_HOME/bin/javac nor javac on PATH. Install a JDK, "
            f"release {JAVA_RELEASE} or newer (Debian, Ubuntu: apt-get install default-jdk-headless), "
            "or set JAVA_HOME to one."
        )
    return javac


def find_model_server() -> Path:
    """Return the model-server.jar of the torchserve in this environment.

    Raises:
        JarError: there is none.
    """
    spec = find_spec("ts")
    for location in (spec and spec.submodule_search_locations) or ():
        jar = Path(location) / "frontend" / "model-server.jar"
        if jar.is_file():
            return jar
    raise JarError(
        "no torchserve to compile against. Build with isolation (the default of pip and uv), or first "
        "pip install 'torchserve==0.12.*'."
    )


def build_jar(javac: str, server: Path, source: Path, jar: Path) -> None:
    """Compile ``source`` against ``server`` into ``jar``: the same bytes from the same source and compiler.

    Raises:
        JarError: the compiler refused.
    """
    with tempfile.TemporaryDirectory() as directory:
        classes = Path(directory)
        # -proc:none: model-server.jar carries annotation processors that are none of our business.
        options = ["--release", JAVA_RELEASE, "-Xlint:all", "-proc:none", "-cp", str(server), "-d", directory]
        files = sorted(str(file) for file in source.rglob("*.java"))
        done = subprocess.run([javac, *options, *files], capture_output=True, text=True, check=False)
        if done.returncode:
            raise JarError(f"{javac}: exit status {done.returncode}\n{done.stderr}")
        shutil.copytree(source / "META-INF", classes / "META-INF")
        fresh = jar.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in classes.rglob("*") if path.is_file()):
                archive.writestr(zipfile.ZipInfo(file.relative_to(classes).as_posix()), file.read_bytes())
        fresh.replace(jar)  # whole or not at all: a server may be starting from the old one
