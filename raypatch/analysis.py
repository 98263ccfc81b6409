"""Ranking: which experiments move the outputs most."""

from __future__ import annotations

from typing import Any

import numpy as np

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.errors import InputError
from raypatch.results.reader import Results

DEFAULT_METRIC = "kl_divergence"
BOTH = "both"


def rank(
    results: Results,
    metric: str = DEFAULT_METRIC,
    *,
    direction: str = BOTH,
    top: int | None = 10,
    layer: str | None = None,
    internal_only: bool = False,
) -> list[dict[str, Any]]:
    """Experiments by the mean of a metric over the inputs, strongest first.

    ``both`` averages the directions. ``layer`` keeps experiments that patch it;
    ``internal_only`` leaves out those that patch ``output_logits``. Each row holds rank,
    experiment_index, name, the metric's mean, and action_changed_rate (None for continuous
    actions). Experiments for which the metric is undefined are left out. Reads part by part,
    in bounded memory for any ``top`` that is not None.
    """
    if metric not in results.metrics:
        raise InputError(
            f"--metric: {metric!r} was not computed; this run holds {', '.join(results.metrics)}"
        )
    chosen = _directions(results, direction)
    layers = results.sweep["identity"]["layers"]
    if layer is not None and layer not in layers and layer != OUTPUT_LOGITS:
        raise InputError(
            f"--layer: unknown layer {layer!r}; valid: {', '.join(layers)}, output_logits"
        )
    wanted = _layer_filter(results, layer, internal_only)
    best = np.empty((0, 3))
    for part in results.summary_parts(
        ["experiment_index", "direction", "action_changed_rate", f"{metric}_mean"]
    ):
        n_directions = len(results.directions)
        ids = part["experiment_index"].to_numpy()[::n_directions]
        keep = [results.directions.index(d) for d in chosen]
        value = _averaged(part[f"{metric}_mean"], n_directions, keep)
        rate = _averaged(part["action_changed_rate"], n_directions, keep)
        rows = np.column_stack([ids, value, rate])[~np.isnan(value)]
        if wanted is not None:
            rows = rows[np.isin(rows[:, 0], wanted)]
        best = np.concatenate([best, rows])
        best = best[np.lexsort((best[:, 0], -best[:, 1]))][:top]
    found = results.describe([int(i) for i in best[:, 0]])
    return [
        {
            "rank": place,
            "experiment_index": int(index),
            "name": name,
            f"{metric}_mean": float(value),
            "action_changed_rate": None if np.isnan(rate) else float(rate),
        }
        for place, ((index, value, rate), name) in enumerate(
            zip(best, found["name"].to_pylist()), 1
        )
    ]


def _directions(results: Results, direction: str) -> tuple[str, ...]:
    if direction == BOTH:
        return results.directions
    if direction not in results.directions:
        raise InputError(
            f"--direction: {direction!r} was not run; valid: {', '.join(results.directions)}"
        )
    return (direction,)


def _averaged(column: Any, n_directions: int, keep: list[int]) -> np.ndarray:
    values = column.to_numpy().astype(np.float64).reshape(-1, n_directions)[:, keep]
    defined = ~np.isnan(values)
    count = defined.sum(1)
    total = np.where(defined, values, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _layer_filter(results: Results, layer: str | None, internal_only: bool) -> np.ndarray | None:
    """Indices of the experiments that pass, None for all."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if layer is None and not internal_only:
        return None
    names = results.experiments["layers"].combine_chunks()
    word = layer or OUTPUT_LOGITS
    hits = pc.unique(
        pc.filter(pc.list_parent_indices(names), pc.equal(pc.list_flatten(names), word))
    )
    all_ids = np.arange(len(names))
    if layer is None:
        return np.setdiff1d(all_ids, hits.to_numpy())
    assert isinstance(hits, pa.Array)
    return hits.to_numpy()
