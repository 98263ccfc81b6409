"""Runs as people type them, and what is read back of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, LAVA, expected_outputs, outputs_of

import raypatch
from raypatch.sweeps import progress

# -------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("agent", [LAVA, CARTPOLE], ids=["lavacrossing", "cartpole"])
def test_a_sweep_equals_the_independent_truth(run_inline, single_neurons, agent):
    results = raypatch.open_results(run_inline(agent, single_neurons(agent)))
    assert results.complete
    np.testing.assert_allclose(outputs_of(results), expected_outputs(agent), atol=1e-5)


def test_a_trusted_zip_gives_the_same_sweep_as_the_manifest(run_inline, single_neurons, tmp_path):
    definition = single_neurons(LAVA)
    one = run_inline(LAVA, definition, "--trust_agent_code", "--agent_file", "agent.zip")
    np.testing.assert_allclose(
        outputs_of(raypatch.open_results(one)), expected_outputs(LAVA), atol=1e-5
    )


def test_float64_is_as_close_as_the_contract_says(run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA), "--dtype", "float64")
    results = raypatch.open_results(out)
    assert results.sweep["runs"][-1]["verification"]["largest_difference"] < 1e-12


def test_two_halves_in_one_directory_equal_the_whole(run_inline, single_neurons, tmp_path):
    definition = single_neurons(LAVA)
    whole = raypatch.open_results(run_inline(LAVA, definition))
    halves = tmp_path / "halves"
    run_inline(LAVA, definition, "--start_index", "0", "--end_index", "97", out=halves)
    assert not raypatch.open_results(halves).complete
    run_inline(LAVA, definition, "--start_index", "97", "--end_index", "195", out=halves)
    results = raypatch.open_results(halves)
    assert results.complete
    one, two = whole.dataset().to_table(), results.dataset().to_table()
    assert one["experiment_index"].equals(two["experiment_index"])
    np.testing.assert_allclose(outputs_of(results), outputs_of(whole), atol=1e-6)


def test_additional_args_are_further_options(run_inline, single_neurons):
    out = run_inline(
        LAVA, single_neurons(LAVA), "--additional_args",
        "--metrics=kl_divergence,cosine_similarity,--direction=noising,--end_index=5",
    )  # fmt: skip
    results = raypatch.open_results(out)
    assert results.metrics == ("kl_divergence", "cosine_similarity")
    assert results.directions == ("noising",)
    assert results.dataset().count_rows() == 5 * 48


def test_a_finished_sweep_is_resumed_without_computing_again(run_inline, single_neurons):
    definition = single_neurons(CARTPOLE)
    out = run_inline(CARTPOLE, definition)
    before = {p: p.stat().st_mtime_ns for p in (out / "shards").iterdir()}
    run_inline(CARTPOLE, definition)
    assert {p: p.stat().st_mtime_ns for p in (out / "shards").iterdir()} == before
    assert raypatch.open_results(out).sweep["runs"][-1]["passes"] == 0


def test_several_layers_whole_layers_and_logits_pass_verification(run_inline, tmp_path):
    definition = tmp_path / "d.json"
    definition.write_text(json.dumps([
        {"q_net.0": [3, 7], "q_net.2": "all"},
        {"features_extractor.mlp.0": "all"},
        {"output_logits": [1]},
        {"output_logits": "all", "q_net.4": [0]},
        {"q_net.0": list(range(60)), "features_extractor.mlp.0": [1]},
        {"q_net.0": [3, 7], "q_net.2": "all"},
    ]))  # fmt: skip
    results = raypatch.open_results(run_inline(LAVA, definition))
    assert results.sweep["runs"][-1]["verification"]["checked"] == 6
    outputs = outputs_of(results)
    np.testing.assert_array_equal(outputs[0], outputs[5])
    source = results.baselines.filter(
        __import__("pyarrow.compute").compute.equal(results.baselines["side"], "clean")
    )["output"].combine_chunks().flatten().to_numpy().reshape(48, 3)  # fmt: skip
    np.testing.assert_array_equal(outputs[1, 0], source)


@pytest.mark.parametrize("source", ["zero", "mean", "resample"])
def test_other_sources_need_one_file_only(run_inline, single_neurons, lava_copy, source):
    (lava_copy / "activation_inputs" / "corrupted_inputs.json").unlink()
    results = raypatch.open_results(
        run_inline(lava_copy, single_neurons(lava_copy), "--source", source)
    )
    assert results.directions == ("noising",)
    assert results.sweep["runs"][-1]["verification"]["checked"] == 8


def test_with_a_direction_other_sources_read_the_side_they_patch_into_and_no_other(
    run_inline, single_neurons, lava_copy
):
    folder = lava_copy / "activation_inputs"
    held = json.loads((folder / "clean_inputs.json").read_text())
    mine = lava_copy / "mine.json"
    mine.write_text(json.dumps({f"mine_{name}": value for name, value in held.items()}))
    (folder / "corrupted_inputs.json").write_text("not even JSON")
    results = raypatch.open_results(
        run_inline(
            lava_copy, single_neurons(lava_copy), "--source", "zero", "--direction", "noising",
            "--clean_inputs", mine,
        )
    )  # fmt: skip
    assert results.directions == ("noising",)
    assert results.sweep["input_ids"][0].startswith("mine_")


@pytest.mark.parametrize("save", ["full", "metrics", "summary"])
def test_save_decides_what_is_kept(run_inline, single_neurons, save):
    out = run_inline(CARTPOLE, single_neurons(CARTPOLE), "--save", save)
    assert (out / "shards").exists() == (save != "summary")
    results = raypatch.open_results(out)
    assert results.summary().num_rows == 260
    if save != "summary":
        assert ("patched_output" in results.dataset().schema.names) == (save == "full")


def test_what_changes_no_number_changes_no_byte(run_inline, single_neurons, tmp_path):
    definition = single_neurons(CARTPOLE)
    one = run_inline(CARTPOLE, definition, out=tmp_path / "1")
    two = run_inline(CARTPOLE, definition, "--verify", "0", out=tmp_path / "2")
    for path in sorted((one / "shards").iterdir()):
        assert path.read_bytes() == (two / "shards" / path.name).read_bytes()


def test_without_a_pair_a_side_that_is_named_alone_is_the_only_one(
    command, tmp_path, run_inline, single_neurons
):
    beside = LAVA / "activation_inputs"
    side = next(beside.glob("corrupted_inputs.*"))
    named = shutil.copy(side, tmp_path / f"alone{side.suffix}")
    out = run_inline(
        LAVA, single_neurons(LAVA), "--source", "zero", "--corrupted_inputs", named,
        "--end_index", 2,
    )  # fmt: skip
    assert json.loads((out / "sweep.json").read_text())["identity"]["sides"] == ["corrupted"]
    # Where a direction says which side is patched, the other one is not looked at.
    options = ("--source", "zero", "--direction", "noising", "--corrupted_inputs", "nowhere.npz")
    other = run_inline(
        LAVA, single_neurons(LAVA), *options, "--end_index", 2, out=tmp_path / "other"
    )
    assert json.loads((other / "sweep.json").read_text())["identity"]["sides"] == ["clean"]


def test_inputs_that_are_all_the_same_on_each_side_are_patched(run_inline, tmp_path):
    definition = tmp_path / "d.json"
    definition.write_text('[{"action_net": [0]}, {"mlp_extractor.policy_net.0": "all"}]')
    sides = {"clean": np.zeros((3, 4)), "corrupted": np.tile([1.0, 0.5, -0.2, 0.3], (3, 1))}
    for side, rows in sides.items():
        np.save(tmp_path / f"{side}.npy", rows)
    for other in ("corrupted", "clean"):
        out = run_inline(
            CARTPOLE, definition, "--clean_inputs", tmp_path / "clean.npy",
            "--corrupted_inputs", tmp_path / f"{other}.npy", out=tmp_path / other,
        )  # fmt: skip
        assert raypatch.open_results(out).complete


# ------------------------------------------------------------------------- reading back


def test_status_and_rank_speak_to_people_and_programs(command, run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA))
    assert "195 of 195 committed (100%)" in command("status", out).out
    assert json.loads(command("status", out, "--json").out)["state"] == "complete"
    rows = json.loads(command("rank", out, "--top", "3", "--json").out)
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert rows[0]["kl_divergence_mean"] >= rows[1]["kl_divergence_mean"]
    assert rows[0]["name"] in command("rank", out, "--top", "3").out


def test_rank_is_the_mean_over_inputs_and_directions(run_inline, single_neurons):
    results = raypatch.open_results(run_inline(LAVA, single_neurons(LAVA)))
    rows = results.dataset().to_table().to_pandas()
    expected = rows.groupby("experiment_index")["kl_divergence"].mean().sort_values(ascending=False)
    found = results.rank("kl_divergence", top=5)
    assert [r["experiment_index"] for r in found] == expected.index[:5].tolist()
    assert found[0]["kl_divergence_mean"] == pytest.approx(expected.iloc[0], rel=1e-5)
    layer = results.rank("kl_divergence", top=400, layer="q_net.2", direction="noising")
    assert len(layer) == 64 and all(row["name"].startswith("q_net.2_") for row in layer)


def test_inspect_tells_how_an_agent_was_loaded(command):
    facts = json.loads(command("inspect", CARTPOLE, "--json").out)
    assert facts["engine"].startswith("incremental")
    assert [layer["neurons"] for layer in facts["layers"]] == [64, 64, 2]
    assert "mlp_extractor.policy_net.0" in command("inspect", CARTPOLE).out


def test_names_of_layers_are_whole_wherever_they_are_printed(command, tmp_path):
    name = "features_extractor.extractors." + "a_long_name." * 5 + "0"
    folder = tmp_path / "agent"
    folder.mkdir()
    torch.save(
        {f"{name}.weight": torch.randn(3, 4), "b.weight": torch.randn(1, 3)}, folder / "p.pt"
    )
    ended = command("inspect", folder, "--activation", "relu")
    assert name in ended.out
    # One output, and nobody said what it is.
    assert "note: one output: " in ended.out
    assert (
        "note"
        not in command("inspect", folder, "--activation", "relu", "--actions", "continuous").out
    )


def test_lines_of_progress_name_a_time_only_when_something_is_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    with progress.Progress(10, 2, quiet=False) as line:
        line.update(actors=1)
        line.update(experiments=5)
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first.startswith("0 of 10 experiments") and first.endswith("1 actor, starting")
    assert second.startswith("5 of 10 experiments") and second.endswith(" left")


def test_a_continuous_run_is_ranked_by_the_metric_it_has(command, tmp_path, run_inline):
    definition = tmp_path / "d.json"
    definition.write_text('[{"a": [0]}, {"a": "all"}]')
    agent = tmp_path / "agent"
    (agent / "activation_inputs").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({"a.weight": torch.randn(3, 4), "b.weight": torch.randn(1, 3)}, agent / "p.pt")
    for side in ("clean", "corrupted"):
        np.savez(agent / "activation_inputs" / f"{side}_inputs.npz", ids=["x", "y"],
                 inputs=np.random.default_rng(len(side)).normal(size=(2, 4)))  # fmt: skip
    options = ("--activation", "tanh", "--actions", "continuous")
    out = run_inline(agent, definition, *options)
    ended = command("rank", out)
    assert ended.code == 0 and "logit_difference_norm" in ended.out
    shown = command("run", "--agent_path", agent, "--definition_file", definition, "--output_dir",
                    out, "--backend", "inline", *options).out  # fmt: skip
    proposed = shown.split("--metric ")[1].split()[0]
    assert "undefined" not in command("rank", out, "--metric", proposed).err
