"""What the Java hook asks: `python -P -m ts_plugin.frontend.server takeover|register|cores`. All policy is here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

from ts_plugin.ledger import registration
from ts_plugin.ledger.directory import LedgerError
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Server
from ts_plugin.lending import words
from ts_plugin.machine import cpu_time, discovery, process
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.planning.policy import LauncherArgsError, Policy, parse_launcher_args
from ts_plugin.view.core_map import core_map

LAUNCHER = "ts-cores-python"
LAUNCHER_SECONDS = 10  # a Python starts in a tenth of a second


class LauncherError(RuntimeError):
    """Workers cannot be started through the launcher; the message says why, and the remedy."""


def main(arguments: list[str]) -> int:
    """Answer the frontend that is this process's parent: one JSON document, or one page, on stdout."""
    command, *options = arguments or [""]
    values = {name: value for name, _, value in (option.partition("=") for option in options)}
    text = values.get("--launcher-args", "")
    server_pid = os.getppid()
    if command == "takeover":
        answer = take_over(Ledger(), server_pid, text)
    elif command == "register":
        limit = parse_cpulist(values["--limit"]) if "--limit" in values else None
        register(Ledger(), server_pid, text, limit)
        answer = {}
    elif command == "cores" and "--html" in options:
        from ts_plugin.view import view
        from ts_plugin.view.html import html

        sys.stdout.buffer.write(html(view.current_view(server_pid), ticks=cpu_time.ticks()).encode())
        return 0
    elif command == "cores":
        ledger = Ledger()
        state = ledger.read()
        answer = {
            "enabled": "--enabled" in options,
            **core_map(state, words.look(ledger), server_pid=server_pid),
        }
    else:
        print("usage: python -m ts_plugin.frontend.server takeover [--launcher-args=TEXT]", file=sys.stderr)
        print(
            "       python -m ts_plugin.frontend.server register [--limit=CPUS] [--launcher-args=TEXT]", file=sys.stderr
        )
        print("       python -m ts_plugin.frontend.server cores [--enabled] [--html]", file=sys.stderr)
        return 2
    print(json.dumps(answer))
    return 0


def take_over(ledger: Ledger, server_pid: int, launcher_args: str) -> dict[str, Any]:
    """Enter a frontend into the ledger, and return what its hook has to know.

    "python" is the launcher's path, "warnings" are for the server's log. "mark", if any, is a file that is there while
    the frontend is in the ledger, "register" the arguments that enter it again: with the mask that holds it back now,
    since it may be moved aside later. A mistake in ``launcher_args`` is entered too: workers then serve unbound and
    name it.

    Raises:
        LauncherError: the launcher is not installed beside this package, or does not run here.
    """
    launcher = _launcher_path()
    _try_launcher(launcher)
    bounds = discovery.read_bounds()
    limit = bounds.limit(discovery.read_mask(server_pid))
    warnings = [*discovery.read_topology().notes, *bounds.within(limit).notes]
    try:
        warnings += register(ledger, server_pid, launcher_args, limit)
    except OSError as problem:
        warnings.append(f"{problem}; workers serve UNBOUND")
    again = ["register", f"--launcher-args={launcher_args}"]
    again += [] if limit is None else [f"--limit={format_cpulist(limit)}"]
    answer: dict[str, Any] = {"python": launcher, "warnings": warnings, "register": again}
    with contextlib.suppress(LedgerError):  # a relative TS_CORES_STATE_DIR: no place where the mark could be
        answer["mark"] = registration.mark(ledger, server_pid)
    return answer


def register(ledger: Ledger, server_pid: int, launcher_args: str, limit: frozenset[int] | None) -> list[str]:
    """Enter a frontend, which ``limit`` holds back from other CPUs, into the ledger.

    Return what its log should show of ``launcher_args``.

    Raises:
        LedgerError: the ledger cannot be used. OSError: the frontend's mark cannot be made.
    """
    policy, error = Policy(), None
    try:
        policy = parse_launcher_args(launcher_args)
        notes = [f"cpu_launcher_args: {note}" for note in policy.notes]
    except LauncherArgsError as problem:
        error = f"cpu_launcher_args: {problem}"
        notes = [f"{error}; workers serve UNBOUND"]
    identity = process.identify(server_pid)
    if identity is not None:
        allowed = discovery.read_bounds().within(limit).cpus
        registration.register(ledger, Server(server_pid, identity.start_time, policy, allowed, error, limit))
    return notes


def _launcher_path() -> str:
    """Return where the installer put the launcher: it need not be beside the interpreter (Debian, --user)."""
    for file in metadata.files("ts-cores") or ():
        if file.name == LAUNCHER:
            return os.path.realpath(str(file.locate()))
    raise LauncherError(f"{LAUNCHER} is not installed for {sys.executable}; {_remedy()}")


def _try_launcher(launcher: str) -> None:
    """Start an interpreter through the launcher, as TorchServe will: it must run, in this environment.

    An environment that was copied or renamed has a launcher whose first line names the old one.
    """
    command = [launcher, "-I", "-c", "import sys; print(sys.prefix)"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LAUNCHER_SECONDS, check=False
        )
    except FileNotFoundError:
        raise LauncherError(f"{launcher}: the interpreter that its first line names is gone; {_remedy()}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LauncherError(f"{launcher} does not run: {error}; {_remedy()}") from error
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LauncherError(f"{launcher} does not run: exit status {done.returncode}: {complaint}; {_remedy()}")
    prefix = done.stdout.strip()
    if os.path.realpath(prefix) != os.path.realpath(sys.prefix):
        raise LauncherError(f"{launcher} starts workers in {prefix}, but TorchServe runs in {sys.prefix}; {_remedy()}")


def _remedy() -> str:
    return f"{sys.executable} -m pip install --force-reinstall PATH, the checkout or a wheel of ts-cores"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, LauncherError) as error:
        sys.exit(f"ts-cores: {error}")
