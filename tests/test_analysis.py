"""Ranking, effect matrices and exports against numbers computed from the rows themselves."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import LAVA
from scipy import stats

import raypatch
from raypatch.errors import InputError
from raypatch.results.analysis import Moments, patched, rank
from raypatch.results.tables import baseline_table
from raypatch.searches.screening import rank_correlation

GOLDEN = Path(__file__).parent / "golden"


REDUCE = {"mean": np.nanmean, "std": np.nanstd, "min": np.nanmin, "max": np.nanmax}


@pytest.mark.parametrize("statistic", REDUCE)
@pytest.mark.parametrize("direction", ["both", "denoising", "noising"])
@pytest.mark.parametrize("combine", ["average", "maximum"])
@pytest.mark.parametrize("bottom", [False, True])
def test_the_ranking_is_that_of_the_rows(lava_run, values, statistic, direction, combine, bottom):
    metric = "logit_difference_norm"
    chosen = {"both": [0, 1], "denoising": [0], "noising": [1]}[direction]
    by_direction = REDUCE[statistic](values[metric][:, chosen], axis=2)
    expected = by_direction.mean(1) if combine == "average" else by_direction.max(1)
    rows = rank(
        lava_run, metric, statistic=statistic, direction=direction, combine=combine, top=25,
        bottom=bottom,
    )  # fmt: skip
    found = [row[f"{metric}_{statistic}"] for row in rows]
    order = np.sort(expected) if bottom else -np.sort(-expected)
    np.testing.assert_allclose(found, order[:25], rtol=1e-5, atol=1e-7)
    for row in rows:
        index = row["experiment_index"]
        flips = values["changed"][index, chosen].mean()
        assert row["action_changed_rate"] == pytest.approx(flips, abs=1e-6)
        assert row["z_score"] == pytest.approx(
            (expected[index] - expected.mean()) / expected.std(), abs=1e-3
        )


@pytest.mark.parametrize("metric", ["output_logit_delta", "cosine_similarity"])
def test_the_strongest_of_a_signed_metric_are_farthest_from_0_and_of_a_similarity_least_alike(
    run_inline, single_neurons, metric, command
):
    out = run_inline(LAVA, single_neurons(LAVA), "--metrics", metric)
    results = raypatch.open_results(out)
    every = [row[f"{metric}_mean"] for row in results.rank(metric, top=None)]
    strengths = [1 - v if metric == "cosine_similarity" else abs(v) for v in every]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] > 10 * strengths[30]
    weakest = results.rank(metric, bottom=True, top=5)
    assert weakest[0][f"{metric}_mean"] == pytest.approx(every[-1])
    # Outside a terminal nothing is folded.
    assert all(row["name"] in command("rank", out, "--metric", metric).out
               for row in results.rank(metric))  # fmt: skip


@pytest.mark.parametrize("metric", ["output_logit_delta", "cosine_similarity"])
def test_the_maximum_of_both_directions_is_the_stronger_effect(run_inline, single_neurons, metric):
    results = raypatch.open_results(run_inline(LAVA, single_neurons(LAVA), "--metrics", metric))
    column = f"{metric}_mean"
    each = [
        {r["name"]: r[column] for r in results.rank(metric, direction=direction, top=None)}
        for direction in results.directions
    ]
    strongest = min if metric == "cosine_similarity" else lambda values: max(values, key=abs)
    rows = results.rank(metric, combine="maximum", top=None)
    for row in rows:
        assert row[column] == strongest([means[row["name"]] for means in each])
    # What is signed goes up in one direction as it goes down in the other, and would cancel.
    usual = "maximum" if metric == "output_logit_delta" else "average"
    assert results.rank(metric, top=None) == results.rank(metric, combine=usual, top=None)
    matrix = np.concatenate(list(results.effect_matrix(metric).values()))
    by_index = sorted(results.rank(metric, top=None), key=lambda row: row["experiment_index"])
    np.testing.assert_array_equal(matrix[: len(by_index)], [row[column] for row in by_index])


@pytest.mark.parametrize("statistic", ["mean", "std"])
@pytest.mark.parametrize("direction", ["both", "noising"])
def test_normalised_is_0_at_the_smallest_value_that_is_ranked_and_1_at_the_largest(
    lava_run, values, statistic, direction
):
    metric = "logit_difference_norm"
    chosen = {"both": [0, 1], "noising": [1]}[direction]
    spread = values[metric][:, chosen]
    by_experiment = REDUCE[statistic](spread, axis=2).mean(1)
    bounds = by_experiment if statistic == "std" else spread
    for row in rank(lava_run, metric, statistic=statistic, direction=direction, top=20):
        value = by_experiment[row["experiment_index"]]
        expected = (value - bounds.min()) / (bounds.max() - bounds.min())
        assert row["normalised"] == pytest.approx(expected, abs=1e-5)


def test_a_metric_that_is_defined_nowhere_is_said_to_be_and_not_what_to_look_at_next(
    run_inline, single_neurons, command, tmp_path
):
    definition = single_neurons(LAVA)
    out = tmp_path / "out"
    ended = command(
        "run", "--agent_path", LAVA, "--definition_file", definition, "--output_dir", out,
        "--source", "zero", "--backend", "inline",
    )  # fmt: skip
    assert re.search("Next: raypatch rank .* --metric reversed_pearson_correlation", ended.out)
    ranked = command("rank", out, "--metric", "logit_diff_recovered")
    assert "logit_diff_recovered is undefined for every experiment" in ranked.err
    assert ranked.code == 0


def test_what_to_look_at_next_is_a_metric_that_is_defined(command, single_neurons, tmp_path):
    same = LAVA / "activation_inputs" / "clean_inputs.json"
    ended = command(
        "run", "--agent_path", LAVA, "--definition_file", single_neurons(LAVA), "--output_dir",
        tmp_path / "out", "--backend", "inline", "--clean_inputs", same, "--corrupted_inputs", same,
    )  # fmt: skip
    assert ended.code == 0 and "note: clean and corrupted inputs are the same" in ended.err
    assert re.search("Next: raypatch rank .* --metric reversed_pearson_correlation", ended.out)


def test_bootstrap_intervals_agree_with_scipys(lava_run, values):
    metric = "logit_difference_norm"
    rows = rank(lava_run, metric, top=5, bootstrap=True)
    for row in rows:
        per_input = values[metric][row["experiment_index"]].mean(0)
        other = stats.bootstrap(
            (per_input,), np.mean, method="percentile", n_resamples=4000, random_state=1
        ).confidence_interval
        width = other.high - other.low
        assert row["ci_low"] == pytest.approx(other.low, abs=0.15 * width)
        assert row["ci_high"] == pytest.approx(other.high, abs=0.15 * width)
        assert row["ci_low"] <= row[f"{metric}_mean"] <= row["ci_high"]


def test_there_is_no_interval_where_resampling_tells_nothing(
    lava_run, run_inline, single_neurons, tmp_path
):
    metric = "logit_difference_norm"
    for statistic in ("min", "max"):
        rows = rank(lava_run, metric, statistic=statistic, bootstrap=True)
        assert {(row["ci_low"], row["ci_high"]) for row in rows} == {(None, None)}
    ids = lava_run.sweep["input_ids"]
    for n_inputs in (4, 5):
        out = run_inline(
            LAVA,
            single_neurons(LAVA),
            "--input_ids",
            ",".join(ids[:n_inputs]),
            out=tmp_path / str(n_inputs),
        )
        rows = rank(raypatch.open_results(out), metric, bootstrap=True)
        assert (rows[0]["ci_low"] is None) == (n_inputs < 5)


def test_moments_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    whole = rng.normal(3, 2, 1000)
    whole[::50] = np.nan
    moments = Moments()
    for part in np.split(whole, [1, 17, 500]):
        moments.add(part, part - 1, part + 1)
    assert moments.mean == pytest.approx(np.nanmean(whole))
    assert moments.std == pytest.approx(np.nanstd(whole))
    assert (moments.low, moments.high) == (np.nanmin(whole) - 1, np.nanmax(whole) + 1)


def test_the_effect_matrix_holds_every_single_neuron(lava_run, values):
    matrix = lava_run.effect_matrix("kl_divergence", "noising")
    flat = np.concatenate([matrix[layer] for layer in matrix])
    np.testing.assert_allclose(flat, values["kl_divergence"][:, 1].mean(1), rtol=1e-5, atol=1e-9)
    assert matrix["q_net.0"].shape == (64,)
    with pytest.raises(InputError, match="was not computed"):
        lava_run.effect_matrix("nonsense")


def test_groups_of_one_name_are_told_apart_by_their_neurons(command, run_inline, tmp_path):
    definition = tmp_path / "groups.json"
    words = ("--type", "neuron_groups", "--group_size", 25, "--agent_path", LAVA)
    assert command("generate", *words, "--output", definition).code == 0
    out = run_inline(LAVA, definition)
    rows = raypatch.open_results(out).rank(top=None)
    patches = [row["patches"] for row in rows if row["name"] == "q_net.0_group_25"]
    assert sorted(patches) == ["q_net.0: 0-24", "q_net.0: 25-49"]
    shown = command("rank", out, "--top", 20).out
    assert "q_net.0_group_25 (q_net.0: 0-24)" in shown


def test_what_an_experiment_patches_is_spelled_in_runs():
    assert patched(["a", "b"], [[3, 0, 1, 2, 7], []]) == "a: 0-3, 7; b: all"


def test_rank_as_csv_and_json_say_the_same(command, lava_run):
    as_json = json.loads(command("rank", lava_run.path, "--json").out)
    as_csv = list(csv.DictReader(io.StringIO(command("rank", lava_run.path, "--csv").out)))
    assert [row["name"] for row in as_csv] == [row["name"] for row in as_json]
    for one, two in zip(as_csv, as_json):
        assert float(one["ci_low"]) == two["ci_low"] and float(one["z_score"]) == two["z_score"]


# ------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_frame_of_a_package_that_is_not_installed_says_what_to_install(
    lava_run, monkeypatch, package
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"to_{package} needs {package}: pip install {package}"):
        getattr(lava_run, f"to_{package}")()


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 40).astype(float)
    b = a + rng.integers(0, 4, 40)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None


def test_a_committed_effect_is_not_hidden_by_a_duplicate_that_is_not(run_inline, tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[{"q_net.0": [5]}, {"q_net.0": [6]}, {"q_net.0": [5]}]')
    out = run_inline(LAVA, path, "--end_index", 2)
    effects = raypatch.open_results(out).effect_matrix("kl_divergence", "noising")["q_net.0"]
    assert np.isfinite(effects[[5, 6]]).all() and np.isnan(effects[7])


def test_the_recorded_baseline_action_is_that_of_the_unrounded_outputs():
    outputs = np.array([[1.0, 1.0 + 1e-12]])
    table = baseline_table({"clean": outputs}, ("a",), discrete=True)
    assert table["action"].to_pylist() == [1]
