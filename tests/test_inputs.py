"""Inputs: layouts, matching of ids, and every kind of bad value."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raypatch.errors import InputError
from raypatch.inputs import read_inputs


def write(tmp_path, clean, corrupted):
    paths = {"clean": tmp_path / "clean.json", "corrupted": tmp_path / "corrupted.json"}
    for path, content in zip(paths.values(), (clean, corrupted)):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return paths


def test_both_json_layouts_are_matched_by_id(tmp_path):
    paths = write(tmp_path, {"a": {"input": [1, 2]}, "b": [3, 4]}, {"b": [7, 8], "a": [5, 6]})
    inputs = read_inputs(paths, (2,))
    assert inputs.ids == ("a", "b")
    np.testing.assert_array_equal(inputs.sides["clean"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(inputs.sides["corrupted"], [[5, 6], [7, 8]])
    assert inputs.sides["clean"].dtype == np.float32


def test_chosen_ids_come_in_the_order_asked(tmp_path):
    paths = write(tmp_path, {"a": [1], "b": [2], "c": [3]}, {"a": [1], "b": [2], "c": [3]})
    inputs = read_inputs(paths, (1,), input_ids=["c", "a"])
    assert inputs.ids == ("c", "a")
    assert inputs.sides["clean"].tolist() == [[3], [1]]


def test_a_flat_list_fills_a_shaped_observation(tmp_path):
    paths = write(tmp_path, {"a": [1, 2, 3, 4]}, {"a": [[1, 2], [3, 4]]})
    inputs = read_inputs(paths, (2, 2))
    assert (
        inputs.sides["clean"].tolist() == inputs.sides["corrupted"].tolist() == [[[1, 2], [3, 4]]]
    )


GOOD = {"a": [1, 2]}
BAD = [
    (GOOD, {"b": [1, 2]}, "input 'a' has no partner"),
    (GOOD, {**GOOD, "b": [1, 2]}, "input 'b' has no partner"),
    (GOOD, {"a": [1, 2, 3]}, r"input 'a': shape \[3\], but the agent takes \[2\]"),
    (GOOD, '{"a": [1, NaN]}', "input 'a': value 1 is nan"),
    (GOOD, '{"a": [Infinity, 1]}', "input 'a': value 0 is inf"),
    (GOOD, {"a": [1e39, 1]}, "input 'a': value 0 is inf"),
    (GOOD, {"a": [[1], [2, 3]]}, "input 'a': holds something that is not a number, or ragged"),
    (GOOD, {"a": ["x", 1]}, "input 'a': holds something that is not a number"),
    (GOOD, {"a": {"values": [1, 2]}}, "input 'a' has no \"input\""),
    (GOOD, {}, "inputs are a non-empty object"),
    (GOOD, [1], "inputs are a non-empty object"),
    (GOOD, "{", "not readable JSON"),
]


@pytest.mark.parametrize(("clean", "corrupted", "message"), BAD)
def test_bad_inputs_are_refused_naming_file_and_id(tmp_path, clean, corrupted, message):
    with pytest.raises(InputError, match=message) as caught:
        read_inputs(write(tmp_path, clean, corrupted), (2,))
    assert ".json" in str(caught.value)


def test_an_unknown_id_is_refused(tmp_path):
    with pytest.raises(InputError, match="--input_ids: 'z' is not in .*it holds a"):
        read_inputs(write(tmp_path, GOOD, GOOD), (2,), input_ids=["z"])


def test_an_id_asked_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match="given twice"):
        read_inputs(write(tmp_path, GOOD, GOOD), (2,), input_ids=["a", "a"])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such input file"):
        read_inputs({"clean": tmp_path / "none.json"}, (2,))
