"""Every algorithm and policy of Stable-Baselines3, trained for some steps and saved by itself."""

from __future__ import annotations

import functools
import io
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import raypatch
from raypatch.errors import AgentError

sb3 = pytest.importorskip("stable_baselines3")
contrib = pytest.importorskip("sb3_contrib")

pytestmark = [
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


@functools.cache
def trained(name):
    """A model, and what the library saves of it."""
    algorithm, policy_name, observation, action, kwargs = CASES[name]
    model, file = make(algorithm, policy_name, observation, action, **kwargs), io.BytesIO()
    model.save(file)
    return model, file.getvalue()


def saved_by(name, folder):
    """The library's file in a folder; the policy that is in it."""
    model, content = trained(name)
    (folder / f"{name}.zip").write_bytes(content)
    return model.policy.float()  # as before a test made it double


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
def test_outputs_equal_those_of_the_librarys_own_network(tmp_path, name, monkeypatch):
    _, _, observation, action, _ = CASES[name]
    policy = saved_by(name, tmp_path)
    agent = raypatch.load_agent(tmp_path)
    assert "no code run" in agent.loaded_as
    assert agent.discrete == isinstance(action, spaces.Discrete)
    kinds = {"Discrete": "discrete", "Box": "continuous"}
    assert agent.actions == kinds.get(type(action).__name__, "several")
    observation.seed(7)
    samples = [observation.sample() for _ in range(6)]
    x = packed(agent, observation, samples)
    policy.set_training_mode(False)
    many = stacked(samples)
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


def librarys_module(policy, layer: str):
    """The library's own module of a layer of ours."""
    inside = next((n for n in ("q_net", "quantile_net", "actor") if hasattr(policy, n)), "")
    if not inside and layer.startswith("features_extractor"):
        inside, layer = "", layer.replace("features_extractor", "pi_features_extractor", 1)
    return policy.get_submodule(f"{inside}.{layer}".lstrip("."))


def hooked_outputs(policy, layer, neurons, source, target):
    """A patch with a plain hook on the library's own module."""
    if layer == "output_logits":
        output, held = policy_output(policy, target).clone(), policy_output(policy, source)
        output[:, neurons] = held[:, neurons]
        return output
    module, held = librarys_module(policy, layer), {}
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


def stacked(samples):
    """Observations as the library takes a batch of them."""
    if isinstance(samples[0], dict):
        return {key: np.stack([s[key] for s in samples]) for key in samples[0]}
    return np.stack(samples)


def write_inputs(folder, samples_by_side) -> None:
    """As a user has them: raw, images with their channels last, parts by key."""
    folder.mkdir()
    for side, samples in samples_by_side.items():
        ids = [f"obs_{i}" for i in range(len(samples))]
        if isinstance(samples[0], dict):
            rows = {
                key: {"input": {part: np.asarray(v).tolist() for part, v in sample.items()}}
                for key, sample in zip(ids, samples)
            }
            (folder / f"{side}_inputs.json").write_text(json.dumps(rows))
        else:
            np.savez(folder / f"{side}_inputs.npz", ids=ids, inputs=np.stack(samples))


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_equals_plain_hooks_on_the_librarys_own_network(tmp_path, name):
    observation = CASES[name][2]
    folder = tmp_path / "agent"
    folder.mkdir()
    policy = saved_by(name, folder)
    observation.seed(3)
    sides = {side: [observation.sample() for _ in range(2)] for side in ("clean", "corrupted")}
    write_inputs(folder / "activation_inputs", sides)
    sizes = raypatch.load_agent(folder).neuron_counts
    specs = [(layer, chosen) for layer, n in sizes.items() for chosen in ([0], [0, n - 1], "all")]
    experiments = [{layer: sorted(set(c)) if c != "all" else c} for layer, c in specs]
    (tmp_path / "d.json").write_text(json.dumps(experiments))
    results = raypatch.run(
        agent_path=str(folder), definition_file=str(tmp_path / "d.json"),
        output_dir=str(tmp_path / "out"), backend="inline",
    )  # fmt: skip
    outputs = np.stack(results.dataset().to_table()["patched_output"].to_pylist())
    outputs = outputs.reshape(len(specs), 2, 2, -1)
    policy.set_training_mode(False)
    clean, corrupted = (stacked(sides[side]) for side in ("clean", "corrupted"))
    for (layer, chosen), found in zip(specs, outputs):
        neurons = slice(None) if chosen == "all" else sorted(set(chosen))
        for direction, (source, target) in enumerate([(clean, corrupted), (corrupted, clean)]):
            expected = hooked_outputs(policy, layer, neurons, source, target).numpy()
            bound = 1e-5 * np.maximum(1.0, np.abs(expected))
            assert (np.abs(found[direction] - expected) <= bound).all(), (layer, chosen, direction)


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
