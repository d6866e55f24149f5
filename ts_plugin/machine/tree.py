"""Kernel files below a root: the machine's own ``/``, or a captured tree."""

from __future__ import annotations

import os

from ts_plugin.machine.cpulist import CpuListError, parse_cpulist


class Tree:
    """The files below ``root``. An absent one is None; a malformed one is None and a note that begins with its path."""

    def __init__(self, root: str) -> None:
        self.base = root.rstrip("/") + "/"
        self.notes: list[str] = []

    def text(self, path: str) -> str | None:
        chunks = []
        try:
            file = os.open(self.base + path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while chunk := os.read(file, 65536):
                    chunks.append(chunk)
            finally:
                os.close(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.malformed(path, error.strerror or str(error))
            return None
        return b"".join(chunks).decode("ascii", "replace").strip()

    def number(self, path: str) -> int | None:
        text = self.text(path)
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            self.malformed(path, f"invalid number {text!r}")
            return None

    def cpulist(self, path: str) -> frozenset[int] | None:
        text = self.text(path)
        if text is None:
            return None
        try:
            return parse_cpulist(text)
        except CpuListError as error:
            self.malformed(path, str(error))
            return None

    def cpumask(self, path: str) -> frozenset[int] | None:
        """Read hexadecimal words of 32 bits, the highest first, for example ``00000001,0000000f``."""
        text = self.text(path)
        if text is None:
            return None
        try:
            bits = int(text.replace(",", "") or "0", 16)
        except ValueError:
            self.malformed(path, f"invalid CPU mask {text!r}")
            return None
        return frozenset(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)

    def cpus(self, cpulist: str, cpumask: str) -> frozenset[int] | None:
        """Read the list, or on kernels that have none the mask."""
        cpus = self.cpulist(cpulist)
        return self.cpumask(cpumask) if cpus is None else cpus

    def numbered(self, path: str, prefix: str) -> list[int]:
        """Return N for every entry ``prefixN`` of a directory, ascending; nothing where it is absent."""
        try:
            names = os.listdir(self.base + path)
        except OSError:
            return []
        numbers = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def malformed(self, path: str, reason: str) -> None:
        self.notes.append(f"{self.base}{path}: {reason}; ignored")
