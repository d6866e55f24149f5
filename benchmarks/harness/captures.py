"""Captured machines: the kernel files of a machine that is not this one."""

from __future__ import annotations

import lzma
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unpacked(archive: Path) -> Iterator[str]:
    """Unpack a captured tree for as long as the context lasts, in memory where the system has a place for that."""
    with in_memory() as directory:
        with lzma.open(archive) as stream:
            subprocess.run(["tar", "-x", "-C", directory], input=stream.read(), check=True)
        yield os.path.join(directory, os.listdir(directory)[0])


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary directory for many small files."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
