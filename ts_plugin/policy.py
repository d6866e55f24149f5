"""What ``cpu_launcher_args`` asks for: its words in, one immutable Policy out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Allocator", "LauncherArgsError", "Memory", "OmpRuntime", "Pin", "Policy", "parse_launcher_args"]


class LauncherArgsError(ValueError):
    """``cpu_launcher_args`` cannot be understood; the message names the word and its nearest match."""


class Pin(StrEnum):
    AUTO = "auto"  # pin unless a CFS quota says that the CPUs are shared with strangers
    ALWAYS = "always"
    NEVER = "never"


class Memory(StrEnum):
    PREFERRED = "preferred"
    BIND = "bind"
    LOCAL = "local"
    NONE = "none"


class Allocator(StrEnum):
    DEFAULT = "default"  # glibc's
    TCMALLOC = "tcmalloc"
    JEMALLOC = "jemalloc"


class OmpRuntime(StrEnum):
    DEFAULT = "default"  # the one inside the torch wheel
    INTEL = "intel"


@dataclass(frozen=True, slots=True)
class Policy:
    """How slices are cut and workers are bound.

    ``node_ids`` and ``core_list`` (CPU numbers) narrow the allowed CPUs; None means no narrowing.
    ``cores_per_worker`` is one number for all workers or one per worker in order of arrival.
    ``logical`` gives a slice both SMT siblings of its cores. ``notes`` say which words were accepted without effect.
    """

    node_ids: frozenset[int] | None = None
    core_list: frozenset[int] | None = None
    cores_per_worker: tuple[int, ...] = ()
    logical: bool = False
    skip_cross_node_cores: bool = False
    equal: bool = False
    latency: bool = False
    use_e_cores: bool = False
    reserve_cores: int = 0
    pin: Pin = Pin.AUTO
    memory: Memory = Memory.PREFERRED
    allocator: Allocator | None = None
    omp_runtime: OmpRuntime | None = None
    notes: tuple[str, ...] = ()


def parse_launcher_args(text: str) -> Policy:
    """Return the Policy that ``text``, the value of ``cpu_launcher_args``, describes.

    Raises:
        LauncherArgsError: an unknown or contradicting word.
    """
    raise NotImplementedError
