"""Shared ground: the example agents with their independently computed truth, and a command."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

import raypatch
from raypatch import cli

# Small networks: two threads that wait for each other on a busy machine take many times as long.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
LAVA = ROOT / "examples" / "lavacrossing_dqn"
CARTPOLE = ROOT / "examples" / "cartpole_ppo"


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def logs_of_training_go_with_the_tests(tmp_path_factory):
    """Stable-Baselines3 leaves a folder a training in /tmp otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("logs")))
        yield


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys):
    """Run the command line in this process: ``command("rank", path)``."""

    def call(*arguments) -> Ended:
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


@pytest.fixture
def run_inline(command, tmp_path):
    """A sweep without Ray; further options as arguments, the output directory comes back."""

    def call(agent, definition, *options, out=None) -> Path:
        out = out or tmp_path / "out"
        ended = command(
            "run", "--agent_path", agent, "--definition_file", definition, "--output_dir", out,
            "--backend", "inline", "--quiet", *options,
        )  # fmt: skip
        assert (ended.code, ended.err) == (0, "")
        return out

    return call


@pytest.fixture
def single_neurons(command, tmp_path):
    """A definition of every neuron of an agent, without output_logits."""

    def call(agent) -> Path:
        path = tmp_path / f"{Path(agent).name}.json"
        ended = command(
            "generate", "--type", "single_neuron", "--agent_path", agent, "--output", path,
            "--exclude_output_logits", "--strict",
        )  # fmt: skip
        assert ended.code == 0
        return path

    return call


@pytest.fixture
def lava_copy(tmp_path):
    """A copy of the LavaCrossing agent that a test may change."""
    return Path(shutil.copytree(LAVA, tmp_path / "agent"))


def expected_outputs(agent: Path) -> np.ndarray:
    """Truth of every single neuron: ``[experiments, directions, inputs, outputs]``."""
    truth = np.load(agent / "expected.npz")
    return np.stack([truth["denoising"], truth["noising"]], axis=1)


def outputs_of(results) -> np.ndarray:
    """Patched outputs of a finished run: ``[experiments, directions, inputs, outputs]``."""
    table = results.dataset().to_table()
    flat = table["patched_output"].combine_chunks().flatten().to_numpy()
    shape = (results.sweep["identity"]["n_experiments"], len(results.directions))
    return flat.reshape(*shape, len(results.sweep["input_ids"]), -1)


def pytest_addoption(parser):
    parser.addoption("--chaos_runs", type=int, default=2, help="runs of the chaos suite")
    parser.addoption("--chaos_kills", type=int, default=4, help="kills in each of them")


# The same cases every time; shrinking a failure of the engine takes minutes, so it is left to
# `pytest --hypothesis-profile=shrink`.
settings.register_profile(
    "steady", derandomize=True, deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
settings.register_profile("shrink", deadline=None)
settings.load_profile("steady")


@pytest.fixture
def folder(tmp_path):
    """An empty directory for an agent."""
    path = tmp_path / "agent"
    path.mkdir()
    return path


@pytest.fixture
def flag(tmp_path):
    """A file that exists only if something was executed; looked for again at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture(scope="session")
def lava_run(tmp_path_factory):
    """A finished single-neuron sweep of the example agent."""
    folder = tmp_path_factory.mktemp("analysis")
    definition = folder / "d.json"
    cli.main(["generate", "--type", "single_neuron", "--agent_path", str(LAVA), "--output",
              str(definition)])  # fmt: skip
    return raypatch.run(
        agent_path=str(LAVA), definition_file=str(definition), output_dir=str(folder / "out"),
        backend="inline",
    )  # fmt: skip


@pytest.fixture(scope="session")
def values(lava_run):
    """``[experiments, directions, inputs]`` by metric, from the rows."""
    table = lava_run.dataset().to_table()
    shape = (-1, 2, len(lava_run.sweep["input_ids"]))
    return {m: table[m].to_numpy().astype(np.float64).reshape(shape) for m in lava_run.metrics} | {
        "changed": table["action_changed"].to_numpy().reshape(shape)
    }


@pytest.fixture
def small(tmp_path):
    """A definition that is cut into three items."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps([{"q_net.0": [i]} for i in range(33)]))
    return path


@pytest.fixture
def finished(run_inline, small, tmp_path):
    return run_inline(LAVA, small, out=tmp_path / "finished")


def resume(command, small, out, *more):
    return command(
        "run", "--agent_path", LAVA, "--definition_file", small, "--output_dir", out,
        "--backend", "inline", *more,
    )  # fmt: skip
