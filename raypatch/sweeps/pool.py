"""Who computes what: the dispatch state of a run, pure and testable without a cluster.

Events go in (an actor is ready, finished its oldest item, failed it, died), instructions and
verdicts come out. Asking never changes state. One record an actor; the items not yet sent are
drawn from an iterator, so a sweep of any length costs the same memory.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

IN_FLIGHT_PER_ACTOR = 2
MAX_TRIES = 3
# Actors lost with their node or preempted: nobody's fault, but not for ever either.
MAX_NODE_LOSSES = 1000


class TooManyLosses(Exception):
    """Nodes were lost more often than the run's budget allows."""


@dataclass(frozen=True)
class Send(Generic[T]):
    """Instruction: let this actor compute this item; ``tries`` counts this one.

    A ``probe`` is computed only to see whether it can be: nothing is written.
    """

    actor: int
    item: T
    tries: int
    probe: bool


@dataclass(frozen=True)
class Failed(Generic[T]):
    """Verdict: this piece cannot be halved and failed its last try; its item leaves it out.

    ``hopeless`` says instead that a whole item failed again with nothing left to leave out.
    """

    item: T
    tries: int
    hopeless: bool = False


@dataclass(frozen=True)
class _Task(Generic[T]):
    """What is sent: an item, or a piece of the item under suspicion ``of``."""

    item: T
    failures: int = 0
    of: _Suspicion[T] | None = None
    # Sent again after a suspicion was settled: it has nothing more to be halved for.
    settled: bool = False


@dataclass(eq=False)
class _Suspicion(Generic[T]):
    """An item that failed every try, while its pieces are probed."""

    item: T
    open_pieces: int
    at_fault: list[T] = field(default_factory=list)


@dataclass
class _Actor(Generic[T]):
    """Tasks sent and not answered, oldest first: the head is the one being computed."""

    in_flight: deque[_Task[T]] = field(default_factory=deque)


