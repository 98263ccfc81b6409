"""NumPy arrays as Arrow arrays, without a copy.

``pyarrow.array`` imports pandas wherever that is installed, to see whether it was given some of
it: a third of a second and 40 MiB in the driver and in every actor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

NUMBERS = {
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


def word(value: str) -> pa.Scalar:
    """One string, for functions that take it along with arrays."""
    return words([value])[0]


def _bits(values: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
