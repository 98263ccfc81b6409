"""raypatch's pool against Ray Data's and Ray's own actor pool, doing the same job with the same
worker: the same items computed and the same shards written.

Each way runs on a Ray that stands already and actors that are set up already; what is timed is
the work. Also inline against one actor, one actor against two, and two actors against two processes
without any pool, which is what the machine has to give. Medians of interleaved runs.

    python benchmarks/dispatch.py [--experiments 200000] [--repeats 3] [--width 64] [--hidden 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from long_sweep import WIDTH, experiments, make_agent

import raypatch
from raypatch.actors import WorkerActor
from raypatch.definition_files import write_definition
from raypatch.results import layout
from raypatch.results.layout import Receipt
from raypatch.sweeps.config import RunConfig
from raypatch.sweeps.driver import Job
from raypatch.sweeps.fleet import Crew, Fleet
from raypatch.sweeps.inline import InlineBackend
from raypatch.sweeps.interruption import Interruption
from raypatch.sweeps.pool import Dispatch
from raypatch.sweeps.work import Item
from raypatch.sweeps.worker import Worker


class Case:
    """A planned job: its worker's specification and its items."""

    def __init__(
        self, folder: Path, n_experiments: int, width: int = WIDTH, hidden: int = 2,
        save: str = "summary",
    ) -> None:  # fmt: skip
        make_agent(folder, width, hidden)
        definition = folder / "definition.arrow"
        write_definition(experiments(n_experiments, width), definition)
        self.folder = folder
        config = RunConfig(str(folder), str(definition), str(folder / "out"), save=save)
        self.job = Job(config, InlineBackend("cpu"), Interruption())
        self.job.read()
        self.job.plan()
        self.job.ranges = []
        self.length = self.job.planned.item_length
        self.items = [
            Item(n, first, min(first + self.length, n_experiments))
            for n, first in enumerate(range(0, n_experiments, self.length))
        ]
        self.passes = n_experiments * self.job.planned.passes_each

    def spec(self, name: str) -> Any:
        """A specification that writes into a directory of its own."""
        import dataclasses

        out = self.folder / name
        for part in (layout.SHARDS, layout.SUMMARY):
            (out / part).mkdir(parents=True, exist_ok=True)
        (out / "beacon").touch()
        return dataclasses.replace(
            self.job.worker_spec(), output_dir=str(out), beacon="beacon", samples=frozenset()
        )


@ray.remote(num_cpus=1)
class PoolActor:
    """The worker behind Ray's own ActorPool."""

    def __init__(self, spec: Any) -> None:
        self.worker = Worker(spec)

    def ready(self) -> bool:
        return True

    def compute(self, item: Item, packed: Any) -> int:
        return self.worker.compute(item, packed, 1).receipt.rows


class DataActor:
    """The worker behind Ray Data's map_batches: an item a batch."""

    def __init__(self, spec: Any, definition: Any) -> None:
        self.worker, self.definition = Worker(spec), definition

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = []
        for number, first, last in zip(batch["number"], batch["first"], batch["last"]):
            item = Item(int(number), int(first), int(last))
            packed = self.definition.slice(item.first, item.last)
            rows.append(self.worker.compute(item, packed, 1).receipt.rows)
        return {"rows": np.array(rows)}


def local_ray() -> None:
    """A Ray on this machine only, as raypatch starts one."""
    ray.init(
        address="local", include_dashboard=False, num_cpus=2, log_to_driver=False,
        logging_level="ERROR", _node_ip_address="127.0.0.1",
    )  # fmt: skip


class StandingPool:
    """raypatch's pool with actors that are set up, and its loop."""

    def __init__(self, case: Case, n_actors: int, items: Iterable[Item]) -> None:
        actor_class = ray.remote(num_cpus=1, max_restarts=0)(WorkerActor)
        self.case = case
        spec = ray.put(case.spec(f"pool{n_actors}"))
        self.fleet = Fleet(ray, [Crew(actor_class, "cpu")], spec)
        self.fleet.grow([n_actors])
        self.dispatch: Dispatch[Item] = Dispatch(
            iter(items), halve=Item.halves, without=Item.without
        )
        while self.dispatch.n_actors < n_actors:
            for event in self.fleet.events():
                self.dispatch.add_actor(event.actor)

    def run(self) -> Receipt:
        """Compute every item; the last receipt."""
        receipt = None
        while not self.dispatch.done:
            for send in self.dispatch.sends():
                self.fleet.send(send, self.case.job.subject.experiments_of(send.item))
            if not self.dispatch.done:
                for event in self.fleet.events():
                    self.dispatch.item_completed(event.actor)
                    receipt = event.outcome.receipt if event.outcome else receipt
        self.fleet.close()
        assert receipt is not None
        return receipt


