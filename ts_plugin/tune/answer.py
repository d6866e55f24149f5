"""What tune answers for one model: plain data between confirming, reporting and setting it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ts_plugin.tune.profile import Choice, Profile, Target

__all__ = ["DEFAULT", "NOW", "Advice", "Answer", "Confirmed"]

DEFAULT = "TorchServe's default"
NOW = "what runs now"
BETTER = 1.02


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
class Answer:
    """All that is known of one model; ``name`` and ``version`` are its manifest's, ``choice`` is what tune advises."""

    name: str
    version: str
    profile: Profile
    target: Target
    choices: tuple[Choice, ...]
    choice: Choice
    confirmed: tuple[Confirmed, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def measured(self) -> Confirmed | None:
        """What the server did with the choice, if it was confirmed."""
        return next((row for row in self.confirmed if row.choice == self.choice), None)

    @property
    def better(self) -> Confirmed | None:
        """What does more than 2 % better than the choice although it is none of ours: then nothing should be changed.

        With a rate alone that is a lower 99th percentile, otherwise more throughput within the target.
        """
        own, target = self.measured, self.target
        for row in self.confirmed:
            if own is None or row.choice is not None or row.failed or row.p99 > (target.p99 or math.inf):
                continue
            if target.rate is not None and target.p99 is None:
                if row.p99 * BETTER < own.p99 and target.serves(row.throughput):
                    return row
            elif row.throughput > own.throughput * BETTER:
                return row
        return None

    @property
    def met(self) -> bool:
        """Whether the target is met, by what was measured if anything was."""
        known = self.measured or self.choice
        return self.target.met(known.throughput, known.p99)
