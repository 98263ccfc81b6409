"""Pairs from an agent that plays: seeded, readable, as corrupted as asked, and swept."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CARTPOLE
from gymnasium import spaces

import raypatch
from raypatch.commands.collecting import greedy_action


@pytest.fixture
def cartpole(tmp_path):
    """The example agent without inputs."""
    folder = tmp_path / "agent"
    folder.mkdir()
    shutil.copy(CARTPOLE / "agent.zip", folder)
    return folder


def collected(folder):
    sides = [
        json.loads((folder / f"activation_inputs/{side}_inputs.json").read_text())
        for side in ("clean", "corrupted")
    ]
    return [
        (list(side), np.array([entry["input"] for entry in side.values()], np.float32))
        for side in sides
    ]


def collect(command, folder, *more, pairs=20):
    return command(
        "collect", "--env", "CartPole-v1", "--agent_path", folder, "--pairs", pairs, *more
    )


def test_what_is_collected_is_swept(command, cartpole, tmp_path):
    ended = collect(command, cartpole)
    assert ended.code == 0, ended.err
    assert "the greedy action differs on" in ended.err and "20 pairs written to" in ended.out
    definition = tmp_path / "d.json"
    command("generate", "--type", "layer", "--agent_path", cartpole, "--output", definition)
    ended = command(
        "run", "--agent_path", cartpole, "--definition_file", definition, "--output_dir",
        tmp_path / "out", "--backend", "inline", "--quiet",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert raypatch.open_results(tmp_path / "out").complete


def test_the_same_seed_gives_the_same_pairs_and_another_one_others(command, cartpole):
    def pairs(seed):
        assert collect(command, cartpole, "--seed", seed, "--overwrite").code == 0
        return collected(cartpole)[0][1]

    np.testing.assert_array_equal(pairs(1), pairs(1))
    assert not np.array_equal(pairs(1), pairs(2))


def test_ids_say_where_a_state_comes_from_and_differ(command, cartpole):
    collect(command, cartpole)
    ids, _ = collected(cartpole)[0]
    assert len(set(ids)) == 20 and all(i.startswith("episode_") and "_step_" in i for i in ids)


@pytest.mark.parametrize("corruption", ["other_state", "shuffle", "noise", "zero", "mean"])
def test_corruptions_are_what_they_are_called(command, cartpole, corruption):
    assert collect(command, cartpole, "--corruption", corruption).code == 0
    (_, clean), (_, corrupted) = collected(cartpole)
    assert clean.shape == corrupted.shape == (20, 4)
    assert not np.array_equal(clean, corrupted)
    if corruption == "zero":
        assert not corrupted.any()
    if corruption == "mean":
        assert (corrupted == corrupted[0]).all() and corrupted.any()


def test_a_function_of_the_users_own_corrupts(command, cartpole, monkeypatch):
    (cartpole / "mine_corrupting.py").write_text("def negate(states, rng):\n    return -states\n")
    ended = collect(command, cartpole, "--corruption", "mine_corrupting:negate")
    assert ended.code == 0, ended.err
    (_, clean), (_, corrupted) = collected(cartpole)
    np.testing.assert_array_equal(corrupted, -clean)


def test_differing_keeps_only_pairs_whose_greedy_actions_differ(command, cartpole):
    assert collect(command, cartpole, "--differing").code == 0
    (_, clean), (_, corrupted) = collected(cartpole)
    network = raypatch.load_agent(cartpole).network
    actions = [network(torch.from_numpy(side)).argmax(1) for side in (clean, corrupted)]
    assert len(clean) == 20 and bool((actions[0] != actions[1]).all())


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--corruption", "nonsense"), "is not one of other_state"),
     (("--corruption", "nowhere:f"), "nowhere"), (("--env", "Nowhere-v0"), "--env Nowhere-v0"),
     (("--env", "Acrobot-v1"), "the agent takes"), (("--pairs", 1), "below 2")],
)  # fmt: skip
def test_what_cannot_be_collected_is_refused_and_nothing_is_written(
    command, cartpole, more, message
):
    ended = collect(command, cartpole, *more)
    assert ended.code == 2 and message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (cartpole / "activation_inputs").exists()


def test_inputs_in_the_way_are_kept(command, cartpole):
    collect(command, cartpole)
    before = collected(cartpole)[0][0]
    ended = collect(command, cartpole, "--seed", 5)
    assert ended.code == 2 and "--overwrite" in ended.err
    assert collected(cartpole)[0][0] == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_acrobot_with_an_agent_of_a_continuous_and_a_discrete_kind(command, tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    for name, env, algorithm in (("a", "Acrobot-v1", "PPO"), ("p", "Pendulum-v1", "SAC")):
        folder = tmp_path / name
        folder.mkdir()
        options = {"n_steps": 32, "batch_size": 16} if algorithm == "PPO" else {}
        getattr(sb3, algorithm)("MlpPolicy", env, device="cpu", **options).learn(64).save(
            folder / f"{name}.zip"
        )
        ended = command("collect", "--env", env, "--agent_path", folder, "--pairs", 8)
        assert ended.code == 0, ended.err
        definition = folder / "d.json"
        command("generate", "--type", "layer", "--agent_path", folder, "--output", definition)
        ended = command(
            "run", "--agent_path", folder, "--definition_file", definition, "--output_dir",
            folder / "out", "--backend", "inline", "--quiet",
        )  # fmt: skip
        assert ended.code == 0, ended.err


def test_greedy_actions_of_every_space():
    assert greedy_action(np.array([0.1, 3, 2]), spaces.Discrete(3, start=5), squashed=False) == 6
    found = greedy_action(np.array([1, 0, 0, 2.0]), spaces.MultiDiscrete([2, 2]), squashed=False)
    assert found.tolist() == [0, 1]
    assert greedy_action(np.array([-1, 1.0]), spaces.MultiBinary(2), squashed=False).tolist() == [
        0,
        1,
    ]
    box = spaces.Box(np.array([-2.0, 0]), np.array([2.0, 1]), dtype=np.float64)
    assert greedy_action(np.array([9.0, -9]), box, squashed=False).tolist() == [2, 0]
    np.testing.assert_allclose(greedy_action(np.array([0.0, 0]), box, squashed=True), [0, 0.5])


def test_nothing_in_the_agents_directory_takes_the_place_of_the_users_modules(
    command, cartpole, tmp_path, monkeypatch
):
    here = tmp_path / "here"
    here.mkdir()
    (here / "my_corrupting.py").write_text(
        "import my_helpers\ndef negate(states, rng):\n    return my_helpers.negated(states)\n"
    )
    (here / "my_helpers.py").write_text("def negated(x):\n    return -x\n")
    (cartpole / "my_helpers.py").write_text("raise SystemExit('the stranger's')\n")
    monkeypatch.chdir(here)
    ended = collect(command, cartpole, "--corruption", "my_corrupting:negate")
    assert ended.code == 0, ended.err


def test_a_negative_seed_is_one_line(command, cartpole):
    ended = collect(command, cartpole, "--seed", -1)
    assert ended.code == 2 and "--seed: -1 is below 0" in ended.err
