"""Definitions: generated, read, named, and refused with one clear line."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import LAVA
from hypothesis import given, settings
from hypothesis import strategies as st

from raypatch.checking import check_experiments
from raypatch.definition_files import read_definition, write_definition
from raypatch.definitions import Experiments, experiment_name, generate
from raypatch.errors import InputError

LAYERS = {"features_extractor.mlp.0": 64, "q_net.0": 64, "q_net.2": 6, "output_logits": 5}


def layers_and_neurons():
    def selection(layer):
        some = st.lists(st.integers(0, LAYERS[layer] - 1), min_size=1, max_size=8, unique=True)
        return st.tuples(st.just(layer), st.one_of(st.just("all"), some))

    entries = st.lists(
        st.sampled_from(sorted(LAYERS)).flatmap(selection),
        min_size=1, max_size=3, unique_by=lambda entry: entry[0],
    )  # fmt: skip
    return st.lists(entries.map(dict), min_size=1, max_size=12)


def test_a_directory_is_no_place_for_a_definition(command, tmp_path):
    words = ("--agent_path", LAVA, "--output", tmp_path)
    for ended in (command("generate", "--type", "layer", *words), command("screen", *words)):
        assert ended.code == 2 and f"--output {tmp_path}: is a directory" in ended.err
    words = ("screen", "--agent_path", LAVA, "--estimates", tmp_path)
    ended = command(*words, "--output", tmp_path / "d.json")
    assert ended.code == 2 and f"--estimates {tmp_path}: is a directory" in ended.err
    assert not (tmp_path / "d.json").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".arrow", ".parquet"])
@settings(max_examples=25, deadline=None)
@given(experiments=layers_and_neurons())
def test_every_format_gives_back_what_was_written(tmp_path_factory, suffix, experiments):
    path = tmp_path_factory.mktemp("definition") / f"d{suffix}"
    assert write_definition(experiments, path) == len(experiments)
    assert list(read_definition(path, LAYERS)) == experiments


@settings(max_examples=50, deadline=None)
@given(experiments=layers_and_neurons(), cut=st.integers(0, 12))
def test_slices_hold_the_same_experiments(experiments, cut):
    packed = Experiments.from_list(experiments)
    cut = min(cut, len(experiments))
    assert list(packed.slice(0, cut)) + list(packed.slice(cut, len(packed))) == experiments


def test_json_is_exactly_the_original_format(tmp_path):
    write_definition([{"q_net.0": [3]}, {"q_net.2": "all"}], tmp_path / "d.json")
    assert json.loads((tmp_path / "d.json").read_text()) == [{"q_net.0": [3]}, {"q_net.2": "all"}]
    assert (tmp_path / "d.json").read_text().startswith('[\n  {\n    "q_net.0": [\n      3\n')


def test_single_neurons_come_in_layer_then_neuron_order_then_logits():
    found = list(generate("single_neuron", {"b": 2, "a": 1}, output_size=2))
    assert found == [
        {"b": [0]},
        {"b": [1]},
        {"a": [0]},
        {"output_logits": [0]},
        {"output_logits": [1]},
    ]


def test_groups_are_cut_at_the_end_of_a_layer():
    found = list(generate("neuron_groups", {"a": 5}, group_size=3, include_output_logits=False))
    assert found == [{"a": [0, 1, 2]}, {"a": [3, 4]}]


def test_whole_layers_and_logits():
    assert list(generate("layer", {"a": 5, "b": 3})) == [
        {"a": "all"},
        {"b": "all"},
        {"output_logits": "all"},
    ]


def test_a_layer_called_output_logits_is_not_repeated():
    assert list(generate("layer", {"a": 5, "output_logits": 3})) == [
        {"a": "all"},
        {"output_logits": "all"},
    ]


@pytest.mark.parametrize(
    ("experiment", "name"),
    [
        ({"q_net.0": [5]}, "q_net.0_neuron_5"),
        ({"q_net.2": [7, 3, 12]}, "q_net.2_neurons_3_7_12"),
        ({"q_net.0": "all"}, "q_net.0_all"),
        ({"q_net.0": list(range(25))}, "q_net.0_group_25"),
        ({"q_net.0": [5], "q_net.2": "all"}, "q_net.0_5_q_net.2_all"),
        ({"q_net.0": [2, 1, 3], "q_net.2": [1, 2, 3, 4]}, "q_net.0_1_2_3_q_net.2_4n"),
        ({"a" * 60: [1], "b" * 60: [1]}, f"exp_9_{'a' * 60}_{'b' * 60}"),
    ],
)
def test_names_are_the_original_ones(experiment, name):
    assert experiment_name(9, experiment) == name


def test_names_with_the_policys_prefix_resolve():
    found = check_experiments(
        [{"q_net.q_net.0": [1]}, {"policy.q_net.features_extractor.mlp.0": [2]}],
        {"features_extractor.mlp.0": 4, "q_net.0": 4},
        "d.json",
    )
    assert list(found) == [{"q_net.0": [1]}, {"features_extractor.mlp.0": [2]}]


def test_an_ambiguous_prefix_is_refused():
    with pytest.raises(InputError, match="could be any of 0, q_net.0"):
        check_experiments([{"policy.q_net.0": [1]}], {"0": 4, "q_net.0": 4}, "d.json")


BAD = [
    ('{"q_net.0": [1]}', r"a definition is a list of experiments.*got \{'q_net.0': \[1\]\}"),
    ("[]", "the definition is empty"),
    ("[1]", "experiment 0: 1 is not an object of layers and neurons"),
    ("[{}]", "experiment 0: patches nothing"),
    ('[{"q_net.O": [1]}]', r"experiment 0: unknown layer 'q_net.O'; did you mean .*q_net.0"),
    ('[{"zzz": [1]}]', "unknown layer 'zzz'; valid: features_extractor.mlp.0, q_net.0"),
    ('[{"q_net.0": [64]}]', "layer 'q_net.0': neuron 64 is out of range; valid: 0 to 63"),
    ('[{"q_net.0": [-1]}]', "layer 'q_net.0': neuron -1 is negative; valid: 0 to 63"),
    ('[{"q_net.0": [1.5]}]', "neuron 1.5 is not a whole number"),
    ('[{"q_net.0": [true]}]', "neuron True is not a whole number"),
    ('[{"q_net.0": ["3"]}]', "neuron '3' is not a whole number"),
    ('[{"q_net.0": [2, 2]}]', "neuron 2 is given twice"),
    ('[{"q_net.0": []}]', "the list of neurons is empty"),
    ('[{"q_net.0": "some"}]', "'some' is not a list of neurons"),
    ('[{"q_net.0": 3}]', "3 is not a list of neurons"),
    ('[{"q_net.0": {"a": 1}}]', "is not a list of neurons"),
    ('[{"q_net.0": [1], "q_net.0": [2]}]', "layer 'q_net.0' is given twice"),
    ('[{"q_net.0": [1], "q_net.q_net.0": [2]}]', "layer 'q_net.0' is given twice"),
    ('[{"q_net.0": [1]}', "not JSON at column 18"),
    ("[" * 100_000, "not usable JSON"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_definition_is_refused_with_the_place_and_the_fix(tmp_path, text, message):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_definition(path, LAYERS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ten_problems_are_shown_and_all_counted(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"q_net.0": [99]}] * 25))
    with pytest.raises(InputError) as caught:
        read_definition(path, LAYERS)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[9].startswith(f"{path}: experiment 9:")
    assert lines[10].endswith("and 15 more problems")
    assert lines[11].endswith("25 problems in all; nothing was done")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "d.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(InputError, match="byte 0 is not UTF-8"):
        read_definition(tmp_path / "d.json", LAYERS)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_a_damaged_table_is_refused(tmp_path, suffix):
    (tmp_path / f"d{suffix}").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="not a readable"):
        read_definition(tmp_path / f"d{suffix}", LAYERS)


def test_columns_are_compact():
    packed = Experiments.from_list({"q_net.0": [i % 64]} for i in range(10_000))
    columns = (packed.entry_offsets, packed.layers, packed.neuron_offsets, packed.neurons)
    assert sum(c.nbytes for c in columns) <= 24 * 10_000 + 16
    assert packed.neurons.dtype == np.int32


TABLES = [
    ([["q_net.0"]], [[[64]]], "experiment 0: layer 'q_net.0': neuron 64 is out of range"),
    ([["q_net.0"], []], [[[1]], []], "experiment 1: patches nothing"),
    ([["q_net.0"], ["x"]], [[[1]], [[1]]], "experiment 1: unknown layer 'x'"),
    ([["q_net.0", "q_net.0"]], [[[1], [2]]], "experiment 0: layer 'q_net.0' is given twice"),
    ([["q_net.0"]], [[[3, 1, 3]]], "experiment 0: layer 'q_net.0': neuron 3 is given twice"),
    ([["q_net.0"]], [[[-1]]], "neuron -1 is negative"),
    ([["q_net.0"]], [[[1], [2]]], "lists of equal length"),
    ([[None]], [[[1]]], "without nulls"),
    ([["q_net.0"]], [[[1, None]]], "without nulls"),
    ([], [], "the definition is empty"),
    ([[]], [[]], "experiment 0: patches nothing"),
]


@pytest.mark.parametrize(("layers", "neurons", "message"), TABLES)
def test_a_bad_table_is_refused_like_a_bad_list(tmp_path, layers, neurons, message):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table(
        {
            "layers": pa.array(layers, pa.list_(pa.string())),
            "neurons": pa.array(neurons, pa.list_(pa.list_(pa.int32()))),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(InputError, match=message):
        read_definition(tmp_path / "d.parquet", LAYERS)


@pytest.mark.parametrize(("values", "kind"), [([2.0], "double"), ([True], "bool")])
def test_neurons_of_a_table_are_whole_numbers(tmp_path, values, kind):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"layers": [["a"]], "neurons": [[values]]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(InputError, match=f"neurons are of type {kind}; they are whole numbers"):
        read_definition(tmp_path / "d.parquet", LAYERS)


def test_a_definition_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "d.json").write_text('[{"q_net.0": [0]}]', encoding="utf-8-sig")
    assert len(read_definition(tmp_path / "d.json", LAYERS)) == 1


def test_a_batch_without_rows_is_no_matter(tmp_path):
    import pyarrow as pa

    rows = {"layers": [["q_net.0"]], "neurons": [[[1]]]}
    schema = pa.schema(
        [("layers", pa.list_(pa.string())), ("neurons", pa.list_(pa.list_(pa.int32())))]
    )
    batch = pa.record_batch(rows, schema=schema)
    path = str(tmp_path / "d.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in (batch.slice(0, 0), batch, batch.slice(0, 0)):
            writer.write_batch(part)
    assert list(read_definition(path, LAYERS)) == [{"q_net.0": [1]}]


def test_a_table_with_other_columns_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"layer": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="this one has .*layer: string"):
        read_definition(tmp_path / "d.parquet", LAYERS)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_names_made_by_columns_are_those_made_one_by_one(data):
    from raypatch.definitions import experiment_name
    from raypatch.results.tables import experiments_table

    layers = ["q_net.0", "a", "x" * 70]
    neurons = st.one_of(
        st.just("all"), st.lists(st.integers(0, 2000), min_size=1, max_size=8, unique=True)
    )
    experiment = st.dictionaries(st.sampled_from(layers), neurons, min_size=1, max_size=3)
    drawn = data.draw(st.lists(experiment, min_size=1, max_size=12))
    packed = Experiments.from_list(drawn, layers)
    names = experiments_table(5, packed)["name"].to_pylist()
    assert names == [experiment_name(5 + i, e) for i, e in enumerate(drawn)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_experiments_travel_in_few_bytes_and_arrive_as_they_were(data):
    largest = data.draw(st.sampled_from([3, 255, 256, 70_000, 2**31 - 1]))
    neurons = st.one_of(
        st.just("all"), st.lists(st.integers(0, largest), min_size=1, max_size=8, unique=True)
    )
    experiment = st.dictionaries(st.sampled_from(["a", "b", "c"]), neurons, min_size=1)
    drawn = data.draw(st.lists(experiment, max_size=12))
    if data.draw(st.booleans()):
        drawn = drawn[:1] * len(drawn)
    packed = Experiments.from_list(drawn, ["c"])
    first = data.draw(st.integers(0, len(drawn)))
    for sent in (packed, packed.slice(first, len(drawn))):
        arrived = pickle.loads(pickle.dumps(sent))
        assert arrived.layer_names == sent.layer_names and list(arrived) == list(sent)
        for name in ("entry_offsets", "layers", "neuron_offsets", "neurons"):
            one, two = getattr(arrived, name), getattr(sent, name)
            assert one.dtype == two.dtype and np.array_equal(one, two)


def test_an_item_of_few_neurons_is_small_enough_to_go_along_with_its_task():
    one = Experiments.from_list({"q_net.0": [i % 64]} for i in range(1 << 14))
    two = Experiments.from_list({"a": [i % 64, 70], "b": [i % 9]} for i in range(1 << 14))
    layers = Experiments.from_list({"ab"[i % 2]: [i % 64]} for i in range(1 << 14))
    assert all(len(pickle.dumps(packed)) < 70_000 for packed in (one, two, layers))


def test_a_column_that_comes_twice_is_refused(tmp_path):
    import pyarrow as pa

    layers = pa.array([["q_net.0"]])
    table = pa.table([layers, pa.array([[[1]]]), layers], names=["layers", "neurons", "layers"])
    path = str(tmp_path / "d.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="a definition has the columns"):
        read_definition(tmp_path / "d.arrow", LAYERS)


@pytest.mark.parametrize(
    "words",
    [("--group_size", "9" * 20, "--layer_structure", '{"a": 4}'),
     ("--layer_structure", json.dumps({"a": 10**20}))],
)  # fmt: skip
def test_sizes_beyond_any_network_are_one_line(command, words):
    ended = command("generate", "--type", "neuron_groups", *words)
    assert ended.code == 2 and "2147483647" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_a_folder_in_place_of_a_definition_is_one_line(tmp_path):
    with pytest.raises(InputError, match="this is a directory; give a definition file in it"):
        read_definition(tmp_path, LAYERS)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_numbers_beyond_int32_and_flat_columns_of_a_table_are_named(tmp_path, suffix):
    path = tmp_path / f"definition{suffix}"

    def message(layers, neurons):
        table = pa.table({"layers": layers, "neurons": neurons})
        if suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        with pytest.raises(InputError) as caught:
            read_definition(path, {"a": 4, "output_logits": 2})
        return str(caught.value)

    for number in (1 << 40, (1 << 32) + 1, -(1 << 40)):
        assert f"experiment 1: layer 'a': neuron {number} is " in message(
            [["a"], ["a"]], pa.array([[[1]], [[number]]], pa.list_(pa.list_(pa.int64())))
        )
    assert "this one has layers: string, neurons: list<" in message(["a"], [[1]])
