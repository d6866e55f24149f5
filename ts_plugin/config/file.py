"""A config.properties as TorchServe reads it.

It is read twice. The command ``torchserve``, in Python, takes the plug-in and the model store from it before it starts
the Java frontend; that one reads it again, by the rules of ``java.util.Properties``, and the TS_* variables with it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import javaproperties

from ts_plugin.config.gson import java_int
from ts_plugin.config.properties import VARIABLES, on
from ts_plugin.errors import CommandError, InputError
from ts_plugin.ledger.unbound import JAR

PLUGIN = Path(__file__).resolve().parents[1] / "frontend"  # for plugins_path

OF_THE_COMMAND = ("plugins_path", "model_store", "vmargs")  # the Python side reads these, the Java side does not
BOM = "\u00ef\u00bb\u00bf"  # UTF-8's byte order mark as Java sees it
DATED = re.compile(r"\d{17}")  # 20261128170405123-startup.cfg
VARIABLE = re.compile(r"\$\$([^$]+[^$])\$\$")


def built_plugin() -> Path:
    """Return the directory for plugins_path.

    Raises:
        CommandError: the plug-in's jar was not built.
    """
    if not (PLUGIN / JAR).is_file():
        remedy = "build it with a JDK, 11 or newer: pip install . in the checkout"
        raise CommandError(f"{PLUGIN}/{JAR}: not there; {remedy}")
    return PLUGIN


@dataclass(frozen=True, slots=True)
class Config:
    """The properties that TorchServe finds.

    ``errors`` say why it would not start with this file or would not find a line of it, ``variables`` which TS_*
    variables go before it.
    """

    path: Path
    properties: Mapping[str, str]
    errors: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()

    def get(self, name: str, default: str = "") -> str:
        return self.properties.get(name, default)

    def on(self, name: str) -> bool:
        """Tell whether a switch is on."""
        return on(self.properties, name)


def default_config() -> Path | None:
    """Return the file that a torchserve started here without --ts-config goes by, if there is one.

    TS_CONFIG_FILE wins, over --ts-config too; then the newest snapshot; then config.properties.
    Source: org.pytorch.serve.util.ConfigManager (its constructor); tests/test_verdict.py asks it.

    Raises:
        InputError: TorchServe ends at a file that lies among its snapshots.
    """
    named = os.environ.get("TS_CONFIG_FILE")
    if named is not None:
        return Path(named) if named else None
    path = _newest_snapshot() or Path("config.properties")
    return path if path.is_file() else None


def _newest_snapshot() -> Path | None:
    """Return what has the latest date in its name. Source: FSSnapshotSerializer (getLastSnapshot, getSnapshotTime)."""
    directory = Path(f"{os.environ.get('LOG_LOCATION', 'logs')}/config")
    files = sorted(file for file in directory.iterdir() if not file.is_dir()) if directory.is_dir() else []
    for file in files if len(files) > 1 else ():
        if not DATED.match(file.name):
            raise InputError(
                f"{file}: its name begins with no date as those of snapshots do, so a torchserve started here without "
                f"--ts-config ends with a NullPointerException; move the file elsewhere"
            )
    return max(files, key=lambda file: file.name[:17], default=None)


def read_config(path: Path, environment: Mapping[str, str]) -> Config:
    """Return what TorchServe makes of the file at ``path``.

    Raises:
        OSError: it cannot be read.
    """
    return parse_config(path, path.read_bytes(), environment)


def parse_config(path: Path, content: bytes, environment: Mapping[str, str]) -> Config:
    """Return what TorchServe makes of ``content``: TS_* variables win over it if enable_envvars_config says so.

    Source: ts/model_server.py (start, load_properties); org.pytorch.serve.util.ConfigManager (resolveEnvVarVals,
        setSystemVars).
    """
    errors = []
    try:
        properties = dict(javaproperties.load(io.BytesIO(content)))
    except javaproperties.InvalidUEscapeError as error:
        properties = {}
        errors.append(f"{error}; a backslash is written as \\\\")
    first = next(iter(properties), "")
    if first.startswith(BOM) and first[len(BOM) :][:1] not in ("#", "!", ""):
        errors.append(f"a byte order mark hides {first[len(BOM) :]}; save the file as UTF-8 without one")
    for name, value in properties.items():
        unset = [variable for variable in VARIABLE.findall(value) if variable not in environment]
        errors += [f"{name}: the variable {variable} is not set; export {variable}=..." for variable in unset]
        properties[name] = VARIABLE.sub(lambda match: environment.get(match[1], match[0]), value)
    variables = environment.keys() & VARIABLES.keys() if on(properties, "enable_envvars_config") else set()
    variables -= {f"TS_{name.upper()}" for name in OF_THE_COMMAND}
    if not on(properties, "use_env_allowed_urls"):
        variables.discard("TS_ALLOWED_URLS")
    gpus = properties.get("number_of_gpu", "0")
    if "TS_NUMBER_OF_GPU" in variables and java_int(gpus) is None:  # the file's own is read before the variable's
        errors.append(f"number_of_gpu={gpus!r} is no whole number that Java reads")
    try:
        seen = _as_the_command_reads(content.decode())
    except UnicodeDecodeError as error:
        errors.append(f"byte {error.start} is not UTF-8, and the command torchserve stops; write \\u00e9 for é, say")
        seen = {}
    else:
        errors += [
            f"the command torchserve does not find {name}; write {name}={properties[name]} in one line, without escapes"
            for name in OF_THE_COMMAND
            if name in properties and name not in seen
        ]
    properties |= {VARIABLES[name]: environment[name] for name in variables}
    for name in OF_THE_COMMAND:
        if name in seen:
            properties[name] = seen[name]
        else:
            properties.pop(name, None)
    return Config(path, properties, tuple(errors), tuple(sorted(variables)))


def _as_the_command_reads(text: str) -> dict[str, str]:
    lines = (line.strip() for line in io.StringIO(text, newline=None))
    pairs = (line.partition("=") for line in lines if not line.startswith("#"))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}
