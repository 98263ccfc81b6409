"""Ranking, effect matrices and exports against numbers computed from the rows themselves."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import CARTPOLE, LAVA
from scipy import stats
from torch import nn

import raypatch
from raypatch.analysis import Moments, patched, rank
from raypatch.errors import InputError
from raypatch.exporting import export
from raypatch.results.tables import baseline_table
from raypatch.screening import rank_correlation

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def lava_run(tmp_path_factory):
    """A finished single-neuron sweep of the example agent."""
    from raypatch import cli

    folder = tmp_path_factory.mktemp("analysis")
    definition = folder / "d.json"
    cli.main(["generate", "--type", "single_neuron", "--agent_path", str(LAVA), "--output",
              str(definition)])  # fmt: skip
    return raypatch.run(
        agent_path=str(LAVA), definition_file=str(definition), output_dir=str(folder / "out"),
        backend="inline",
    )  # fmt: skip


@pytest.fixture(scope="module")
def values(lava_run):
    """``[experiments, directions, inputs]`` by metric, from the rows."""
    table = lava_run.dataset().to_table()
    shape = (-1, 2, len(lava_run.sweep["input_ids"]))
    return {m: table[m].to_numpy().astype(np.float64).reshape(shape) for m in lava_run.metrics} | {
        "changed": table["action_changed"].to_numpy().reshape(shape)
    }


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


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_an_export_tells_which_neurons_and_inputs_its_numbers_stand_for(lava_run, tmp_path, form):
    import pandas

    export(lava_run, form, "experiment", str(tmp_path / "e"))
    read = pandas.read_parquet if form == "parquet" else pandas.read_csv
    experiments = read(tmp_path / "e" / f"experiments.{form}")
    assert experiments["name"][70] == lava_run.experiments["name"][70].as_py()
    layers, neurons = experiments["layers"][70], experiments["neurons"][70]
    if form == "csv":
        layers, neurons = json.loads(layers), json.loads(neurons)
    assert [list(layers), [list(n) for n in neurons]] == [
        lava_run.experiments[name][70].as_py() for name in ("layers", "neurons")
    ]
    baselines = read(tmp_path / "e" / f"baselines.{form}")
    assert list(baselines["input_id"]) == lava_run.baselines["input_id"].to_pylist()
    if form == "csv":
        first = [baselines[f"output_{i}"][0] for i in range(3)]
        np.testing.assert_allclose(first, lava_run.baselines["output"][0].as_py()[:3], rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "--format", "csv", "--by", "input", "--output", "x"), "--by input: chooses"),
        (("rank", "--json", "--csv"), "one form at a time"),
    ],
)
def test_options_that_exclude_each_other_are_refused(command, lava_run, words, message):
    ended = command(words[0], lava_run.path, *words[1:])
    assert ended.code == 2 and message in ended.err


def test_parquet_and_csv_hold_the_same_rows_as_the_shards(lava_run, tmp_path):
    table = lava_run.dataset().to_table()
    export(lava_run, "parquet", "experiment", str(tmp_path / "p"))
    back = pyarrow.parquet.read_table(tmp_path / "p" / "rows.parquet")
    assert back.equals(table.replace_schema_metadata(back.schema.metadata))
    summary = pyarrow.parquet.read_table(tmp_path / "p" / "summary.parquet")
    assert summary.to_pydict() == lava_run.summary().to_pydict()
    export(lava_run, "csv", "experiment", str(tmp_path / "c"))
    import pandas

    frame = pandas.read_csv(tmp_path / "c" / "rows.csv")
    assert len(frame) == len(table)
    outputs = frame[[f"patched_output_{i}" for i in range(3)]].to_numpy()
    np.testing.assert_allclose(outputs, np.stack(table["patched_output"].to_pylist()), rtol=1e-6)
    np.testing.assert_allclose(frame["kl_divergence"], table["kl_divergence"], rtol=1e-6)


@pytest.mark.parametrize("by", ["experiment", "input"])
def test_the_originals_layouts_hold_the_same_numbers(lava_run, values, tmp_path, by):
    folder = export(lava_run, "json", by, str(tmp_path / by))
    ids = lava_run.sweep["input_ids"]
    names = lava_run.experiments["name"].to_pylist()
    outputs = np.stack(lava_run.dataset().to_table()["patched_output"].to_pylist())
    outputs = outputs.reshape(len(names), 2, len(ids), -1)
    for d, direction in enumerate(("denoising", "noising")):
        files = {p.stem: json.loads(p.read_text()) for p in (folder / direction).iterdir()}
        assert len(files) == (len(names) if by == "experiment" else len(ids))
        for e, name in enumerate(names):
            for i, key in enumerate(ids):
                entry = files[name][key] if by == "experiment" else files[key][name]["results"]
                np.testing.assert_array_equal(
                    np.float32(entry["patched_output"][0]), outputs[e, d, i]
                )
                assert entry["action_changed"] == bool(values["changed"][e, d, i])
        summary = json.loads((folder / f"patching_summary_{direction}.json").read_text())
        means = [summary[name]["metrics"]["kl_divergence"]["mean"] for name in names]
        np.testing.assert_allclose(
            means, values["kl_divergence"][:, d].mean(1), rtol=1e-5, atol=1e-9
        )


def test_an_exported_summary_counts_the_inputs_that_a_metric_is_defined_for(
    run_inline, single_neurons, tmp_path
):
    out = run_inline(LAVA, single_neurons(LAVA), "--source", "resample")
    results = raypatch.open_results(out)
    folder = export(results, "json", "experiment", str(tmp_path / "e"))
    shape = (-1, 2, len(results.sweep["input_ids"]))
    column = results.dataset().to_table()["logit_diff_recovered"]
    defined = column.is_valid().to_numpy().reshape(shape).sum(2)
    assert 0 < defined.min() < shape[2]
    for d, direction in enumerate(results.directions):
        summary = json.loads((folder / f"patching_summary_{direction}.json").read_text())
        entries = [entry["metrics"] for entry in summary.values()]
        assert [e["logit_diff_recovered"]["count"] for e in entries] == defined[:, d].tolist()
        assert {e["kl_divergence"]["count"] for e in entries} == {shape[2]}


def keys_of(value, path=""):
    """Paths of keys in a JSON value; of a list, those of its first element."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ([f"{path}/{key}"] if not isinstance(inner, (dict, list)) else
                        [f"{path}/{key}", *keys_of(inner, f"{path}/{key}")])  # fmt: skip
    elif isinstance(value, list) and value:
        yield from keys_of(value[0], f"{path}[]")


