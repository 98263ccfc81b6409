"""Every algorithm and policy of Stable-Baselines3, trained for some steps and saved by itself."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import raypatch
from raypatch.engine.reference import reference_outputs
from raypatch.errors import AgentError

sb3 = pytest.importorskip("stable_baselines3")
contrib = pytest.importorskip("sb3_contrib")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BOX = spaces.Box(-2, 2, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
FLOAT_GRID = spaces.Box(-1, 1, (3, 4), np.float32)
MIXED = spaces.Dict({"vec": BOX, "img": IMAGE, "kind": spaces.Discrete(4)})
FLAT_DICT = spaces.Dict({"b": BOX, "a": spaces.MultiBinary(3), "c": spaces.MultiDiscrete([2, 5])})
DISCRETE, TORQUE = spaces.Discrete(4), spaces.Box(-1, 1, (2,), np.float32)


class RandomEnv(gym.Env):
    """Random observations, rewards and endings; some actions may be masked."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return (
            self.observation_space.sample(),
            float(np.random.rand()),
            np.random.rand() < 0.1,
            False,
            {},
        )

    def action_masks(self):
        space = self.action_space
        n = sum(space.nvec) if isinstance(space, spaces.MultiDiscrete) else space.n
        return np.ones(n, bool)


def make(algorithm, policy, observation, action, **kwargs):
    library = sb3 if hasattr(sb3, algorithm) else contrib
    on_policy = algorithm in ("PPO", "A2C", "TRPO", "MaskablePPO")
    options = {} if on_policy else {"buffer_size": 200, "learning_starts": 8}
    if algorithm in ("PPO", "TRPO", "MaskablePPO"):
        options |= {"n_steps": 16, "batch_size": 8}
    options |= kwargs
    model = getattr(library, algorithm)(
        policy, RandomEnv(observation, action), seed=0, device="cpu", **options
    )
    return model.learn(24)


def policy_output(policy, obs: dict | np.ndarray) -> torch.Tensor:
    """The library's own network before squashing and sampling."""
    with torch.no_grad():
        tensor, _ = policy.obs_to_tensor(obs)
        if isinstance(tensor, dict):
            tensor = {k: v.to(next(policy.parameters()).dtype) for k, v in tensor.items()}
        if hasattr(policy, "q_net"):
            return policy.q_net(tensor)
        if hasattr(policy, "quantile_net"):
            return policy.quantile_net(tensor).mean(1)
        if hasattr(policy, "actor") and hasattr(policy.actor, "latent_pi"):
            return policy.actor.get_action_dist_params(tensor)[0]
        if hasattr(policy, "actor"):
            actor = policy.actor
            features = actor.extract_features(tensor, actor.features_extractor)
            return actor.mu[:-1](features)
        # Both halves where each has an extractor of its own.
        features = policy.extract_features(tensor)
        features = features[0] if isinstance(features, tuple) else features
        return policy.action_net(policy.mlp_extractor.forward_actor(features))


