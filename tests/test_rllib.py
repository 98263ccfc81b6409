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


def saved(folder, action_space, algorithm="ppo"):
    """A module with RLlib's default network, saved by RLlib."""
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    if algorithm == "ppo":
        from ray.rllib.algorithms.ppo.ppo import PPOConfig as Config
        from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog as Catalog
    else:
        from ray.rllib.algorithms.sac.sac import SACConfig as Config
        from ray.rllib.algorithms.sac.sac_catalog import SACCatalog as Catalog
    torch.manual_seed(0)
    spec = Config().get_default_rl_module_spec()
    spec.observation_space = gym.spaces.Box(-1, 1, (4,))
    spec.action_space = action_space
    spec.model_config = (
        DefaultModelConfig(fcnet_hiddens=[16, 8]) if algorithm == "ppo" else
        {**vars(DefaultModelConfig(fcnet_hiddens=[16, 8])), "twin_q": False}
    )  # fmt: skip
    spec.catalog_class = Catalog
    module = spec.build()
    module.save_to_path(str(folder))
    return module


@pytest.mark.parametrize(
    "action_space", [gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))], ids=["discrete", "box"]
)
def test_a_ppo_module_gives_its_own_outputs_and_patches_as_hooks_do(tmp_path, action_space):
    module = saved(tmp_path / "checkpoint", action_space)
    agent = raypatch.load_agent(tmp_path / "checkpoint", trust_agent_code=True)
    x = torch.randn(6, 4)
    with torch.no_grad():
        expected = module.forward_inference({"obs": x})["action_dist_inputs"]
        found = agent.network(x)
    n = 3 if agent.discrete else 2
    assert found.shape == (6, n)
    torch.testing.assert_close(found, expected[:, :n])
    assert "encoder.encoder.net.mlp.0" in agent.layers and "pi.net.mlp.0" in agent.layers
    experiments = [{layer: [0, 1]} for layer in agent.layers]
    patched = raypatch.patch(agent.network, experiments, x[:3], x[3:])
    truth = reference_outputs(agent.network, experiments, x[:3], x[3:])
    np.testing.assert_allclose(patched, truth, atol=1e-5)


def test_without_trust_nothing_is_unpickled(tmp_path):
    saved(tmp_path / "checkpoint", gym.spaces.Discrete(2))
    with pytest.raises(AgentError, match="--trust_agent_code"):
        raypatch.load_agent(tmp_path / "checkpoint")


def test_an_algorithms_checkpoint_is_entered(tmp_path):
    inside = tmp_path / "algo" / "learner_group" / "learner" / "rl_module" / "default_policy"
    inside.parent.mkdir(parents=True)
    saved(inside, gym.spaces.Discrete(2))
    agent = raypatch.load_agent(tmp_path / "algo", trust_agent_code=True)
    assert agent.output_size == 2


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    saved(tmp_path / "checkpoint", gym.spaces.Discrete(2))
    (tmp_path / "checkpoint" / "class_and_ctor_args.pkl").write_bytes(b"no pickle")
    with pytest.raises(AgentError, match="RLlib could not load it"):
        raypatch.load_agent(tmp_path / "checkpoint", trust_agent_code=True)
