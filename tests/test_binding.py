"""What the kernel is told, read back from the kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ts_plugin.kernel import affinity, memory
from ts_plugin.machine import discovery, process
from ts_plugin.planning.policy import Memory

pytestmark = pytest.mark.process

ALLOWED = sorted(os.sched_getaffinity(0))
needs_two = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two CPUs to tell one mask from another")

TEAM = """
import os, sys, threading
own, both = {int(sys.argv[1])}, {int(word) for word in sys.argv[1:]}
ready = threading.Barrier(3)
def with_mask(mask):
    os.sched_setaffinity(0, mask)
    ready.wait()
    threading.Event().wait()
threading.Thread(target=with_mask, args=(both,), daemon=True).start()
threading.Thread(target=with_mask, args=(both - own,), daemon=True).start()
os.sched_setaffinity(0, own)
ready.wait()
print("ready", flush=True)
sys.stdin.read()
"""


@needs_two
def test_threads_on_what_is_borrowed_stay_until_it_goes_back() -> None:
    """One that spans the slice and what is borrowed was set so by somebody else: no wide request has such a thread."""
    own, other = ALLOWED[:2]
    with subprocess.Popen(
        [sys.executable, "-c", TEAM, str(own), str(other)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as team:
        assert team.stdout is not None
        assert team.stdout.readline() == "ready\n"

        def masks() -> list[list[int]]:
            return sorted(sorted(os.sched_getaffinity(tid)) for tid in process.threads(team.pid))

        assert masks() == sorted([[own], [own, other], [other]])
        assert affinity.bind_tree(team.pid, [own], borrows=[own, other]) == (1, ())
        assert masks() == sorted([[own], [own], [other]])
        assert affinity.bind_tree(team.pid, [own]).changed == 1
        assert masks() == [[own]] * 3
        team.communicate("")


FAMILY = """
import os, subprocess, sys, threading
child = subprocess.Popen(["sleep", "600"])
narrowed = threading.Event()
def narrow():
    os.sched_setaffinity(0, {int(sys.argv[1])})
    narrowed.set()
    threading.Event().wait()
threading.Thread(target=narrow, daemon=True).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
narrowed.wait()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def family() -> Iterator[int]:
    """A process with three threads, one narrowed to the last CPU, and a child."""
    arguments = [sys.executable, "-c", FAMILY, str(ALLOWED[-1])]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        yield parent.pid
        for pid in reversed(list(process.tree(parent.pid))):
            os.kill(pid, signal.SIGKILL)


def masks(pid: int) -> list[list[int]]:
    tids = [tid for member in process.tree(pid) for tid in process.threads(member)]
    return [sorted(os.sched_getaffinity(tid)) for tid in tids]


@needs_two
def test_every_thread_and_child_moves(family: int) -> None:
    assert len(masks(family)) == 4
    affinity.bind_tree(family, [ALLOWED[0]])
    assert masks(family) == [[ALLOWED[0]]] * 4
    assert affinity.bind_tree(family, [ALLOWED[0]]) == (0, ()), "nothing left to do"


@needs_two
def test_a_thread_narrowed_inside_the_slice_stays_and_one_that_spanned_the_old_slice_follows(family: int) -> None:
    affinity.bind_tree(family, ALLOWED)
    assert sorted(masks(family)) == sorted([ALLOWED, ALLOWED, ALLOWED, [ALLOWED[-1]]])
    affinity.bind_tree(family, [ALLOWED[-1]])
    affinity.bind_tree(family, ALLOWED, before=[ALLOWED[-1]])
    assert masks(family) == [ALLOWED] * 4


@needs_two
def test_a_thread_that_starts_meanwhile_does_not_escape() -> None:
    code = """
import threading, time
def spawn():
    while True:
        threading.Thread(target=time.sleep, args=(0.02,)).start()
        time.sleep(0.001)
for _ in range(3): threading.Thread(target=spawn, daemon=True).start()
print("ready", flush=True); time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            for target in (ALLOWED[0], ALLOWED[-1]) * 5:
                affinity.bind_tree(child.pid, [target])
                escaped = []
                for tid in process.threads(child.pid):
                    try:
                        escaped += [tid] if os.sched_getaffinity(tid) != {target} else []
                    except ProcessLookupError:
                        continue
                assert escaped == []
        finally:
            child.kill()


def test_a_process_that_is_gone_is_no_error() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
        assert affinity.bind_tree(child.pid, ALLOWED) == (0, ())


def test_cpus_that_the_kernel_does_not_have_are_an_error() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        try:
            with pytest.raises(OSError, match="Invalid argument"):
                affinity.bind_tree(child.pid, [100_000])
        finally:
            child.kill()


def test_memory_policy_on_one_node_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "memory_nodes", lambda: frozenset({0}))
    assert memory.bind_memory(Memory.PREFERRED, [0]) is None
    assert memory.bind_memory(Memory.NONE, [0, 1]) is None


def test_a_memory_policy_that_the_kernel_refuses_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "memory_nodes", lambda: frozenset({0, 1023}))
    note = memory.bind_memory(Memory.BIND, [1023])  # no machine here has such a node
    assert note is not None
    assert "memory policy bind for nodes 1023" in note
    assert "first touch" in note


def test_a_memory_policy_is_set_and_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from ts_plugin.kernel import memory
from ts_plugin.planning.policy import Memory
from ts_plugin.machine import discovery
discovery.memory_nodes = lambda: frozenset({0, 1})
assert memory.bind_memory(Memory.PREFERRED, [0]) is None
print(open("/proc/self/numa_maps").readline().split()[1])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "prefer:0"


def test_pages_of_a_process_that_is_gone_stay_with_a_note() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()

        assert "stay where they are" in (memory.move_pages(child.pid, [0], [0]) or "")


@needs_two
@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a child as another user")
def test_a_child_of_another_user_keeps_nobody_else_from_being_bound() -> None:
    """As with sudo: the kernel lets a worker bind its own threads and children, and not that one."""
    code = """
import json, os, subprocess, sys, threading
from ts_plugin.kernel import affinity
from ts_plugin.machine import process
foreign = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
os.setuid(4242)
own = subprocess.Popen(["sleep", "600"])
threading.Thread(target=threading.Event().wait, daemon=True).start()
changed, refused = affinity.bind_tree(os.getpid(), [int(sys.argv[1])])
masks = {name: sorted(os.sched_getaffinity(child.pid)) for name, child in (("own", own), ("foreign", foreign))}
masks["threads"] = sorted({cpu for tid in process.threads(os.getpid()) for cpu in os.sched_getaffinity(tid)})
own.kill()
print(json.dumps({**masks, "changed": changed, "refused": list(refused) == [foreign.pid], "foreign_pid": foreign.pid}))
"""
    arguments = [sys.executable, "-c", code, str(ALLOWED[0])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    os.kill(found.pop("foreign_pid"), signal.SIGKILL)
    first = [ALLOWED[0]]
    assert found == {"own": first, "threads": first, "foreign": ALLOWED, "changed": 3, "refused": True}