CASES = {
    "dqn_mlp": ("DQN", "MlpPolicy", BOX, DISCRETE, {}),
    "dqn_cnn": ("DQN", "CnnPolicy", IMAGE, DISCRETE, {}),
    "dqn_multi": ("DQN", "MultiInputPolicy", MIXED, DISCRETE, {}),
    "dqn_no_hidden_layer": ("DQN", "MlpPolicy", BOX, DISCRETE, {"policy_kwargs": {"net_arch": []}}),
    "dqn_discrete_observations": ("DQN", "MlpPolicy", spaces.Discrete(6), DISCRETE, {}),
    "qrdqn_mlp": ("QRDQN", "MlpPolicy", BOX, DISCRETE, {"policy_kwargs": {"n_quantiles": 7}}),
    "qrdqn_cnn": ("QRDQN", "CnnPolicy", IMAGE, DISCRETE, {}),
    "qrdqn_multi": ("QRDQN", "MultiInputPolicy", FLAT_DICT, DISCRETE, {}),
    "ppo_mlp": ("PPO", "MlpPolicy", BOX, DISCRETE, {}),
    "ppo_relu": (
        "PPO", "MlpPolicy", BOX, DISCRETE,
        {"policy_kwargs": {"activation_fn": torch.nn.ReLU, "net_arch": {"pi": [9, 7], "vf": [3]}}},
    ),
    "ppo_empty": ("PPO", "MlpPolicy", BOX, DISCRETE, {"policy_kwargs": {"net_arch": []}}),
    "ppo_cnn": ("PPO", "CnnPolicy", IMAGE, DISCRETE, {}),
    "ppo_cnn_separate": (
        "PPO", "CnnPolicy", IMAGE, DISCRETE,
        {"policy_kwargs": {"share_features_extractor": False, "net_arch": [8]}},
    ),
    "ppo_multi": ("PPO", "MultiInputPolicy", MIXED, TORQUE, {}),
    "ppo_multi_discrete": ("PPO", "MlpPolicy", FLOAT_GRID, spaces.MultiDiscrete([3, 2]), {}),
    "ppo_multi_binary": ("PPO", "MlpPolicy", BOX, spaces.MultiBinary(3), {}),
    "ppo_sde": ("PPO", "MlpPolicy", BOX, TORQUE, {"use_sde": True}),
    "ppo_observed_counts": ("PPO", "MlpPolicy", spaces.MultiDiscrete([3, 4]), DISCRETE, {}),
    "a2c_mlp": ("A2C", "MlpPolicy", BOX, TORQUE, {}),
    "a2c_cnn": ("A2C", "CnnPolicy", IMAGE, DISCRETE, {}),
    "a2c_multi": ("A2C", "MultiInputPolicy", FLAT_DICT, DISCRETE, {}),
    "trpo_mlp": ("TRPO", "MlpPolicy", BOX, DISCRETE, {}),
    "trpo_cnn": ("TRPO", "CnnPolicy", IMAGE, TORQUE, {}),
    "trpo_multi": ("TRPO", "MultiInputPolicy", FLAT_DICT, DISCRETE, {}),
    "maskable_mlp": ("MaskablePPO", "MlpPolicy", BOX, DISCRETE, {}),
    "maskable_cnn": ("MaskablePPO", "CnnPolicy", IMAGE, DISCRETE, {}),
    "maskable_multi": ("MaskablePPO", "MultiInputPolicy", MIXED, spaces.MultiDiscrete([2, 2]), {}),
    "sac_mlp": ("SAC", "MlpPolicy", BOX, TORQUE, {}),
    "sac_sde": ("SAC", "MlpPolicy", BOX, TORQUE, {"use_sde": True}),
    "sac_cnn": ("SAC", "CnnPolicy", IMAGE, TORQUE, {"policy_kwargs": {"net_arch": [16]}}),
    "sac_multi": ("SAC", "MultiInputPolicy", FLAT_DICT, TORQUE, {}),
    "td3_mlp": ("TD3", "MlpPolicy", BOX, TORQUE, {}),
    "td3_cnn": ("TD3", "CnnPolicy", IMAGE, TORQUE, {"policy_kwargs": {"net_arch": [16]}}),
    "td3_multi": ("TD3", "MultiInputPolicy", FLAT_DICT, TORQUE, {}),
    "ddpg_mlp": ("DDPG", "MlpPolicy", BOX, TORQUE, {}),
    "ddpg_cnn": ("DDPG", "CnnPolicy", IMAGE, TORQUE, {"policy_kwargs": {"net_arch": [16]}}),
    "ddpg_multi": ("DDPG", "MultiInputPolicy", FLAT_DICT, TORQUE, {}),
    "tqc_mlp": ("TQC", "MlpPolicy", BOX, TORQUE, {}),
    "tqc_cnn": ("TQC", "CnnPolicy", IMAGE, TORQUE, {"policy_kwargs": {"net_arch": [16]}}),
    "tqc_multi": ("TQC", "MultiInputPolicy", FLAT_DICT, TORQUE, {}),
}  # fmt: skip


