"""Facts about live processes, checked on real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from ts_plugin.machine import process
from ts_plugin.machine.process import Identity

pytestmark = pytest.mark.process


def test_this_process_is_alive_and_a_later_one_with_its_pid_would_not_be_taken_for_it() -> None:
    me = process.identify(os.getpid())
    assert me is not None
    assert me.alive()
    assert not Identity(me.pid, me.start_time + 1).alive()


def test_a_killed_process_is_dead_while_it_is_still_a_zombie() -> None:
    child = subprocess.Popen(["sleep", "60"])
    identity = process.identify(child.pid)
    assert identity is not None
    assert identity.alive()
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not yet reaped: a zombie
    assert not identity.alive()
    child.wait()
    assert process.identify(child.pid) is None
    assert process.threads(child.pid) == []
    assert process.command_line(child.pid) == []
    assert process.environment(child.pid) == {}


def test_the_command_name_may_hold_blanks_and_brackets(tmp_path: os.PathLike[str]) -> None:
    program = os.path.join(tmp_path, "a) (b")
    os.symlink("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as child:
        try:
            assert process.parent(child.pid) == os.getpid()
        finally:
            child.kill()


def test_tree_walks_children_of_every_thread() -> None:
    code = "import subprocess, threading; threading.Thread(target=lambda: subprocess.run(['sleep', '60'])).start()"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        try:
            while [process.command_line(pid) for pid in process.tree(child.pid)][1:] != [["sleep", "60"]]:
                assert child.poll() is None
            assert next(process.tree(child.pid)) == child.pid
        finally:
            for pid in list(process.tree(child.pid)):
                os.kill(pid, signal.SIGKILL)


def test_threads_and_environment_of_this_process() -> None:
    with_more = threading.Event()
    thread = threading.Thread(target=with_more.wait)
    before = len(process.threads(os.getpid()))
    thread.start()
    try:
        assert len(process.threads(os.getpid())) == before + 1
        assert thread.native_id in process.threads(os.getpid())
    finally:
        with_more.set()
        thread.join()
    with subprocess.Popen(["sleep", "60"], env={"KEY": "a=b"}) as child:
        try:
            while process.command_line(child.pid) != [
                "sleep",
                "60",
            ]:  # between fork and exec it looks like this process
                assert child.poll() is None
            assert process.environment(child.pid) == {"KEY": "a=b"}
        finally:
            child.kill()
