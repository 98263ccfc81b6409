"""What plots and reports show of a run, read part by part in bounded memory.

Heat maps grow with the network, not with the number of experiments; tables keep the top,
distributions and scatter plots a seeded sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.results.analysis import combined, rank, single_neurons, usual_combination
from raypatch.results.reader import Results
from raypatch.results.schema import TARGET_SIDE

TOP = 20
SAMPLE = 4000
MAX_STRIP_INPUTS = 200


@dataclass
class Sample:
    """A uniform sample of rows that come in parts (Vitter's algorithm R, a part at a time)."""

    size: int
    rng: np.random.Generator
    seen: int = 0
    rows: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        """``values`` ``[rows, columns]``."""
        if self.rows is None:
            self.rows = np.empty((0, values.shape[1]))
        room = self.size - len(self.rows)
        self.rows = np.concatenate([self.rows, values[:room]])
        self.seen += min(room, len(values))
        rest = values[room:] if room < len(values) else values[:0]
        if not len(rest):
            return
        places = self.rng.random(len(rest)) * np.arange(self.seen + 1, self.seen + len(rest) + 1)
        places = places.astype(np.int64)
        inside = places < self.size
        self.rows[places[inside]] = rest[inside]
        self.seen += len(rest)


@dataclass
class Gathered:
    """All that is drawn.

    ``heat[metric][direction][layer]`` float ``[neurons]``; ``effects[layer]`` a sample
    ``[rows, metrics * directions]`` of experiments that patch the layer (several layers
    together: "several layers"); ``scatter`` ``[rows, 1 + metrics * directions]`` with the
    experiment's index first; ``flips`` ``[actions, actions]`` baseline to patched action.
    """

    metrics: tuple[str, ...]
    directions: tuple[str, ...]
    units: dict[str, str]
    heat: dict[str, dict[str, dict[str, np.ndarray]]]
    effects: dict[str, np.ndarray]
    scatter: np.ndarray
    scatter_names: list[str]
    top: dict[str, list[dict[str, Any]]]
    strips: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    flips: dict[str, np.ndarray] = field(default_factory=dict)
    n_experiments: int = 0
    sampled: set[str] = field(default_factory=set)  # layers of which ``effects`` are not all


def gather(results: Results) -> Gathered:
    """Read a run once for its summary, once for its actions, and the top experiments' rows."""
    metrics, directions = results.metrics, results.directions
    sizes = results.sweep["identity"]["layers"]
    heat = {
        m: {d: {layer: np.full(n, np.nan) for layer, n in sizes.items()} for d in directions}
        for m in metrics
    }
    rng = np.random.default_rng(0)
    scatter = Sample(SAMPLE, rng)
    effects: dict[str, Sample] = {}
    n_experiments = 0
    for ids, values, batch in _aligned(results):
        n_experiments += len(ids)
        flat = values.reshape(len(ids), -1)
        scatter.add(np.column_stack([ids, flat]))
        for layer, rows in _by_layer(batch, sizes):
            effects.setdefault(layer, Sample(SAMPLE // 4, rng)).add(flat[rows])
        _fill_heat(heat, batch, ids, values, metrics, directions)
    assert scatter.rows is not None
    places = [int(i) for i in scatter.rows[:, 0]]
    order = np.argsort(places)
    described = results.describe([places[i] for i in order])["name"].to_pylist()
    twice = {name for name, count in Counter(described).items() if count > 1}
    names = {
        place: f"{name} (experiment {place})" if name in twice else name
        for place, name in zip((places[i] for i in order), described)
    }
    found = Gathered(
        metrics=metrics,
        directions=directions,
        units=results.sweep["units"],
        heat=heat,
        effects={layer: s.rows for layer, s in effects.items() if s.rows is not None},
        scatter=scatter.rows,
        scatter_names=[names[i] for i in places],
        top={metric: rank(results, metric, top=TOP, bootstrap=True) for metric in metrics},
        n_experiments=n_experiments,
        sampled={layer for layer, s in effects.items() if s.seen > s.size},
    )
    if results.has_rows:
        found.strips = _strips(results, found.top)
        if results.sweep["agent"]["discrete"]:
            found.flips = _flips(results)
    return found


def _aligned(results: Results) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """Summary parts beside the descriptions of the same experiments: indices, means
    ``[experiments, metrics, directions]``, and the rows of ``experiments.arrow``."""
    import pyarrow as pa

    n_directions = len(results.directions)
    batches = results.experiment_batches()
    held: Any = None
    for part in results.summary_parts(None):
        ids = part["experiment_index"].to_numpy()[::n_directions]
        values = np.stack(
            [
                part[f"{m}_mean"].to_numpy().astype(np.float64).reshape(-1, n_directions)
                for m in results.metrics
            ],
            axis=1,
        )
        pieces = []
        while len(ids):
            if held is None or ids[0] > held["experiment_index"][-1].as_py():
                held = next(batches)
                continue
            first = held["experiment_index"][0].as_py()
            inside = ids[ids < first + len(held)]
            pieces.append(held.take(pa.array(inside - first)))
            ids = ids[len(inside) :]
        if pieces:
            batch = pa.Table.from_batches(pieces).combine_chunks()
            yield batch["experiment_index"].to_numpy(), values, batch.to_batches()[0]


def _by_layer(batch: Any, sizes: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of the batch by the one layer they patch."""
    import pyarrow.compute as pc

    lengths = np.asarray(pc.list_value_length(batch["layers"]))
    first = pc.list_element(batch["layers"], 0).to_numpy(zero_copy_only=False)
    for layer in sizes:
        rows = np.flatnonzero((lengths == 1) & (first == layer))
        if len(rows):
            yield layer, rows
    rows = np.flatnonzero(lengths > 1)
    if len(rows):
        yield "several layers", rows


def _fill_heat(
    heat: Any, batch: Any, ids: np.ndarray, values: np.ndarray, metrics: Any, directions: Any
) -> None:
    places, layers, neurons = single_neurons(batch)
    if not len(places):
        return
    rows = np.searchsorted(ids, places)
    for layer in dict.fromkeys(layers.tolist()):
        mine = layers == layer
        for m, metric in enumerate(metrics):
            for d, direction in enumerate(directions):
                heat[metric][direction][layer][neurons[mine]] = values[rows[mine], m, d]


def _strips(results: Results, top: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per-input values of each metric's top experiments, the directions combined as in ranks."""
    n_inputs, n_directions = len(results.sweep["input_ids"]), len(results.directions)
    indices = sorted({row["experiment_index"] for rows in top.values() for row in rows})
    rows = results.rows_of(indices, list(results.metrics))
    found: dict[str, dict[str, Any]] = {}
    for metric, ranked in top.items():
        found[metric] = {}
        for row in ranked:
            index = row["experiment_index"]
            values = rows[index][metric].to_numpy(zero_copy_only=False).astype(np.float64)
            both = values.reshape(n_directions, n_inputs).T
            per_input = combined(both, usual_combination(metric), metric)
            found[metric][str(index)] = per_input[:MAX_STRIP_INPUTS]
    return found


def _flips(results: Results) -> dict[str, np.ndarray]:
    """Counts of baseline action to patched action by direction, over all rows."""
    n_outputs, n_inputs = results.sweep["n_outputs"], len(results.sweep["input_ids"])
    sides: dict[str, list[int]] = {}
    for row in results.baselines.select(["side", "action"]).to_pylist():
        sides.setdefault(row["side"], []).append(row["action"])
    counts = {d: np.zeros((n_outputs, n_outputs), np.int64) for d in results.directions}
    for part in results.row_parts(["patched_action"]):
        patched = part["patched_action"].to_numpy().reshape(-1, len(results.directions), n_inputs)
        for d, direction in enumerate(results.directions):
            base = np.array(sides[TARGET_SIDE[direction]])
            cells = base[None, :] * n_outputs + patched[:, d]
            found = np.bincount(cells.ravel(), minlength=n_outputs**2)
            counts[direction] += found.reshape(n_outputs, n_outputs)
    return counts


def ordered_layers(layers: Any) -> list[str]:
    """Layers in forward order, the outputs last."""
    return [layer for layer in layers if layer != OUTPUT_LOGITS] + [
        layer for layer in layers if layer == OUTPUT_LOGITS
    ]
