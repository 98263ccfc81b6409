"""What an item costs the driver, besides the actor's work: the figures benchmarks/simulate.py uses.

Processor time of the driver for sending an item and taking its outcome, over items of a single
experiment; and the time of a flush of manifest lines.

    python benchmarks/driver_cost.py [--items 2000]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import ray
from dispatch import Case

from raypatch.actors import WorkerActor
from raypatch.fleet import Fleet
from raypatch.inline import halves, without
from raypatch.pool import Dispatch
from raypatch.results import layout
from raypatch.results.store import open_store
from raypatch.worker import Item


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2000)
    options = parser.parse_args()
    ray.init(
        address="local", include_dashboard=False, num_cpus=2, log_to_driver=False,
        logging_level="ERROR", _node_ip_address="127.0.0.1",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        case = Case(Path(folder), options.items)
        fleet = Fleet(ray, ray.remote(num_cpus=1)(WorkerActor), ray.put(case.spec("out")), [])
        fleet.grow(2)
        items = (Item(i, i, i + 1) for i in range(options.items))
        dispatch: Dispatch[Item] = Dispatch(items, halve=halves, without=without)
        while dispatch.n_actors < 2:
            for event in fleet.events():
                dispatch.add_actor(event.actor)
        started, receipt = time.process_time(), None
        while not dispatch.done:
            for send in dispatch.sends():
                fleet.send(send, case.job.experiments_of(send.item))
            if not dispatch.done:
                for event in fleet.events():
                    dispatch.item_completed(event.actor)
                    receipt = event.outcome.receipt if event.outcome else receipt
        handled = (time.process_time() - started) / options.items
        fleet.close()
        assert receipt is not None
        store, flushes = open_store(folder), []
        for _ in range(200):
            begun = time.perf_counter()
            store.append_lines(layout.MANIFEST, [receipt.line()] * 4)
            flushes.append(time.perf_counter() - begun)
    ray.shutdown()
    print(
        f"an item sent and its outcome taken: {handled * 1e3:.2f} ms of the driver's processor; "
        f"a flush of manifest lines: {statistics.median(flushes) * 1e3:.2f} ms (median)"
    )


if __name__ == "__main__":
    main()
