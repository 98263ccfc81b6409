"""Metrics of many rows in bounded memory, and their statistics over the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from raypatch.errors import out_of_memory
from raypatch.metrics.arrays import (
    Array,
    add_up,
    as_array,
    as_tensor,
    first_argmax,
    library,
    sum_of_squares,
)
from raypatch.metrics.formulas import METRICS
from raypatch.metrics.terms import DIGITS_LEFT, Baselines, Fixed, Rows
from raypatch.results.schema import STATISTICS

# Logits at a time: enough to make the call of an operation cheap, few enough for the cache; on
# a GPU for its memory, 128 MiB an array of them.
BLOCK_LOGITS = 128_000
GPU_BLOCK_LOGITS = 1 << 24
# Experiments at a time even so, because operations run along them; and rows where inputs are
# so many that these would be too much memory.
MIN_EXPERIMENTS = 400
MAX_ROWS = 1 << 19
# Some of the inputs, and what depends on their baselines.
Part = tuple[slice, Fixed]


class MetricTable:
    """Metrics of one direction's patched outputs, block by block in bounded memory."""

    def __init__(self, names: Sequence[str], baselines: Baselines) -> None:
        self.names = tuple(names)
        self.baselines = baselines
        self.n_inputs, self._n_outputs = baselines.target.shape
        least = max(1, min(MIN_EXPERIMENTS, MAX_ROWS // self.n_inputs))
        on_cpu = baselines.target.device.type == "cpu"
        self._block_logits = BLOCK_LOGITS if on_cpu else GPU_BLOCK_LOGITS
        self._step = max(least, self._block_logits // (self.n_inputs * self._n_outputs))
        self.baseline_actions = as_tensor(first_argmax(as_array(baselines.target)))
        self._kept: dict[int, list[Part]] = {}

    def compute(
        self,
        patched: Tensor,
        values: Tensor | None = None,
        *,
        statistics: Tensor | None = None,
        changed_rate: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> None:
        """Compute from ``patched`` ``[experiments, inputs, outputs]`` what is asked for.

        ``values`` ``[metrics, experiments, inputs]`` receives every number, NaN where a metric
        is not defined; ``statistics`` ``[statistics, metrics, experiments]`` those of
        :func:`summarise`; ``changed_rate`` ``[experiments]`` the share of inputs whose greedy
        action changes; ``actions`` ``[experiments, inputs]`` the greedy actions.
        """
        start = 0
        while start < len(patched):
            part = slice(start, min(start + self._step, len(patched)))
            try:
                self._compute_block(
                    patched[part],
                    None if values is None else values[:, part],
                    None if statistics is None else statistics[:, :, part],
                    None if changed_rate is None else changed_rate[part],
                    None if actions is None else actions[part],
                )
            except (RuntimeError, MemoryError) as error:
                if self._step == 1 or not out_of_memory(error):
                    raise
                self._step, self._block_logits = self._step // 2, max(1, self._block_logits // 2)
                self._kept.clear()
            else:
                start = part.stop

    def _compute_block(
        self,
        block: Tensor,
        values: Tensor | None,
        statistics: Tensor | None,
        changed_rate: Tensor | None,
        actions: Tensor | None,
    ) -> None:
        if changed_rate is not None or actions is not None:
            greedy = as_tensor(first_argmax(as_array(block)))
        if changed_rate is not None:
            changed = (greedy != self.baseline_actions).sum(1, dtype=torch.int32)
            changed_rate.copy_(changed.double() / self.n_inputs)
        if actions is not None:
            actions.copy_(greedy)
        shape = len(STATISTICS), len(self.names), len(block)
        found = as_array(block.new_empty(shape, dtype=torch.float64))
        # Overflow is looked for, and what is undefined is NaN on purpose.
        with np.errstate(all="ignore"):
            metric_of = self._metrics(block)
            for number in range(len(self.names)):
                # What is to be done with a metric costs less while it is in the cache.
                metric = metric_of(number)
                if values is not None:
                    values[number].copy_(as_tensor(metric).T)
                if statistics is not None:
                    _add_up(self._of_defined(metric, number), found[:, number])
            if statistics is not None:
                unsure = _finish(found, self._n_defined)
                for number in as_tensor(unsure.any(1)).numpy(force=True).nonzero()[0]:
                    metric = self._of_defined(metric_of(number), number)
                    _with_care(metric, found[:, number], library(unsure).where(unsure[number])[0])
                statistics.copy_(as_tensor(found))

    @cached_property
    def _defined(self) -> Array:
        """The inputs for which each metric is defined, ``[metrics, inputs]``. As a rule it is the
        pair that leaves a metric undefined, not the patch: what is undefined where nothing
        changes always is."""
        with np.errstate(all="ignore"):
            metric_of = self._metrics(self.baselines.target[None])
            found = [metric_of(number)[:, 0] for number in range(len(self.names))]
        xp = library(found[0])
        return ~xp.isnan(xp.stack(found))

    @cached_property
    def _n_defined(self) -> Array:
        return self._defined.sum(1)[:, None]

    @cached_property
    def _some_defined(self) -> list[Array | None]:
        """The same for every metric by their places, None where it is all of them."""
        where = library(self._defined).where
        return [None if bool(some.all()) else where(some)[0] for some in self._defined]

    def _of_defined(self, metric: Array, number: int) -> Array:
        some = self._some_defined[number]
        return metric if some is None else metric[some]

    def _parts(self, n_experiments: int) -> list[Part]:
        """Many inputs are taken in parts, few are all in the first."""
        size = min(self.n_inputs, max(1, self._block_logits // (n_experiments * self._n_outputs)))
        if size not in self._kept:
            if len(self._kept) > 1:
                self._kept.clear()
            self._kept[size] = [
                (slice(i, i + size), Fixed(self.baselines.of_inputs(i, i + size)))
                for i in range(0, self.n_inputs, size)
            ]
        return self._kept[size]

    def _metrics(self, block: Tensor) -> Callable[[int], Array]:
        """Computes a metric of a block by its number, ``[inputs, experiments]``."""
        formulas = [METRICS[name].formula for name in self.names]
        parts = self._parts(len(block))
        if len(parts) == 1:
            rows = Rows(block, parts[0][1])
            return lambda number: formulas[number](rows)
        found = []
        for inputs, fixed in parts:
            rows = Rows(block[:, inputs], fixed)
            found.append([formula(rows) for formula in formulas])
        concatenate = library(found[0][0]).concatenate
        return lambda number: concatenate([of_some[number] for of_some in found])


def _add_up(metric: Array, sums: Array) -> None:
    """:func:`add_up` of a metric; NaN where there are no inputs."""
    if len(metric):
        add_up(metric, sums)
    else:
        sums[...] = torch.nan


def _finish(found: Array, counts: Array) -> Array:
    """Make statistics of what :func:`_add_up` found ``[4, metrics, experiments]`` over so many
    inputs ``[metrics, 1]``; those to be computed with care instead, ``[metrics, experiments]``."""
    found[:2] /= counts
    mean, squares = found[0], found[1]
    variance = squares - mean * mean
    # Where little is left of what was subtracted, digits are lost; of one input nothing is.
    unsure = ~(variance >= DIGITS_LEFT * squares) & (counts > 1) | (mean != mean) & (counts > 0)
    found[1] = library(found).sqrt(variance)
    return unsure


def _with_care(metric: Array, found: Array, some: Array) -> None:
    """The statistics ``found`` of ``some`` experiments in a second pass over the metric
    ``[inputs, experiments]``."""
    deviation, mean = metric[:, some], found[0, some]
    if bool((mean != mean).any()):
        found[:, some] = summarise(deviation)
        return
    deviation -= mean
    found[1, some] = (sum_of_squares(deviation) / len(deviation)) ** 0.5


def summarise(metric: Array) -> Array:
    """Statistics of a metric ``[inputs, experiments]`` over the inputs, in float64, leaving out
    NaN: ``[statistics, experiments]``, mean, std (population), min, max; NaN where nothing is
    defined."""
    xp = library(metric)
    undefined = xp.isnan(metric)
    count = (~undefined).sum(0)
    mean = xp.where(undefined, 0, metric).sum(0) / count
    deviation = xp.where(undefined, 0, metric - mean)
    std = ((deviation * deviation).sum(0) / count) ** 0.5
    low = xp.amin(xp.where(undefined, torch.inf, metric), 0)
    high = xp.amax(xp.where(undefined, -torch.inf, metric), 0)
    return xp.where(count == 0, torch.nan, xp.stack([mean, std, low, high]))
