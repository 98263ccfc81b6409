"""Metrics of many rows in bounded memory, and their statistics over the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raypatch.metrics import METRICS, Array, Baselines, Fixed, Rows, first_argmax

# Rows at a time: enough to make the call of an operation cheap, few enough for the cache.
BLOCK_ROWS = 16384
STATISTICS = ("mean", "std", "min", "max")


class MetricTable:
    """Metrics of one direction's patched outputs, block by block in bounded memory."""

    def __init__(self, names: Sequence[str], baselines: Baselines) -> None:
        self.names = tuple(names)
        self.baselines = baselines
        self._kept: dict[int, Fixed] = {}

    def compute(
        self,
        patched: Tensor,
        values: Tensor | None = None,
        *,
        statistics: Mapping[str, Tensor] | None = None,
        actions: Tensor | None = None,
    ) -> None:
        """Compute from ``patched`` ``[experiments, inputs, outputs]`` what is asked for.

        ``values`` ``[metrics, experiments, inputs]`` receives every number, NaN where a metric
        is not defined; ``statistics`` those of :func:`summarise`, ``[metrics, experiments]``
        each; ``actions`` ``[experiments, inputs]`` the greedy actions.
        """
        n_experiments, n_inputs, n_outputs = patched.shape
        step = max(1, BLOCK_ROWS // n_inputs)
        buffer = torch.empty(
            len(self.names), min(step, n_experiments), n_inputs, dtype=torch.float64
        )
        for start in range(0, n_experiments, step):
            block = patched[start : start + step]
            columns = np.ascontiguousarray(block.reshape(-1, n_outputs).numpy().T)
            part = slice(start, start + len(block))
            if actions is not None:
                place = first_argmax(columns).reshape(len(block), n_inputs)
                actions[part] = torch.from_numpy(place)
            found = buffer[:, : len(block)]
            self._fill(found.numpy(), Rows(columns.astype(np.float64), self._fixed(len(block))))
            if values is not None:
                values[:, part] = found
            if statistics is not None:
                for name, summary in summarise(found).items():
                    statistics[name][:, part] = summary

    def _fixed(self, repeats: int) -> Fixed:
        if repeats not in self._kept:
            # At most the full block and one rest are kept.
            largest = max(self._kept, default=0)
            self._kept = {k: v for k, v in self._kept.items() if k == largest}
            self._kept[repeats] = Fixed(self.baselines, repeats)
        return self._kept[repeats]

    def _fill(self, found: Array, rows: Rows) -> None:
        # Overflow is looked for, and what is undefined is NaN on purpose.
        with np.errstate(all="ignore"):
            for number, name in enumerate(self.names):
                found[number] = METRICS[name].formula(rows).reshape(found.shape[1:])


def summarise(values: Tensor) -> dict[str, Tensor]:
    """Statistics of metrics ``[metrics, ..., inputs]`` over the inputs, in float64, leaving
    out NaN: mean, std (population), min, max; NaN where nothing is defined."""
    found = _plain_statistics(values)
    undefined = found["min"].isnan().view(len(values), -1).any(1)
    for number in undefined.nonzero().flatten().tolist():
        for name, summary in _defined_statistics(values[number]).items():
            found[name][number] = summary
    return found


def _plain_statistics(values: Tensor) -> dict[str, Tensor]:
    # Plain reductions: torch.std_mean and torch.aminmax are ten times slower here.
    mean = values.mean(-1)
    deviation = values - mean[..., None]
    std = deviation.mul_(deviation).mean(-1).sqrt_()
    return dict(zip(STATISTICS, (mean, std, values.amin(-1), values.amax(-1))))


def _defined_statistics(metric: Tensor) -> dict[str, Tensor]:
    """The statistics of one metric ``[..., inputs]`` that is undefined for some inputs."""
    undefined = metric.isnan()
    somewhere = undefined.view(-1, metric.shape[-1]).any(0)
    if bool((undefined == somewhere).all()):
        # As a rule it is the pair that leaves a metric undefined, not the patch.
        if bool(somewhere.all()):
            return dict.fromkeys(STATISTICS, metric[..., 0])
        return _plain_statistics(metric[..., ~somewhere])
    count = (~undefined).sum(-1)
    mean = torch.where(undefined, 0.0, metric).sum(-1) / count
    deviation = torch.where(undefined, 0.0, metric - mean[..., None])
    low = torch.where(undefined, torch.inf, metric).amin(-1)
    high = torch.where(undefined, -torch.inf, metric).amax(-1)
    std = (deviation.square().sum(-1) / count).sqrt()
    low, high = (torch.where(count == 0, torch.nan, extreme) for extreme in (low, high))
    return dict(zip(STATISTICS, (mean, std, low, high)))
