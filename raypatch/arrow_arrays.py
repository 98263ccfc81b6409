"""NumPy arrays as Arrow arrays and back, without a copy.

``pyarrow.array`` and ``to_numpy`` import pandas wherever that is installed, to see whether they
were given some of it: a third of a second and 40 MiB in the driver and in every actor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

NUMBERS: dict[np.dtype[Any], pa.DataType] = {
    np.dtype(np.int32): pa.int32(),
    np.dtype(np.int64): pa.int64(),
    np.dtype(np.float32): pa.float32(),
}


def numbers(values: np.ndarray, valid: np.ndarray | None = None) -> pa.Array:
    """A flat int32, int64 or float32 array; null where ``valid`` is false."""
    mask = None if valid is None else _bits(valid)
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(NUMBERS[values.dtype], len(values), [mask, data])


def truths(values: np.ndarray) -> pa.Array:
    """A flat bool array."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def words(values: Sequence[str]) -> pa.Array:
    """Strings; few, as they are made one by one."""
    encoded = [word.encode() for word in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))
    )


def as_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of int32, int64 or float32; where it is null a float is NaN."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    dtype = next(dtype for dtype, kind in NUMBERS.items() if kind == column.type)
    if not len(column):
        return np.empty(0, dtype)
    mask, data = column.buffers()
    part = slice(column.offset, column.offset + len(column))
    values = np.frombuffer(data, dtype)[part]
    if column.null_count:
        valid = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[part]
        values = np.where(valid, values, np.float32(np.nan))
    return values


def word(value: str) -> pa.Scalar:
    """One string, for functions that take it along with arrays."""
    return words([value])[0]


def _bits(values: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
