"""Arrays made and read without pyarrow.array, against pyarrow itself."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypatch.arrow_arrays import as_numpy, numbers, truths, word, words
from raypatch.results.schema import BATCH_ROWS
from raypatch.results.tables import file_bytes

lengths = st.integers(0, 40)


@settings(max_examples=100, deadline=None)
@given(lengths, st.sampled_from([np.int32, np.int64, np.float32]), st.randoms())
def test_numbers_are_what_pyarrow_makes_of_them(n, dtype, random):
    values = np.array([random.randrange(-1000, 1000) for _ in range(n)], dtype)
    valid = np.array([random.random() < 0.7 for _ in range(n)], bool)
    for made, expected in (
        (numbers(values), pa.array(values)),
        (numbers(values, valid), pa.array(values, mask=~valid)),
        (truths(valid), pa.array(valid)),
    ):
        made.validate(full=True)
        assert made.type == expected.type and made.equals(expected)


@given(st.lists(st.text(max_size=5), max_size=6))
def test_words_are_what_pyarrow_makes_of_them(given_words):
    made = words(given_words)
    made.validate(full=True)
    assert made.equals(pa.array(given_words, pa.string()))
    assert [word(one).as_py() for one in given_words] == given_words


@settings(max_examples=100, deadline=None)
@given(lengths, lengths, st.sampled_from([pa.int32(), pa.int64(), pa.float32()]), st.randoms())
def test_a_column_is_read_as_pyarrow_reads_it_from_any_slice_and_chunks(n, first, kind, random):
    some = kind == pa.float32()
    values = [None if some and random.random() < 0.3 else random.randrange(99) for _ in range(n)]
    column = pa.array(values, kind)
    for given_column in (
        column,
        column.slice(min(first, n)),
        pa.chunked_array([column.slice(min(first, n)), column], kind),
    ):
        found, expected = as_numpy(given_column), given_column.to_numpy(zero_copy_only=False)
        assert found.dtype == expected.dtype or not len(expected)
        np.testing.assert_array_equal(found, expected)


def test_other_types_are_refused():
    with pytest.raises(KeyError):
        numbers(np.zeros(2, np.float64))


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_a_file_compressed_on_several_threads_has_the_same_bytes(compression):
    n_rows, random = 2 * BATCH_ROWS + 5, np.random.default_rng(0)
    columns = [random.integers(0, 9, n_rows, np.int32), np.repeat(np.int64(7), n_rows)]
    columns += [random.standard_normal(n_rows).astype(np.float32) for _ in range(6)]
    table = pa.table(list(map(numbers, columns)), [str(i) for i in range(len(columns))])
    before = pa.cpu_count()
    try:
        pa.set_cpu_count(4)
        assert file_bytes(table, compression, threads=True) == file_bytes(table, compression)
    finally:
        pa.set_cpu_count(before)
