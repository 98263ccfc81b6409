"""What a person sees while a run goes on, on a terminal or in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from raypatch.terminal import say

LOG_EVERY_S = 5.0


class Progress:
    """One moving line on a terminal, plain lines every few seconds elsewhere.

    Writes to stderr; ``quiet`` writes nothing. Use as a context manager.
    """

    def __init__(self, n_experiments: int, passes_each: int, *, quiet: bool) -> None:
        self.n_experiments = n_experiments
        self.passes_each = passes_each
        self.done = 0
        self.actors = 0
        self.retries = 0
        self.quarantined = 0
        # Seconds until the first actor stood.
        self.startup_seconds = 0.0
        self._quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.BarColumn(bar_width=24),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.description}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.text(), total=self.n_experiments)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def passes_per_second(self) -> float:
        return self.done * self.passes_each / max(self.seconds, 1e-9)

    def text(self) -> str:
        """The line without its bar."""
        retries = f", {self.retries} retried" if self.retries else ""
        failed = f", {self.quarantined} quarantined" if self.quarantined else ""
        actors = counted(self.actors, "actor")
        return (
            f"{self.done:,} of {self.n_experiments:,} experiments, "
            f"{short_number(self.passes_per_second)} passes/s, {actors}{retries}{failed}"
        )

    def update(
        self, *, experiments: int = 0, actors: int | None = None, retries: int = 0,
        quarantined: int = 0,
    ) -> None:  # fmt: skip
        """Count finished experiments and show where the run is."""
        self.done += experiments
        if actors and not self.actors:
            self.startup_seconds = self.seconds
        self.actors = self.actors if actors is None else actors
        self.retries = max(self.retries, retries)
        self.quarantined = max(self.quarantined, quarantined)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=self.text())
        elif not self._quiet and time.monotonic() - self._last_line >= LOG_EVERY_S:
            self._last_line = time.monotonic()
            ending = "starting"  # nothing is known before the first item is done
            if self.done:
                left = (self.n_experiments - self.done) * self.seconds / self.done
                ending = f"{duration(left)} left"
            say(f"{self.text()}, {ending}")


def short_number(value: float) -> str:
    """1234567 as 1.2 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f}"


def counted(number: int, noun: str) -> str:
    """1 actor, 2 actors."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for people: 8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
