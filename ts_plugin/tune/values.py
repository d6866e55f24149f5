"""What tune measures, chooses and finds for one model: plain data between its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ts_plugin.machine.words import count

LOAD = 0.7  # of the throughput at full load: what a server may be asked for in the long run
DEFAULT = "TorchServe's default"
NOW = "what runs now"
BETTER = 1.02


def fitting(limit: int, first: int, further: int) -> int:
    """Return how many processes fit into ``limit`` bytes: ``first`` for one, ``further`` for each other."""
    return 0 if limit < first else 1 + (limit - first) // max(further, 1)


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

    @property
    def fits(self) -> int:
        """How many workers memory has room for; one is always tried."""
        return max(fitting(self.free_memory, self.first_memory, self.next_memory), 1)

    def memory(self, workers: int) -> int:
        """Return the bytes of so many workers."""
        return self.first_memory + (workers - 1) * self.next_memory


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted: ``p99`` in seconds at most, or None; ``rate`` in requests/s to be served, or None: the most."""

    p99: float | None = None
    rate: float | None = None

    def serves(self, throughput: float) -> bool:
        """Tell whether the rate is a load of 0.7 at most."""
        return self.rate is None or self.rate <= LOAD * throughput

    def met(self, throughput: float, p99: float) -> bool:
        """Tell whether the rate is served, and the 99th percentile holds at it."""
        return self.serves(throughput) and (self.p99 is None or p99 <= self.p99)


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

    def __str__(self) -> str:
        """Return for example ``2 workers x 1 core, batch 4``."""
        return f"{count(self.workers, 'worker')} x {count(self.threads, 'core')}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What the real server did with ``choice``, or with settings that are no choice of ours.

    ``throughput`` in requests/s at full load, ``spread`` half of what lies between its lowest and highest repetition.
    ``p50`` and ``p99`` in seconds, at ``rate`` requests/s, which all rows had. ``failed`` requests of all.
    ``throughputs`` are those of the repetitions.
    """

    name: str
    choice: Choice | None
    throughput: float
    spread: float
    p50: float
    p99: float
    failed: int
    rate: float = 0.0
    throughputs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Advice:
    """Something outside of slices that was measured: requests/s ``before`` and ``after``, and ``how`` to get it."""

    what: str
    before: float
    after: float
    how: str


@dataclass(frozen=True, slots=True)
class Result:
    """All that is found for one model; ``name`` and ``version`` are its manifest's.

    ``choice`` is what tune advises, ``measured`` what the server did with it: one of ``confirmed``.
    """

    name: str
    version: str
    profile: Profile
    target: Target
    choices: tuple[Choice, ...]
    choice: Choice
    measured: Confirmed
    confirmed: tuple[Confirmed, ...]
    advice: tuple[Advice, ...] = ()

    @property
    def better(self) -> Confirmed | None:
        """What does more than 2 % better than the choice although it is none of ours: then nothing should be changed.

        With a rate alone that is a lower 99th percentile, otherwise more throughput within the target.
        """
        measured, target = self.measured, self.target
        for row in self.confirmed:
            if row.choice is not None or row.failed or row.p99 > (target.p99 or math.inf):
                continue
            if target.rate is not None and target.p99 is None:
                if row.p99 * BETTER < measured.p99 and target.serves(row.throughput):
                    return row
            elif row.throughput > measured.throughput * BETTER:
                return row
        return None

    @property
    def met(self) -> bool:
        """Whether the target is met, by what was measured."""
        return self.target.met(self.measured.throughput, self.measured.p99)
