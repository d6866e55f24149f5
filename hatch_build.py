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

JAVA_RELEASE = "17"  # what TorchServe 0.12 requires
NO_JAVAC = """\
ts-cores: no Java compiler: neither $JAVA_HOME/bin/javac nor javac on PATH.
Install a JDK {release} or newer (Debian, Ubuntu: apt-get install openjdk-17-jdk-headless), or set JAVA_HOME to one."""
NO_TORCHSERVE = """\
ts-cores: model-server.jar is not there to compile against. The build needs torchserve 0.12 beside hatchling:
build with isolation (the default of pip and uv), or first pip install 'torchserve==0.12.*'."""


class JarBuildHook(BuildHookInterface):  # type: ignore[misc]  # hatchling has no types here
    """The custom build hook of hatchling that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the Java source and put the jar into the wheel, although git ignores it."""
        frontend = Path(self.root) / "ts_plugin" / "frontend"
        jar = frontend / "ts-cores.jar"
        javac = find_javac()
        if javac is None:
            self.app.abort(NO_JAVAC.format(release=JAVA_RELEASE))
        server = find_model_server()
        if server is None:
            self.app.abort(NO_TORCHSERVE)
        try:
            build_jar(javac, server, frontend / "java", jar)
        except subprocess.CalledProcessError as error:
            self.app.abort(f"ts-cores: {javac}: exit status {error.returncode}\n{error.stderr}")
        build_data["artifacts"].append(str(jar.relative_to(self.root)))


def find_javac() -> str | None:
    """Return the Java compiler: JAVA_HOME's, else the one on PATH, else None."""
    home = os.environ.get("JAVA_HOME")
    return (home and shutil.which("javac", path=f"{home}/bin")) or shutil.which("javac")


def find_model_server() -> Path | None:
    """Return the model-server.jar of the torchserve in this environment."""
    spec = find_spec("ts")
    for location in (spec and spec.submodule_search_locations) or ():
        jar = Path(location) / "frontend" / "model-server.jar"
        if jar.is_file():
            return jar
    return None


def build_jar(javac: str, server: Path, source: Path, jar: Path) -> None:
    """Compile ``source`` against ``server`` into ``jar``: the same bytes from the same source and compiler.

    Raises:
        subprocess.CalledProcessError: the compiler refused; its messages are in ``stderr``.
    """
    with tempfile.TemporaryDirectory() as directory:
        classes = Path(directory)
        # -proc:none: model-server.jar carries annotation processors that are none of our business.
        options = ["--release", JAVA_RELEASE, "-Xlint:all", "-proc:none", "-cp", str(server), "-d", str(classes)]
        files = sorted(str(file) for file in source.rglob("*.java"))
        subprocess.run([javac, *options, *files], check=True, capture_output=True, text=True)
        shutil.copytree(source / "META-INF", classes / "META-INF")
        # Whole or not at all: a server may be starting from the old jar.
        fresh = jar.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in classes.rglob("*") if path.is_file()):
                archive.writestr(zipfile.ZipInfo(file.relative_to(classes).as_posix()), file.read_bytes())
        fresh.replace(jar)
