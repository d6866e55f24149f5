"""The machine that a benchmark ran on, as far as it can explain the figures; no names, no addresses."""

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

from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.discovery import read_allowance, read_topology

__all__ = ["describe", "summary"]

TUNING = ("OMP_", "KMP_", "GOMP_", "MKL_", "LD_PRELOAD", "MALLOC_")  # every configuration inherits these
PACKAGES = ("ts-cores", "torch", "torchvision", "torchserve", "torch-model-archiver", "numpy")


def describe() -> dict[str, Any]:
    """Return everything about the machine and its software that results.json carries under "machine"."""
    topology, allowance = read_topology(), read_allowance()
    return {
        "cpu_model": _first(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$") or platform.machine(),
        "packages": len({core.package for core in topology.cores}),
        "numa_nodes": len({core.node for core in topology.cores}),
        "l3_domains": len({core.l3 for core in topology.cores}),
        "cores": len(topology.cores),
        "cpus": len(topology.online),
        "cpus_per_core": dict(sorted(Counter(str(len(core.cpus)) for core in topology.cores).items())),
        "core_types": len({core.kind for core in topology.cores}),
        "allowed_cpus": format_cpulist(allowance.cpus),
        "allowed_cores": len(topology.cores_of(allowance.cpus)),
        "cgroup_cpu_quota": allowance.quota,
        "topology": [
            {"cpus": format_cpulist(core.cpus), "package": core.package, "numa_node": core.node, "l3_domain": core.l3}
            for core in topology.cores
        ],
        "memory_mib": int(_first(Path("/proc/meminfo"), r"^MemTotal:\s*(\d+)") or 0) // 1024,
        "kernel": platform.release(),
        "virtual_machine": bool(_first(Path("/proc/cpuinfo"), r"^flags\s*:.*\b(hypervisor)\b")),
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
            "java": _output("java", "-version", pattern=r'version "([^"]+)"'),
            "ab": _output("ab", "-V", pattern=r"Version (\S+)"),
        },
        "load_average": os.getloadavg()[0],
        "environment": {name: value for name, value in os.environ.items() if name.startswith(TUNING)},
        "notes": [*topology.notes, *allowance.notes],
        "unavailable": {},
    }


def summary(machine: dict[str, Any]) -> str:
    """Return one line for a person, from what ``describe`` returned."""
    parts = [
        machine["cpu_model"],
        f"{machine['packages']} package(s), {machine['numa_nodes']} NUMA node(s), {machine['cores']} cores, "
        f"{machine['cpus']} CPUs",
        f"allowed CPUs {machine['allowed_cpus']}",
    ]
    if machine["cgroup_cpu_quota"]:
        parts.append(f"CFS quota {machine['cgroup_cpu_quota']:g} CPUs")
    parts.append(f"{machine['memory_mib'] / 1024:.0f} GiB")
    parts.append(f"Linux {machine['kernel']}{' in a virtual machine' if machine['virtual_machine'] else ''}")
    parts += [f"{name} {version}" for name, version in machine["versions"].items() if version]
    return "; ".join(parts)


def _first(file: Path, pattern: str) -> str | None:
    found = re.search(pattern, file.read_text(), re.MULTILINE)
    return found[1] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(program: str, option: str, *, pattern: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([path, option], capture_output=True, text=True, check=False)
    found = re.search(pattern, done.stdout + done.stderr)
    return found[1] if found else None
