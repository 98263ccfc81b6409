"""Ctrl-C and SIGTERM during a run: the first ends it in order, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raypatch.errors import Interrupted


class Interruption:
    """Set by the first SIGINT or SIGTERM; the second one stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def handle(self, number: int, _: Any) -> None:
        if self.signal_number is not None:
            raise Interrupted(
                "stopped at once; committed results are kept, run the same command again to resume",
                number,
            )
        self.signal_number = number


@contextmanager
def signals_caught() -> Iterator[Interruption]:
    """Turn signals into an orderly end; outside the main thread they stay as they are."""
    interruption = Interruption()
    held: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            held[number] = signal.signal(number, interruption.handle)
    except ValueError:  # not the main thread
        held = {}
    try:
        yield interruption
    except SystemError as error:
        if isinstance(error.__cause__, Interrupted):  # raised while Ray's compiled code ran
            raise error.__cause__ from None
        raise
    finally:
        for held_number, handler in held.items():
            signal.signal(held_number, handler)
