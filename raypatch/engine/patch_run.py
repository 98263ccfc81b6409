"""An engine on one set of inputs: batches that fit, results in the definition's order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from raypatch.checking import check_experiments
from raypatch.definitions import OUTPUT_LOGITS, Experiment, Experiments
from raypatch.engine.arguments import count_inputs, in_parts
from raypatch.engine.dense_ops import NARROW_OUTPUT
from raypatch.engine.incremental import Incremental
from raypatch.engine.layers import Args, tensors_in
from raypatch.engine.plan import Plan, plan_experiments
from raypatch.engine.precision import exact_math
from raypatch.engine.prepared import Prepared
from raypatch.engine.sources import Fill, GivenFill
from raypatch.engine.stacked import Stacked, StackedPrepared
from raypatch.errors import InputError, NoRoomError, out_of_memory

# What a patcher may take where nothing is said: on a CPU, and of what is free on a GPU.
CPU_MEMORY_BYTES = 2 << 30
GPU_MEMORY_SHARE = 0.5
# Dense values of one batch on a CPU: a part of what the last level of cache holds.
CPU_BATCH_BYTES = 8 << 20
MIN_BATCH_ROWS = 256
# On a GPU: of its free memory, whatever may be taken; and rows, of which more are no faster.
GPU_BATCH_SHARE = 0.25
GPU_BATCH_ROWS = 1 << 20
Definition = Union[Experiments, Plan, Sequence[Experiment]]
Engine = Union[Incremental, Stacked]


@dataclass(frozen=True)
class Limits:
    """What may be kept and computed at a time: ``memory_bytes`` in all, ``batch_rows``
    (experiments x inputs) in a batch where the user has set them; else on a GPU ``gpu_share`` of
    what a patcher takes by itself.

    What is free on a GPU is looked at once, so that later batches are as large.
    """

    device: torch.device
    memory_bytes: int | None = None
    batch_rows: int | None = None
    gpu_share: float = 1.0

    def part(self, parts: int) -> Limits:
        """One of so many equal parts of the memory."""
        return replace(self, memory_bytes=self._most_bytes // parts)

    def inputs_at_a_time(self, engine: Engine, target: Args, n_inputs: int) -> int:
        """How many inputs' unpatched runs fit in half of the memory; all of them where the
        network mixes inputs."""
        if n_inputs == 1 or (isinstance(engine, Stacked) and engine.limit == 1):
            return n_inputs
        # Both runs, every layer's chain (values, differences), each about a run's size.
        one = 6 * max(1, engine.run_bytes(target))
        return max(1, min(n_inputs, self._most_bytes // 2 // one))

    def rows_for(self, row_bytes: int) -> int:
        """Rows of a batch whose dense values take ``row_bytes`` each."""
        if self.batch_rows is not None:
            return self.batch_rows
        on_cpu = self.device.type == "cpu"
        suits = max(MIN_BATCH_ROWS, CPU_BATCH_BYTES // row_bytes) if on_cpu else GPU_BATCH_ROWS
        return max(1, min(self._batch_bytes // (3 * row_bytes), suits))

    @cached_property
    def _free(self) -> int:
        return _free_on_gpu(self.device)

    @property
    def _most_bytes(self) -> int:
        if self.memory_bytes is not None:
            return self.memory_bytes
        on_gpu = self.device.type == "cuda"
        return int(self._free * GPU_MEMORY_SHARE * self.gpu_share) if on_gpu else CPU_MEMORY_BYTES

    @property
    def _batch_bytes(self) -> int:
        most = self._most_bytes // 4
        on_gpu = self.device.type == "cuda"
        return min(most, int(self._free * GPU_BATCH_SHARE)) if on_gpu else most


class PatchRun:
    """An engine on one set of inputs, which patches any experiments on them.

    ``baseline`` ``[inputs, outputs]`` holds the unpatched outputs on the targets, and
    ``source_baseline`` those on the sources, None where patched values are no run's own.
    ``inputs_at_a_time`` is how many inputs' runs fit in the memory.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        source: Args | None,
        target: Args,
        fill: Fill | None,
        *,
        deduplicate: bool = True,
        modules: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.deduplicate = deduplicate
        self._modules = modules
        self.rows_computed = 0
        self.target = target
        given = fill.values.values() if isinstance(fill, GivenFill) else ()
        as_given = [*tensors_in(source or ()), *tensors_in(target), *given]
        self._versions = [(x, x._version) for x in as_given]
        self.n_inputs = count_inputs(target)
        self._engine = engine
        self._limits = limits
        self._halvings = 0
        self.inputs_at_a_time = size = limits.inputs_at_a_time(engine, target, self.n_inputs)
        sources: Iterable[Args | None] = [None] * self.n_inputs
        if source is not None:
            sources = in_parts(source, self.n_inputs, size)
        self._parts = list(zip(sources, in_parts(target, self.n_inputs, size)))
        self._fill = fill
        self._kept: Prepared | StackedPrepared | None = None
        if len(self._parts) == 1:
            self._kept = self._prepare(0)
        baselines, source_baselines = [], []
        for i in range(len(self._parts)):
            held = self._prepare(i)
            baselines.append(held.baseline)
            source_baselines.append(held.source_baseline)
        self.baseline = torch.cat(baselines)
        self.source_baseline = (
            None if source is None else torch.cat([b for b in source_baselines if b is not None])
        )

    def __call__(self, experiments: Definition) -> Tensor:
        """Patched outputs ``[experiments, inputs, outputs]`` in the definition's order; in memory
        each of few outputs lies apart."""
        plan = self.plan(experiments)
        if any(x._version != version for x, version in self._versions):
            raise InputError(
                "inputs have been written over since they were prepared: prepare them again, or "
                "pass copies"
            )
        if isinstance(self._fill, GivenFill):
            self._fill.check({layer for group in plan.groups for layer, _ in group.signature})
        with exact_math(), torch.no_grad():
            out = empty_outputs(plan.n_experiments, self.baseline)
            first = 0
            for i in range(len(self._parts)):
                prepared = self._prepare(i)
                part = out[:, first : first + prepared.n_inputs]
                first += prepared.n_inputs
                for group in plan.groups:
                    self._evaluate(prepared, group, part)
            for copies, originals in plan.copies:
                out[copies] = out[originals]
        return out

    def plan(self, experiments: Definition) -> Plan:
        """Check and group experiments; a plan can be used for several runs."""
        if isinstance(experiments, Plan):
            return experiments
        if not isinstance(experiments, Experiments):
            counts = {name: layer.neurons for name, layer in self._engine.layers.items()}
            counts[OUTPUT_LOGITS] = self.baseline.shape[1]
            plain = _plain(experiments)
            self._refuse_other_modules(plain, counts)
            experiments = check_experiments(plain, counts, "experiments")
        return plan_experiments(experiments, deduplicate=self.deduplicate)

    def _refuse_other_modules(self, experiments: Any, counts: Mapping[str, int]) -> None:
        """Raises InputError for a module that is there and no layer."""
        listed = experiments if isinstance(experiments, list) else []
        named = {str(name) for one in listed if isinstance(one, Mapping) for name in one}
        for name in sorted(named - counts.keys()):
            if name == "":
                raise InputError("'' is the network itself: its output is 'output_logits'")
            if name in self._modules:
                raise InputError(f"{name!r} {self._modules[name]}; valid: {', '.join(counts)}")

    def _prepare(self, part: int) -> Prepared | StackedPrepared:
        if self._kept is not None:
            return self._kept
        source, target = self._parts[part]
        fill = self._fill
        if isinstance(fill, GivenFill):
            first = sum(count_inputs(earlier) for _, earlier in self._parts[:part])
            fill = fill.part(first, first + count_inputs(target))
        with torch.no_grad():
            return self._engine.prepare(source, target, fill)

    def _evaluate(self, prepared: Prepared | StackedPrepared, group: Any, out: Tensor) -> None:
        """One group, with smaller batches after running out of memory; the size is kept."""
        while True:
            rows = self._limits.rows_for(prepared.row_bytes(group)) >> self._halvings
            try:
                self.rows_computed += prepared.evaluate(group, out, max(1, rows))
                return
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if rows <= prepared.n_inputs:
                    raise NoRoomError(
                        f"out of memory with one experiment on {prepared.n_inputs} inputs; "
                        "lower --memory_per_actor so that inputs are taken in parts"
                    ) from error
                self._halvings += 1
                if isinstance(self._engine, Incremental):
                    self._engine.scratch.forget_buffers()


