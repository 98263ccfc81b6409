"""Who computes what: the dispatch state of a run, pure and testable without a cluster.

Events go in (an actor is ready, finished its oldest item, died), instructions come out
(send this item to that actor). Asking never changes state. One record an actor; the items
not yet sent are drawn from an iterator, so a sweep of any length costs the same memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

IN_FLIGHT_PER_ACTOR = 2
MAX_TRIES = 3


@dataclass(frozen=True)
class Send(Generic[T]):
    """Instruction: give this item to this actor. ``tries`` counts this attempt, from 1."""

    actor: int
    item: T
    tries: int


@dataclass
class _Actor(Generic[T]):
    """Items sent and not answered, oldest first: the head is the one being computed."""

    in_flight: deque[tuple[T, int]] = field(default_factory=deque)


class Dispatch(Generic[T]):
    """Hands out items to actors, two in flight each, and again after a death.

    Only the item at the head of a dead actor's queue is charged with a try: the others were
    waiting and are not to blame.
    """

    def __init__(
        self,
        items: Iterator[T],
        *,
        in_flight_per_actor: int = IN_FLIGHT_PER_ACTOR,
        max_tries: int = MAX_TRIES,
    ) -> None:
        self._items = items
        self._retry: deque[tuple[T, int]] = deque()
        self._actors: dict[int, _Actor[T]] = {}
        self._in_flight_per_actor = in_flight_per_actor
        self._max_tries = max_tries
        self._exhausted = False
        self._stopping = False
        self.retries = 0
        self.completed = 0

    @property
    def n_actors(self) -> int:
        return len(self._actors)

    @property
    def n_in_flight(self) -> int:
        return sum(len(actor.in_flight) for actor in self._actors.values())

    @property
    def done(self) -> bool:
        """Nothing is in flight and nothing is left to send."""
        waiting = not self._stopping and (self._retry or not self._exhausted)
        return not waiting and self.n_in_flight == 0

    def stop(self) -> None:
        """Send nothing more; what is in flight may finish."""
        self._stopping = True

    def add_actor(self, actor: int) -> None:
        """An actor is ready to compute."""
        if actor in self._actors:
            raise ValueError(f"actor {actor} is in the pool already")
        self._actors[actor] = _Actor()

    def sends(self) -> list[Send[T]]:
        """Items to send now, given to the least loaded actors first; each is in flight from
        here on."""
        instructions: list[Send[T]] = []
        while not self._stopping:
            free = [
                a for a, r in self._actors.items() if len(r.in_flight) < self._in_flight_per_actor
            ]
            if not free:
                break
            actor = min(free, key=lambda a: len(self._actors[a].in_flight))
            drawn = self._draw()
            if drawn is None:
                break
            item, failures = drawn
            self._actors[actor].in_flight.append((item, failures))
            instructions.append(Send(actor, item, failures + 1))
        return instructions

    def _draw(self) -> tuple[T, int] | None:
        if self._retry:
            return self._retry.popleft()
        item = next(self._items, None)
        if item is None:
            self._exhausted = True
            return None
        return item, 0

    def head(self, actor: int) -> T | None:
        """The item an actor is computing."""
        in_flight = self._actors[actor].in_flight
        return in_flight[0][0] if in_flight else None

    def item_completed(self, actor: int) -> T:
        """An actor finished its oldest item."""
        item, _ = self._actors[actor].in_flight.popleft()
        self.completed += 1
        return item

    def actor_died(self, actor: int) -> T | None:
        """An actor is gone: its items go back to the front of the queue.

        Returns the item at its head if that one has now failed for the last time.
        """
        in_flight = self._actors.pop(actor).in_flight
        given_up = None
        bystanders = list(in_flight)[1:]
        self._retry.extendleft(reversed(bystanders))
        if in_flight:
            item, failures = in_flight[0]
            if failures + 1 >= self._max_tries:
                given_up = item
            else:
                self._retry.appendleft((item, failures + 1))
                self.retries += 1
        return given_up
