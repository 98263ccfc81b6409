"""One experiment that cannot be computed among thousands, and places that refuse to be written."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import raypatch
from raypatch.sweeps.worker import Worker

HERE = Path(__file__).parent
N_EXPERIMENTS = 3000
POISON_INDEX = 1777


@pytest.fixture
def fragile(tmp_path):
    """The fragile agent's directory and a definition of thousands with one poison."""
    sys.path.insert(0, str(HERE))
    from poison import POISON, raising

    agent = tmp_path / "agent"
    (agent / "activation_inputs").mkdir(parents=True)
    shutil.copy(HERE / "poison.py", agent)
    torch.manual_seed(0)
    torch.save(raising().state_dict(), agent / "policy.pt")
    rng = np.random.default_rng(0)
    for side in ("clean", "corrupted"):
        inputs = {f"obs_{i}": rng.normal(size=4).tolist() for i in range(4)}
        (agent / "activation_inputs" / f"{side}_inputs.json").write_text(json.dumps(inputs))
    draw = random.Random(0)
    harmless = [(i, j) for i in range(8) for j in range(6) if (i, j) != (3, 1)]
    experiments = [
        {"first": [i], "second": [j]} for i, j in draw.choices(harmless, k=N_EXPERIMENTS)
    ]
    experiments[POISON_INDEX] = POISON
    definition = tmp_path / "definition.json"
    definition.write_text(json.dumps(experiments))
    yield agent, definition
    sys.path.remove(str(HERE))


def words(fragile, out, factory, *more):
    agent, definition = fragile
    return [str(w) for w in (
        "run", "--agent_path", agent, "--definition_file", definition, "--output_dir", out,
        "--agent_factory", f"poison:{factory}", "--source", "zero", *more,
    )]  # fmt: skip


def shortened(definition):
    """The definition cut to a few experiments around the poison, so that it is found in fewer of
    the tries that take seconds; where it is and how many there are."""
    few = json.loads(definition.read_text())[POISON_INDEX - 1 : POISON_INDEX + 3]
    definition.write_text(json.dumps(few))
    return 1, len(few)


def check_all_but_the_poison(out, poison=POISON_INDEX, n_experiments=N_EXPERIMENTS):
    results = raypatch.open_results(out)
    assert [f.experiment_index for f in results.failures] == [poison]
    assert results.failures[0].name == "first_3_second_1"
    assert results.complete
    table = results.dataset().to_table()
    ids, counts = np.unique(table["experiment_index"].to_numpy(), return_counts=True)
    assert set(counts) == {2 * 4}
    assert sorted(set(range(n_experiments)) - set(ids.tolist())) == [poison]
    assert len(results.summary()) == 2 * (n_experiments - 1)
    return results


def test_an_experiment_that_raises_is_quarantined_with_its_error_and_the_rest_is_complete(
    fragile, command, tmp_path
):
    out = tmp_path / "out"
    ended = command(*words(fragile, out, "raising", "--backend", "inline"))
    assert ended.code == 3, ended.err
    results = check_all_but_the_poison(out)
    assert "this neuron bites" in results.failures[0].error
    assert "first_3_second_1" in ended.out and "this neuron bites" in ended.out
    assert results.rank("logit_difference_norm")
    again = command(*words(fragile, out, "raising", "--backend", "inline"))
    assert again.code == 3 and "0 passes" in again.err
    check_all_but_the_poison(out)


@pytest.mark.parametrize(
    ("factory", "error"),
    [("asking", "out of memory with one experiment"), ("exiting", "SystemExit")],
)
def test_an_experiment_for_which_there_is_no_memory_or_that_ends_python_is_quarantined(
    fragile, command, tmp_path, factory, error
):
    out, (place, length) = tmp_path / "out", shortened(fragile[1])
    ended = command(*words(fragile, out, factory, "--backend", "inline"))
    assert ended.code == 3, ended.err
    results = check_all_but_the_poison(out, place, length)
    assert error in results.failures[0].error


