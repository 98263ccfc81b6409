"""The pool of Ray actors. Other files import ray only where they are about Ray itself.

Each actor holds one :class:`raypatch.sweeps.worker.Worker`, built from a specification that lies in
the object store once. The driver keeps a bounded number of items in flight and takes
outcomes as they finish; what to send where is decided by :class:`raypatch.sweeps.pool.Dispatch`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypatch.definitions import Experiments
from raypatch.errors import InputError, RaypatchError, RunError, one_line
from raypatch.processors import usable_cores
from raypatch.sweeps.fleet import Crew, Event, Fleet, Watchdog
from raypatch.sweeps.pool import Dispatch, Failed, TooManyLosses
from raypatch.sweeps.work import Item, Outcome, Quarantined, Tick, Work, verdict
from raypatch.terminal import say

if TYPE_CHECKING:
    from raypatch.sweeps.shipping import Shipment
    from raypatch.sweeps.worker import WorkerSpec

EARLY_ACTORS = 2
OBJECT_STORE_BYTES = 256 << 20
CONNECT_S = 10.0
# How often a cluster is asked whether it has grown.
RESIZE_EVERY_S = 5.0
# How often it is looked whether Ray's daemons live.
WATCH_EVERY_S = 0.2
_DEATH = "Ray's {} died; committed results are kept, run the same command again to resume"
_QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


class WorkerActor:
    """What lives in an actor process; a plain class, made remote by the pool."""

    def __init__(self) -> None:
        import raypatch.sweeps.worker  # noqa: F401  (torch loads while the driver still plans)

        self._worker: Any = None

    def setup(self, spec: WorkerSpec, device: str) -> int:
        """Build the worker; the process id tells that it stands."""
        from raypatch.sweeps.worker import Worker

        self._worker = Worker(replace(spec, device=device))
        return os.getpid()

    def compute(
        self, item: Item, experiments: Experiments, tries: int, probe: bool
    ) -> Outcome | None:
        """Compute one item; see :meth:`raypatch.sweeps.worker.Worker.compute`. None for a probe."""
        if probe:
            self._worker.probe(experiments)
            return None
        return self._worker.compute(item, experiments, tries)


@dataclass(frozen=True)
class PoolOptions:
    """Where Ray is and how many actors to ask of it."""

    address: str | None = None
    num_actors: int | None = None
    gpus_per_actor: float = 1.0
    cpu_actors: int = 0
    device: str = "auto"
    quiet: bool = True
    watchdog_s: float = 600.0


# Ray itself belongs to the whole process.
_one_at_a_time = threading.Lock()


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
        self._started, self._leaving = threading.Event(), threading.Event()
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._ray: Any = None
        self._crews: list[Crew] = []
        self._limit = 1
        self._next_resize = 0.0
        self._local, self._broken, self._has_turn = True, False, False
        self.device = "cpu"

    def __enter__(self) -> RayBackend:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.wait()
        self._leaving.set()
        try:
            if self._ray is not None and self._ray.is_initialized():
                if self._broken:
                    _end_daemons(self._ray._private.worker)
                else:
                    self._ray.shutdown()
        finally:
            self._closing.set()
            self._thread.join()
            if self._has_turn:
                _one_at_a_time.release()

    def _serve(self) -> None:
        self._start()
        self._started.set()
        while self._failure is None and not self._leaving.wait(WATCH_EVERY_S):
            if (dead := self._dead_daemons()) and not self._leaving.is_set():
                self._say_why_ray_ends_this(dead[0])
                break
        self._closing.wait()

    def _say_why_ray_ends_this(self, daemon: str) -> None:
        """Where the main thread, busy with something else, does not raise it in time: Ray itself
        says little, or nothing, before it ends this process."""
        if not self._leaving.wait(WATCH_EVERY_S) and not self._broken:
            say(f"raypatch: {_DEATH.format(daemon)}")

    def _start(self) -> None:
        try:
            for name, value in _QUIET_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            import ray

            self._has_turn = _one_at_a_time.acquire(blocking=False)
            if not self._has_turn:
                raise InputError(
                    "another sweep of this process runs on Ray: start this one after it, in a "
                    "process of its own, or with backend='inline'"
                )
            if ray.is_initialized():
                raise InputError(
                    "Ray is already initialised in this process, and raypatch starts or joins Ray "
                    "itself: call ray.shutdown() first, or use backend='inline'"
                )
            self._ray = ray
            self._init()
            self._choose_actors()
            first = self._crews[0]
            for _ in range(min(EARLY_ACTORS, self._limit)):
                first.early.append(first.actor_class.remote())
        except BaseException as error:
            self._failure = error

    @property
    def _address(self) -> str:
        return self.options.address or os.environ.get("RAY_ADDRESS") or "local"

    def _init(self) -> None:
        address = self._address
        if address == "auto":  # as Ray finds it: the one on this machine, or what a file remembers
            from ray._private.services import canonicalize_bootstrap_address

            address = canonicalize_bootstrap_address(address) or address
        settings: dict[str, Any] = {
            "address": address,
            "log_to_driver": not self.options.quiet,
            "logging_level": logging.ERROR,
            "namespace": "raypatch",
        }
        self._local = address == "local"
        _check_answers(address)
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        if not self._local and not in_job:  # a submitted job has brought its own
            # Machines of a cluster need torch and pyarrow, but not raypatch.
            settings["runtime_env"] = {"py_modules": [str(Path(__file__).parent)]}
        elif self._local:
            settings |= {
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "num_cpus": max(usable_cores(), self.options.num_actors or 1),
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        self._ray.init(**settings)

    def _choose_actors(self) -> None:
        resources = self._ray.cluster_resources()
        gpus, device = resources.get("GPU", 0.0), self.options.device
        if device == "auto" and gpus > 0 and self._local and not _torch_sees_gpu():
            device = "cpu"  # a build of torch without CUDA, or a driver too old for it
        use_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        if device == "cuda" and gpus == 0:
            raise InputError("--device cuda: Ray reports no GPU; use --device cpu")
        if self.options.cpu_actors and not use_gpu:
            raise InputError(
                f"--cpu_actors {self.options.cpu_actors}: there is no GPU to compute on, so all "
                "actors run on the CPU; set their number with --num_actors"
            )
        self.device = "cuda" if use_gpu else "cpu"
        # With GPUs those are what is scarce; a share of one needs no core of its own.
        on_gpu = {"num_gpus": self.options.gpus_per_actor, "num_cpus": 0.0}
        on_cpu = {"num_cpus": 1.0}
        self._limit = self.options.num_actors or max(1, self._room())
        self._crews = [self._crew(on_gpu if use_gpu else on_cpu, self.device)]
        if self.options.cpu_actors:
            self._crews.append(self._crew(on_cpu, "cpu"))

    def _crew(self, resources: dict[str, float], device: str) -> Crew:
        remote = self._ray.remote(**resources, max_restarts=0, scheduling_strategy="SPREAD")
        return Crew(remote(WorkerActor), device)

    def _room(self) -> int:
        """How many actors the cluster has resources for."""
        resources = self._ray.cluster_resources()
        if self.device == "cuda":
            return int(resources.get("GPU", 0.0) / self.options.gpus_per_actor)
        return int(resources.get("CPU", 1.0))

    def packed(self, value: Any, folders: Sequence[Path]) -> Shipment:
        """The value for actors that do not have the user's code: what was imported from these
        folders travels by value."""
        from raypatch.sweeps.shipping import pack

        self.wait_started()
        cloudpickle: Any = self._ray.cloudpickle

        own = Path(__file__).parent
        modules = [
            module
            for name, module in list(sys.modules.items())
            if name != "__main__"  # travels by value as it is
            and (file := getattr(module, "__file__", None))
            and any(folder in Path(file).parents for folder in folders)
            and own not in Path(file).parents
            and not {"site-packages", "dist-packages"}.intersection(Path(file).parts)
        ]
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            return pack(value, cloudpickle.CloudPickler)
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)

    def wait_started(self) -> None:
        """Until Ray stands; raises RunError where it does not, or no longer."""
        self._started.wait()
        if isinstance(self._failure, RaypatchError):
            raise self._failure
        if self._failure is not None:
            what = "Ray could not be started"
            if (address := self._address) != "local":
                what = (
                    f"no Ray cluster could be joined at {address}: is it running, reachable from "
                    "here, and of this version? Where it asks for a token, set RAY_AUTH_MODE=token "
                    "and RAY_AUTH_TOKEN (docs/cluster.md)"
                )
            raise RunError(f"{what}: {one_line(self._failure)}") from self._failure
        self._check_daemons()

    def outcomes(self, work: Work) -> Generator[Outcome | Quarantined | Tick, None, None]:
        """See :class:`Backend`."""
        self.wait_started()
        dispatch = Dispatch(work.items, halve=Item.halves, without=Item.without)
        watchdog = Watchdog(self.options.watchdog_s)
        fleet = Fleet(self._ray, self._crews, self._put(work.spec))
        gauges = _Gauges()
        try:
            while not dispatch.done:
                self._check_daemons()
                if work.stopping():
                    dispatch.stop()
                else:
                    limit = min(self._current_limit(), work.n_items)
                    fleet.grow([limit, min(self.options.cpu_actors, work.n_items - limit)])
                for send in dispatch.sends():
                    fleet.send(send, work.experiments_of(send.item))
                for event in fleet.events():
                    if event.kind == "done":
                        dispatch.item_completed(event.actor)
                        if event.outcome is not None:
                            gauges.note(event.outcome)
                            yield event.outcome
                    elif event.kind == "ready":
                        dispatch.add_actor(event.actor)
                    elif event.kind != "unstarted" and (
                        failed := self._failure_of(dispatch, event)
                    ):
                        yield verdict(failed, event.error)
                for actor in watchdog.overdue(dispatch):
                    fleet.kill(actor)
                gauges.show(dispatch)
                yield Tick(
                    dispatch.n_actors,
                    dispatch.retries + dispatch.node_losses,
                    dispatch.n_in_flight,
                )
        finally:
            fleet.close()

    def _put(self, spec: WorkerSpec) -> Any:
        try:
            return self._ray.put(spec)
        except self._ray.exceptions.RayError as error:
            raise RunError(
                f"the agent and its inputs do not fit into Ray's object store: {one_line(error)}; "
                "give fewer inputs (--input_ids) or start Ray with a larger object store"
            ) from None

    def _current_limit(self) -> int:
        """How many actors to have: as asked, else as many as the cluster has room for now."""
        if self.options.num_actors is None and time.monotonic() > self._next_resize:
            self._next_resize = time.monotonic() + RESIZE_EVERY_S
            self._limit = max(self._limit, self._room())
        return self._limit

    def _check_daemons(self) -> None:
        """Raises RunError where the local Ray has lost a daemon: Ray would end this process."""
        if dead := self._dead_daemons():
            self._broken = True
            raise RunError(_DEATH.format(dead[0]))

    def _dead_daemons(self) -> list[str]:
        """Names of the local Ray's daemons that have ended."""
        node = getattr(self._ray._private.worker, "_global_node", None) if self._local else None
        if node is None:
            return []
        return [name for name, _ in node.dead_processes() if name in ("raylet", "gcs_server")]

    def _failure_of(self, dispatch: Dispatch[Item], event: Event) -> Failed[Item] | None:
        """Tell the dispatch state what happened to an actor or its oldest item."""
        if event.kind == "failed":
            return dispatch.item_failed(event.actor)
        if event.kind == "lost":
            try:
                dispatch.actor_lost(event.actor)
            except TooManyLosses as error:
                raise RunError(f"{error}; run the same command again to resume") from None
            return None
        return dispatch.actor_died(event.actor)


