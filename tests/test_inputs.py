"""Inputs: layouts, matching of ids, and every kind of bad value."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import LAVA

from raypatch.errors import InputError
from raypatch.inputs import (
    SIDES,
    ObservationShape,
    read_activations,
    read_inputs,
    read_observations,
)


def write(tmp_path, clean, corrupted):
    paths = {"clean": tmp_path / "clean.json", "corrupted": tmp_path / "corrupted.json"}
    for path, content in zip(paths.values(), (clean, corrupted)):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return paths


def test_both_json_layouts_are_matched_by_id(tmp_path):
    paths = write(tmp_path, {"a": {"input": [1, 2]}, "b": [3, 4]}, {"b": [7, 8], "a": [5, 6]})
    inputs = read_inputs(paths, ObservationShape((2,)))
    assert inputs.ids == ("a", "b")
    np.testing.assert_array_equal(inputs.sides["clean"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(inputs.sides["corrupted"], [[5, 6], [7, 8]])
    assert inputs.sides["clean"].dtype == np.float32


def test_chosen_ids_come_in_the_order_asked(tmp_path):
    paths = write(tmp_path, {"a": [1], "b": [2], "c": [3]}, {"a": [1], "b": [2], "c": [3]})
    inputs = read_inputs(paths, ObservationShape((1,)), input_ids=["c", "a"])
    assert inputs.ids == ("c", "a")
    assert inputs.sides["clean"].tolist() == [[3], [1]]


def test_a_flat_list_fills_a_shaped_observation(tmp_path):
    paths = write(tmp_path, {"a": [1, 2, 3, 4]}, {"a": [[1, 2], [3, 4]]})
    inputs = read_inputs(paths, ObservationShape((2, 2)))
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
    (GOOD, {"a": [1e39, 1]}, r"value 0 is 1e\+39; every value must be finite, in float32"),
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
        read_inputs(write(tmp_path, clean, corrupted), ObservationShape((2,)))
    assert ".json" in str(caught.value)


def test_an_unknown_id_is_refused(tmp_path):
    with pytest.raises(InputError, match="--input_ids: 'z' is not in .*it holds a"):
        read_inputs(write(tmp_path, GOOD, GOOD), ObservationShape((2,)), input_ids=["z"])


def test_an_id_asked_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match="given twice"):
        read_inputs(write(tmp_path, GOOD, GOOD), ObservationShape((2,)), input_ids=["a", "a"])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such input file"):
        read_inputs({"clean": tmp_path / "none.json"}, ObservationShape((2,)))


ROWS = np.array([[1.0, -2.0], [0.5, 3.0], [0.0, 4.0]], np.float32)
IDS = ["a", "b", "c"]


def write_all_formats(folder):
    """The same three inputs in every format."""
    import pyarrow as pa
    import pyarrow.parquet

    (folder / "x.json").write_text(
        json.dumps({i: {"input": row.tolist()} for i, row in zip(IDS, ROWS)})
    )
    np.savez(folder / "x.npz", ids=IDS, inputs=ROWS)
    np.save(folder / "x.npy", ROWS)
    table = pa.table({"input_id": IDS, "input": ROWS.tolist()})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    with pa.ipc.new_file(folder / "x.arrow", table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("suffix", ["json", "npz", "npy", "parquet", "arrow"])
def test_every_format_gives_the_same_inputs(tmp_path, suffix):
    write_all_formats(tmp_path)
    path = tmp_path / f"x.{suffix}"
    inputs = read_inputs({"clean": path, "corrupted": path}, ObservationShape((2,)))
    assert inputs.ids == (("0", "1", "2") if suffix == "npy" else tuple(IDS))
    np.testing.assert_array_equal(inputs.sides["clean"], ROWS)


@pytest.mark.parametrize("suffix", ["json", "npz", "npy", "parquet", "arrow"])
def test_a_file_of_another_kind_is_one_line(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    for content in (
        b"",
        b"PK\x03\x04 no",
        b"\x93NUMPY\x01\x00",
        b"ARROW1\0\0",
        b"PAR1PAR1",
        b"\xff",
    ):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_inputs({"clean": path}, ObservationShape((2,)))
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_pickle_inside_numpy_files_is_not_run(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(InputError, match="not readable"):
        read_inputs({"clean": tmp_path / "x.npy"}, ObservationShape((2,)))


PARTS = ObservationShape((5,), {"b": (2, 1), "a": (3,)})


def test_observations_of_several_parts_are_packed_in_the_agents_order(tmp_path):
    (tmp_path / "x.json").write_text(
        json.dumps({"q": {"input": {"a": [1, 2, 3], "b": [[4], [5]]}}})
    )
    np.savez(
        tmp_path / "x.npz", ids=["q"],
        **{"inputs.a": np.array([[1, 2, 3]]), "inputs.b": np.array([[[4], [5]]])},
    )  # fmt: skip
    for name in ("x.json", "x.npz"):
        inputs = read_inputs({"clean": tmp_path / name}, PARTS)
        np.testing.assert_array_equal(inputs.sides["clean"], [[4, 5, 1, 2, 3]])


@pytest.mark.parametrize(
    ("value", "message"),
    [({"a": [1, 2, 3]}, "has no 'b'"), ({"a": [1, 2, 3], "b": [[1], [2]], "z": 1}, "unknown 'z'"),
     ({"a": [1, 2], "b": [[1], [2]]}, "'a': shape"), ([1, 2], "shape")],
)  # fmt: skip
def test_a_part_that_is_missing_or_of_another_shape_is_named(tmp_path, value, message):
    (tmp_path / "x.json").write_text(json.dumps({"q": {"input": value}}))
    with pytest.raises(InputError, match=message):
        read_inputs({"clean": tmp_path / "x.json"}, PARTS)


def test_images_as_bytes_and_with_their_channels_last_are_taken(tmp_path):
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.savez(tmp_path / "x.npz", ids=["a", "b"], inputs=images)
    inputs = read_inputs({"clean": tmp_path / "x.npz"}, ObservationShape((3, 4, 5)))
    np.testing.assert_array_equal(inputs.sides["clean"], images.transpose(0, 3, 1, 2))


def record_activations_of(agent_path, side, path, prefix=""):
    """What the original's activation logging writes."""
    import torch

    import raypatch
    from raypatch.engine.layers import record_activations

    agent = raypatch.load_agent(agent_path)
    raw = json.loads((agent_path / f"activation_inputs/{side}_inputs.json").read_text())
    arrays = {}
    for key, entry in raw.items():
        x = torch.tensor(entry["input"] if isinstance(entry, dict) else entry)
        x = x.reshape(1, *agent.observation_shape).float()
        taken = record_activations(agent.network, (x,), [*agent.layers, "output_logits"])
        arrays |= {f"{key}_{prefix}{layer}": calls[0].numpy() for layer, calls in taken.items()}
    np.savez(path, **arrays)


