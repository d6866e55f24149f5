"""Chaos: random scaling, failures, meddling and uneven load on real servers, watched from outside.

``./dev chaos --minutes 10 --seed 1``. Two TorchServe servers share one ledger and lend each other their cores. A
watcher, which shares no code with ts_plugin, looks at all threads of all workers and at the words through which they
lend 20 times a second; ``benchmarks.checks.watch`` says what is a violation. At no time may two workers compute on one
CPU, but for REGROUP seconds after a change of the workers. Whatever else happened, at most GRACE seconds later
(``--grace``) the slices must be disjoint (with more workers than cores: one core each, equally crowded) and cover every
core, and ``GET /cores`` must list exactly the workers that live. What somebody did to masks, to the cpuset or to the
state directory from outside is mended READ_BACK seconds later.

Workers change between few (each has a slice, and lends it) and many (more than cores: nobody lends). What this machine
or this user does not allow (a cpuset, a second user) is left out, and the summary says so. Exit status 0 without a
violation and without a failed request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.checks import watch
from benchmarks.harness import PLUGINS, archives
from benchmarks.harness.cpuset import Cpuset
from benchmarks.harness.server import TorchServe
from ts_plugin.trial.client import RequestError, TorchServeError
from ts_plugin.trial.properties import Property
from ts_plugin.trial.torchserve import WORKER_SCRIPT

GRACE = 2.0  # seconds, the promise
READ_BACK = 6.0  # seconds until a worker has looked at its own masks again
REGROUP = 5.0  # seconds, or less with a shorter grace
LOOKS, LISTS = 0.05, 0.25  # seconds between two looks; between two lists of the workers
STOPPED = 3.0  # seconds that somebody is stopped
WIDE_WITHIN = 5.0  # seconds to wait for a worker that computes wide
DAMAGE = ["", "{", '{"version": 0}', '{"version": 1, "generation": "x"}', "[" * 200_000, "\0" * 4096]
MAX_WORKERS = 3  # per model: more would only wait for the CPUs to start them
BASE = "convolutions"  # the model that each server always has
NOBODY = 65534
WORDS = "lending-*"  # the file of words, in the state directory

# Takes the lock of the ledger at argv[1] and tells so.
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""

# Becomes user argv[1], meddles with the state directory argv[2] and the workers argv[3:], and tells what it could do.
SECOND_USER = """
import os, signal, sys, time
user, state, workers = int(sys.argv[1]), sys.argv[2], list(map(int, sys.argv[3:]))
names = os.listdir(state)
os.setgroups([]), os.setgid(user), os.setuid(user)
attempts = [("list " + state, lambda: os.listdir(state))]
attempts += [("open " + name, lambda name=name: os.open(state + "/" + name, os.O_RDWR)) for name in names]
attempts += [("rename " + state, lambda: os.rename(state, state + ".mine"))]
for pid in workers:
    attempts += [(f"stop {pid}", lambda pid=pid: os.kill(pid, signal.SIGSTOP))]
    attempts += [(f"bind {pid}", lambda pid=pid: os.sched_setaffinity(pid, os.sched_getaffinity(0)))]