@pytest.mark.parametrize("by", ["experiment", "input", "summary"])
def test_the_layouts_keys_are_those_of_the_golden_files(run_inline, tmp_path, by):
    definition = tmp_path / "d.json"
    definition.write_text('[{"q_net.0": [5]}]')
    out = run_inline(LAVA, definition, "--input_ids", "lava_ahead_03", "--metrics", "kl_divergence")
    layout = "experiment" if by == "summary" else by
    folder = export(raypatch.open_results(out), "json", layout, str(tmp_path / "e"))
    path = {
        "experiment": folder / "noising" / "q_net.0_neuron_5.json",
        "input": folder / "noising" / "lava_ahead_03.json",
        "summary": folder / "patching_summary_noising.json",
    }[by]
    golden = json.loads((GOLDEN / f"{by}.json").read_text())
    assert set(keys_of(json.loads(path.read_text()))) == set(keys_of(golden))


def test_an_experiment_given_twice_gets_a_name_of_its_own(run_inline, tmp_path):
    definition = tmp_path / "d.json"
    definition.write_text('[{"q_net.0": [5]}, {"q_net.0": [5]}]')
    folder = export(
        raypatch.open_results(run_inline(LAVA, definition)), "json", "experiment",
        str(tmp_path / "e"),
    )  # fmt: skip
    assert sorted(p.name for p in (folder / "noising").iterdir()) == [
        "q_net.0_neuron_5.json", "q_net.0_neuron_5_1.json",
    ]  # fmt: skip


def test_exports_that_cannot_be_made_are_refused_and_leave_nothing(command, run_inline, tmp_path):
    definition = tmp_path / "d.json"
    definition.write_text('[{"q_net.0": [5]}]')
    out = run_inline(LAVA, definition, "--save", "metrics")
    ended = command("export", out, "--format", "json", "--output", tmp_path / "e")
    assert ended.code == 2 and "need --save full" in ended.err
    (tmp_path / "there").mkdir()
    ended = command("export", out, "--format", "csv", "--output", tmp_path / "there")
    assert ended.code == 2 and "exists" in ended.err
    assert not (tmp_path / "e").exists() and not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("form", ["csv", "parquet", "json"])