@pytest.mark.parametrize("prefix", ["", "policy.q_net."])
def test_recorded_activations_give_the_same_as_the_inputs_they_were_recorded_on(
    run_inline, single_neurons, tmp_path, prefix
):
    import raypatch

    record_activations_of(LAVA, "clean", tmp_path / "clean_activations.npz", prefix)
    definition = single_neurons(LAVA)
    one = run_inline(LAVA, definition, "--direction", "denoising", out=tmp_path / "one")
    two = run_inline(
        LAVA, definition, "--direction", "denoising", "--source_activations",
        tmp_path / "clean_activations.npz", out=tmp_path / "two",
    )  # fmt: skip
    rows = [raypatch.open_results(p).dataset().to_table().to_pandas() for p in (one, two)]
    outputs = [np.stack(r["patched_output"]) for r in rows]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_recorded_activations_that_lack_a_layer_are_refused_by_name(
    command, single_neurons, tmp_path
):
    np.savez(tmp_path / "a.npz", nothing=np.zeros(3))
    words = ("run", "--agent_path", LAVA, "--definition_file", single_neurons(LAVA),
             "--output_dir", tmp_path / "out", "--backend", "inline",
             "--source_activations", tmp_path / "a.npz")  # fmt: skip
    ended = command(*words)
    assert ended.code == 2 and "add --direction denoising" in ended.err
    ended = command(*words, "--direction", "denoising")
    assert ended.code == 2 and "_features_extractor.mlp.0', which the definition needs" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_compressed_archive_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, ids=IDS, inputs=np.random.default_rng(0).normal(size=np.shape(ROWS)))
    content = bytearray(path.read_bytes())
    start = content.index(b"inputs.npy") + 40
    for at in range(start, start + 20):
        content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="not readable inputs"):
        read_inputs({"clean": path}, ObservationShape((np.shape(ROWS)[1],)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": {"input": ["1", "2"]}}, "not a number"),
        ({"a": {"input": [10**400, 1]}}, "not a number"),
        ({"\ud800": {"input": [1, 2]}}, "holds unprintable characters"),
        ({"a\nb": {"input": [1, 2]}}, "holds unprintable characters"),
    ],
)
def test_what_is_no_number_or_no_name_is_refused(tmp_path, rows, message):
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        read_inputs({"clean": tmp_path / "x.json"}, ObservationShape((2,)))


