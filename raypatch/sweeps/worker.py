"""Computes work items and writes their shards; the same object in an actor and inline.

Knows the engine and the file formats, not Ray.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raypatch.definitions import Experiments
from raypatch.engine.patch_run import PatchRun
from raypatch.engine.patcher import Patcher
from raypatch.errors import RaypatchError
from raypatch.metrics.table import MetricTable
from raypatch.metrics.terms import Baselines
from raypatch.processors import usable_cores
from raypatch.results import layout, schema, tables
from raypatch.results.schema import STATISTICS
from raypatch.results.store import open_store
from raypatch.results.tables import ItemArrays
from raypatch.sweeps.allocator import keep_freed_memory
from raypatch.sweeps.leaving import Leaving
from raypatch.sweeps.shipping import Shipment, unpack
from raypatch.sweeps.sides import Sides
from raypatch.sweeps.work import Item, Outcome

# Threads that compress what a GPU computes in a fraction of the time that one needs for it.
GPU_THREADS = 8


@dataclass(frozen=True)
class WorkerSpec:
    """All a worker needs; plain data and pickled bytes, no files of the agent."""

    patcher: Shipment
    sides: Sides
    discrete: bool
    columns: schema.Columns
    metadata: Mapping[str, Any]
    compression: str
    output_dir: str
    # A file in the output directory; a worker that cannot see it sends its tables back.
    beacon: str = ""
    # Experiments whose outputs go back to the driver for verification.
    samples: frozenset[int] = frozenset()
    device: str = "cpu"


class Worker:
    """One copy of the agent with both sides' activations cached."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.spec = spec
        self.store = open_store(spec.output_dir)
        self.sees_output = self._sees_output()
        self.patcher: Patcher = unpack(spec.patcher).to(spec.device)
        # An actor on a CPU has one core, and another's is not its to take.
        self._on_gpu = self.patcher.device.type != "cpu"
        if self._on_gpu:  # where Ray leaves Arrow one thread
            pa.set_cpu_count(max(pa.cpu_count(), min(GPU_THREADS, usable_cores())))
        self._leaving = Leaving(self.patcher.device)
        self.runs = [prepare_direction(self.patcher, spec.sides, d) for d in spec.sides.directions]
        self.tables = [self._metric_table(run) for run in self.runs]
        self.row_schema = schema.row_schema(spec.columns, spec.metadata)
        self.summary_schema = schema.summary_schema(spec.columns.metrics, spec.metadata)

    def _sees_output(self) -> bool:
        try:
            return bool(self.spec.beacon) and self.store.read(self.spec.beacon) is not None
        except RaypatchError:
            return False

    def _metric_table(self, run: PatchRun) -> MetricTable:
        return MetricTable(self.spec.columns.metrics, Baselines(run.baseline, run.source_baseline))

    def compute(self, item: Item, experiments: Experiments, tries: int) -> Outcome:
        """Compute an item, write its shard and summary part, and give back the receipt.

        ``experiments`` are those of ``item.indices``.
        """
        started = time.perf_counter()
        arrays, outputs = self.arrays(item, experiments)
        part = layout.part_name(item.first, item.last)
        files = {}
        if self.spec.columns.save != "summary":
            files[f"{layout.SHARDS}/{part}"] = self._content(arrays, self.row_schema)
        files[f"{layout.SUMMARY}/{part}"] = self._content(arrays, self.summary_schema)
        digests = {name: self._write(name, content) for name, content in files.items()}
        shard, summary = f"{layout.SHARDS}/{part}", f"{layout.SUMMARY}/{part}"
        receipt = layout.Receipt(
            item=item.number,
            first=item.first,
            last=item.last,
            rows=int(np.prod(arrays.shape)),
            bytes=len(files[shard]) if shard in files else None,
            sha256=digests.get(shard),
            summary_bytes=len(files[summary]),
            summary_sha256=digests[summary],
            tries=tries,
            seconds=round(time.perf_counter() - started, 4),
            quarantined=tuple(sorted(item.skip)),
        )
        within = (i for i in self.spec.samples if item.first <= i < item.last)
        sampled = sorted(set(within) - item.skip)
        return Outcome(
            receipt,
            {
                index: outputs_of(outputs, place)
                for index, place in zip(sampled, np.searchsorted(arrays.indices, sampled))
            },
            {} if self.sees_output else {name: bytes(view) for name, view in files.items()},
        )

    def probe(self, experiments: Experiments) -> None:
        """Compute experiments only to see whether they can be."""
        self.arrays(Item(0, 0, len(experiments)), experiments)

    def arrays(self, item: Item, experiments: Experiments) -> tuple[ItemArrays, list[torch.Tensor]]:
        """An item's results, and its outputs ``[experiments, inputs, outputs]`` by direction."""
        outputs = self._outputs(experiments)
        return self.arrays_of(item, outputs), outputs

    def _outputs(self, experiments: Experiments) -> list[torch.Tensor]:
        """Patched outputs ``[experiments, inputs, outputs]`` of each direction, on the device."""
        plan = self.runs[0].plan(experiments)
        outputs = [run(plan) for run in self.runs]
        for patched in outputs:
            # The sum of finite numbers is cheap to test and almost never infinite itself.
            if not bool(patched.sum().isfinite()) and not bool(patched.isfinite().all()):
                raise ValueError("patched outputs hold NaN or infinity; metrics need finite logits")
        return outputs

    def arrays_of(self, item: Item, outputs: list[torch.Tensor]) -> ItemArrays:
        """An item's results from its outputs."""
        columns = self.spec.columns
        n_directions, (n_experiments, n_inputs, _) = len(outputs), outputs[0].shape
        rows = columns.save != "summary"
        shape = (len(columns.metrics), n_experiments, n_directions)
        # Metrics are computed where the outputs are; only results leave a GPU, and outputs while
        # metrics are computed.
        device = outputs[0].device
        kept = torch.stack(outputs, 1).float() if columns.save == "full" else None
        outputs_left = self._leaving.array(kept)
        statistics = torch.empty(len(STATISTICS), *shape, device=device)
        values = torch.empty(*shape, n_inputs, device=device) if rows else None
        actions = changed = rate = None
        if self.spec.discrete:
            rate = torch.empty(shape[1:], device=device)
            if rows:
                actions = torch.empty(*shape[1:], n_inputs, dtype=torch.int32, device=device)
        for number, (table, patched) in enumerate(zip(self.tables, outputs)):
            table.compute(
                patched,
                None if values is None else values[:, :, number],
                statistics=statistics[..., number],
                changed_rate=None if rate is None else rate[:, number],
                actions=None if actions is None else actions[:, number],
            )
        if actions is not None:
            changed = actions != torch.stack([table.baseline_actions for table in self.tables])
        array = self._leaving.array
        arrays = ItemArrays(
            indices=item.indices,
            directions=self.spec.sides.directions,
            shape=(n_experiments, n_directions, n_inputs),
            outputs=outputs_left,
            actions=array(actions),
            changed=array(changed),
            metrics=array(values),
            statistics=dict(zip(STATISTICS, array(statistics))),
            changed_rate=array(rate),
        )
        self._leaving.wait()
        return arrays

    def _content(self, arrays: ItemArrays, table_schema: Any) -> memoryview:
        build = tables.row_table if table_schema is self.row_schema else tables.summary_table
        return self.file_bytes(build(arrays, table_schema))

    def file_bytes(self, table: pa.Table) -> memoryview:
        """What is written of a table."""
        return tables.file_bytes(table, self.spec.compression, threads=self._on_gpu)

    def _write(self, name: str, content: memoryview) -> str:
        if self.sees_output:
            return self.store.write(name, content)
        return hashlib.sha256(content).hexdigest()


def outputs_of(outputs: list[torch.Tensor], place: int) -> np.ndarray:
    """One experiment's ``[directions, inputs, outputs]`` of those of all by direction."""
    return np.stack([patched[place].numpy(force=True) for patched in outputs])


def prepare_direction(patcher: Patcher, sides: Sides, direction: str) -> PatchRun:
    """Run both sides of one direction unpatched."""
    source, target = sides.source_and_target(direction)
    return patcher.prepare(source, target, kind=sides.kind, seed=sides.seed)  # type: ignore[arg-type]
