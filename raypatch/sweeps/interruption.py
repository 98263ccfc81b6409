"""Ctrl-C and SIGTERM during a run: the first ends it in order, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from raypatch.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Set by the first SIGINT or SIGTERM; the second one stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def catch(self) -> None:
        """Handle the signals; again once Ray has started, which puts a handler of its own before
        this one. Outside the main thread they stay as they are."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.handle)

    def check(self) -> None:
        """Raises Interrupted where nothing has begun that would have to be finished."""
        if self.signal_number is not None:
            raise Interrupted(
                "stopped before anything was computed; run the same command again to go on",
                self.signal_number,
            )

    def handle(self, number: int, frame: FrameType | None) -> None:
        if hasattr(signal, "alarm"):
            signal.alarm(0)  # Ray's handler has the process aborted after three seconds
        if self.signal_number is not None and not _imports(frame):
            raise Interrupted(
                "stopped at once; committed results are kept, run the same command again to resume",
                number,
            )
        self.signal_number = number


def _imports(frame: FrameType | None) -> bool:
    """Whether Python is in the middle of an import: what is raised there may leave its locks held,
    for ever. The run ends after it, at the next :meth:`Interruption.check`."""
    while frame is not None and frame.f_code.co_name != "run_config":  # which may be in one itself
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def termination_raised() -> Iterator[None]:
    """Within, SIGTERM is an exception, so that what is half written is removed on the way out; a
    run has a way of its own, :func:`signals_caught`."""

    def handle(number: int, _: FrameType | None) -> None:
        raise Interrupted("stopped at once; nothing half-written is left", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def signals_caught() -> Iterator[Interruption]:
    """Turn signals into an orderly end."""
    interruption = Interruption()
    held = {number: signal.getsignal(number) for number in SIGNALS}
    interruption.catch()
    try:
        yield interruption
    except SystemError as error:
        if isinstance(error.__cause__, Interrupted):  # raised while Ray's compiled code ran
            raise error.__cause__ from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in held.items():
                if handler is not None:  # else it was not set by Python
                    signal.signal(number, handler)
