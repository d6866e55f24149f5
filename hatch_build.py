"""Builds what is compiled while the wheel (or editable install) is built: the frontend hook and the lending library.

The library is built by the C compiler of the machine, for its processor. Where there is none, or with
TS_CORES_COMPILER=zig, as for a wheel that is published, it is built by ziglang from PyPI for x86-64 and aarch64.
A wheel without it is a good one, too: its workers lend no cores, and `ts-cores doctor` says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

JAVA_RELEASE = "11"  # the oldest that TorchServe 0.12 runs on; a class that is newer than the JVM ends the server


PROCESSORS = ("x86_64", "aarch64")  # that regions.c knows
LIBRARY_OPTIONS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-s")
OLDEST_GLIBC = "2.17"  # for what zig builds: that of torch's own wheels, or older


class JarError(RuntimeError):
    """The jar cannot be built; the message says what to install."""


class CompiledBuildHook(BuildHookInterface[Any]):
    """The custom build hook of hatchling that pyproject.toml names."""

    def dependencies(self) -> list[str]:
        """Return what has to be installed before ``initialize`` is called."""
        return ["ziglang>=0.13"] if os.uname().machine in PROCESSORS and find_cc() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the sources and put the results into the wheel, although git ignores them."""
        frontend = Path(self.root) / "ts_plugin" / "frontend"
        jar = frontend / "ts-cores.jar"
        try:
            build_jar(find_javac(), find_model_server(), frontend / "java", jar)
        except JarError as error:
            self.app.abort(f"ts-cores: {error}")
        build_data["artifacts"].append(str(jar.relative_to(self.root)))
        libraries, complaint = build_libraries(Path(self.root) / "ts_plugin" / "lending" / "regions.c")
        if complaint:
            self.app.display_warning(f"ts-cores: built without lending: {complaint}")
        build_data["artifacts"] += [str(library.relative_to(self.root)) for library in libraries]


def find_cc() -> str | None:
    """Return the C compiler, or None where zig is to be used."""
    return None if os.environ.get("TS_CORES_COMPILER") == "zig" else shutil.which("cc") or shutil.which("gcc")


def build_libraries(source: Path) -> tuple[list[Path], str]:
    """Compile ``source`` into regions-PROCESSOR.so beside it; return the files, and a complaint if one is missing."""
    cc, machine = find_cc(), os.uname().machine
    commands: dict[str, list[str]] = {}
    if cc is not None and machine in PROCESSORS:
        commands = {machine: [cc]}
    elif find_spec("ziglang"):
        zig = [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=undefined", "-target"]
        commands = {processor: [*zig, f"{processor}-linux-gnu.{OLDEST_GLIBC}"] for processor in PROCESSORS}
    built, complaint = [], "" if commands else f"no C compiler for {machine}: neither cc on PATH nor ziglang"
    for processor, command in commands.items():
        library = source.with_name(f"regions-{processor}.so")
        fresh = library.with_suffix(f".{os.getpid()}")
        options = [*LIBRARY_OPTIONS, "-o", str(fresh), str(source), "-ldl", "-lpthread"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            complaint = f"{command[0]}: exit status {done.returncode}\n{done.stderr}"
            continue
        fresh.replace(library)  # whole or not at all: a worker may be starting with the old one
        built.append(library)
    return built, complaint


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
