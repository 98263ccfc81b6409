"""Checkpoints of RLlib's new API stack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import raypatch
from raypatch.engine.reference import reference_outputs
from raypatch.errors import AgentError

pytest.importorskip("tree", reason="RLlib's own dependencies are not installed")
gym = pytest.importorskip("gymnasium")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


NETWORK = {
    "fcnet_hiddens": [16, 8], "fcnet_activation": "relu", "head_fcnet_hiddens": [8],
    "head_fcnet_activation": "relu",
}  # fmt: skip
DQN = {"double_q": True, "num_atoms": 1, "epsilon": 0.1, "std_init": 0.5, **NETWORK}
DISCRETE, TORQUE = gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))
CASES = {
    "ppo": ("PPO", DISCRETE, None, "encoder.encoder.net.mlp.0", "action_dist_inputs"),
    "ppo_box": ("PPO", TORQUE, None, "pi.net.mlp.0", "action_dist_inputs"),
    "sac": ("SAC", TORQUE, {"twin_q": True, **NETWORK}, "pi_encoder.net.mlp.2", "action_dist_inputs"),
    "dqn": ("DQN", DISCRETE, {"dueling": False, **DQN}, "af.net.mlp.2", "qf_preds"),
    "dqn_dueling": ("DQN", DISCRETE, {"dueling": True, **DQN}, "vf.net.mlp.0", "qf_preds"),
}  # fmt: skip


def saved(folder, name="ppo", **changes):
    """A module with RLlib's default network, saved by RLlib."""
    import importlib

    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    algorithm, action_space, config, _, _ = CASES[name]
    package = f"ray.rllib.algorithms.{algorithm.lower()}"
    made = importlib.import_module(f"{package}.{algorithm.lower()}")
    catalog = importlib.import_module(f"{package}.{algorithm.lower()}_catalog")
    torch.manual_seed(0)
    spec = getattr(made, f"{algorithm}Config")().get_default_rl_module_spec()
    spec.observation_space = gym.spaces.Box(-1, 1, (4,))
    spec.action_space = action_space
    spec.model_config = (
        {**config, **changes} if config else DefaultModelConfig(fcnet_hiddens=[16, 8])
    )
    spec.catalog_class = getattr(catalog, f"{algorithm}Catalog")
    module = spec.build()
    module.save_to_path(str(folder))
    return module


@pytest.mark.parametrize("name", CASES)
def test_a_module_gives_its_own_outputs_and_patches_as_hooks_do(tmp_path, name):
    algorithm, action_space, _, layer, key = CASES[name]
    module = saved(tmp_path / "checkpoint", name)
    agent = raypatch.load_agent(tmp_path / "checkpoint", trust_agent_code=True)
    x = torch.randn(6, 4)
    with torch.no_grad():
        call = module.compute_q_values if algorithm == "DQN" else module.forward_inference
        expected, found = call({"obs": x})[key], agent.network(x)
    n = 3 if agent.discrete else 2
    assert found.shape == (6, n) and agent.discrete == (action_space is DISCRETE)
    torch.testing.assert_close(found, expected[:, :n])
    assert layer in agent.layers
    experiments = [{layer: [0]} for layer in agent.layers]
    patched = raypatch.patch(agent.network, experiments, x[:3], x[3:])
    truth = reference_outputs(agent.network, experiments, x[:3], x[3:])
    np.testing.assert_allclose(patched, truth, atol=1e-5)


def test_an_action_space_of_several_actions_is_refused_not_guessed(tmp_path, monkeypatch):
    several = gym.spaces.MultiDiscrete([3, 5])
    monkeypatch.setitem(CASES, "several", ("PPO", several, None, "", ""))
    saved(tmp_path / "checkpoint", "several")
    with pytest.raises(AgentError, match="its action space is MultiDiscrete, not Discrete or Box"):
        raypatch.load_agent(tmp_path / "checkpoint", trust_agent_code=True)


def test_a_distribution_of_returns_is_refused_not_guessed(tmp_path):
    saved(tmp_path / "c", "dqn_dueling", num_atoms=5, v_min=-1.0, v_max=1.0)
    with pytest.raises(AgentError, match="distributional"):
        raypatch.load_agent(tmp_path / "c", trust_agent_code=True)


def test_a_module_that_computes_something_else_is_not_believed(tmp_path, monkeypatch):
    from raypatch.agents import rllib

    saved(tmp_path / "c", "dqn_dueling")
    real = rllib._parts
    monkeypatch.setattr(
        rllib,
        "_parts",
        lambda *a: dict(list(real(*a).items())[:2]),  # the value head forgotten
    )
    with pytest.raises(AgentError, match="other outputs than the module"):
        raypatch.load_agent(tmp_path / "c", trust_agent_code=True)


def test_without_trust_nothing_is_unpickled(tmp_path):
    saved(tmp_path / "checkpoint")
    with pytest.raises(AgentError, match="--trust_agent_code"):
        raypatch.load_agent(tmp_path / "checkpoint")


def test_an_algorithms_checkpoint_is_entered(tmp_path):
    inside = tmp_path / "algo" / "learner_group" / "learner" / "rl_module" / "default_policy"
    inside.parent.mkdir(parents=True)
    saved(inside)
    agent = raypatch.load_agent(tmp_path / "algo", trust_agent_code=True)
    assert agent.output_size == 3


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    saved(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "class_and_ctor_args.pkl").write_bytes(b"no pickle")
    with pytest.raises(AgentError, match="RLlib could not load it"):
        raypatch.load_agent(tmp_path / "checkpoint", trust_agent_code=True)
