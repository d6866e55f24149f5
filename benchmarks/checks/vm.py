"""The launcher on machines that this one is not: QEMU guests with sockets, SMT siblings, NUMA nodes and cgroups.

``./dev vm`` boots each guest of GUESTS and runs the other half of this file in it: real launchers start
stand-in workers (no torch: the guests are emulated), and what the kernel says of their masks, their memory policy and
the nodes of their pages is held against ``ts-cores plan``. Needs the ``vm`` script of the directory ``../shared``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import CHECKOUT

VM = CHECKOUT.parent / "shared" / "vm"
LAUNCHER = Path(sys.executable).with_name("ts-cores-python")
MEBIBYTES = 16

GUESTS: dict[str, list[str]] = {
    "2 sockets, siblings adjacent": [],
    "2 sockets, siblings split": ["--numbering", "split"],
    "4 NUMA nodes": ["--cores", "4", "--threads", "1", "--nodes", "4"],
    "CPUs 3 and 5 offline": ["--offline", "3,5"],
    "cpuset 2-5": ["--cpuset", "2-5"],
    "cpuset 0-3 with memory of node 1": ["--cpuset", "0-3", "--mems", "1"],
}

SCRIPT = f"""
import json, sys, time
memory = bytearray({MEBIBYTES} << 20)
memory[::4096] = b"x" * len(memory[::4096])
print("ready", flush=True)
sys.stdin.read()
"""


class StandIn:
    """A stand-in for TorchServe's worker script, started through the real launcher."""

    def __init__(self, directory: Path, number: int) -> None:
        script = directory / "ts" / "model_service_worker.py"
        script.parent.mkdir(exist_ok=True)
        script.write_text(SCRIPT)
        manifest = directory / "MAR-INF" / "MANIFEST.json"
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text('{"model": {"modelName": "stand-in"}}')
        self.process = subprocess.Popen(
            [str(LAUNCHER), str(script), "--sock-type", "unix", "--sock-name", f"/x/.ts.sock.{9000 + number}"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                break
            self.log.append(line.strip())

    def masks(self) -> set[str]:
        return {
            line.split()[1]
            for task in Path(f"/proc/{self.process.pid}/task").iterdir()
            for line in (task / "status").read_text().splitlines()
            if line.startswith("Cpus_allowed_list:")
        }

    def memory(self) -> tuple[str, dict[int, int]]:
        """Return the policy and the pages per node of the large block."""
        best: tuple[int, str, dict[int, int]] = (0, "", {})
        for line in Path(f"/proc/{self.process.pid}/numa_maps").read_text().splitlines():
            words = line.split()
            pages = {int(w[1 : w.index("=")]): int(w[w.index("=") + 1 :]) for w in words if w[0] == "N" and "=" in w}
            best = max(best, (sum(pages.values()), words[1], pages), key=lambda item: item[0])
        return best[1], best[2]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def guest() -> int:
    """Run inside a guest; print what was seen and return 1 if any of it is not what the plan says."""
    from ts_plugin.ledger.file import Ledger
    from ts_plugin.machine.cpulist import format_cpulist

    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TS_CORES_STATE_DIR"] = f"{scratch}/state"
        workers: list[StandIn] = []
        for number in range(3):
            workers.append(StandIn(Path(scratch), number))
            plan = planned(len(workers))
            expected = sorted(format_cpulist(entry["cpus"]) for entry in plan["workers"])
            check = settled(workers, expected)
            report(len(workers), workers, Ledger().read(), problems, expected, check)
        print(f"  SIGKILL of pid {workers[0].process.pid}")
        workers.pop(0).kill()
        expected = sorted(format_cpulist(entry["cpus"]) for entry in planned(2)["workers"])
        report(2, workers, Ledger().read(), problems, expected, settled(workers, expected))
        for worker in workers:
            worker.kill()
    for problem in problems:
        print(f"  WRONG: {problem}")
    return 1 if problems else 0


def planned(workers: int) -> dict[str, Any]:
    command = [str(LAUNCHER.with_name("ts-cores")), "plan", "--workers", str(workers), "--json"]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def settled(workers: list[StandIn], expected: list[str]) -> Callable[[], bool]:
    return lambda: sorted(mask for worker in workers for mask in worker.masks()) == expected


def report(
    count: int, workers: list[StandIn], state: Any, problems: list[str], expected: list[str], check: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + 60  # emulated CPUs: seconds here are not seconds there
    while not check() and time.monotonic() < deadline:
        time.sleep(0.5)
    print(f"  plan for {count}: {'  '.join(expected)}")
    if not check():
        problems.append(f"{count} workers: masks {[sorted(worker.masks()) for worker in workers]}, plan {expected}")
    for worker in workers:
        lease = state.lease_of(worker.process.pid)
        policy, pages = worker.memory()
        print(f"    pid {worker.process.pid}: CPUs {', '.join(sorted(worker.masks()))}, {policy}, pages {pages}")
        if lease is None:
            problems.append(f"pid {worker.process.pid} has no lease: {worker.log}")
        elif len(lease.slice.numa_nodes) == 1 and lease.slice.numa_nodes[0] in pages:
            remote = sum(count for node, count in pages.items() if node not in lease.slice.numa_nodes)
            if remote > sum(pages.values()) // 10:
                problems.append(f"pid {worker.process.pid} on node {lease.slice.numa_nodes}: pages {pages}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev vm", description=__doc__)
    parser.add_argument("--guest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", metavar="TEXT", default="", help="boot only the guests whose name contains TEXT")
    options = parser.parse_args()
    if options.guest:
        return guest()
    if not VM.exists():
        sys.exit(f"{VM} not found: this check boots its guests with it")
    failed = []
    for name, arguments in GUESTS.items():
        if options.only not in name:
            continue
        print(f"{name}: {' '.join(arguments) or '2 sockets x 2 cores x 2 threads'}", flush=True)
        command = [str(VM), *arguments, "--mem", "3G", "--", sys.executable, "-m", "benchmarks.checks.vm", "--guest"]
        if subprocess.run(command, cwd=CHECKOUT, check=False).returncode:
            failed.append(name)
    print(f"{len(failed)} of the guests failed{': ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
