"""Metrics of many rows in bounded memory, and their statistics over the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from raypatch.metric_terms import DIGITS_LEFT, Array, Baselines, Fixed, Rows, first_argmax
from raypatch.metrics import METRICS

# Logits at a time: enough to make the call of an operation cheap, few enough for the cache.
BLOCK_LOGITS = 131072
# Experiments at a time even so, because operations run along them; and rows where inputs are
# so many that these would be too much memory.
MIN_EXPERIMENTS = 256
MAX_ROWS = 1 << 19
STATISTICS = ("mean", "std", "min", "max")
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
                changed = np.count_nonzero(greedy != self.baseline_actions, axis=1)
                changed_rate[part] = torch.from_numpy(changed / self.n_inputs)
            if actions is not None:
                actions[part] = torch.from_numpy(greedy)
            # Overflow is looked for, and what is undefined is NaN on purpose.
            with np.errstate(all="ignore"):
                summaries = []
                for number, metric in enumerate(self._metrics(block)):
                    if values is not None:
                        stored = values[number, part].numpy()
                        stored[...] = metric.astype(stored.dtype).T
                    if statistics is not None:
                        summaries.append(summarise(metric))
                if statistics is not None:
                    statistics[:, :, part] = torch.from_numpy(np.stack(summaries, axis=1))

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

    def _metrics(self, block: Tensor) -> Iterator[Array]:
        """Each metric of a block, ``[inputs, experiments]``, one after the other: what is to be
        done with it costs less while it is in the cache."""
        formulas = [METRICS[name].formula for name in self.names]
        parts = self._parts(len(block))
        if len(parts) == 1:
            rows = Rows(block, parts[0][1])
            yield from (formula(rows) for formula in formulas)
            return
        found = []
        for inputs, fixed in parts:
            rows = Rows(block[:, inputs], fixed)
            found.append([formula(rows) for formula in formulas])
        yield from map(np.concatenate, zip(*found))


def summarise(metric: Array) -> Array:
    """Statistics of a metric ``[inputs, experiments]`` over the inputs, in float64, leaving out
    NaN: ``[statistics, experiments]``, mean, std (population), min, max; NaN where nothing is
    defined."""
    # As a rule it is the pair that leaves a metric undefined, not the patch.
    undefined = np.isnan(metric[:, 0])
    if not undefined.any():
        return _plain_statistics(metric)
    if not np.isnan(metric[undefined]).all() or np.isnan(metric[~undefined]).any():
        return _statistics_of_defined(metric)
    if undefined.all():
        return np.full((len(STATISTICS), metric.shape[1]), np.nan)
    return _plain_statistics(metric[~undefined])


def _plain_statistics(metric: Array) -> Array:
    """The same, found fast where all is defined."""
    n_inputs, n_experiments = metric.shape
    found = np.empty((len(STATISTICS), n_experiments))
    mean, std, low, high = found
    # A product and ufuncs' own reductions: the methods of arrays cost several times as much.
    np.matmul(np.ones(n_inputs), metric, out=mean)
    mean /= n_inputs
    squares = np.einsum("ne,ne->e", metric, metric)
    squares /= n_inputs
    np.minimum.reduce(metric, 0, out=low)
    np.maximum.reduce(metric, 0, out=high)
    np.subtract(squares, mean * mean, out=std)
    squares *= DIGITS_LEFT
    if not (std >= squares).all():
        if np.isnan(mean).any():
            return _statistics_of_defined(metric)
        # Where little is left of what was subtracted, digits are lost.
        some = np.flatnonzero(std < squares)
        deviation = metric[:, some] - mean[some]
        std[some] = (deviation * deviation).mean(0)
    np.sqrt(std, out=std)
    return found


def _statistics_of_defined(metric: Array) -> Array:
    """The same where any number may be undefined."""
    undefined = np.isnan(metric)
    count = (~undefined).sum(0)
    mean = np.where(undefined, 0, metric).sum(0) / count
    deviation = np.where(undefined, 0, metric - mean)
    std = np.sqrt((deviation * deviation).sum(0) / count)
    low = np.where(undefined, np.inf, metric).min(0)
    high = np.where(undefined, -np.inf, metric).max(0)
    return np.where(count == 0, np.nan, np.stack([mean, std, low, high]))