def _plain(experiments: Any) -> Any:
    """Neurons that a script holds as an array, a tensor, a range or a tuple, as lists; what is
    none of these stays as it is, to be named."""
    if isinstance(experiments, (str, Mapping)) or not isinstance(experiments, Iterable):
        return experiments
    return [
        {layer: _listed(neurons) for layer, neurons in one.items()}
        if isinstance(one, Mapping)
        else one
        for one in experiments
    ]


def _listed(neurons: Any) -> Any:
    if isinstance(neurons, (Tensor, np.ndarray)):
        return neurons.tolist()
    return list(neurons) if isinstance(neurons, (range, tuple)) else neurons


def _free_on_gpu(device: torch.device) -> int:
    """Bytes nobody uses; torch keeps some of them for itself, which the device counts as taken."""
    free, _ = torch.cuda.mem_get_info(device)
    counts = torch.cuda.memory_stats_as_nested_dict(device)
    if not counts:
        return free  # nothing has been computed there yet
    reserved, allocated = (counts[f"{kind}_bytes"] for kind in ("reserved", "allocated"))
    return free + int(reserved["all"]["current"]) - int(allocated["all"]["current"])


def empty_outputs(n_experiments: int, baseline: Tensor) -> Tensor:
    """Memory for ``[experiments, inputs, outputs]`` like ``baseline`` ``[inputs, outputs]``; few
    outputs lie apart, each in one piece, as narrow products give them and metrics take them."""
    n_inputs, n_outputs = baseline.shape
    if n_outputs < NARROW_OUTPUT:
        return baseline.new_empty(n_outputs, n_experiments, n_inputs).permute(1, 2, 0)
    return baseline.new_empty(n_experiments, n_inputs, n_outputs)
