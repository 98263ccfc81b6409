"""Every careless mistake on the command line is one clear line, and nothing is written."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import LAVA
from torch import nn


def good(tmp_path):
    definition = tmp_path / "d.json"
    definition.write_text('[{"q_net.0": [1]}, {"q_net.0": [2]}]')
    return {
        "--agent_path": LAVA, "--definition_file": definition, "--output_dir": tmp_path / "out",
        "--backend": "inline",
    }  # fmt: skip


MISTAKES = [
    ({"--agent_path": "nowhere"}, "--agent_path nowhere: no such file or directory"),
    ({"--agent_path": None}, "--agent_path is missing"),
    ({"--definition_file": "no.json"}, "--definition_file no.json: no such file or directory"),
    ({"--output_dir": None}, "--output_dir is missing"),
    ({"--start_index": "2"}, r"--start_index 2: the definition has 2 experiments, 0 to 1"),
    ({"--start_index": "-1"}, r"--start_index: -1 is below 0"),
    ({"--start_index": "x"}, r"'x' is not a valid integer"),
    ({"--end_index": "3"}, r"--end_index 3: valid are 1 to 2"),
    ({"--start_index": "1", "--end_index": "1"}, r"--end_index 1: valid are 2 to 2"),
    ({"--direction": "up"}, r"--direction: 'up' is not one of both, denoising, noising"),
    ({"--source": "x"}, r"--source: 'x' is not one of pair, zero, mean, resample"),
    ({"--metrics": "x"}, r"--metrics: unknown metric 'x'; valid: all, "),
    ({"--metrics": "all,kl_divergence"}, r"'all' stands for every metric; leave out the others"),
    ({"--metrics": "kl_divergance"}, r"'kl_divergance'; did you mean kl_divergence or "),
    ({"--save": "x"}, r"--save: 'x' is not one of full, metrics, summary"),
    ({"--dtype": "float16"}, r"--dtype: 'float16' is not one of float32, float64"),
    ({"--device": "tpu"}, r"--device: 'tpu' is not one of auto, cpu, cuda"),
    ({"--backend": "x"}, r"--backend: 'x' is not one of ray, inline"),
    ({"--num_actors": "0"}, r"--num_actors: 0 is below 1"),
    pytest.param(
        {"--device": "cuda"},
        r"--device cuda: torch sees no GPU; use --device cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
    ),
    ({"--address": "auto"}, r"--address auto: --backend inline has no actors"),
    ({"--num_actors": "2"}, r"--num_actors 2: --backend inline has no actors"),
    (
        {"--source": "resample", "--input_ids": "lava_beside_00"},
        r"--source resample: needs at least two inputs; there is only 'lava_beside_00'",
    ),
    ({"--cpu_actors": "-1"}, r"--cpu_actors: -1 is below 0"),
    (
        {"--cpu_actors": "2"},
        r"--cpu_actors 2: adds CPU actors to those on GPUs; --backend inline has",
    ),
    ({"--input_ids": "a\nb"}, r"--input_ids 'a\\nb': write ids in one line, with commas"),
    ({"--gpus_per_actor": "inf"}, r"--gpus_per_actor: inf are more than there can be"),
    ({"--additional_args": "--save metrics --seed 1"}, r"write --name=value, with commas between"),
    ({"--gpus_per_actor": "0"}, r"--gpus_per_actor: 0.0 is not above 0"),
    ({"--batch_size": "many"}, r"--batch_size: 'many' is not auto or a number"),
    ({"--memory_per_actor": "lots"}, r"--memory_per_actor: 'lots' is not a size"),
    ({"--clean_inputs": "no.json"}, r"no.json: no such input file"),
    ({"--input_ids": "zz"}, r"--input_ids: 'zz' is not in "),
    ({"--activation": "rulu"}, r"--activation: unknown activation 'rulu'"),
    ({"--additional_args": "--tpyo=1"}, r"--additional_args: No such option.*tpyo"),
    ({"--additional_args": "word"}, r"--additional_args: 'word' is no option"),
    ({"--tpyo": "1"}, r"No such option.*tpyo"),
    ({"--memory_per_actor": "inf"}, r"--memory_per_actor: 'inf' is not a size"),
    ({"--additional_args": "--additional_args=--seed=1"}, r"cannot be given inside itself"),
    ({"--seed": "9" * 23}, r"--seed: 9+ does not fit into 64 bits"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_a_mistake_is_one_line_exit_2_and_nothing_written(command, tmp_path, change, message):
    options = {**good(tmp_path), **change}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    ended = command("run", *words)
    assert ended.code == 2
    assert re.search(message, ended.err)
    assert len(ended.err.strip().splitlines()) == 1
    assert ended.out == "" and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(command, run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA))
    for words in (
        ("generate", "--type", "layer", "--agent_path", LAVA, "--output", "/proc/no/d.json"),
        ("report", out, "--output", "/proc/no/r.html"),
        ("plot", out, "--output", "/proc/no"),
        ("export", out, "--format", "csv", "--output", "/proc/no"),
    ):
        ended = command(*words)
        assert ended.code in (1, 2), words
        assert "/proc/" in ended.err and len(ended.err.strip().splitlines()) == 1


def test_another_sweeps_directory_is_refused_naming_what_differs(command, tmp_path, run_inline):
    options = good(tmp_path)
    out = run_inline(LAVA, options["--definition_file"])
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    (tmp_path / "d.json").write_text('[{"q_net.0": [1]}]')
    ended = command("run", *[w for pair in options.items() for w in pair], "--seed", "4")
    assert ended.code == 2
    assert "another sweep; different: definition, n_experiments, seed" in ended.err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_overwrite_replaces_another_sweep_and_only_its_files(command, tmp_path, run_inline):
    out = run_inline(LAVA, good(tmp_path)["--definition_file"])
    (out / "notes.txt").write_text("mine")
    (tmp_path / "d.json").write_text('[{"q_net.2": "all"}]')
    run_inline(LAVA, tmp_path / "d.json", "--overwrite")
    assert [p.name for p in (out / "shards").iterdir()] == ["part-000000000000-000000000001.arrow"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_directory_with_foreign_files_is_refused(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    ended = command("run", *[w for pair in good(tmp_path).items() for w in pair])
    assert ended.code == 2 and "holds 'thesis.tex' but no sweep" in ended.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("words", [["status"], ["rank"]])
def test_a_directory_without_a_sweep_is_refused(command, tmp_path, words):
    ended = command(*words, tmp_path)
    assert ended.code == 2 and "no sweep here" in ended.err


def test_looking_at_a_part_of_a_sweep_says_how_much_there_is(command, tmp_path, run_inline):
    definition = good(tmp_path)["--definition_file"]
    out = run_inline(LAVA, definition, "--end_index", 1)
    assert "note: 1 of 2 experiments so far" in command("rank", out).err
    run_inline(LAVA, definition)
    assert "so far" not in command("rank", out).err


def test_an_unknown_metric_or_layer_to_rank_by_is_refused(command, tmp_path, run_inline):
    out = run_inline(LAVA, good(tmp_path)["--definition_file"])
    assert "--metric: 'x' was not computed" in command("rank", out, "--metric", "x").err
    assert "--layer: unknown layer 'x'" in command("rank", out, "--layer", "x").err
    assert "--direction: 'x' was not run" in command("rank", out, "--direction", "x").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--type", "custom"], "--custom_spec is missing"),
        (["--type", "layer", "--custom_spec", "[]"], "only for --type custom"),
        (["--type", "custom", "--custom_spec", "nofile"], "neither JSON nor an existing file"),
        (["--type", "custom", "--custom_spec", "[{]"], "not JSON at column 3"),
        (["--type", "layer", "--layer_structure", "[1]"], "a layer structure is a non-empty object"),
        (["--type", "layer", "--layer_structure", '{"a": 0}'], "size 0 is not a whole number"),
        (["--type", "neuron_groups", "--group_size", "0"], "--group_size: 0 is not between 1 and"),
        (["--type", "pairs"], "'pairs' is not one of"),
        ([], "Missing option '--type'"),
        (
            ["--type", "layer", "agents/dqn"],
            "argument (agents/dqn): options are written --name value; see raypatch generate --help",
        ),
    ],
)  # fmt: skip
def test_mistakes_with_generate_write_nothing(command, in_empty_folder, words, message):
    ended = command("generate", *words)
    assert ended.code == 2 and message in ended.err
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("export", "RUN", "--format", "csv", "--output", "s3://bucket/x"),
        ("report", "RUN", "--output", "file:///tmp/x.html"),
        ("plot", "RUN", "--output", "gs://bucket/x"),
        ("generate", "--type", "layer", "--output", "s3://bucket/x.json"),
        (
            "coalition",
            "--agent_path",
            LAVA,
            "--metric",
            "kl_divergence",
            "--output_dir",
            "s3://b/x",
        ),
        ("screen", "--agent_path", LAVA, "--output", "s3://bucket/x.json"),
        ("run", "--agent_path", LAVA, "--definition_file", "x", "--clean_inputs", "s3://b/x.npz"),
    ],
)
def test_addresses_where_only_paths_will_do_are_refused(command, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    ended = command(*words)
    assert ended.code == 2 and "is an address; only a run's --output_dir" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_file_address_is_the_path_it_stands_for(command, tmp_path, single_neurons):
    run = (
        "run", "--agent_path", LAVA, "--definition_file", single_neurons(LAVA), "--backend",
        "inline", "--quiet", "--end_index", 3, "--output_dir",
    )  # fmt: skip
    assert command(*run, (tmp_path / "a b").as_uri()).code == 0
    assert (tmp_path / "a b" / "sweep.json").is_file()
    ended = command(*run, "file://elsewhere/x")
    assert ended.code == 2 and "a file's address is file:///path, on this machine" in ended.err


def test_a_run_with_nothing_committed_has_no_ranking(command, tmp_path, run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA))
    (out / "manifest.jsonl").write_text("")
    ended = command("rank", out)
    assert ended.code == 2 and "nothing is committed yet" in ended.err
    assert "complete" not in command("status", out).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--source", "zero", "--source_activations", "x.npz", "--direction", "noising"),
         "--source zero: --source_activations says where"),
        (("--input_ids", ""), "--input_ids: '' is not in"),
    ],
)  # fmt: skip
def test_options_that_contradict_or_are_empty_are_refused(
    command, tmp_path, single_neurons, options, message
):
    ended = command(
        "run", "--agent_path", LAVA, "--definition_file", single_neurons(LAVA), "--output_dir",
        tmp_path / "o", "--backend", "inline", *options,
    )  # fmt: skip
    assert ended.code == 2 and message in ended.err and not (tmp_path / "o").exists()


def test_generate_says_where_layers_are_a_guess_from_weights(command, tmp_path):
    agent = tmp_path / "agent"
    agent.mkdir()
    gru = nn.GRU(4, 8).state_dict()
    torch.save(
        {f"gru.{k}": v for k, v in gru.items()} | {"pi.weight": torch.ones(3, 8)}, agent / "p.pt"
    )
    words = ("generate", "--type", "layer", "--agent_path", agent, "--output", tmp_path / "d.json")
    ended = command(*words)
    assert ended.code == 0 and "layers are those of the weights alone" in ended.err
    assert "left out: gru.weight_ih_l0, gru.weight_hh_l0" in ended.err
    ended = command(*words, "--strict")
    assert ended.code == 2 and "--strict: layers are those of the weights alone" in ended.err
    ended = command("generate", "--type", "layer", "--agent_path", tmp_path / "nowhere")
    assert ended.code == 2 and "no such directory" in ended.err
