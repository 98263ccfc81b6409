"""Results of a work item as Arrow tables and file bytes; plain arrays in, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypatch.arrow_arrays import numbers, truths, word, words
from raypatch.definition_files import experiment_columns
from raypatch.definitions import NAME_LIMIT, Experiments, experiment_name
from raypatch.results import schema

# Room in a file for where its batches are and for what does not compress.
SPARE_BYTES = 1 << 20


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
        numbers(np.repeat(item.indices, n_directions * n_inputs)),
        _direction_column(item.directions, n_experiments, n_inputs),
        _input_column(n_experiments * n_directions, n_inputs),
    ]
    if item.outputs is not None:
        columns.append(_fixed_lists(item.outputs))
    columns += [
        _or_null(item.actions, n_rows, pa.int32()),
        pa.nulls(n_rows, pa.bool_()) if item.changed is None else truths(item.changed.reshape(-1)),
    ]
    assert item.metrics is not None
    columns += [_nan_is_null(values.reshape(-1)) for values in item.metrics]
    return pa.Table.from_arrays(columns, schema=table_schema)


def summary_table(item: ItemArrays, table_schema: pa.Schema) -> pa.Table:
    """One row an experiment and direction."""
    n_experiments, n_directions, n_inputs = item.shape
    n_rows = n_experiments * n_directions
    columns: list[pa.Array] = [
        numbers(np.repeat(item.indices, n_directions)),
        _direction_column(item.directions, n_experiments, 1),
        numbers(np.full(n_rows, n_inputs, np.int32)),
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
            "experiment_index": numbers(np.arange(first, first + len(names), dtype=np.int64)),
            "name": names,
            **experiment_columns(experiments),
        },
        schema=schema.EXPERIMENTS,
    )


def _names(first: int, experiments: Experiments) -> pa.Array:
    """:func:`raypatch.definitions.experiment_name` of each, column by column: there may be
    many millions."""
    n_neurons = np.diff(experiments.neuron_offsets)
    entry = np.repeat(np.arange(len(n_neurons)), n_neurons)
    ordered = experiments.neurons[np.lexsort((experiments.neurons, entry))]
    cells = pa.ListArray.from_arrays(
        numbers(experiments.neuron_offsets.astype(np.int32)),
        pc.cast(numbers(ordered), pa.string()),
    )
    between = word("_")
    listed = pc.binary_join(cells, between)
    counted = pc.cast(numbers(n_neurons), pa.string())
    layers = words(experiments.layer_names).take(numbers(experiments.layers))

    def joined(*parts: Any) -> pa.Array:
        return pc.binary_join_element_wise(layers, *parts, between)

    alone = np.repeat(np.diff(experiments.entry_offsets) == 1, np.diff(experiments.entry_offsets))
    parts = pc.case_when(
        pc.make_struct(
            truths(n_neurons == 0),
            truths(alone & (n_neurons == 1)),
            truths(alone & (n_neurons <= 5)),
            truths(alone),
            truths(n_neurons <= 3),
        ),
        joined(word("all")),
        joined(word("neuron"), listed),
        joined(word("neurons"), listed),
        joined(word("group"), counted),
        joined(listed),
        joined(pc.binary_join_element_wise(counted, word("n"), word(""))),
    )
    names = pc.binary_join(
        pa.ListArray.from_arrays(numbers(experiments.entry_offsets.astype(np.int32)), parts),
        between,
    )
    lengths = pc.utf8_length(names)
    if len(lengths) and pc.max(lengths).as_py() > NAME_LIMIT:
        long = np.flatnonzero(np.asarray(lengths) > NAME_LIMIT)
        short = [experiment_name(first + int(i), experiments[int(i)]) for i in long]
        mask = np.zeros(len(experiments), bool)
        mask[long] = True
        names = pc.replace_with_mask(names, pa.array(mask), pa.array(short, pa.string()))
    return names


def baseline_table(
    sides: Mapping[str, np.ndarray], ids: tuple[str, ...], *, discrete: bool
) -> pa.Table:
    """Unpatched outputs ``[inputs, outputs]`` of each side."""
    n_outputs = next(iter(sides.values())).shape[1]
    exact = np.concatenate(list(sides.values()))
    actions = exact.argmax(1).astype(np.int32) if discrete else None
    outputs = exact.astype(np.float32)
    return pa.table(
        [
            words([side for side in sides for _ in ids]),
            numbers(np.tile(np.arange(len(ids), dtype=np.int32), len(sides))),
            words([*ids] * len(sides)),
            _fixed_lists(outputs),
            _or_null(actions, len(outputs), pa.int32()),
        ],
        schema=schema.baseline_schema(n_outputs),
    )


def file_bytes(table: pa.Table, compression: str, *, threads: bool = False) -> memoryview:
    """The table as an Arrow IPC file, its columns compressed on as many ``threads`` as Arrow has or
    on one; the same table gives the same bytes."""
    options = pa.ipc.IpcWriteOptions(
        compression=None if compression == "none" else compression, use_threads=threads
    )
    table = table.combine_chunks()
    # A sink that grows copies itself over and over; memory that is not touched costs nothing.
    room = 2 * (table.nbytes + table.schema.serialize().size) + SPARE_BYTES
    buffer = pa.allocate_buffer(room)
    sink = pa.FixedSizeBufferWriter(buffer)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=schema.BATCH_ROWS)
    return memoryview(buffer)[: sink.tell()]


# Most items have as many experiments as the one before, and then the same columns.
@lru_cache(maxsize=4)
def _direction_column(directions: tuple[str, ...], n_experiments: int, repeats: int) -> pa.Array:
    codes = np.repeat(np.arange(len(directions), dtype=np.int32), repeats)
    return words(directions).take(numbers(np.tile(codes, n_experiments)))


@lru_cache(maxsize=2)
def _input_column(repeats: int, n_inputs: int) -> pa.Array:
    return numbers(np.tile(np.arange(n_inputs, dtype=np.int32), repeats))


def _fixed_lists(values: np.ndarray) -> pa.Array:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(numbers(flat), values.shape[-1])


def _or_null(values: np.ndarray | None, n_rows: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(n_rows, kind) if values is None else numbers(values.reshape(-1))


def _nan_is_null(values: np.ndarray) -> pa.Array:
    nan = np.isnan(values)
    return numbers(values, ~nan if nan.any() else None)
