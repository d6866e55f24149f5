"""What the cgroups of a process say: its cpuset, its CFS quota and its memory, in cgroup v1 and v2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ts_plugin.machine.tree import Tree

_KINDS = ("cgroup", "cgroup2", "cpuset")


class Cgroups:
    """The cgroups of this process: where they are mounted, and what they and their ancestors say."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.mounts = _cgroup_mounts(tree)
        self.path_of = _cgroup_paths(tree)

    def cpuset(self) -> frozenset[int] | None:
        """Return the CPUs of the nearest cgroup that has a cpuset, or None."""
        for directory, mount in self._directories("cpuset"):
            if mount.kind == "cgroup2":
                name = "cpuset.cpus.effective"
            else:
                # Without cpuset_v2_mode the kernel narrows `cpus` itself when CPUs go offline.
                name = "effective_cpus" if "cpuset_v2_mode" in mount.options else "cpus"
                name = name if mount.kind == "cpuset" or "noprefix" in mount.options else f"cpuset.{name}"
            cpus = self.tree.cpulist(f"{directory}/{name}")
            if cpus:
                return cpus
        return None

    def quota(self) -> float | None:
        """Return the smallest CFS limit of the cgroup and all its visible ancestors, in CPUs."""
        limits = []
        for directory, mount in self._directories("cpu"):
            if mount.kind == "cgroup2":
                path = f"{directory}/cpu.max"
                quota, _, period = (self.tree.text(path) or "max").partition(" ")
            else:
                path = f"{directory}/cpu.cfs_quota_us"
                quota = self.tree.text(path) or "-1"
                period = self.tree.text(f"{directory}/cpu.cfs_period_us") or ""
            if quota in ("max", "-1"):
                continue
            if quota.isdecimal() and period.isdecimal() and int(period) > 0:
                limits.append(int(quota) / int(period))
            else:
                self.tree.malformed(path, f"invalid CFS quota {quota!r} for a period of {period!r}")
        return min(limits, default=None)

    def memory(self) -> int | None:
        """Return the bytes that the tightest memory limit of the cgroup and its visible ancestors leaves, or None.

        Files that nobody used lately count as left: the kernel drops them before it refuses memory.
        """
        left = []
        for directory, mount in self._directories("memory"):
            new = mount.kind == "cgroup2"
            limit = self.tree.text(f"{directory}/{'memory.max' if new else 'memory.limit_in_bytes'}") or ""
            used = self.tree.number(f"{directory}/{'memory.current' if new else 'memory.usage_in_bytes'}")
            if limit.isdecimal() and used is not None:
                text = self.tree.text(f"{directory}/memory.stat") or ""
                counts = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
                files = counts.get("inactive_file" if new else "total_inactive_file", "0")
                left.append(max(int(limit) - used + int(files), 0))
        return min(left, default=None)

    def _directories(self, controller: str) -> Iterator[tuple[str, _Mount]]:
        """Yield the cgroup's directory under every mount that has ``controller``, then its ancestors upwards.

        A container often sees its own cgroup as the root of the mount while its path is the host's: the directories
        that do not exist are skipped by whoever reads them, and the root of the mount remains.
        """
        mounts = [m for m in self.mounts if m.kind in ("cgroup2", controller) or controller in m.options]
        below = [(m, path) for m in mounts if (path := self._path_below(m, controller)) is not None]
        for mount, path in below or [(mount, "") for mount in mounts]:
            while True:
                yield (mount.point + path).strip("/"), mount
                if not path:
                    break
                path = path.rpartition("/")[0]

    def _path_below(self, mount: _Mount, controller: str) -> str | None:
        path = self.path_of.get("" if mount.kind == "cgroup2" else controller, self.path_of.get("cpuset", "/"))
        parts = [part for part in path.split("/") if part]
        above = [part for part in (mount.root or "/").split("/") if part]
        if parts[: len(above)] != above:
            return None
        parts = parts[len(above) :]
        return "" if ".." in parts else "".join(f"/{part}" for part in parts)


class _Mount(NamedTuple):
    """A mounted cgroup hierarchy; ``root`` is the cgroup that shows at ``point``, None where that is not said."""

    point: str
    root: str | None
    kind: str
    options: frozenset[str]


def _cgroup_mounts(tree: Tree) -> list[_Mount]:
    mounts = []
    for line in (tree.text("proc/self/mountinfo") or "").splitlines():
        place, _, source = line.partition(" - ")
        fields, kinds = place.split(), source.split()
        if len(fields) > 4 and len(kinds) > 2 and kinds[0] in _KINDS:
            mounts.append(_Mount(fields[4], fields[3], kinds[0], frozenset(kinds[2].split(","))))
    if not mounts:
        for line in (tree.text("proc/mounts") or "").splitlines():
            fields = line.split()
            if len(fields) > 3 and fields[2] in _KINDS:
                mounts.append(_Mount(fields[1], None, fields[2], frozenset(fields[3].split(","))))
    return mounts


def _cgroup_paths(tree: Tree) -> dict[str, str]:
    """Return the path of the process's cgroup per controller; the unified hierarchy's is under the empty name."""
    path_of = {}
    for line in (tree.text("proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            path_of[controller] = path
    if "cpuset" not in path_of:
        cpuset = tree.text("proc/self/cpuset")
        if cpuset:
            path_of["cpuset"] = cpuset
    return path_of
