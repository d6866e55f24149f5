"""A real cgroup with a cpuset, as a container has one, where this user may make it (cgroup v1 or v2)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PLACES = (Path("/sys/fs/cgroup/cpuset"), Path("/sys/fs/cgroup"))


class Cpuset:
    """A child cgroup of the root; ``create`` returns None where none can be made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def create(cls, cpus: frozenset[int]) -> Cpuset | None:
        for place in PLACES:
            made = cls(place / f"ts-cores-test-{os.getpid()}-{time.monotonic_ns()}")
            if not ((place / "cpuset.cpus").exists() or (place / "cgroup.subtree_control").exists()):
                continue
            try:
                made.directory.mkdir()
                if (place / "cpuset.mems").exists():  # v1 starts empty, v2's root has no such file
                    (made.directory / "cpuset.mems").write_text((place / "cpuset.mems").read_text())
                made.allow(cpus)
            except OSError:
                made.remove()
                continue
            return made
        return None

    def allow(self, cpus: frozenset[int]) -> None:
        (self.directory / "cpuset.cpus").write_text(",".join(map(str, sorted(cpus))))

    def enter(self) -> None:
        """Move this process there; meant for a child before its program starts."""
        (self.directory / "cgroup.procs").write_text(str(os.getpid()))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Let this process be there for a while: what it starts meanwhile stays there. It returns with wide masks."""
        self.enter()
        try:
            yield
        finally:
            (self.directory.parent / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        """Remove the cgroup once its last process is gone, which takes the kernel a moment."""
        deadline = time.monotonic() + 10
        while self.directory.exists():
            try:
                self.directory.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
