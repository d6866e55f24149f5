"""The machine that was measured on, as far as it can explain the figures; no names, no addresses."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.trial.room import Room

TUNING = ("OMP_", "KMP_", "GOMP_", "MKL_", "LD_PRELOAD", "MALLOC_")  # every way inherits these
PACKAGES = ("ts-cores", "torch", "torchvision", "torchserve", "numpy")


def describe(room: Room) -> dict[str, Any]:
    """Return everything about the machine and its software that a comparison carries."""
    topology = room.topology
    return {
        "cpu_model": _first(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$") or platform.machine(),
        "packages": len({core.package for core in topology.cores}),
        "numa_nodes": len({core.node for core in topology.cores}),
        "l3_domains": len({core.l3 for core in topology.cores}),
        "cores": len(topology.cores),
        "cpus": len(topology.online),
        "cores_by_smt_siblings": dict(Counter(str(len(core.cpus)) for core in topology.cores)),
        "core_types": len({core.kind for core in topology.cores}),
        "cpuset": format_cpulist(room.cpus),
        "measured_cpus": len(room.cpus),
        "measured_cores": room.cores,
        "quota": room.quota,
        "memory_mib": psutil.virtual_memory().total >> 20,
        "kernel": platform.release(),
        "virtual_machine": bool(_first(Path("/proc/cpuinfo"), r"^flags\s*:.*\b(hypervisor)\b")),
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
            "java": _java(),
        },
        "environment": {name: value for name, value in os.environ.items() if name.startswith(TUNING)},
        "notes": list(topology.notes),
    }


def _first(file: Path, pattern: str) -> str | None:
    found = re.search(pattern, file.read_text(), re.MULTILINE)
    return found[1] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _java() -> str | None:
    path = shutil.which("java")
    if path is None:
        return None
    done = subprocess.run([path, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r'version "([^"]+)"', done.stdout + done.stderr)
    return found[1] if found else None
