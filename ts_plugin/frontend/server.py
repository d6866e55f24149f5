"""What the Java hook asks: `python -P -m ts_plugin.frontend.server takeover|cores`. All policy is on this side."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from typing import Any

from ts_plugin.leases import coordinator
from ts_plugin.leases.ledger import Ledger, LedgerError, Server
from ts_plugin.machine import discovery, process
from ts_plugin.operate.core_map import core_map
from ts_plugin.planning.policy import LauncherArgsError, Policy, parse_launcher_args

__all__ = ["main", "take_over"]

LAUNCHER = "ts-cores-python"


def main(arguments: list[str]) -> int:
    """Answer the frontend that is this process's parent: one JSON document, or one page, on stdout."""
    command, *options = arguments or [""]
    server_pid = os.getppid()
    if command == "takeover":
        text = next((option.partition("=")[2] for option in options if option.startswith("--launcher-args=")), "")
        answer = take_over(Ledger(), server_pid, text)
    elif command == "cores" and "--html" in options:
        from ts_plugin.operate import view
        from ts_plugin.operate.html import html

        sys.stdout.buffer.write(html(view.current_view(server_pid), ticks=view.ticks()).encode())
        return 0
    elif command == "cores":
        answer = {"enabled": "--enabled" in options, **core_map(Ledger().read(), server_pid=server_pid)}
    else:
        print("usage: python -m ts_plugin.frontend.server takeover [--launcher-args=TEXT]", file=sys.stderr)
        print("       python -m ts_plugin.frontend.server cores [--enabled] [--html]", file=sys.stderr)
        return 2
    print(json.dumps(answer))
    return 0


def take_over(ledger: Ledger, server_pid: int, launcher_args: str) -> dict[str, Any]:
    """Enter a frontend into the ledger; return the launcher's path and the warnings that its log should show.

    A mistake in ``launcher_args`` is entered too: the workers then serve unbound and name it.

    Raises:
        FileNotFoundError: the launcher is not installed beside this package.
    """
    warnings = []
    policy, error = Policy(), None
    try:
        policy = parse_launcher_args(launcher_args)
        warnings += [f"cpu_launcher_args: {note}" for note in policy.notes]
    except LauncherArgsError as problem:
        error = f"cpu_launcher_args: {problem}"
        warnings.append(f"{error}; workers serve UNBOUND")
    try:
        identity = process.identify(server_pid)
        allowance = discovery.read_allowance(affinity=os.sched_getaffinity(server_pid))
        warnings += [*discovery.read_topology().notes, *allowance.notes]
        if identity is not None:
            coordinator.enlist(ledger, Server(server_pid, identity.start_time, policy, allowance.cpus, error))
    except OSError as problem:
        warnings.append(f"{problem}; workers serve UNBOUND")
    return {"python": _launcher_path(), "warnings": warnings}


def _launcher_path() -> str:
    """Return where the installer put the launcher: it need not be beside the interpreter (Debian, --user)."""
    for file in metadata.files("ts-cores") or ():
        if file.name == LAUNCHER:
            return os.path.realpath(str(file.locate()))
    raise FileNotFoundError(f"{LAUNCHER} is not installed for {sys.executable}; pip install ts-cores there")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (LedgerError, FileNotFoundError) as error:
        sys.exit(f"ts-cores: {error}")
