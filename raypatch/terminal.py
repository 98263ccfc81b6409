"""What people read: notes on stderr, tables and facts on stdout."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PIPE_WIDTH = 240


def open_standard_streams() -> None:
    """Where one is closed, as by ``2>&-``, what is written there is dropped; the next file that is
    opened must not become it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115, open to the end


def leave_nothing_to_flush() -> None:
    """What could not be written is dropped: Python would try again at its end, and fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """A line on stderr; work goes on where nobody can read it."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def console() -> Any:
    """On a terminal as wide as that is. Elsewhere nothing is gained by folding: a program may read
    it."""
    from rich.console import Console

    class Printer(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich itself ends the process, as a failure

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Printer(highlight=False, width=None if is_terminal else PIPE_WIDTH)