def _check_answers(address: str) -> None:
    """Raises InputError where nobody is at ``host:port``: Ray itself would try for ten minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "local" and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--address {address} (or RAY_ADDRESS): nothing answers there ({one_line(error)}); "
            "give the address of a Ray that runs, as its head's host:6379"
        ) from None


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _end_daemons(of_ray: Any) -> None:
    """End a local Ray that has lost a daemon: an orderly shutdown would wait for it, and so would
    the agents of a raylet, and Ray's way to report an exception."""
    import psutil  # Ray brings it

    node, agents = of_ray._global_node, []
    for raylet in node.all_processes.get("raylet", []):
        with suppress(psutil.Error):
            agents += psutil.Process(raylet.process.pid).children(recursive=True)
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    for agent in agents:
        with suppress(psutil.Error):
            agent.kill()
    sys.excepthook = of_ray.normal_excepthook


class _Gauges:
    """What Ray's dashboard shows of a run: passes, rows, retries, items in flight."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._passes = metrics.Counter("raypatch_passes", "Patched forwards that are computed.")
        self._rows = metrics.Counter("raypatch_rows", "Rows written to shards.")
        self._retries = metrics.Gauge("raypatch_retries", "Tries that failed, and lost actors.")
        self._in_flight = metrics.Gauge("raypatch_items_in_flight", "Items sent, not answered.")

    def note(self, outcome: Outcome) -> None:
        receipt = outcome.receipt
        if receipt.rows:
            self._passes.inc(receipt.rows)
            if receipt.bytes is not None:  # none are written with --save summary
                self._rows.inc(receipt.rows)

    def show(self, dispatch: Dispatch[Item]) -> None:
        self._retries.set(dispatch.retries + dispatch.node_losses)
        self._in_flight.set(dispatch.n_in_flight)
