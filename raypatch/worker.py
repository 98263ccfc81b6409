"""Computes work items and writes their shards; the same object in an actor and inline.

Knows the engine and the file formats, not Ray.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raypatch.definitions import Experiments
from raypatch.engine.patcher import Patcher, PatchRun
from raypatch.metrics import Baselines, MetricTable, first_argmax, summarise
from raypatch.results import layout, schema, tables
from raypatch.results.store import Store

# Which side of a pair is the target in each direction; the other one is the source.
TARGET_SIDE = {"denoising": "corrupted", "noising": "clean"}


@dataclass(frozen=True)
class WorkerSpec:
    """All a worker needs; plain data and pickled bytes, no files of the agent."""

    patcher: bytes
    sides: Mapping[str, np.ndarray]
    directions: tuple[str, ...]
    source_kind: str
    seed: int
    discrete: bool
    columns: schema.Columns
    metadata: Mapping[str, Any]
    compression: str
    output_dir: str
    # Experiments whose outputs go back to the driver for verification.
    samples: frozenset[int] = frozenset()
    device: str = "cpu"


@dataclass(frozen=True)
class Item:
    """A contiguous range of experiments: the unit that is computed, retried and committed."""

    number: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"item {self.number} (experiments {self.first} to {self.last - 1})"


@dataclass(frozen=True)
class Outcome:
    """What a worker tells of a finished item.

    ``samples`` maps an experiment to its patched outputs ``[directions, inputs, outputs]``.
    """

    receipt: layout.Receipt
    samples: dict[int, np.ndarray] = field(default_factory=dict)


class Worker:
    """One copy of the agent with both sides' activations cached."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(1)
        self.spec = spec
        self.store = Store(spec.output_dir)
        self.patcher: Patcher = pickle.loads(spec.patcher).to(spec.device)
        self.runs = [prepare_direction(self.patcher, spec, d) for d in spec.directions]
        self.tables = [self._metric_table(d, run) for d, run in zip(spec.directions, self.runs)]
        self.baseline_actions = torch.stack(
            [first_argmax(run.baseline.cpu().t()).to(torch.int32) for run in self.runs]
        )
        self.row_schema = schema.row_schema(spec.columns, spec.metadata)
        self.summary_schema = schema.summary_schema(spec.columns.metrics, spec.metadata)

    def _metric_table(self, direction: str, run: PatchRun) -> MetricTable:
        source = run.source_baseline
        return MetricTable(
            self.spec.columns.metrics,
            Baselines(run.baseline.cpu(), None if source is None else source.cpu()),
        )

    def compute(self, item: Item, experiments: Experiments, tries: int) -> Outcome:
        """Compute an item, write its shard and summary part, and give back the receipt."""
        started = time.perf_counter()
        outputs = self._outputs(experiments)
        arrays = self._arrays(item, outputs)
        part = layout.part_name(item.first, item.last)
        n_bytes = digest = None
        if self.spec.columns.save != "summary":
            n_bytes, digest = self._write(f"{layout.SHARDS}/{part}", arrays, self.row_schema)
        summary_bytes, summary_digest = self._write(
            f"{layout.SUMMARY}/{part}", arrays, self.summary_schema
        )
        receipt = layout.Receipt(
            item=item.number,
            first=item.first,
            last=item.last,
            rows=int(np.prod(arrays.shape)),
            bytes=n_bytes,
            sha256=digest,
            summary_bytes=summary_bytes,
            summary_sha256=summary_digest,
            tries=tries,
            seconds=round(time.perf_counter() - started, 4),
        )
        wanted = self.spec.samples.intersection(range(item.first, item.last))
        return Outcome(receipt, {i: outputs[i - item.first].numpy().copy() for i in wanted})

    def _outputs(self, experiments: Experiments) -> torch.Tensor:
        """Patched outputs ``[experiments, directions, inputs, outputs]`` on the CPU."""
        plan = self.runs[0].plan(experiments)
        first = self.runs[0].baseline
        outputs = torch.empty(len(experiments), len(self.runs), *first.shape, dtype=first.dtype)
        for number, run in enumerate(self.runs):
            outputs[:, number] = run(plan)
        return outputs

    def _arrays(self, item: Item, outputs: torch.Tensor) -> tables.ItemArrays:
        columns = self.spec.columns
        n_experiments, n_directions, n_inputs, _ = outputs.shape
        values = torch.empty(
            len(columns.metrics), n_experiments, n_directions, n_inputs, dtype=torch.float64
        )
        actions = changed = rate = None
        if self.spec.discrete:
            actions = torch.empty(n_experiments, n_directions, n_inputs, dtype=torch.int32)
        for number, table in enumerate(self.tables):
            chosen = None if actions is None else actions[:, number]
            table.compute(outputs[:, number], values[:, :, number], chosen)
        if actions is not None:
            changed = actions != self.baseline_actions
            rate = changed.double().mean(-1).float().numpy()
        rows = columns.save != "summary"
        return tables.ItemArrays(
            first=item.first,
            directions=self.spec.directions,
            shape=(n_experiments, n_directions, n_inputs),
            outputs=outputs.float().numpy() if columns.save == "full" else None,
            actions=actions.numpy() if actions is not None else None,
            changed=changed.numpy() if changed is not None else None,
            metrics=values.float().numpy() if rows else None,
            statistics={name: v.float().numpy() for name, v in summarise(values).items()},
            changed_rate=rate,
        )

    def _write(self, name: str, arrays: tables.ItemArrays, table_schema: Any) -> tuple[int, str]:
        build = tables.row_table if table_schema is self.row_schema else tables.summary_table
        content = tables.file_bytes(build(arrays, table_schema), self.spec.compression)
        return content.size, self.store.write(name, memoryview(content))


def prepare_direction(patcher: Patcher, spec: WorkerSpec, direction: str) -> PatchRun:
    """Run both sides of one direction unpatched."""
    target = torch.from_numpy(spec.sides[TARGET_SIDE[direction]])
    other = next((v for side, v in spec.sides.items() if side != TARGET_SIDE[direction]), None)
    source = torch.from_numpy(other) if spec.source_kind == "pair" and other is not None else None
    return patcher.prepare(source, target, kind=spec.source_kind, seed=spec.seed)  # type: ignore[arg-type]
