"""What a worker has learned of its requests: how long they take on how many threads, and so which widths are worth it.

Nothing is predicted here. A width that does not make requests faster than a narrower one is left alone for a while,
which doubles each time it is tried in vain: the model gains nothing by more cores, or another program uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WORTH = 0.95  # of the time on fewer threads that a request may take, or the width is not worth it
KNOWN = 2  # requests on the slice alone that are measured before the first one borrows
MEMORY = 16  # requests over which a time is averaged
RECENT = 0.5  # weight of the latest request where a width is judged
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 64.0  # seconds that a width is left alone
GOOD_AGAIN = 3  # good requests in a row after which a pause starts small again


@dataclass(slots=True)
class _Width:
    """The requests on one number of threads. The first is not counted: oneDNN prepares its primitives in it."""

    requests: int = 0
    mean: float = 0.0
    recent: float = 0.0
    good: int = 0
    pause: float = FIRST_PAUSE
    until: float = 0.0  # left alone until then

    def add(self, seconds: float) -> None:
        self.requests += 1
        if self.requests < 2:
            return
        count = min(self.requests - 1, MEMORY)
        self.mean += (seconds - self.mean) / count
        self.recent = self.recent + RECENT * (seconds - self.recent) if self.recent else seconds


class Gains:
    """What requests of a worker with a slice of ``own`` threads gain by more. Times in seconds, ``now`` monotonic."""

    def __init__(self, own: int) -> None:
        self._own = own
        self._widths: dict[int, _Width] = {own: _Width()}

    def prime(self, profile: Mapping[int, float]) -> None:
        """Start with what was measured before, threads -> seconds."""
        for threads, seconds in profile.items():
            if threads >= self._own:
                self._widths[threads] = _Width(KNOWN + 1, seconds)

    @property
    def alone(self) -> float:
        """Return how long a request takes on the slice alone; 0 where that is not known yet."""
        alone = self._widths[self._own]
        return alone.mean if alone.requests > KNOWN else 0.0

    @property
    def times(self) -> dict[int, float]:
        """Return mean service times by threads."""
        return {threads: width.mean for threads, width in sorted(self._widths.items()) if width.mean}

    def most(self, threads: int, now: float) -> int:
        """Return how many of ``threads`` a request may take."""
        if not self.alone:
            return self._own
        left_alone = [tried for tried, width in self._widths.items() if tried > self._own and now < width.until]
        return min([threads, *(tried - 1 for tried in left_alone)])

    def learn(self, threads: int, seconds: float, now: float) -> None:
        """Take a request into account that computed on ``threads`` threads all the time, or as long as its budget."""
        width = self._widths.setdefault(threads, _Width())
        width.add(seconds)
        if threads == self._own or not width.mean:
            return
        narrower = [other.mean for tried, other in self._widths.items() if tried < threads and other.mean]
        if width.recent > WORTH * min(narrower):
            width.until, width.pause = now + width.pause, min(2 * width.pause, LONGEST_PAUSE)
            width.recent, width.good = 0.0, 0
        else:
            width.good += 1
            if width.good >= GOOD_AGAIN:
                width.pause = FIRST_PAUSE
