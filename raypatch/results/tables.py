"""Results of a work item as Arrow tables and file bytes; plain arrays in, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypatch.definition_files import experiment_columns
from raypatch.definitions import NAME_LIMIT, Experiments, experiment_name
from raypatch.results import schema


@dataclass(frozen=True)
class ItemArrays:
    """What was computed for the E experiments ``indices`` (int64); D directions, N inputs.

    ``outputs`` float32 ``[E, D, N, outputs]`` or None; ``actions`` int32 and ``changed`` bool
    ``[E, D, N]``, None for continuous actions; ``metrics`` float32 ``[M, E, D, N]``, NaN
    where undefined; ``statistics`` maps a statistic to float32 ``[M, E, D]``;
    ``changed_rate`` float32 ``[E, D]`` or None.
    """

    indices: np.ndarray
    directions: tuple[str, ...]
    shape: tuple[int, int, int]
    outputs: np.ndarray | None
    actions: np.ndarray | None
    changed: np.ndarray | None
    metrics: np.ndarray | None
    statistics: Mapping[str, np.ndarray]
    changed_rate: np.ndarray | None


def row_table(item: ItemArrays, table_schema: pa.Schema) -> pa.Table:
    """One row an experiment, direction and input."""
    n_experiments, n_directions, n_inputs = item.shape
    n_rows = n_experiments * n_directions * n_inputs
    columns: list[pa.Array] = [
        pa.array(np.repeat(item.indices, n_directions * n_inputs)),
        _directions(item, n_inputs),
        pa.array(np.tile(np.arange(n_inputs, dtype=np.int32), n_experiments * n_directions)),
    ]
    if item.outputs is not None:
        columns.append(_fixed_lists(item.outputs))
    columns += [
        _or_null(item.actions, n_rows, pa.int32()),
        _or_null(item.changed, n_rows, pa.bool_()),
    ]
    assert item.metrics is not None
    columns += [_nan_is_null(values.reshape(-1)) for values in item.metrics]
    return pa.Table.from_arrays(columns, schema=table_schema)


def summary_table(item: ItemArrays, table_schema: pa.Schema) -> pa.Table:
    """One row an experiment and direction."""
    n_experiments, n_directions, n_inputs = item.shape
    n_rows = n_experiments * n_directions
    columns: list[pa.Array] = [
        pa.array(np.repeat(item.indices, n_directions)),
        _directions(item, 1),
        pa.array(np.full(n_rows, n_inputs, np.int32)),
        _or_null(item.changed_rate, n_rows, pa.float32()),
    ]
    n_metrics = len(next(iter(item.statistics.values())))
    columns += [
        _nan_is_null(item.statistics[stat][m].reshape(-1))
        for m in range(n_metrics)
        for stat in schema.STATISTICS
    ]
    return pa.Table.from_arrays(columns, schema=table_schema)


def experiments_table(first: int, experiments: Experiments) -> pa.Table:
    """Index, name, layers and neurons of a run of experiments."""
    names = _names(first, experiments)
    return pa.table(
        {
            "experiment_index": pa.array(np.arange(first, first + len(names), dtype=np.int64)),
            "name": names,
            **experiment_columns(experiments),
        },
        schema=schema.EXPERIMENTS,
    )


def _names(first: int, experiments: Experiments) -> pa.Array:
    """The experiments' names; those of single neurons, of which there may be many millions,
    all at once."""
    n_entries = np.diff(experiments.entry_offsets)
    n_neurons = np.diff(experiments.neuron_offsets)
    if (n_entries == 1).all() and (n_neurons == 1).all():
        layers = pa.array(list(experiments.layer_names), pa.string())
        words = pc.binary_join_element_wise(
            layers.take(pa.array(experiments.layers)),
            pc.cast(pa.array(experiments.neurons), pa.string()),
            "_neuron_",
        )
        if pc.max(pc.utf8_length(words)).as_py() <= NAME_LIMIT:
            return words
    names = [experiment_name(first + i, e) for i, e in enumerate(experiments)]
    return pa.array(names, pa.string())


def baseline_table(
    sides: Mapping[str, np.ndarray], ids: tuple[str, ...], *, discrete: bool
) -> pa.Table:
    """Unpatched outputs ``[inputs, outputs]`` of each side."""
    n_outputs = next(iter(sides.values())).shape[1]
    outputs = np.concatenate(list(sides.values())).astype(np.float32)
    actions = outputs.argmax(1).astype(np.int32) if discrete else None
    return pa.table(
        [
            pa.array(np.repeat(list(sides), len(ids)).tolist(), pa.string()),
            pa.array(np.tile(np.arange(len(ids), dtype=np.int32), len(sides))),
            pa.array(list(ids) * len(sides), pa.string()),
            _fixed_lists(outputs),
            _or_null(actions, len(outputs), pa.int32()),
        ],
        schema=schema.baseline_schema(n_outputs),
    )


def file_bytes(table: pa.Table, compression: str) -> pa.Buffer:
    """The table as an Arrow IPC file; the same table gives the same bytes."""
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=schema.BATCH_ROWS)
    return sink.getvalue()


def _directions(item: ItemArrays, repeats: int) -> pa.Array:
    codes = np.tile(
        np.repeat(np.arange(len(item.directions), dtype=np.int32), repeats), item.shape[0]
    )
    words = pa.array(list(item.directions), pa.string())
    return words.take(pa.array(codes))


def _fixed_lists(values: np.ndarray) -> pa.Array:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[-1])


def _or_null(values: np.ndarray | None, n_rows: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(n_rows, kind) if values is None else pa.array(values.reshape(-1), kind)


def _nan_is_null(values: np.ndarray) -> pa.Array:
    nan = np.isnan(values)
    return pa.array(values, pa.float32(), mask=nan if nan.any() else None)