def packed(agent, space, samples) -> torch.Tensor:
    """Observations as raypatch takes them: one row an observation, keys one after another."""
    if not agent.observation_parts:
        first = np.stack([np.asarray(s, np.float32) for s in samples])
        if space is IMAGE:
            first = first.transpose(0, 3, 1, 2)
        return torch.from_numpy(first).reshape(len(samples), *agent.observation_shape)
    rows = []
    for sample in samples:
        parts = []
        for key in agent.observation_parts:
            value = np.asarray(sample[key], np.float32)
            parts.append((value.transpose(2, 0, 1) if value.ndim == 3 else value).ravel())
        rows.append(np.concatenate(parts))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_patches_equal_those_of_the_librarys_own_network(tmp_path, name, monkeypatch):
    algorithm, policy_name, observation, action, kwargs = CASES[name]
    model = make(algorithm, policy_name, observation, action, **kwargs)
    model.save(tmp_path / f"{name}.zip")
    agent = raypatch.load_agent(tmp_path)
    assert "no code run" in agent.loaded_as
    assert agent.discrete == isinstance(action, spaces.Discrete)
    observation.seed(7)
    samples = [observation.sample() for _ in range(6)]
    x, policy = packed(agent, observation, samples), model.policy
    policy.set_training_mode(False)
    many = samples
    if isinstance(observation, spaces.Dict):
        many = {key: np.stack([s[key] for s in samples]) for key in samples[0]}
    else:
        many = np.stack(samples)
    expected = policy_output(policy, many)
    with torch.no_grad():
        found = agent.network(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # The library casts observations to float32; here they stay what they are.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    expected = policy_output(policy.double(), many)
    monkeypatch.undo()
    with torch.no_grad():
        found = agent.network.double()(x.double())
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    agent.network.float()
    sizes = {layer: facts.neurons for layer, facts in agent.layers.items()}
    experiments = [{layer: [0, n - 1] if n > 1 else [0]} for layer, n in sizes.items()]
    experiments += [{layer: "all"} for layer in sizes]
    source, target = x[:3], x[3:]
    patched = raypatch.patch(agent.network, experiments, source, target)
    truth = reference_outputs(agent.network, experiments, source, target)
    bound = 1e-5 * np.maximum(1.0, np.abs(truth.numpy()))
    assert (np.abs(patched.numpy() - truth.numpy()) <= bound).all()


def hooked_outputs(policy, layer, neurons, source, target):
    """A patch with a plain hook on the library's own module."""
    module, held = dict(policy.named_modules())[layer], {}
    handle = module.register_forward_hook(lambda m, a, out: held.setdefault("value", out.clone()))
    policy_output(policy, source)
    handle.remove()

    def replace(_, __, out):
        out = out.clone()
        out[:, neurons] = held["value"][:, neurons]
        return out

    handle = module.register_forward_hook(replace)
    try:
        return policy_output(policy, target)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "inside"),
    [("dqn_cnn", "q_net."), ("ppo_mlp", ""), ("sac_mlp", "actor."), ("qrdqn_mlp", "quantile_net."),
     ("td3_mlp", "actor."), ("trpo_mlp", "")],
)  # fmt: skip
def test_a_small_sweep_equals_plain_hooks_on_the_librarys_network(tmp_path, name, inside):
    algorithm, policy_name, observation, action, kwargs = CASES[name]
    model = make(algorithm, policy_name, observation, action, **kwargs)
    model.save(tmp_path / f"{name}.zip")
    agent = raypatch.load_agent(tmp_path)
    observation.seed(3)
    samples = [observation.sample() for _ in range(4)]
    x, many = packed(agent, observation, samples), np.stack(samples)
    model.policy.set_training_mode(False)
    for layer in agent.layers:
        patched = raypatch.patch(agent.network, [{layer: [0, 1]}], x[:2], x[2:])[0]
        expected = hooked_outputs(model.policy, inside + layer, [0, 1], many[:2], many[2:])
        torch.testing.assert_close(patched, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_recurrent_policies_are_refused_with_the_reason(tmp_path):
    model = contrib.RecurrentPPO(
        "MlpLstmPolicy", RandomEnv(BOX, DISCRETE), n_steps=8, batch_size=8, device="cpu"
    )
    model.save(tmp_path / "recurrent.zip")
    with pytest.raises(AgentError, match="hidden state"):
        raypatch.load_agent(tmp_path)


def test_crossq_is_refused_by_name(tmp_path):
    model = contrib.CrossQ("MlpPolicy", RandomEnv(BOX, TORQUE), buffer_size=10, device="cpu")
    model.save(tmp_path / "crossq.zip")
    with pytest.raises(AgentError, match="supported are DQN, QRDQN"):
        raypatch.load_agent(tmp_path)
