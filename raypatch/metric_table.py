"""Metrics of many rows in bounded memory, and their statistics over the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from raypatch.metric_terms import DIGITS_LEFT, Array, Baselines, Fixed, Rows, first_argmax
from raypatch.metrics import METRICS
from raypatch.results.schema import STATISTICS

# Logits at a time: enough to make the call of an operation cheap, few enough for the cache.
BLOCK_LOGITS = 128_000
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
        self._step = max(least, BLOCK_LOGITS // (self.n_inputs * self._n_outputs))
        self.baseline_actions = first_argmax(baselines.target.numpy())
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
        for start in range(0, len(patched), self._step):
            block = patched[start : start + self._step]
            part = slice(start, start + len(block))
            if changed_rate is not None or actions is not None:
                greedy = first_argmax(block.numpy())
            if changed_rate is not None:
                changed = torch.from_numpy(greedy != self.baseline_actions)
                changed_rate[part] = changed.sum(1, dtype=torch.int32) / self.n_inputs
            if actions is not None:
                actions[part] = torch.from_numpy(greedy)
            # Overflow is looked for, and what is undefined is NaN on purpose.
            with np.errstate(all="ignore"):
                metric_of = self._metrics(block)
                found = np.empty((len(STATISTICS), len(self.names), len(block)))
                for number in range(len(self.names)):
                    # What is to be done with a metric costs less while it is in the cache.
                    metric = metric_of(number)
                    if values is not None:
                        stored = values[number, part].numpy()
                        stored[...] = metric.astype(stored.dtype).T
                    if statistics is not None:
                        _add_up(self._of_defined(metric, number), found[:, number])
                if statistics is not None:
                    unsure = _finish(found, self._defined.sum(1))
                    for number in np.flatnonzero(unsure.any(axis=1)):
                        metric = self._of_defined(metric_of(number), number)
                        _with_care(metric, found[:, number], np.flatnonzero(unsure[number]))
                    statistics[:, :, part] = torch.from_numpy(found)

    @cached_property
    def _defined(self) -> Array:
        """The inputs for which each metric is defined, ``[metrics, inputs]``. As a rule it is the
        pair that leaves a metric undefined, not the patch: what is undefined where nothing
        changes always is."""
        with np.errstate(all="ignore"):
            metric_of = self._metrics(self.baselines.target[None])
            return np.stack([~np.isnan(metric_of(i)[:, 0]) for i in range(len(self.names))])

    def _of_defined(self, metric: Array, number: int) -> Array:
        defined = self._defined[number]
        return metric if defined.all() else metric[defined]

    def _parts(self, n_experiments: int) -> list[Part]:
        """Many inputs are taken in parts, few are all in the first."""
        size = min(self.n_inputs, max(1, BLOCK_LOGITS // (n_experiments * self._n_outputs)))
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
        return lambda number: np.concatenate([of_some[number] for of_some in found])


def _add_up(metric: Array, found: Array) -> None:
    """Sum, sum of squares, least and largest of a metric ``[inputs, experiments]`` over the
    inputs, into ``found`` ``[4, experiments]``; NaN where there are no inputs."""
    if not len(metric):
        found[...] = np.nan
        return
    # A product and ufuncs' own reductions: the methods of arrays cost several times as much.
    np.matmul(np.ones(len(metric)), metric, out=found[0])
    np.einsum("ne,ne->e", metric, metric, out=found[1])
    np.minimum.reduce(metric, 0, out=found[2])
    np.maximum.reduce(metric, 0, out=found[3])


def _finish(found: Array, counts: Array) -> Array:
    """Make statistics of what :func:`_add_up` found ``[4, metrics, experiments]`` over so many
    inputs ``[metrics]``; those to be computed with care instead, ``[metrics, experiments]``."""
    mean, squares = found[0], found[1]
    found[:2] /= counts[:, None]
    variance = squares - mean * mean
    # Where little is left of what was subtracted, digits are lost.
    unsure: Array = ~(variance >= DIGITS_LEFT * squares) & (counts > 0)[:, None]
    np.sqrt(variance, out=found[1])
    return unsure


def _with_care(metric: Array, found: Array, some: Array) -> None:
    """The statistics ``found`` of ``some`` experiments in a second pass over the metric
    ``[inputs, experiments]``."""
    deviation, mean = metric.take(some, 1), found[0, some]
    if np.isnan(mean).any():
        found[:, some] = summarise(deviation)
        return
    deviation -= mean
    found[1, some] = np.sqrt(np.einsum("ne,ne->e", deviation, deviation) / len(deviation))


def summarise(metric: Array) -> Array:
    """Statistics of a metric ``[inputs, experiments]`` over the inputs, in float64, leaving out
    NaN: ``[statistics, experiments]``, mean, std (population), min, max; NaN where nothing is
    defined."""
    undefined = np.isnan(metric)
    count = (~undefined).sum(0)
    mean = np.where(undefined, 0, metric).sum(0) / count
    deviation = np.where(undefined, 0, metric - mean)
    std = np.sqrt((deviation * deviation).sum(0) / count)
    low = np.where(undefined, np.inf, metric).min(0)
    high = np.where(undefined, -np.inf, metric).max(0)
    return np.where(count == 0, np.nan, np.stack([mean, std, low, high]))
