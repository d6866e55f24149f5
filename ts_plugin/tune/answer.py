"""What tune answers for one model: plain data between confirming, reporting and setting it."""

from __future__ import annotations

from dataclasses import dataclass

from ts_plugin.tune.choose import LOAD, met
from ts_plugin.tune.profile import Choice, Profile, Target

__all__ = ["DEFAULT", "NOW", "Advice", "Answer", "Confirmed"]

DEFAULT = "TorchServe's default"
NOW = "what runs now"


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What the real server did with ``choice``, or with settings that are no choice of ours.

    ``throughput`` in requests/s at full load, ``spread`` half of what lies between its lowest and highest repetition.
    ``p50`` and ``p99`` in seconds, at ``rate`` requests/s, which all rows had. ``failed`` requests of all.
    """

    name: str
    choice: Choice | None
    throughput: float
    spread: float
    p50: float
    p99: float
    failed: int
    rate: float = 0.0


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
    def met(self) -> bool:
        """Whether the target is met, by what was measured if anything was."""
        row, target = self.measured, self.target
        if row is None:
            return met(self.choice, target)
        served = target.rate is None or target.rate <= LOAD * row.throughput
        return served and (target.p99 is None or row.p99 <= target.p99)