def test_a_missing_part_is_named_when_exporting(
    command, run_inline, tmp_path, single_neurons, form
):
    out = run_inline(LAVA, single_neurons(LAVA))
    victim = min((out / "shards").iterdir())
    victim.unlink()
    ended = command("export", out, "--format", form, "--output", tmp_path / "exported")
    assert ended.code == 2 and f"{victim.name}: missing or unreadable" in ended.err
    with pytest.raises(InputError, match="missing or unreadable"):
        raypatch.open_results(out).dataset()


def test_a_summary_run_exports_its_summary_and_ranks_without_intervals(
    command, run_inline, single_neurons, tmp_path
):
    out = run_inline(CARTPOLE, single_neurons(CARTPOLE), "--save", "summary")
    assert command("export", out, "--format", "parquet", "--output", tmp_path / "e").code == 0
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "baselines.parquet", "experiments.parquet", "summary.parquet",
    ]  # fmt: skip
    assert json.loads(command("rank", out, "--json").out)[0]["ci_low"] is None
    assert "interval" not in command("rank", out).out


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


@pytest.fixture
def named(tmp_path):
    """A one-layer agent whose layer has the name a test gives, with its pairs."""

    def make(*names: str, ids=("a", "b")) -> Path:
        folder = tmp_path / "named"
        (folder / "activation_inputs").mkdir(parents=True)
        torch.manual_seed(0)
        widths = [4, *[5] * (len(names) - 1), 3]
        state = {}
        for name, (n_in, n_out) in zip(names, itertools.pairwise(widths)):
            layer = nn.Linear(n_in, n_out)
            state |= {f"{name}.weight": layer.weight.data, f"{name}.bias": layer.bias.data}
        torch.save(state, folder / "policy.pt")
        (folder / "agent.json").write_text('{"file": "policy.pt", "activation": "relu"}')
        for side in ("clean", "corrupted"):
            rows = {key: {"input": torch.randn(4).tolist()} for key in ids}
            path = folder / "activation_inputs" / f"{side}_inputs.json"
            path.write_text(json.dumps(rows))
        return folder

    return make


def swept(run_inline, agent, experiments, tmp_path):
    path = tmp_path / "named.json"
    path.write_text(json.dumps(experiments))
    return raypatch.open_results(run_inline(agent, path, out=tmp_path / "named_out"))


def test_names_are_never_read_as_folders_and_never_too_long(named, run_inline, tmp_path):
    layers = ["/tmp/mlp/~/linear", "a" * 180, "b" * 180]
    agent = named(*layers, ids=("x/../y", "z" * 300))
    results = swept(
        run_inline, agent, [{n: [0]} for n in layers] + [{n: [1] for n in layers}], tmp_path
    )
    for by in ("experiment", "input"):
        folder = export(results, "json", by, str(tmp_path / by))
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert len(files) == 2 * (4 if by == "experiment" else 2) + 2
        assert all(p.parent in (folder, *(folder / d for d in results.directions)) for p in files)


def test_names_that_meet_stay_apart(named, run_inline, tmp_path):
    layer = "q_net.0"
    # Some disks take capitals, and letters composed or not, for the same.
    agent = named(layer, "Q_net.0", ids=("1.5", "1_5_2", "1-5", "1_5", "A", "a", "é", "e\u0301"))
    results = swept(run_inline, agent, [{layer: [1]}] * 3 + [{"Q_net.0": [1]}], tmp_path)
    folder = export(results, "json", "experiment", str(tmp_path / "e"))
    assert len({path.name.casefold() for path in (folder / "noising").iterdir()}) == 4
    folder = export(results, "json", "input", str(tmp_path / "i"))
    files = list((folder / "noising").iterdir())
    names = {unicodedata.normalize("NFC", path.name).casefold() for path in files}
    assert len(files) == len(names) == 8
    assert all(len(json.loads(path.read_text())) == 4 for path in files)


def test_a_name_that_looks_like_the_printers_markup_is_shown_as_it_is(
    named, run_inline, command, tmp_path
):
    results = swept(
        run_inline, named("net[a]", "[/red]x"), [{"net[a]": [2]}, {"[/red]x": [1]}], tmp_path
    )
    shown = command("rank", results.path).out
    assert "net[a]_neuron_2" in shown and "[/red]x_neuron_1" in shown
    assert "net[a]" in command("inspect", tmp_path / "named").out


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
