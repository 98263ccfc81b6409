"""Exports against the rows themselves, and the names of their files."""

from __future__ import annotations

import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import CARTPOLE, LAVA
from torch import nn

import raypatch
from raypatch.errors import InputError
from raypatch.reporting.exporting import export

GOLDEN = Path(__file__).parent / "golden"


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
        (
            ("export", "--format", "csv", "--by", "input", "--output", "x"),
            "--by input: is for --format json",
        ),
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
