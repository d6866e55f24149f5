"""What an archive's handler costs, measured without a server: plain data between measuring, choosing and reporting."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cell", "Choice", "Profile", "Target"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch of ``batch`` requests on ``threads`` cores, while ``instances`` processes did the same at once.

    ``seconds`` is the mean time of one batch in one process, ``variation`` the squared coefficient of variation.
    """

    threads: int
    batch: int
    instances: int
    seconds: float
    variation: float
    samples: int


@dataclass(frozen=True, slots=True)
class Profile:
    """An archive on this machine. Memory is in bytes: of the first process, and what each further one adds (PSS)."""

    archive: str  # file name
    cores: int  # that may be used
    node_cores: int  # of the smallest NUMA node among them: a slice is no larger
    first_memory: int
    next_memory: int
    free_memory: int
    batches: bool  # whether the handler answers a batch of several requests
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted: ``p99`` in seconds at most, or None; ``rate`` in requests/s to be served, or None: the most."""

    p99: float | None = None
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """``workers`` with ``threads`` cores each and batches of at most ``batch``, and what is expected of it.

    ``throughput`` in requests/s at full load. ``p99`` in seconds at ``rate`` requests/s: the target's, or 0.7 of the
    throughput. ``memory`` in bytes, of all workers.
    """

    workers: int
    threads: int
    batch: int
    batch_delay_ms: int
    throughput: float
    rate: float
    p99: float
    memory: int
