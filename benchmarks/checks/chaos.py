"""Chaos: random scaling, registering, SIGKILL and load on real servers, watched from /proc.

``./dev chaos --minutes 10``. Two TorchServe servers share one ledger. A watcher, which shares no code with ts_plugin,
reads the affinity masks of all threads of all workers from /proc ten times a second. Whatever happened, at most GRACE
seconds later (``--grace``) the masks must be disjoint (with more workers than cores: one core each, equally crowded),
cover every core, and ``GET /cores`` must list exactly the workers that live. Exit status 0 without a violation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.harness import PLUGINS, archives
from benchmarks.harness.torchserve import Property, RequestError, TorchServe, TorchServeError

GRACE = 2.0  # seconds, the promise
READ_BACK = 6.0  # seconds until a worker has looked at its own masks again
DAMAGE = ["", "{", '{"version": 0}', '{"version": 1, "generation": "x"}', "[" * 200_000, "\0" * 4096]
UNFINISHED = ("idle cores", "more workers than cores, but not shared fairly")
MAX_WORKERS = 3  # per model: more would only wait for the CPUs to start them


@dataclass
class Report:
    """What a run counted; ``violations`` and ``failed_requests`` should be empty."""

    seconds: float = 0.0
    actions: Counter[str] = field(default_factory=Counter)
    observations: int = 0
    answered: int = 0
    excused: int = 0  # requests in flight when their worker was killed on purpose
    failed_requests: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    longest_unsettled: float = 0.0

    def text(self) -> str:
        done = ", ".join(f"{count} x {name}" for name, count in sorted(self.actions.items()))
        return (
            f"{self.seconds:.0f} s, {sum(self.actions.values())} actions ({done})\n"
            f"{self.observations} observations of /proc, longest unsettled time {self.longest_unsettled:.2f} s\n"
            f"{self.answered} requests answered, {self.excused} lost to a SIGKILL of their worker or frontend, "
            f"{len(self.failed_requests)} failed\n"
            f"{len(self.violations)} violations"
        )


class Watcher(threading.Thread):
    """Reads masks from /proc and counts how long they are not what the promise says."""

    def __init__(self, chaos: Chaos) -> None:
        super().__init__(daemon=True)
        self._chaos, self._report = chaos, chaos.report
        self._end = threading.Event()
        self._unsettled_since: float | None = None
        self._workers: frozenset[int] = frozenset()

    def stop(self) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(0.1):
            try:
                self._observe()
            except Exception as error:  # noqa: BLE001 - a watcher that failed must not look like no violation
                self._report.violations.append(f"watcher: {error!r}")

    def _observe(self) -> None:
        workers, complaint = self._chaos.inspect()
        now = time.monotonic()
        self._report.observations += 1
        if workers != self._workers or complaint is None:
            self._unsettled_since = None  # a new set of workers starts a new grace
            self._workers = workers
        if complaint is None:
            return
        if self._unsettled_since is None:
            self._unsettled_since = now
        if self._chaos.tampered:
            return
        unsettled = now - self._unsettled_since
        self._report.longest_unsettled = max(self._report.longest_unsettled, unsettled)
        if unsettled > self._chaos.grace:
            self._report.violations.append(f"{time.strftime('%H:%M:%S')} {complaint}")
            self._unsettled_since = now


def living_workers(server: TorchServe) -> list[int]:
    """Return the workers that have got as far as their own interpreter (before, the launcher is still asking)."""
    with contextlib.suppress(psutil.Error):
        return [pid for pid, words in server.workers().items() if not any("ts-cores-python" in word for word in words)]
    return []


def starting(server: TorchServe) -> bool:
    """Tell whether a worker does not listen on its socket yet, as far as /proc and the server's directory show.

    It holds its lease before it is an interpreter; and while it imports torch, which holds Python's lock for up to a
    second at a time, it may give up cores, since others do that for it, but not take any.
    """
    with contextlib.suppress(psutil.Error):
        for pid, words in server.workers().items():
            try:
                listens = os.stat(words[words.index("--sock-name") + 1]).st_mtime  # its predecessor's is older
            except FileNotFoundError:
                return True
            if listens < psutil.Process(pid).create_time() - 0.1:
                return True
    return False


def inspect(workers: frozenset[int]) -> str | None:
    """Return what is wrong with the masks of all threads of ``workers``, or None."""
    used: dict[int, frozenset[int]] = {}
    for pid in workers:
        own = [cpus for tid in threads(pid) if (cpus := mask(pid, tid))]
        if not own:
            continue  # ended meanwhile
        used[pid] = frozenset().union(*own)
        if any(cpus != used[pid] for cpus in own):
            return f"worker {pid}: threads with different masks: {sorted(map(sorted, set(own)))}"
    allowed = frozenset(os.sched_getaffinity(0))
    if not used:
        return None
    load = Counter(cpu for cpus in used.values() for cpu in cpus)
    picture = {pid: sorted(cpus) for pid, cpus in used.items()}
    if set(load) - allowed:
        return f"CPUs that are not allowed: {picture}"
    cores = physical_cores(allowed)
    if len(used) <= len(cores):
        if any(count > 1 for count in load.values()):
            return f"overlap: {picture}"
        if any(len(core & set(load)) == 0 for core in cores):
            return f"{UNFINISHED[0]}: {picture}"
    elif any(len(cpus) != 1 for cpus in used.values()) or max(load.values()) - min(load.values()) > 1:
        return f"{UNFINISHED[1]}: {picture}"
    return None


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def mask(pid: int, tid: str) -> frozenset[int] | None:
    try:
        status = Path(f"/proc/{pid}/task/{tid}/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("Cpus_allowed_list:")), "")
    cpus: set[int] = set()
    for part in line.partition(":")[2].strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus) or None


def physical_cores(allowed: frozenset[int]) -> list[frozenset[int]]:
    found = set()
    for cpu in allowed:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").read_text().replace(",", "")
        found.add(frozenset(bit for bit in range(int(text, 16).bit_length()) if int(text, 16) >> bit & 1) & allowed)
    return list(found)


class Chaos:
    """Two servers, the models on them, and the random things that happen to them."""

    def __init__(self, seed: int, report: Report, grace: float = GRACE) -> None:
        self.random = random.Random(seed)
        self.report = report
        self.grace = grace
        self.archive = archives.facts()
        properties: dict[str, Property | None] = {"plugins_path": PLUGINS, "cpu_launcher_enable": True}
        first = TorchServe(self.archive, workers=1, properties=properties)
        second = TorchServe(self.archive, workers=1, properties=properties, state_directory=first.state_directory)
        self.servers = [first, second]
        self.models: dict[tuple[TorchServe, str], int] = {}
        self.tampered = False  # masks were changed from outside: the read-back's own period is the promise then
        self._end = threading.Event()
        self._outages: list[tuple[TorchServe, float, float]] = []  # server, from a kill to its recovery
        self._clients = [threading.Thread(target=self._client, daemon=True) for _ in range(2)]

    def __enter__(self) -> Chaos:
        try:
            for server in self.servers:
                server.start()
                self.models[server, "facts"] = 1
        except BaseException:
            self.__exit__()
            raise
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for client in self._clients:
            if client.ident:
                client.join()
        for server in reversed(self.servers):
            server.stop()

    def _client(self) -> None:
        """Ask random models at a constant rate; only what a SIGKILL explains may fail."""
        while not self._end.wait(0.25):
            try:
                server, name = random.choice(list(self.models))
            except IndexError:
                continue
            started = time.monotonic()
            try:
                server.predict(name, b'{"work": 128}', timeout=60)
                self.report.answered += 1
            except RequestError as error:
                if self._is_excused(server, name, started):
                    self.report.excused += 1
                else:
                    self.report.failed_requests.append(f"{time.strftime('%H:%M:%S')} {error}")

    def _is_excused(self, server: TorchServe, name: str, started: float) -> bool:
        """A request may fail only if its worker or frontend was being killed, or its model went, while it was asked."""
        now = time.monotonic()
        killed = any(victim is server and started <= end and now >= begin for victim, begin, end in list(self._outages))
        return killed or (server, name) not in self.models or self._end.is_set()

    def act(self) -> None:
        """Do one random thing and wait until TorchServe calls it done."""
        actions: list[tuple[int, str, Callable[[], None]]] = [
            (4, "scale", self.scale),
            (3, "register", self.register),
            (3, "unregister", self.unregister),
            (3, "kill worker", self.kill_worker),
            (1, "kill all workers", self.kill_all_workers),
            (1, "kill frontend", self.kill_frontend),
            (1, "garbage ledger", self.garbage_ledger),
            (1, "delete ledger", self.delete_ledger),
            (1, "widen masks", self.widen_masks),
        ]
        _, name, action = self.random.choices(actions, weights=[weight for weight, *_ in actions])[0]
        action()
        self.report.actions[name] += 1

    def scale(self) -> None:
        server, name = self.random.choice(list(self.models))
        workers = self.random.randint(1, MAX_WORKERS)
        server.scale(name, workers)
        self.models[server, name] = workers

    def register(self) -> None:
        server = self.random.choice(self.servers)
        name = f"model{self.random.randint(1, 3)}"
        if (server, name) not in self.models:
            server.register(self.archive, name=name, workers=1)
            self.models[server, name] = 1

    def unregister(self) -> None:
        extra = [key for key in self.models if key[1] != "facts"]
        if extra:
            server, name = self.random.choice(extra)
            del self.models[server, name]
            time.sleep(1)  # requests that were under way end first
            server.unregister(name)

    def kill_worker(self) -> None:
        workers = [(server, pid) for server in self.servers for pid in living_workers(server)]
        if workers:
            server, pid = self.random.choice(workers)
            with self._outage(server):
                kill(pid)
                self._recover(server)

    def kill_all_workers(self) -> None:
        with self._outage(*self.servers):
            for pid in [pid for server in self.servers for pid in living_workers(server)]:
                kill(pid)
            for server in self.servers:
                self._recover(server)

    def kill_frontend(self) -> None:
        """SIGKILL a Java process; its workers end by themselves, and a new server takes its place."""
        index = self.random.randrange(len(self.servers))
        server = self.servers[index]
        for key in [key for key in self.models if key[0] is server]:
            del self.models[key]
        with self._outage(server):
            server.kill_frontend()
            server.start()
        self.models[server, "facts"] = 1

    def garbage_ledger(self) -> None:
        for file in self.servers[0].state_directory.glob("*.json"):
            file.write_text(self.random.choice(DAMAGE))

    def delete_ledger(self) -> None:
        for file in self.servers[0].state_directory.glob("*.json"):
            file.unlink()

    def widen_masks(self) -> None:
        """Do to a worker what an administrator's taskset would; the read-back, every 5 seconds, must mend it."""
        workers = [pid for server in self.servers for pid in living_workers(server)]
        if workers:
            self.tampered = True
            every = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            subprocess.run(["taskset", "-acp", every, str(workers[0])], check=False, capture_output=True)
            time.sleep(READ_BACK)
            self.tampered = False

    @contextlib.contextmanager
    def _outage(self, *servers: TorchServe) -> Iterator[None]:
        begin = time.monotonic()
        index = len(self._outages)
        self._outages += [(server, begin, float("inf")) for server in servers]
        yield
        self._outages[index:] = [(server, begin, time.monotonic()) for server in servers]

    def _recover(self, server: TorchServe) -> None:
        time.sleep(1)  # TorchServe calls a worker READY until it has noticed its death
        for (owner, name), workers in list(self.models.items()):
            if owner is server:
                server.wait_ready(name, workers)

    def inspect(self) -> tuple[frozenset[int], str | None]:
        """Return the living workers of all servers, and what is wrong with their masks."""
        workers = frozenset(pid for server in self.servers for pid in living_workers(server))
        complaint = inspect(workers)
        if complaint is not None and complaint.startswith(UNFINISHED) and any(map(starting, self.servers)):
            complaint = None  # a worker that starts will take the cores, or already holds them
        return workers, complaint

    def check_settled(self) -> None:
        """Within the grace the masks must be right and GET /cores list exactly the living workers, none unbound."""
        deadline = time.monotonic() + self.grace
        while (complaint := self.inspect()[1] or self._wrong_map()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if complaint:
            self.report.violations.append(f"{time.strftime('%H:%M:%S')} {complaint}")

    def _wrong_map(self) -> str | None:
        for server in self.servers:
            core_map = server.cores()
            listed, living = {entry["pid"] for entry in core_map["slices"]}, set(living_workers(server))
            if listed != living or core_map["unbound"]:
                return f"core map {core_map} but living workers {sorted(living)}"
        return None


def run(minutes: float, seed: int, grace: float = GRACE) -> Report:
    """Do random things for that long and return what was counted."""
    report = Report()
    with Chaos(seed, report, grace) as chaos:
        watcher = Watcher(chaos)
        watcher.start()
        started = time.monotonic()
        try:
            while time.monotonic() - started < minutes * 60:
                chaos.act()
                chaos.check_settled()
                time.sleep(chaos.random.uniform(0.5, GRACE + 1))
                print(f"{time.monotonic() - started:5.0f} s  {dict(report.actions)}", file=sys.stderr, flush=True)
        except TorchServeError as error:
            report.violations.append(f"serving went down: {error}")
        finally:
            watcher.stop()
            report.seconds = time.monotonic() - started
            if report.observations < report.seconds:
                report.violations.append(f"only {report.observations} observations: the watcher did not watch")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds until everything must be right again")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    report = run(options.minutes, options.seed, options.grace)
    print(json.dumps(report.__dict__) if options.json else report.text())
    for problem in [*report.violations, *report.failed_requests]:
        print(problem, file=sys.stderr)
    return 1 if report.violations or report.failed_requests else 0


if __name__ == "__main__":
    sys.exit(main())
