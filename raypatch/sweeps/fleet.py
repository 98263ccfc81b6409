"""Actor handles and what happens to them: ready, done, failed, died, lost.

The Ray module is handed in; this file decides what Ray's errors mean for the pool.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from raypatch.definitions import Experiments
from raypatch.errors import (
    NoRoomError,
    RaypatchError,
    RunError,
    gpu_failed,
    one_line,
    out_of_memory,
)
from raypatch.sweeps.pool import Dispatch, Send

if TYPE_CHECKING:
    from raypatch.sweeps.work import Item, Outcome

WAIT_S = 0.2
# Actors that die while they start, one after another with none standing, before giving up.
MAX_START_FAILURES = 5


class Watchdog:
    """Actors whose oldest item has not been answered for too long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: dict[int, tuple[object, float]] = {}

    def overdue(self, dispatch: Dispatch[Item]) -> list[int]:
        """Actors to end now; each is named once an item. Clock: monotonic."""
        now, found = time.monotonic(), []
        busy = dispatch.busy_actors()
        self._since = {actor: held for actor, held in self._since.items() if actor in busy}
        for actor in busy:
            head = dispatch.head(actor)
            held = self._since.get(actor)
            if held is None or held[0] != head:
                self._since[actor] = (head, now)
            elif now - held[1] > self._limit_s:
                self._since[actor] = (head, float("inf"))
                found.append(actor)
        return found


@dataclass(frozen=True)
class Event:
    """What an actor did: ``ready``, or ``unstarted`` where it ended before; ``done`` with its
    oldest item or ``failed`` it; ``died``, or was ``lost`` with its node."""

    actor: int
    kind: Literal["ready", "unstarted", "done", "failed", "died", "lost"]
    outcome: Outcome | None = None
    error: str = ""


@dataclass(frozen=True)
class _Pending:
    """A reference being waited for; ``order`` is that of sending."""

    actor: int
    starting: bool
    order: int


@dataclass(eq=False)
class Crew:
    """Actors of one kind: their class, the device they compute on, those started early.

    ``size`` counts those that stand or are starting.
    """

    actor_class: Any
    device: str
    early: list[Any] = field(default_factory=list)
    size: int = 0


class Fleet:
    """Actor handles of all crews and the references being waited for."""

    def __init__(self, ray: Any, crews: Sequence[Crew], spec_ref: Any) -> None:
        self._ray = ray
        self._crews = crews
        self._spec_ref = spec_ref
        self._handles: dict[int, Any] = {}
        self._crew_of: dict[int, Crew] = {}
        self._pending: dict[Any, _Pending] = {}
        self._numbers = itertools.count()
        self._orders = itertools.count()
        self._start_failures = 0

    def grow(self, sizes: Sequence[int]) -> None:
        """Start actors up to these sizes of the crews; each is ready when an event says so."""
        for crew, size in zip(self._crews, sizes):
            while crew.size < size:
                crew.size += 1
                number = next(self._numbers)
                handle = crew.early.pop() if crew.early else crew.actor_class.remote()
                self._handles[number], self._crew_of[number] = handle, crew
                ready = handle.setup.remote(self._spec_ref, crew.device)
                self._wait_for(ready, number, starting=True)

    def send(self, send: Send[Item], experiments: Experiments) -> None:
        """Queue an item at an actor."""
        handle = self._handles[send.actor]
        reference = handle.compute.remote(send.item, experiments, send.tries, send.probe)
        self._wait_for(reference, send.actor, starting=False)

    def _wait_for(self, reference: Any, actor: int, *, starting: bool) -> None:
        self._pending[reference] = _Pending(actor, starting, next(self._orders))

    def events(self) -> list[Event]:
        """What happened; waits a fraction of a second for the first event."""
        if not self._pending:
            time.sleep(WAIT_S)
            return []
        # An actor answers in order, but a large answer may arrive after a small one that follows.
        oldest: dict[int, Any] = {}
        for reference, pending in self._pending.items():
            oldest.setdefault(pending.actor, reference)
        waiting = list(oldest.values())
        ready, rest = self._ray.wait(waiting, num_returns=1, timeout=WAIT_S)
        if ready and rest:
            # What else has happened, without waiting for it.
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        found: list[Event] = []
        for reference in sorted(ready, key=lambda ready: self._pending[ready].order):
            # An actor that died takes its later references with it.
            if reference in self._pending:
                found.append(self._event(reference, self._pending.pop(reference)))
        return found

    def _event(self, reference: Any, pending: _Pending) -> Event:
        exceptions, actor = self._ray.exceptions, pending.actor
        try:
            value = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            if isinstance(cause, RaypatchError) and not isinstance(cause, NoRoomError):
                raise cause from None
            if pending.starting:
                raise RunError(f"an actor could not start: {one_line(cause)}") from None
            if not (out_of_memory(cause) or gpu_failed(cause)):
                return Event(actor, "failed", error=one_line(cause))
            # What it holds on to goes with its process; a fresh one may compute the item.
            self._drop(actor)
            return Event(actor, "died", error=one_line(cause))
        except exceptions.RayError as error:
            # Death, an actor out of reach, memory, a lost object: a fresh actor is what helps.
            self._drop(actor)
            if pending.starting:
                self._note_start_failure(error)
                return Event(actor, "unstarted")
            lost = getattr(error, "preempted", False) or _node_lost(error)
            return Event(actor, "lost" if lost else "died", error=_short_cause(error))
        if pending.starting:
            self._start_failures = 0
            return Event(actor, "ready")
        return Event(actor, "done", outcome=value)

    def _note_start_failure(self, error: BaseException) -> None:
        self._start_failures += 1
        if self._start_failures >= MAX_START_FAILURES or "__init__" in str(error):
            raise RunError(f"an actor could not start: {_short_cause(error)}") from None

    def kill(self, actor: int) -> None:
        """End an actor's process; an event says that it died."""
        self._ray.kill(self._handles[actor])

    def _drop(self, actor: int) -> None:
        self.kill(actor)
        del self._handles[actor]
        self._crew_of.pop(actor).size -= 1
        self._pending = {r: p for r, p in self._pending.items() if p.actor != actor}

    def close(self) -> None:
        """End all actors."""
        early = [handle for crew in self._crews for handle in crew.early]
        for handle in [*self._handles.values(), *early]:
            self._ray.kill(handle)
        self._handles.clear()
        for crew in self._crews:
            crew.early.clear()


def _node_lost(error: BaseException) -> bool:
    """Whether Ray says that the actor went away with its node."""
    words = ("node was terminated", "node has died", "node is dead", "node died", "node failed")
    return any(word in str(error) for word in words)


def _short_cause(error: BaseException) -> str:
    """The line of Ray's long text that says why an actor is gone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = ("cause", "memory", "exited", "died", "killed")
    chosen = next((line for line in lines[1:] if any(w in line.lower() for w in telling)), "")
    return (chosen or one_line(error))[:300]
