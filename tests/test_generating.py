"""raypatch generate as people type it: the original's examples, and what falls back."""

from __future__ import annotations

import json

import pytest
from conftest import CARTPOLE, LAVA, ROOT


@pytest.mark.parametrize(
    ("kind", "count", "first"),
    [
        ("single_neuron", 198, {"features_extractor.mlp.0": [0]}),
        ("layer", 5, {"features_extractor.mlp.0": "all"}),
        ("neuron_groups", 41, {"features_extractor.mlp.0": [0, 1, 2, 3, 4]}),
    ],
)
def test_generate_reads_the_layers_from_the_agent(command, in_empty_folder, kind, count, first):
    assert command("generate", "--type", kind, "--agent_path", LAVA).code == 0
    found = json.loads((in_empty_folder / "Definitions" / f"{kind}_experiment.json").read_text())
    assert (len(found), found[0]) == (count, first)
    assert set(found[-1]) == {"output_logits"}


@pytest.mark.parametrize("kind", ["single_neuron", "layer", "neuron_groups"])
def test_the_definitions_in_the_repository_are_what_generate_writes(command, tmp_path, kind):
    out = tmp_path / "d.json"
    command("generate", "--type", kind, "--agent_path", LAVA, "--output", out)
    assert out.read_text() == (ROOT / "Definitions" / f"{kind}_experiment.json").read_text()


def test_custom_json_on_the_command_line(command, in_empty_folder):
    spec = '\n[\n  {"layer_name": [0, 1, 2]},\n  {"another_layer": [5, 10, 15]}\n]'
    assert command("generate", "--type", "custom", "--custom_spec", spec).code == 0
    found = json.loads((in_empty_folder / "Definitions" / "custom_experiment.json").read_text())
    assert found == [{"layer_name": [0, 1, 2]}, {"another_layer": [5, 10, 15]}]


def test_custom_json_from_a_file(command, in_empty_folder):
    (in_empty_folder / "custom_definition.json").write_text('[{"q_net.0": [3], "q_net.2": "all"}]')
    ended = command("generate", "--type", "custom", "--custom_spec", "custom_definition.json")
    assert ended.code == 0
    found = json.loads((in_empty_folder / "Definitions" / "custom_experiment.json").read_text())
    assert found == [{"q_net.0": [3], "q_net.2": "all"}]


def test_the_custom_definition_in_the_repository_fits_the_example(command, tmp_path):
    path = ROOT / "Definitions" / "custom_experiment.json"
    ended = command(
        "generate", "--type", "custom", "--custom_spec", path, "--agent_path", LAVA,
        "--output", tmp_path / "d.json",
    )  # fmt: skip
    assert ended.code == 0
    assert (tmp_path / "d.json").read_text() == path.read_text()


@pytest.mark.parametrize("as_file", [False, True])
def test_a_layer_structure_goes_before_the_agent(command, in_empty_folder, as_file):
    structure = '{"a": 2, "b": 3}'
    if as_file:
        (in_empty_folder / "structure.json").write_text(structure)
        structure = "structure.json"
    command("generate", "--type", "layer", "--layer_structure", structure, "--agent_path", LAVA)
    found = json.loads((in_empty_folder / "Definitions" / "layer_experiment.json").read_text())
    assert found == [{"a": "all"}, {"b": "all"}, {"output_logits": "all"}]


def test_options_of_generate_with_dashes_and_underscores(command, tmp_path):
    for number, names in enumerate((("--group_size", "--exclude_output_logits"),
                                    ("--group-size", "--exclude-output-logits"))):  # fmt: skip
        ended = command(
            "generate", "--type", "neuron_groups", names[0], "10", "--agent_path", CARTPOLE,
            names[1], "--output", tmp_path / f"{number}.json",
        )  # fmt: skip
        assert ended.code == 0
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    assert json.loads((tmp_path / "0.json").read_text())[-1] == {"action_net": [0, 1]}


def test_a_group_size_for_another_type_is_said_to_do_nothing(command, in_empty_folder):
    ended = command("generate", "--type", "layer", "--group_size", 3, "--agent_path", LAVA)
    assert ended.code == 0 and "--group_size does nothing for --type layer" in ended.err


def test_an_unreadable_agent_falls_back_with_a_warning(command, in_empty_folder):
    (in_empty_folder / "agent").mkdir()
    ended = command("generate", "--type", "single_neuron", "--agent_path", "agent")
    assert ended.code == 0
    assert "WARNING: USING THE DEFAULT LAYER STRUCTURE" in ended.err
    found = json.loads(
        (in_empty_folder / "Definitions" / "single_neuron_experiment.json").read_text()
    )
    assert len(found) == 64 * 3 + 5 + 5


def test_strict_makes_the_fallback_an_error(command, in_empty_folder):
    (in_empty_folder / "agent").mkdir()
    ended = command("generate", "--type", "layer", "--agent_path", "agent", "--strict")
    assert ended.code == 2 and "no agent here" in ended.err
    assert not (in_empty_folder / "Definitions").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--actions", "foo"], "actions 'foo' is not one of discrete, continuous"),
        (["--activation", "tanhh"], "unknown activation 'tanhh'; did you mean tanh"),
        (["--agent_file", "nope.pt"], "--agent_file nope.pt: no such file"),
        (["--agent_factory", "json:nope"], "has no function 'nope'"),
        (["--agent_output", "nope"], "--agent_output 'nope' is not in it; there are: "),
    ],
)
def test_a_mistaken_option_is_no_reason_to_generate_something_else(
    command, in_empty_folder, options, message
):
    ended = command("generate", "--type", "layer", "--agent_path", LAVA, *options)
    assert ended.code == 2 and message in ended.err and not list(in_empty_folder.iterdir())


def test_a_layer_that_is_given_twice_is_named(command, in_empty_folder):
    ended = command("generate", "--type", "layer", "--layer_structure", '{"a": 2, "b": 1, "a": 3}')
    assert ended.code == 2 and "--layer_structure: layer 'a' is given twice" in ended.err
