"""The pool of Ray actors: the only file that imports ray.

Each actor holds one :class:`raypatch.worker.Worker`, built from a specification that lies in
the object store once. The driver keeps a bounded number of items in flight and takes
outcomes as they finish; what to send where is decided by :class:`raypatch.pool.Dispatch`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raypatch.definitions import Experiments
from raypatch.errors import RaypatchError, RunError, one_line
from raypatch.pool import Dispatch

if TYPE_CHECKING:
    from raypatch.worker import Item, Outcome, WorkerSpec

EARLY_ACTORS = 2
OBJECT_STORE_BYTES = 256 << 20
WAIT_S = 0.2
START_TIMEOUT_S = 300.0
_QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


class WorkerActor:
    """What lives in an actor process; a plain class, made remote by the pool."""

    def __init__(self) -> None:
        import raypatch.worker  # noqa: F401  (torch loads while the driver still plans)

        self._worker: Any = None

    def setup(self, spec: WorkerSpec) -> int:
        """Build the worker; the process id tells that it stands."""
        from raypatch.worker import Worker

        self._worker = Worker(spec)
        return os.getpid()

    def compute(self, item: Item, experiments: Experiments, tries: int) -> Outcome:
        """Compute one item; see :meth:`raypatch.worker.Worker.compute`."""
        return self._worker.compute(item, experiments, tries)


@dataclass(frozen=True)
class PoolOptions:
    """Where Ray is and how many actors to ask of it."""

    address: str | None = None
    num_actors: int | None = None
    gpus_per_actor: float = 1.0
    device: str = "auto"
    quiet: bool = True


@dataclass(frozen=True)
class Tick:
    """State of the pool, given between outcomes so that the driver can show and decide."""

    actors: int
    retries: int


class RayBackend:
    """A pool on a local or given Ray. Use as a context manager: Ray is always shut down.

    Entering starts Ray and the first actors in the background, so that the driver reads and
    checks its input meanwhile.
    """

    name = "ray"

    def __init__(self, options: PoolOptions) -> None:
        self.options = options
        # Ray's daemons are tied to the life of the thread that starts them, not just the
        # process, so that thread stays until the end.
        self._thread = threading.Thread(target=self._serve, name="raypatch-ray", daemon=True)
        self._started, self._closing = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._ray: Any = None
        self._actor_class: Any = None
        self._early: list[Any] = []
        self._limit = 1
        self.device = "cpu"

    def __enter__(self) -> RayBackend:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.wait()
        if self._ray is not None and self._ray.is_initialized():
            self._ray.shutdown()
        self._closing.set()
        self._thread.join()

    def _serve(self) -> None:
        self._start()
        self._started.set()
        self._closing.wait()

    def _start(self) -> None:
        try:
            for name, value in _QUIET_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            import ray

            self._ray = ray
            self._init()
            self._choose_actors()
            for _ in range(min(EARLY_ACTORS, self._limit)):
                self._early.append(self._actor_class.remote())
        except BaseException as error:
            self._failure = error

    def _init(self) -> None:
        address = self.options.address or os.environ.get("RAY_ADDRESS") or "local"
        settings: dict[str, Any] = {
            "address": address,
            "log_to_driver": not self.options.quiet,
            "logging_level": logging.ERROR,
            "namespace": "raypatch",
        }
        if address == "local":
            cores = (
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            )
            settings |= {
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "num_cpus": max(cores or 1, self.options.num_actors or 1),
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        self._ray.init(**settings)

    def _choose_actors(self) -> None:
        resources = self._ray.cluster_resources()
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
        use_gpu = self.options.device == "cuda" or (self.options.device == "auto" and gpus > 0)
        if self.options.device == "cuda" and gpus == 0:
            raise RunError("--device cuda: Ray reports no GPU; use --device cpu")
        self.device = "cuda" if use_gpu else "cpu"
        wanted = {"num_gpus": self.options.gpus_per_actor} if use_gpu else {"num_cpus": 1}
        possible = gpus / self.options.gpus_per_actor if use_gpu else cpus
        self._limit = self.options.num_actors or max(1, int(possible))
        self._actor_class = self._ray.remote(**wanted, max_restarts=0)(WorkerActor)

    def wait_started(self) -> None:
        """Until Ray stands; raises RunError where it does not."""
        self._started.wait()
        if isinstance(self._failure, RaypatchError):
            raise self._failure
        if self._failure is not None:
            raise RunError(
                f"Ray could not be started: {one_line(self._failure)}"
            ) from self._failure

    def outcomes(
        self,
        spec: WorkerSpec,
        items: Iterator[Item],
        n_items: int,
        experiments_of: Callable[[Item], Experiments],
        stopping: Callable[[], bool],
    ) -> Iterator[Outcome | Tick]:
        """Outcomes as items finish, and a tick at least every fraction of a second.

        After ``stopping()`` is true nothing more is sent; what is in flight still comes.
        """
        self.wait_started()
        fleet = _Fleet(self._ray, self._actor_class, self._ray.put(spec), self._early)
        dispatch: Dispatch[Item] = Dispatch(items)
        n_actors = min(self._limit, n_items)
        for _ in range(n_actors):
            fleet.add()
        while not dispatch.done:
            if stopping():
                dispatch.stop()
            for send in dispatch.sends():
                fleet.send(send.actor, send.item, experiments_of(send.item), send.tries)
            for event in fleet.events():
                if event.outcome is not None:
                    dispatch.item_completed(event.actor)
                    yield event.outcome
                elif event.ready:
                    dispatch.add_actor(event.actor)
                else:
                    self._replace(dispatch, fleet, event, stopping)
            yield Tick(dispatch.n_actors, dispatch.retries)
        fleet.close()

    def _replace(
        self, dispatch: Dispatch[Item], fleet: _Fleet, event: _Event, stopping: Callable[[], bool]
    ) -> None:
        """An actor is gone: give its items to others and start a fresh one."""
        if event.starting:
            raise RunError(f"an actor could not start: {event.error}")
        given_up = dispatch.actor_died(event.actor)
        if given_up is not None:
            raise RunError(f"{given_up} lost its actor {dispatch.retries + 1} times: {event.error}")
        if not stopping():
            fleet.add()


@dataclass(frozen=True)
class _Event:
    """Something an actor did: became ready, finished an item, or died."""

    actor: int
    outcome: Outcome | None = None
    ready: bool = False
    starting: bool = False
    error: str = ""


class _Fleet:
    """Actor handles and the references being waited for."""

    def __init__(self, ray: Any, actor_class: Any, spec_ref: Any, early: list[Any]) -> None:
        self._ray = ray
        self._actor_class = actor_class
        self._spec_ref = spec_ref
        self._early = early
        self._handles: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, bool]] = {}
        self._next = 0

    def add(self) -> None:
        """Start an actor; it is ready when an event says so."""
        handle = self._early.pop() if self._early else self._actor_class.remote()
        self._handles[self._next] = handle
        self._pending[handle.setup.remote(self._spec_ref)] = (self._next, True)
        self._next += 1

    def send(self, actor: int, item: Item, experiments: Experiments, tries: int) -> None:
        """Queue an item at an actor."""
        reference = self._handles[actor].compute.remote(item, experiments, tries)
        self._pending[reference] = (actor, False)

    def events(self) -> list[_Event]:
        """What happened; waits a fraction of a second for the first event."""
        found: list[_Event] = []
        ready, _ = self._ray.wait(
            list(self._pending), num_returns=min(len(self._pending), 16), timeout=WAIT_S
        )
        for reference in sorted(ready, key=list(self._pending).index):
            if reference not in self._pending:
                continue
            actor, starting = self._pending.pop(reference)
            try:
                value = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause if error.cause is not None else error
                if isinstance(cause, RaypatchError):
                    raise cause from None
                raise RunError(f"an actor failed: {one_line(cause)}") from error
            except self._ray.exceptions.RayActorError as error:
                self._forget(actor)
                found.append(_Event(actor, starting=starting, error=one_line(error)))
                continue
            found.append(_Event(actor, ready=True) if starting else _Event(actor, outcome=value))
        return found

    def _forget(self, actor: int) -> None:
        del self._handles[actor]
        self._pending = {r: owner for r, owner in self._pending.items() if owner[0] != actor}

    def close(self) -> None:
        """End all actors."""
        for handle in [*self._handles.values(), *self._early]:
            self._ray.kill(handle)


class InlineBackend:
    """The same work in the driver's own process, with no Ray: same code, same bytes."""

    name = "inline"

    def __init__(self, device: str) -> None:
        self._wanted = device
        self.device = "cpu"

    def __enter__(self) -> InlineBackend:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait_started(self) -> None:
        """Settle the device."""
        import torch

        available = torch.cuda.is_available()
        if self._wanted == "cuda" and not available:
            raise RunError("--device cuda: torch sees no GPU; use --device cpu")
        self.device = "cuda" if available and self._wanted != "cpu" else "cpu"

    def outcomes(
        self,
        spec: WorkerSpec,
        items: Iterator[Item],
        n_items: int,
        experiments_of: Callable[[Item], Experiments],
        stopping: Callable[[], bool],
    ) -> Iterator[Outcome | Tick]:
        """See :meth:`RayBackend.outcomes`; one item at a time."""
        import torch

        from raypatch.worker import Worker

        n_threads = torch.get_num_threads()
        try:
            worker = Worker(spec)
            for item in items:
                if stopping():
                    return
                yield worker.compute(item, experiments_of(item), tries=1)
                yield Tick(1, 0)
        finally:
            torch.set_num_threads(n_threads)