def test_a_gpu_that_fails_ends_an_inline_run_and_no_experiment_is_blamed(
    fragile, command, tmp_path, monkeypatch
):
    out, real = tmp_path / "out", Worker.compute

    def compute(self, item, experiments, tries):
        if item.number == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, item, experiments, tries)

    monkeypatch.setattr(Worker, "compute", compute)
    ended = command(*words(fragile, out, "raising", "--backend", "inline", "--end_index", 1700))
    assert ended.code == 1 and "item 3" in ended.err and "the GPU failed" in ended.err
    results = raypatch.open_results(out)
    assert len(results.receipts) == 3 and not results.failures
    monkeypatch.setattr(Worker, "compute", real)
    again = command(*words(fragile, out, "raising", "--backend", "inline", "--end_index", 1700))
    assert again.code == 0


def test_more_quarantined_than_allowed_ends_the_run_with_the_option_named(
    fragile, command, tmp_path
):
    out = tmp_path / "out"
    more = ("--backend", "inline", "--max_failures", 0)
    ended = command(*words(fragile, out, "raising", *more))
    assert ended.code == 1
    assert "--max_failures 0" in ended.err and len(ended.err.strip().splitlines()[-1]) < 600
    assert not raypatch.open_results(out).complete
    assert command(*words(fragile, out, "raising", "--backend", "inline")).code == 3
    check_all_but_the_poison(out)


def _run(arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "raypatch.cli", *arguments], capture_output=True, text=True,
        timeout=280, check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["raising", "killing", "hanging"])
def test_on_actors_exactly_the_poison_is_quarantined(fragile, tmp_path, harm):
    out = tmp_path / "out"
    ended = _run(words(fragile, out, harm, "--num_actors", 2, "--watchdog_s", 3))
    assert ended.returncode == 3, ended.stderr
    check_all_but_the_poison(out)
    inline = tmp_path / "inline"
    assert _run(words(fragile, inline, "raising", "--backend", "inline")).returncode == 3
    for part in sorted((inline / "shards").iterdir()):
        mine, other = (raypatch.results.reader.pa.ipc.open_file(p / "shards" / part.name).read_all()
                       for p in (out, inline))  # fmt: skip
        assert mine.replace_schema_metadata() == other.replace_schema_metadata()


@pytest.mark.slow
def test_an_experiment_that_exhausts_memory_is_killed_by_rays_monitor_and_quarantined(
    fragile, tmp_path
):
    memory = psutil.virtual_memory()
    if memory.available < 6 << 30:
        pytest.skip("needs 6 GiB of free memory to let Ray's memory monitor act")
    out = tmp_path / "out"
    threshold = (memory.total - memory.available + (3 << 30)) / memory.total
    env = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    where = shortened(fragile[1])
    ended = _run(words(fragile, out, "eating", "--num_actors", 1), env)
    assert ended.returncode == 3, ended.stderr
    results = check_all_but_the_poison(out, *where)
    assert "memory" in results.failures[0].error.lower()


def test_infinite_outputs_are_quarantined_not_measured(fragile, command, tmp_path):
    out = tmp_path / "out"
    ended = command(*words(fragile, out, "overflowing", "--backend", "inline"))
    assert ended.code == 3, ended.err
    results = check_all_but_the_poison(out)
    assert "NaN or infinity" in results.failures[0].error


def test_an_input_with_infinite_outputs_is_named_before_anything_is_written(
    fragile, command, tmp_path
):
    from poison import steep

    agent, definition = fragile
    torch.save(steep().state_dict(), agent / "policy.pt")
    definition.write_text('[{"first": [1]}]')
    path = agent / "activation_inputs" / "clean_inputs.json"
    inputs = json.loads(path.read_text())
    inputs["obs_2"] = [1e20] * 4
    path.write_text(json.dumps(inputs))
    ended = command(*words(fragile, tmp_path / "out", "steep", "--backend", "inline"))
    assert ended.code == 2 and "clean input 'obs_2'" in ended.err, ended.err
    assert not (tmp_path / "out").exists()
