"""What passes between the driver and those who compute: items of work, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raypatch.definitions import Experiments
from raypatch.errors import RunError
from raypatch.results import layout
from raypatch.sweeps.pool import Failed

if TYPE_CHECKING:
    from raypatch.sweeps.shipping import Shipment
    from raypatch.sweeps.worker import WorkerSpec


@dataclass(frozen=True)
class Item:
    """A contiguous range of experiments: the unit that is computed, retried and committed.

    ``skip`` are experiments in it that failed every try and get no rows.
    """

    number: int
    first: int
    last: int
    skip: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return f"item {self.number} (experiments {self.first} to {self.last - 1})"

    @property
    def indices(self) -> np.ndarray:
        """Experiments to compute, int64."""
        indices = np.arange(self.first, self.last, dtype=np.int64)
        return indices[~np.isin(indices, list(self.skip))] if self.skip else indices

    def halves(self) -> tuple[Item, Item] | None:
        """Two items that cover this one; None where it is a single experiment."""
        if self.last - self.first < 2:
            return None
        middle = (self.first + self.last) // 2
        return Item(self.number, self.first, middle), Item(self.number, middle, self.last)

    def without(self, pieces: list[Item]) -> Item:
        """The same range, leaving out the experiments of these pieces."""
        left_out = [index for piece in pieces for index in range(piece.first, piece.last)]
        return Item(self.number, self.first, self.last, self.skip.union(left_out))


@dataclass(frozen=True)
class Quarantined:
    """An experiment that failed every try, alone; the rest of the run goes on."""

    experiment: int
    error: str
    tries: int


@dataclass(frozen=True)
class Outcome:
    """What a worker tells of a finished item.

    ``samples`` maps an experiment to its patched outputs ``[directions, inputs, outputs]``.
    ``files`` holds what the driver is to write, where the worker cannot see the output.
    """

    receipt: layout.Receipt
    samples: dict[int, np.ndarray] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a backend is to compute: items in order, and how to get an item's experiments.

    After ``stopping()`` is true nothing more is sent; what is in flight still comes.
    """

    spec: WorkerSpec
    items: Iterator[Item]
    n_items: int
    experiments_of: Callable[[Item], Experiments]
    stopping: Callable[[], bool]


@dataclass(frozen=True)
class Tick:
    """State of the pool, given between outcomes so that the driver can show and decide."""

    actors: int
    retries: int
    in_flight: int


def verdict(failed: Failed[Item], error: str) -> Quarantined:
    """The experiment to quarantine; raises RunError where there is none to blame."""
    if failed.hopeless:
        raise RunError(
            f"{failed.item} failed {failed.tries} times, though each of its experiments can be "
            f"computed alone: {error}; run the same command again to resume"
        )
    return Quarantined(failed.item.first, error, failed.tries)


class Backend(Protocol):
    """Where the work is done; entered before anything is read, so that it may start meanwhile."""

    name: str
    device: str  # "cpu" or "cuda", settled once it has started

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...

    def wait_started(self) -> None:
        """Wait until the device is known; raises InputError or RunError where there is none."""

    def packed(self, value: Any, folders: Sequence[Path]) -> Shipment:
        """A value for workers, with the user's code from these folders where they lack it."""

    def outcomes(self, work: Work) -> Generator[Outcome | Quarantined | Tick, None, None]:
        """Outcomes as items finish, verdicts on experiments that cannot be computed, and a tick at
        least every fraction of a second."""