def test_archives_and_arrays_that_lie_about_themselves_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        stream = io.BytesIO()
        np.save(stream, np.array(["a"]))
        archive.writestr("ids.npy", stream.getvalue())
        archive.writestr("inputs", "nonsense")
    with (tmp_path / "x.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**13, 4)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"0" * 64)
    for suffix in ("npz", "npy"):
        with pytest.raises(InputError, match="not readable inputs"):
            read_inputs({"clean": tmp_path / f"x.{suffix}"}, ObservationShape((4,)))


def test_an_id_that_is_there_twice_or_missing_is_refused(tmp_path):
    twice = tmp_path / "twice.json"
    twice.write_text('{"a": {"input": [1]}, "b": {"input": [2]}, "a": {"input": [3]}}')
    with pytest.raises(InputError, match=r"twice.json: not readable JSON: 'a' appears twice"):
        read_observations(twice)
    table = pa.table({"input_id": ["a", None], "input": [[1.0], [2.0]]})
    pq.write_table(table, tmp_path / "null.parquet")
    with pytest.raises(InputError, match=r"null.parquet: an input_id is missing"):
        read_observations(tmp_path / "null.parquet")


def test_ids_of_bytes_are_texts(tmp_path):
    np.savez(tmp_path / "bytes.npz", ids=np.array([b"left", b"right"]), inputs=np.zeros((2, 3)))
    assert list(read_observations(tmp_path / "bytes.npz")) == ["left", "right"]


def test_arrays_and_archives_under_each_others_names_are_told_apart(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"one.npz: not readable inputs: this is one array"):
        read_observations(tmp_path / "one.npz")
    np.savez(tmp_path / "whole.npz", ids=IDS, inputs=ROWS)
    content = (tmp_path / "whole.npz").read_bytes()
    for length, what in ((len(content) // 2, "its end is missing"), (0, "this is empty")):
        (tmp_path / "part.npz").write_bytes(content[:length])
        with pytest.raises(InputError, match=f"part.npz: not readable inputs: {what}"):
            read_observations(tmp_path / "part.npz")
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, ids=["a"], inputs=np.zeros((1, 3)))
    with pytest.raises(InputError, match=r"several.npy: .*an archive of several arrays"):
        read_observations(tmp_path / "several.npy")
    (tmp_path / "inputs.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"inputs.csv: inputs are files of the kinds .json, .npz"):
        read_observations(tmp_path / "inputs.csv")


def test_recorded_activations_of_ids_that_begin_alike_are_told_apart(tmp_path):
    values = {"a_q_net.0": [1.0, 2.0], "a_q_q_net.0": [3.0, 4.0]}
    np.savez(tmp_path / "a.npz", **{key: np.array([value]) for key, value in values.items()})
    layers = {"q_net.0": (2,)}
    found = read_activations(
        tmp_path / "a.npz", ["a", "a_q"], layers, lambda name: name if name in layers else None
    )
    assert found["q_net.0"].tolist() == [[1, 2], [3, 4]]


def test_inputs_begin_in_memory_where_torchs_own_tensors_do():
    paths = {side: LAVA / "activation_inputs" / f"{side}_inputs.json" for side in SIDES}
    raw = read_observations(paths["clean"])
    shape = ObservationShape(np.shape(next(iter(raw.values()))))
    for values in read_inputs(paths, shape).sides.values():
        assert values.ctypes.data % 64 == 0 and values.dtype == np.float32
