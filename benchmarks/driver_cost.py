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
from dispatch import Case, StandingPool, local_ray

from raypatch.results import layout
from raypatch.results.store import open_store
from raypatch.sweeps.work import Item


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2000)
    options = parser.parse_args()
    local_ray()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        case = Case(Path(folder), options.items)
        pool = StandingPool(case, 2, (Item(i, i, i + 1) for i in range(options.items)))
        started = time.process_time()
        receipt = pool.run()
        handled = (time.process_time() - started) / options.items
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
