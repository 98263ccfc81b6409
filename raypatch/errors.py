"""The errors raypatch raises on purpose; each ends in one line for the user.

Anything else that escapes is a bug and keeps its traceback. All of them survive
pickling, because they cross process borders between actors and driver.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RaypatchError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command ends with."""

    exit_code = 1


class InputError(RaypatchError):
    """The user's input is wrong: the text names the value, the place and the fix."""

    exit_code = 2


def few(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def offer(name: str, valid: Sequence[str]) -> str:
    """What to write instead of a name that does not exist: those that look like it, else all."""
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"valid: {few(valid, limit=20)}"


def missing_package(what: str, package: str, extra: str) -> str:
    """What to say where something needs a package that is not installed."""
    return f"{what} needs {package}: pip install {package} (or 'raypatch[{extra}]' for all of it)"


class AgentError(InputError):
    """The agent's files cannot be read or need something the user has not allowed."""


class RunError(RaypatchError):
    """The run itself failed: an actor that cannot start, a full disk."""


class NoRoomError(RunError):
    """One experiment takes more memory than there is: the fault of that experiment, in a sweep."""


class VerificationError(RunError):
    """Numbers are not what the reference or a new computation gives."""


class Interrupted(RaypatchError):
    """A signal ended the run in order; what was committed is kept."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return str(self.args[0])


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no room for a tensor: the CPU's allocator, CUDA itself, cuBLAS and cuDNN
    have words of their own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def gpu_failed(error: BaseException) -> bool:
    """Whether CUDA gave up: it refuses everything that the same process asks of it afterwards."""
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def is_not_of_network(error: BaseException) -> bool:
    """Whether an error out of a network's forward is none of the network's own: one raised on
    purpose, no room, or a GPU that gave up."""
    return isinstance(error, RaypatchError) or gpu_failed(error) or out_of_memory(error)


def one_line(error: BaseException) -> str:
    """First line of an error's text, prefixed with its type where the text alone says little."""
    if isinstance(error, RaypatchError):
        return first_line(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {first_line(error) if text else ''}"


def first_line(error: BaseException) -> str:
    """First line of an error's text, its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
