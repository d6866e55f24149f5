"""Facts about live processes, read from /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

PROC = "/proc"


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same PID.

    ``start_time`` is in clock ticks since boot: no change of the wall clock touches it.
    Source: man 5 proc, /proc/pid/stat, field 22.
    """

    pid: int
    start_time: int

    def alive(self) -> bool:
        """Tell whether this very process runs; a zombie uses no CPU any more and counts as dead."""
        return identify(self.pid) == self


def boot() -> str:
    """Return what tells this start of this machine from others, for example ``1f6d0c6a8d2b``; nothing if unknown.

    Source: man 4 random, /proc/sys/kernel/random/boot_id.
    """
    return (_read("sys/kernel/random/boot_id") or b"").decode().replace("-", "")[:12]


def first_open_port() -> int:
    """Return the port from which on anybody may listen. Source: man 7 ip, ip_unprivileged_port_start."""
    return int(_read("sys/net/ipv4/ip_unprivileged_port_start") or b"1024")


def identify(pid: int) -> Identity | None:
    """Return the identity of ``pid``, or None where it does not run."""
    fields = _stat(pid)
    if fields is None or fields[0] in (b"Z", b"X"):
        return None
    return Identity(pid, int(fields[19]))


def parent(pid: int) -> int | None:
    """Return the PID of the parent, or None where ``pid`` does not run."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def pids() -> list[int]:
    """Return the PIDs of all processes that this one can see."""
    return [int(name) for name in os.listdir(PROC) if name.isdigit()]


def owner(pid: int) -> int | None:
    """Return the user id that ``pid`` runs under, or None where it does not run."""
    try:
        return os.stat(f"{PROC}/{pid}").st_uid
    except (FileNotFoundError, ProcessLookupError):
        return None


def memory(pid: int) -> tuple[int, int] | None:
    """Return the bytes of memory of ``pid``, and how many of them nobody shares; None where that may not be read.

    Pages that several processes use count in parts (PSS).
    Source: Documentation/filesystems/proc.rst, smaps_rollup.
    """
    words = (line.split() for line in (_read(f"{pid}/smaps_rollup") or b"").splitlines())
    kib = {line[0]: int(line[1]) for line in words if len(line) == 3 and line[2] == b"kB"}
    if b"Pss:" not in kib:
        return None
    return 1024 * kib[b"Pss:"], 1024 * (kib.get(b"Private_Clean:", 0) + kib.get(b"Private_Dirty:", 0))


def namespace(pid: int) -> str | None:
    """Return the PID namespace of ``pid``, for example ``pid:[4026531836]``, or None where it may not be read."""
    try:
        return os.readlink(f"{PROC}/{pid}/ns/pid")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def opened(pid: int) -> Iterator[str]:
    """Yield the paths of the files that ``pid`` has open; none where that may not be read."""
    try:
        descriptors = os.listdir(f"{PROC}/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # closed in the meantime
            yield os.readlink(f"{PROC}/{pid}/fd/{descriptor}")


def threads(pid: int) -> list[int]:
    """Return the thread ids of ``pid``; none where it does not run."""
    try:
        return [int(name) for name in os.listdir(f"{PROC}/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def state(pid: int, tid: int) -> str | None:
    """Return the state letter of a thread, R for running or runnable, or None where it ended."""
    fields = _stat(f"{pid}/task/{tid}")
    return None if fields is None else fields[0].decode()


def last_cpu(pid: int, tid: int) -> int | None:
    """Return the CPU that a thread is on, or was on last; None where it ended."""
    fields = _stat(f"{pid}/task/{tid}")
    return None if fields is None else int(fields[36])


def migrations(pid: int, tid: int) -> int | None:
    """Return how often the scheduler moved a thread to another CPU; None where it ended or is not counted.

    Source: Documentation/scheduler/sched-debug.rst; needs CONFIG_SCHED_DEBUG.
    """
    for line in (_read(f"{pid}/task/{tid}/sched") or b"").splitlines():
        if line.startswith(b"se.nr_migrations"):
            return int(line.rpartition(b":")[2])
    return None


def numa_pages(pid: int) -> list[tuple[int, int, int]] | None:
    """Return (NUMA node, pages, KiB of one page) for every mapping of a process; None where the kernel does not tell.

    The kernel walks all pages for it, some 10 ms per GiB. Source: man 7 numa, /proc/pid/numa_maps.
    """
    text = _read(f"{pid}/numa_maps")
    if text is None:
        return None
    found = []
    for line in text.decode(errors="replace").splitlines():
        facts = dict(word.split("=", 1) for word in line.split()[2:] if "=" in word)
        size = int(facts.get("kernelpagesize_kB", 4))
        found += [
            (int(name[1:]), int(pages), size) for name, pages in facts.items() if name[:1] == "N" and name[1:].isdigit()
        ]
    return found


def tree(pid: int) -> Iterator[int]:
    """Yield ``pid`` and all its descendants, parents first.

    Source: man 5 proc, /proc/pid/task/tid/children; a kernel built without it shows no descendants.
    """
    yield pid
    for tid in threads(pid):
        for child in (_read(f"{pid}/task/{tid}/children") or b"").split():
            yield from tree(int(child))


def command_line(pid: int) -> list[str]:
    """Return the arguments of ``pid``; none for a kernel thread or where it does not run."""
    return [os.fsdecode(part) for part in (_read(f"{pid}/cmdline") or b"").split(b"\0")[:-1]]


def environment(pid: int) -> dict[str, str]:
    """Return the environment that ``pid`` was started with; empty where it may not be read."""
    pairs = (part.partition(b"=") for part in (_read(f"{pid}/environ") or b"").split(b"\0") if part)
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs}


def _stat(pid: int | str) -> list[bytes] | None:
    """Return the fields of /proc/pid/stat from the third (state) on; the second may hold blanks and brackets."""
    text = _read(f"{pid}/stat")
    return None if not text else text[text.rindex(b")") + 2 :].split()


def _read(name: str) -> bytes | None:
    try:
        with open(f"{PROC}/{name}", "rb", buffering=0) as file:
            return file.readall()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