def through_raypatch(case: Case, n_actors: int) -> float:
    pool = StandingPool(case, n_actors, case.items)
    started = time.perf_counter()
    pool.run()
    return time.perf_counter() - started


def through_actor_pool(case: Case, n_actors: int) -> float:
    from ray.util import ActorPool

    spec = ray.put(case.spec("actor_pool"))
    actors = [PoolActor.remote(spec) for _ in range(n_actors)]
    ray.get([actor.ready.remote() for actor in actors])
    started = time.perf_counter()
    pool = ActorPool(actors)
    list(
        pool.map_unordered(
            lambda actor, item: actor.compute.remote(item, case.job.subject.experiments_of(item)),
            case.items,
        )
    )
    seconds = time.perf_counter() - started
    for actor in actors:
        ray.kill(actor)
    return seconds


def through_ray_data(case: Case, n_actors: int) -> float:
    """Ray Data starts its own actors: a run over no items is taken off."""

    def run(items: list[Item]) -> float:
        rows = [{"number": i.number, "first": i.first, "last": i.last} for i in items]
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            DataActor, fn_constructor_args=(case.spec("data"), case.job.subject.experiments),
            batch_size=1, concurrency=n_actors, num_cpus=1,
        )  # fmt: skip
        started = time.perf_counter()
        data.materialize()
        return time.perf_counter() - started

    alone = run([Item(i.number, i.first, i.first + 1) for i in case.items[:n_actors]])
    return run(case.items) - alone


def inline(case: Case) -> float:
    import torch

    threads = torch.get_num_threads()
    worker = Worker(case.spec("inline"))
    started = time.perf_counter()
    for item in case.items:
        worker.compute(item, case.job.subject.experiments_of(item), 1)
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    return seconds


def two_processes(case: Case) -> float:
    """What this machine gives to two workers with no pool at all: each half of the items."""
    context = multiprocessing.get_context("spawn")
    halves = [case.items[::2], case.items[1::2]]
    ready, go, done = (context.Barrier(3) for _ in range(3))
    workers = [
        context.Process(
            target=_work,
            args=(
                case.spec(f"alone{n}"),
                half,
                [case.job.subject.experiments_of(i) for i in half],
                (ready, go, done),
            ),
        )
        for n, half in enumerate(halves)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    go.wait()
    started = time.perf_counter()
    done.wait()
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return seconds


def _work(spec: Any, items: list[Item], experiments: list[Any], barriers: Any) -> None:
    worker = Worker(spec)
    ready, go, done = barriers
    ready.wait()
    go.wait()
    for item, packed in zip(items, experiments):
        worker.compute(item, packed, 1)
    done.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the network's hidden layers")
    parser.add_argument("--hidden", type=int, default=2, help="hidden layers")
    parser.add_argument("--save", default="summary", help="what raypatch run would save")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where shards are written")
    options = parser.parse_args()
    local_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = Case(Path(folder), options.experiments, options.width, options.hidden, options.save)
        ways: dict[str, Callable[[], float]] = {
            "inline, one thread": lambda: inline(case),
            "two processes, no pool": lambda: two_processes(case),
            "raypatch, 1 actor": lambda: through_raypatch(case, 1),
            "raypatch, 2 actors": lambda: through_raypatch(case, 2),
            "ray.util.ActorPool, 2 actors": lambda: through_actor_pool(case, 2),
            "Ray Data map_batches, 2 actors": lambda: through_ray_data(case, 2),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                seconds[name].append(way())
    ray.shutdown()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{len(case.items)} items, {case.passes:,} passes, raypatch {raypatch.__version__}")
    for name, median in medians.items():
        print(f"{name:32} {median:6.2f} s, {case.passes / median:12,.0f} passes/s")
    one, two = medians["raypatch, 1 actor"], medians["raypatch, 2 actors"]
    print(json.dumps({
        "1 actor against inline": round(medians["inline, one thread"] / one, 3),
        "2 actors against 1": round(one / two, 3),
        "2 processes against inline": round(
            medians["inline, one thread"] / medians["two processes, no pool"], 3
        ),
        "2 actors against 2 processes": round(medians["two processes, no pool"] / two, 3),
        "against ActorPool": round(medians["ray.util.ActorPool, 2 actors"] / two, 3),
        "against Ray Data": round(medians["Ray Data map_batches, 2 actors"] / two, 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
