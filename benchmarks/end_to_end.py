"""Where the time of a sweep goes: engine, metrics, Arrow tables, writing; one thread, inline.

Takes the worker's own steps apart on one large item of the dqn_mlp network and of the example
agents, for each ``--save`` mode.

    python benchmarks/end_to_end.py [--repeats 5] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from engine import agent_case, example_agents, make_case

from raypatch.definitions import Experiments
from raypatch.engine.patcher import Patcher
from raypatch.metrics.formulas import DEFAULT_METRICS
from raypatch.results import layout, schema, tables
from raypatch.sweeps.shipping import pack
from raypatch.sweeps.sides import Sides
from raypatch.sweeps.sweep import ITEM_ROWS
from raypatch.sweeps.work import Item
from raypatch.sweeps.worker import Worker, WorkerSpec

FORMULAS = "formulas"


def make_worker(case, save: str, folder: str, device: str) -> tuple[Worker, Experiments]:
    patcher = Patcher(case.network)
    patcher.prepare(case.source, case.target)
    inputs = {"clean": case.source.numpy(), "corrupted": case.target.numpy()}
    n_outputs = case.network(case.target[:1]).shape[1]
    spec = WorkerSpec(
        patcher=pack(patcher), sides=Sides(inputs, ("denoising", "noising"), "pair"),
        discrete=True,
        columns=schema.Columns(n_outputs, DEFAULT_METRICS, save), metadata={},
        compression="lz4", output_dir=folder, device=device,
    )  # fmt: skip
    one = [{str(layer): [neuron]} for layer, neuron in case.experiments]
    # As long as an item of a large sweep: every neuron several times over.
    passes = 2 * len(case.target)
    repeats = max(1, ITEM_ROWS[device] // (len(one) * passes))
    worker = Worker(spec)
    for run in worker.runs:
        run.deduplicate = False
    worker.store.make(layout.SHARDS, layout.SUMMARY)
    return worker, Experiments.from_list(one * repeats)


def measure(worker: Worker, experiments: Experiments) -> dict[str, float]:
    """Seconds of each step of one item."""
    item, taken = Item(0, 0, len(experiments)), {}

    def clock(name, step):
        started = time.perf_counter()
        result = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken[name] = time.perf_counter() - started
        return result

    def formulas():
        for number, table in enumerate(worker.tables):
            table.compute(outputs[number])

    outputs = clock("engine", lambda: worker._outputs(experiments))
    clock(FORMULAS, formulas)  # once more, and nothing kept: not a step of the item
    arrays = clock("metrics and statistics", lambda: worker.arrays_of(item, outputs))

    def build():
        found = [tables.summary_table(arrays, worker.summary_schema)]
        if worker.spec.columns.save != "summary":
            found.append(tables.row_table(arrays, worker.row_schema))
        return found

    made = clock("Arrow tables", build)
    files = clock("lz4", lambda: [worker.file_bytes(table) for table in made])
    clock("hash, fsync, rename", lambda: [
        worker.store.write(f"{layout.SUMMARY}/part-{i}.arrow", f)
        for i, f in enumerate(files)
    ])  # fmt: skip
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    repeats, device = options.repeats, options.device
    torch.set_num_threads(1)
    cases = [make_case("dqn_mlp", "cpu")]
    cases += map(agent_case, example_agents())
    for case in cases:
        for save in schema.SAVE_MODES:
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, torch.no_grad():
                worker, experiments = make_worker(case, save, folder, device)
                measure(worker, experiments)
                rows = [measure(worker, experiments) for _ in range(repeats)]
            passes = len(experiments) * 2 * len(case.target)
            steps = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            alone = steps.pop(FORMULAS) / steps["engine"]
            total = sum(steps.values())
            parts = ", ".join(f"{name} {value / total:.0%}" for name, value in steps.items())
            print(f"{case.name:17} --save {save:8} {passes / total:12,.0f} passes/s: {parts}; "
                  f"formulas alone {alone:.2f} of the engine")  # fmt: skip


if __name__ == "__main__":
    main()
