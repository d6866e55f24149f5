"""How far a trial is, and about how long it still takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn


class Stage:
    def __init__(self, show: Show, what: str, seconds: float) -> None:
        self._show = show
        self._what = what
        self.seconds = seconds

    def tell(self, what: str, left: float) -> None:
        self._show.update(f"{self._what}: {what}", left)


class Show:
    """The progress, on stderr: a bar where that is a terminal, else a line per stage."""

    def __init__(self, models: int, seconds: float) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._budget = models * seconds
        self._planned = 1.0  # of the budget, for what has not begun
        self._began = time.monotonic()
        bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[left]}"))
        self._progress = Progress(*bar, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("", total=1.0, left="")

    def __enter__(self) -> Show:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def stage(self, what: str, part: float) -> Iterator[Stage]:
        """Begin what takes such a part of the time."""
        self._planned = max(self._planned - part, 0.0)
        if not self._console.is_terminal:
            self._console.print(f"{what} ...", soft_wrap=True)
        left = self._began + self._budget * (1 - self._planned) - time.monotonic()
        yield Stage(self, what, max(min(part * self._budget * 1.3, left), part * self._budget / 2))

    def update(self, what: str, left: float) -> None:
        elapsed = time.monotonic() - self._began
        left = max(left, 0.0) + self._planned * self._budget
        told = f"about {left / 60:.0f} min left" if left >= 90 else f"about {max(round(left, -1), 5):.0f} s left"
        self._progress.update(
            self._task, description=what, completed=elapsed, total=elapsed + left, left=told, refresh=True
        )

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