class Dispatch(Generic[T]):
    """Hands out items to actors, two in flight each, and again after a failure.

    Only the item at the head of an actor's queue is charged with a failed try: the others
    were waiting and are not to blame. An item that failed all its tries is probed in halves,
    and halves of halves, with one try each, until the pieces at fault stand alone; each of
    those has all its tries once more before the verdict. Then the whole item is sent again
    without them, so that the borders of items never depend on what failed.

    ``halve`` gives an item's halves, or None where it is a single experiment; ``without``
    gives an item that leaves pieces out.
    """

    def __init__(
        self,
        items: Iterator[T],
        *,
        halve: Callable[[T], tuple[T, T] | None] = lambda _: None,
        without: Callable[[T, list[T]], T] = lambda item, _: item,
        in_flight_per_actor: int = IN_FLIGHT_PER_ACTOR,
        max_tries: int = MAX_TRIES,
    ) -> None:
        self._items = items
        self._halve = halve
        self._without = without
        self._again: deque[_Task[T]] = deque()
        self._actors: dict[int, _Actor[T]] = {}
        self._in_flight_per_actor = in_flight_per_actor
        self._max_tries = max_tries
        self._free: list[tuple[int, int]] = []
        self._n_in_flight = 0
        self._exhausted = False
        self._stopping = False
        self.retries = 0
        self.node_losses = 0

    @property
    def n_actors(self) -> int:
        return len(self._actors)

    @property
    def n_in_flight(self) -> int:
        return self._n_in_flight

    @property
    def done(self) -> bool:
        """Nothing is in flight and nothing is left to send."""
        waiting = not self._stopping and (self._again or not self._exhausted)
        return not waiting and self.n_in_flight == 0

    def stop(self) -> None:
        """Send nothing more; what is in flight may finish."""
        self._stopping = True

    def add_actor(self, actor: int) -> None:
        """An actor is ready; its number was never used before."""
        if actor in self._actors:
            raise ValueError(f"actor {actor} is in the pool already")
        self._actors[actor] = _Actor()
        heapq.heappush(self._free, (0, actor))

    def sends(self) -> list[Send[T]]:
        """Draw and assign all that may be sent now, least busy actors first."""
        instructions: list[Send[T]] = []
        while not self._stopping and (number := self._least_busy()) is not None:
            task = self._draw()
            if task is None:
                break
            self._load(number, task)
            instructions.append(Send(number, task.item, task.failures + 1, task.of is not None))
        return instructions

    def _least_busy(self) -> int | None:
        """The actor with the least in flight, the first of them; None where all are full.

        A heap of (load, actor) in which entries that are out of date are passed over: with
        thousands of actors a search through all of them would be most of the driver's time.
        """
        while self._free:
            load, number = self._free[0]
            actor = self._actors.get(number)
            if actor is not None and len(actor.in_flight) == load < self._in_flight_per_actor:
                return number
            heapq.heappop(self._free)
        return None

    def _load(self, number: int, task: _Task[T]) -> None:
        in_flight = self._actors[number].in_flight
        in_flight.append(task)
        self._n_in_flight += 1
        heapq.heappush(self._free, (len(in_flight), number))

    def _unload(self, number: int) -> _Task[T]:
        in_flight = self._actors[number].in_flight
        task = in_flight.popleft()
        self._n_in_flight -= 1
        heapq.heappush(self._free, (len(in_flight), number))
        return task

    def _remove(self, number: int) -> list[_Task[T]]:
        held = list(self._actors.pop(number).in_flight)
        self._n_in_flight -= len(held)
        return held

    def _draw(self) -> _Task[T] | None:
        if self._again:
            return self._again.popleft()
        item = next(self._items, None)
        if item is None:
            self._exhausted = True
            return None
        return _Task(item)

    def head(self, actor: int) -> T | None:
        """What an actor computes now."""
        in_flight = self._actors[actor].in_flight
        return in_flight[0].item if in_flight else None

    def busy_actors(self) -> list[int]:
        """Actors that have something to compute."""
        return [number for number, actor in self._actors.items() if actor.in_flight]

    def item_completed(self, actor: int) -> T:
        """An actor finished its oldest item."""
        task = self._unload(actor)
        if task.of is not None:
            self._piece_settled(task.of)
        return task.item

    def item_failed(self, actor: int) -> Failed[T] | None:
        """An actor's oldest item ended in an error; the actor itself lives."""
        return self._charge(self._unload(actor))

    def actor_died(self, actor: int) -> Failed[T] | None:
        """An actor is gone: its items go back to the front, its head is charged."""
        in_flight = self._remove(actor)
        self._again.extendleft(reversed(in_flight[1:]))
        return self._charge(in_flight[0]) if in_flight else None

    def actor_lost(self, actor: int) -> None:
        """An actor is gone with its node or was preempted: no item is charged.

        Raises TooManyLosses past the budget.
        """
        self._again.extendleft(reversed(self._remove(actor)))
        self.node_losses += 1
        if self.node_losses > MAX_NODE_LOSSES:
            raise TooManyLosses(f"{self.node_losses} actors were lost with their nodes")

    def _charge(self, task: _Task[T]) -> Failed[T] | None:
        failures = task.failures + 1
        self.retries += 1
        if failures < self._max_tries:
            self._again.appendleft(_Task(task.item, failures, task.of, task.settled))
            return None
        if task.settled:
            return Failed(task.item, failures, hopeless=True)
        suspicion = task.of
        if suspicion is None:
            suspicion = _Suspicion(task.item, open_pieces=1)
        halves = self._halve(task.item)
        if halves is None:
            suspicion.at_fault.append(task.item)
            self._piece_settled(suspicion)
            return Failed(task.item, failures)
        suspicion.open_pieces += 1
        for half in reversed(halves):
            alone = self._halve(half) is None
            self._again.appendleft(_Task(half, 0 if alone else self._max_tries - 1, suspicion))
        return None

    def _piece_settled(self, suspicion: _Suspicion[T]) -> None:
        suspicion.open_pieces -= 1
        if not suspicion.open_pieces:
            item = self._without(suspicion.item, suspicion.at_fault)
            self._again.appendleft(_Task(item, settled=True))