for what, attempt in attempts:
    try:
        attempt()
    except OSError:
        continue
    print(what, flush=True)
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
"""


@dataclass
class Report:
    """What a run counted; ``violations`` and ``failed_requests`` should be empty."""

    seconds: float = 0.0
    actions: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    observations: int = 0
    wide_looks: int = 0  # of these, with a slice that was borrowed
    wide: int = 0  # requests on borrowed slices that the watcher saw; back to back they count as one
    answered: int = 0
    excused: int = 0  # requests in flight when their worker was killed on purpose
    failed_requests: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    longest_unsettled: float = 0.0

    def text(self) -> str:
        done = ", ".join(f"{count} x {name}" for name, count in sorted(self.actions.items()))
        return "\n".join(
            [
                f"{self.seconds:.0f} s, {sum(self.actions.values())} actions ({done})",
                *(f"left out: {what}" for what in self.left_out),
                f"{self.observations} looks, {self.wide_looks} with a slice borrowed: {self.wide} wide requests seen; "
                f"longest unsettled time {self.longest_unsettled:.2f} s",
                f"{self.answered} requests answered, {self.excused} lost to a SIGKILL of their worker or frontend, "
                f"{len(self.failed_requests)} failed",
                f"{len(self.violations)} violations",
            ]
        )

    def violation(self, what: str) -> None:
        self.violations.append(f"{time.strftime('%H:%M:%S')} {what}")


class Watcher(threading.Thread):
    """Looks again and again, and counts how long what it sees is not what the promise says."""

    def __init__(self, chaos: Chaos) -> None:
        super().__init__(daemon=True)
        self._chaos, self._report = chaos, chaos.report
        self._end = threading.Event()
        self._since: dict[str, float] = {}  # kind of complaint -> its first look in a row
        self._changed = 0.0  # the latest change of the workers, or of what they may use
        self._last: watch.Look | None = None
        self._meetings = watch.Meetings()
        self._pids: list[int] = []
        self._listed = 0.0

    def stop(self) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(LOOKS):
            try:
                self._observe()
            except Exception as error:  # noqa: BLE001 - a watcher that failed must not look like no violation
                self._report.violation(f"watcher: {error!r}")

    def _observe(self) -> None:
        now = time.monotonic()
        if now - self._listed > LISTS:
            self._pids, self._listed = self._chaos.workers(), now
        last = self._last
        # A worker whose frontend was killed is nobody's child any more, and has its slice until it ends.
        look = self._last = self._chaos.look({*self._pids, *(last.workers if last else ())})
        self._report.observations += 1
        if last is None or look.workers.keys() != last.workers.keys() or look.allowed != last.allowed:
            self._changed = now
            self._since.clear()  # a new set of workers starts a new grace
        if self._chaos.tampered:
            self._changed = now
        if last is not None:
            wide = look.wide
            self._report.wide_looks += bool(wide)
            self._report.wide += len(wide - last.wide)
        self._settles(look, now)
        meetings = self._meetings.next(look)
        if now - self._changed > min(self._chaos.grace, REGROUP):
            for meeting in meetings:
                self._report.violation(meeting)

    def _settles(self, look: watch.Look, now: float) -> None:
        complaints = self._chaos.complaints(look)
        self._since = {} if self._chaos.tampered else {kind: self._since.get(kind, now) for kind in complaints}
        for kind, since in self._since.items():
            patience = self._chaos.grace + (READ_BACK if kind == watch.CHILD else 0)
            if kind != watch.CHILD:
                self._report.longest_unsettled = max(self._report.longest_unsettled, now - since)
            if now - since > patience:
                self._report.violation(f"{kind}: {complaints[kind]}")
                self._since[kind] = now


def living_workers(server: TorchServe) -> dict[int, list[str]]:
    """Return pid -> command line of what the frontend has started, which a worker's forks are not.

    Only workers that have got as far as their own interpreter: before, the launcher is still asking.
    """
    found = {}
    with contextlib.suppress(psutil.Error, TorchServeError):
        for process in psutil.Process(server.pid).children():
            words = process.cmdline()
            if any(word.endswith(WORKER_SCRIPT) for word in words):
                found[process.pid] = words
    return {pid: words for pid, words in found.items() if not any("ts-cores-python" in word for word in words)}


def starting(server: TorchServe) -> bool:
    """Tell whether a worker does not listen on its socket yet, as far as /proc and the server's directory show.

    It holds its lease before it is an interpreter; and while it imports torch, which holds Python's lock for up to a
    second at a time, it may give up cores, since others do that for it, but not take any.
    """
    with contextlib.suppress(psutil.Error, TorchServeError):
        for process in psutil.Process(server.pid).children():
            words = process.cmdline()
            if not any(word.endswith(WORKER_SCRIPT) for word in words):
                continue
            try:
                listens = os.stat(words[words.index("--sock-name") + 1]).st_mtime  # its predecessor's is older
            except FileNotFoundError:
                return True
            if listens < process.create_time() - 0.1:
                return True
    return False


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Chaos:
    """Two servers, the models on them, and the random things that happen to them."""

    def __init__(self, seed: int, report: Report, grace: float = GRACE) -> None:
        self.random = random.Random(seed)
        self.report = report
        self.grace = grace
        self.archives = [archives.convolutions(), archives.facts()]
        # Like /dev/shm: everybody may make something there, nobody may take what is another's.
        self.public = Path(tempfile.mkdtemp(prefix="ts-cores-chaos-"))
        self.public.chmod(stat.S_ISVTX | 0o777)
        self.state = self.public / "state"
        properties: dict[str, Property | None] = {"plugins_path": PLUGINS, "cpu_launcher_enable": True}
        self.servers = [
            TorchServe(self.archives[0], workers=1, properties=properties, state_directory=self.state) for _ in range(2)
        ]
        self.allowed = self.all = frozenset(os.sched_getaffinity(0))
        self.cpuset = Cpuset.create(self.all) if len(self.all) > 1 else None
        self.models: dict[tuple[TorchServe, str], int] = {}
        self.tampered = False  # from outside: the read-back's own period is the promise then
        self.many = False  # whether there may be more workers than cores now
        self._end = threading.Event()
        self._outages: list[tuple[TorchServe, float, float]] = []  # server, from a kill to its recovery
        self._clients = [threading.Thread(target=self._client, args=(seed + i,), daemon=True) for i in range(2)]
        if self.cpuset is None:
            report.left_out.append("cpuset: needs two CPUs and the right to make a cgroup")
        if os.getuid() != 0:
            report.left_out.append("second user: only root can become one")

    def __enter__(self) -> Chaos:
        try:
            for server in self.servers:
                self._start(server)
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
        shutil.rmtree(self.public, ignore_errors=True)
        if self.cpuset is not None:
            self.cpuset.remove()

    def _start(self, server: TorchServe) -> None:
        with contextlib.nullcontext() if self.cpuset is None else self.cpuset.inside():
            server.start()
        self.models[server, BASE] = 1

    # ---- load

    def _client(self, seed: int) -> None:
        """Ask one model for some seconds, fast or slowly, then another; only what a SIGKILL explains may fail."""
        chance = random.Random(seed)
        while not self._end.is_set():
            try:
                server, name = chance.choice(list(self.models))
            except IndexError:
                self._end.wait(0.25)
                continue
            until, pause = time.monotonic() + chance.uniform(2, 8), chance.choice([0.0, 0.05, 0.5, 2.0])
            while time.monotonic() < until and not self._end.wait(pause) and (server, name) in self.models:
                # Half a second of it wide: long enough for several looks at a borrower that gives nothing back.
                body = {"rounds": chance.randint(1, 20), "work": 128}
                if chance.random() < 0.02:
                    body["fork"] = 10
                    self.report.actions["fork under load"] += 1
                self._ask(server, name, json.dumps(body).encode())

    def _ask(self, server: TorchServe, name: str, body: bytes) -> None:
        started = time.monotonic()
        try:
            server.predict(name, body, timeout=60)
            self.report.answered += 1
        except RequestError as error:
            if self._is_excused(server, name, started):
                self.report.excused += 1
            else:
                self.report.failed_requests.append(f"{time.strftime('%H:%M:%S')} {error}")
            self._end.wait(0.25)

    def _is_excused(self, server: TorchServe, name: str, started: float) -> bool:
        """A request may fail only if its worker or frontend was being killed, or its model went, while it was asked."""
        now = time.monotonic()
        killed = any(victim is server and started <= end and now >= begin for victim, begin, end in list(self._outages))
        return killed or (server, name) not in self.models or self._end.is_set()

    # ---- what happens

    def act(self) -> None:
        """Do one random thing and wait until TorchServe calls it done; False means that there was nothing to do."""
        actions: list[tuple[int, str, Callable[[], bool | None]]] = [
            (4, "scale", self.scale),
            (3, "register", self.register),
            (3, "unregister", self.unregister),
            (6 if self.many else 2, "few or many workers", self.few_or_many),
            (2, "kill worker", self.kill_worker),
            (4, "kill wide worker", self.kill_wide_worker),
            (2, "stop wide worker", self.stop_wide_worker),
            (2, "stop lock holder", self.stop_lock_holder),
            (1, "kill all workers", self.kill_all_workers),
            (1, "kill frontend", self.kill_frontend),
            (1, "garbage ledger", self.garbage_ledger),
            (1, "delete ledger", self.delete_ledger),
            (1, "delete state directory", self.delete_state_directory),
            (1, "widen masks", self.widen_masks),
        ]
        if self.cpuset is not None:
            actions.append((1, "change cpuset", self.change_cpuset))
        if os.getuid() == 0:
            actions.append((2, "second user", self.second_user))
        done: bool | None = False
        while done is False:
            _, name, action = self.random.choices(actions, weights=[weight for weight, *_ in actions])[0]
            done = action()
        self.report.actions[name] += 1

    def _room(self, key: tuple[TorchServe, str]) -> int:
        """Return how many workers a model may have now."""
        cores = len(watch.physical_cores(self.allowed))
        others = sum(workers for other, workers in self.models.items() if other != key)
        return MAX_WORKERS if self.many else min(MAX_WORKERS, cores - others)

    def scale(self) -> bool:
        key = self.random.choice(list(self.models))
        workers = self.random.randint(1, max(1, self._room(key)))
        changes = workers != self.models[key]
        key[0].scale(key[1], workers)
        self.models[key] = workers
        return changes

    def register(self) -> bool:
        server = self.random.choice(self.servers)
        name = f"model{self.random.randint(1, 3)}"
        archive = self.random.choice(self.archives)
        if (server, name) in self.models or self._room((server, name)) < 1:
            return False
        server.register(archive, name=name, workers=1)
        self.models[server, name] = 1
        return True

    def unregister(self) -> bool:
        extra = [key for key in self.models if key[1] != BASE]
        if extra:
            self._unregister(self.random.choice(extra))
        return bool(extra)

    def _unregister(self, key: tuple[TorchServe, str]) -> None:
        server, name = key
        del self.models[key]
        time.sleep(1)  # requests that were under way end first
        server.unregister(name)

    def few_or_many(self) -> None:
        """From now on there may be more workers than cores, or may not."""
        self.many = not self.many
        if not self.many:
            for key in [key for key in self.models if key[1] != BASE]:
                self._unregister(key)
            for server, name in list(self.models):
                server.scale(name, 1)
                self.models[server, name] = 1

    def kill_worker(self) -> bool:
        workers = self.workers()
        if workers:
            self._kill(self.random.choice(workers))
        return bool(workers)

    def kill_wide_worker(self) -> bool:
        pid = self._wide_worker()
        if pid is not None:
            self._kill(pid)
        return pid is not None

    def _kill(self, pid: int) -> None:
        server = next((server for server in self.servers if pid in living_workers(server)), None)
        if server is not None:
            with self._outage(server):
                send(pid, signal.SIGKILL)
                self._recover(server)

    def stop_wide_worker(self) -> bool:
        """SIGSTOP a worker while it computes on borrowed cores: their owner must take them back."""
        pid = self._wide_worker()
        if pid is not None:
            send(pid, signal.SIGSTOP)
            time.sleep(STOPPED)
            send(pid, signal.SIGCONT)
        return pid is not None

    def _wide_worker(self) -> int | None:
        """Return a worker that has borrowed a slice at this moment, as the words say."""
        deadline = time.monotonic() + WIDE_WITHIN
        while time.monotonic() < deadline:
            wide = [user for pid, user in watch.words(self._words()).items() if user not in (0, pid)]
            if wide:
                return self.random.choice(wide)
            time.sleep(0.005)
        return None

    def stop_lock_holder(self) -> bool:
        """SIGSTOP a process that holds the ledger's lock; workers that want to join meanwhile wait."""
        file = next(iter(self.state.glob("ledger-*.lock")), None)
        if file is None:
            return False
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdout.readline()
            holder.send_signal(signal.SIGSTOP)
            self.tampered = True  # nobody can divide anything now
            ending = self.random.choice([signal.SIGCONT, signal.SIGKILL])
            holder.stdin.close()  # it lets go of the lock when it goes on: workers wait no longer than LOCK_TIMEOUT
            releases = threading.Timer(STOPPED, holder.send_signal, [ending])
            releases.start()
            self.scale()
            releases.join()
        time.sleep(1)
        self.tampered = False
        return True

    def kill_all_workers(self) -> None:
        with self._outage(*self.servers):
            for pid in self.workers():
                send(pid, signal.SIGKILL)
            for server in self.servers:
                self._recover(server)

    def kill_frontend(self) -> None:
        """SIGKILL a Java process; its workers end by themselves, and a new server takes its place."""
        server = self.random.choice(self.servers)
        for key in [key for key in self.models if key[0] is server]:
            del self.models[key]
        with self._outage(server):
            server.kill_frontend()
            self._start(server)

    def garbage_ledger(self) -> None:
        for file in self.state.glob("*.json"):
            file.write_text(self.random.choice(DAMAGE))

    def delete_ledger(self) -> None:
        for file in self.state.glob("*.json"):
            file.unlink()

    def delete_state_directory(self) -> None:
        """Delete ledger, locks and words: workers agree on new ones at their next request or read-back."""
        with self._tampering():
            shutil.rmtree(self.state, ignore_errors=True)

    def widen_masks(self) -> bool:
        """Do to a worker what an administrator's taskset would; the read-back, every 5 seconds, must mend it."""
        workers = self.workers()
        if workers:
            with self._tampering():
                every = ",".join(map(str, sorted(self.allowed)))
                subprocess.run(["taskset", "-acp", every, str(workers[0])], check=False, capture_output=True)
        return bool(workers)

    def change_cpuset(self) -> None:
        """Narrow the cpuset of everything to one half of the CPUs, move it to the other, and widen it again."""
        assert self.cpuset is not None
        ordered = sorted(self.all)
        half = len(ordered) // 2
        for cpus in (frozenset(ordered[:half]), frozenset(ordered[half:]), self.all):
            with self._tampering():
                self.cpuset.allow(cpus)
                self.allowed = cpus
            self.check_settled()

    def second_user(self) -> None:
        """Let another local user try to get at the ledger and the workers, and compute beside them."""
        self.state.mkdir(mode=0o700, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", SECOND_USER, str(NOBODY), str(self.state), *map(str, self.workers())],
            check=False,
            capture_output=True,
            text=True,
        )
        for line in (done.stdout + done.stderr).splitlines():
            self.report.violation(f"user {NOBODY} could {line}")

    @contextlib.contextmanager
    def _tampering(self) -> Iterator[None]:
        self.tampered = True
        yield
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

    # ---- what can be seen of it

    def workers(self) -> list[int]:
        return [pid for server in self.servers for pid in living_workers(server)]

    def _words(self) -> Path | None:
        return next(iter(self.state.glob(WORDS)), None)

    def look(self, pids: Iterable[int]) -> watch.Look:
        return watch.look(pids, self._words(), allowed=self.allowed)

    def complaints(self, look: watch.Look) -> dict[str, str]:
        """Return what is wrong: kind -> details. A worker that starts will take idle cores, or already holds them."""
        complaints = look.complaints()
        if (watch.IDLE in complaints or watch.UNFAIR in complaints) and any(map(starting, self.servers)):
            return {kind: text for kind, text in complaints.items() if kind not in (watch.IDLE, watch.UNFAIR)}
        return complaints

    def check_settled(self) -> None:
        """Within the grace GET /cores must list exactly the living workers, none unbound; the watcher does the rest."""
        deadline = time.monotonic() + self.grace
        while (complaint := self._wrong_map()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if complaint:
            self.report.violation(complaint)

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
