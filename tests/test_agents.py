"""Agents: what loads, under which names, and what is refused without running code."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, LAVA
from safetensors.torch import save_file
from torch import nn

import raypatch
from raypatch.agents import AgentOptions, load_agent, read_layer_structure
from raypatch.errors import AgentError, InputError
from raypatch.sweeps.sweep import files_digest


def truth(agent, *names):
    return [np.load(agent / "expected.npz")[name] for name in names]


def clean_outputs(agent, path):
    inputs = json.loads((path / "activation_inputs" / "clean_inputs.json").read_text())
    obs = torch.tensor([value["input"] for value in inputs.values()], dtype=torch.float64)
    return agent.network.double()(obs).numpy()


def edited_zip(source, target, **members):
    """A copy of an archive with some members replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, members.get(info.filename, old.read(info)))
    return target


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Payload:
    """Leaves a file behind if anyone unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("path", [LAVA, CARTPOLE], ids=["manifest", "zip"])
def test_an_agent_loads_with_the_names_and_outputs_of_its_library(path):
    agent = load_agent(path)
    names, sizes, outputs = truth(path, "layer_names", "layer_sizes", "clean_output")
    assert list(agent.layers) == names.tolist()
    assert [layer.neurons for layer in agent.layers.values()] == sizes.tolist()
    assert agent.discrete and agent.output_size == outputs.shape[1]
    np.testing.assert_allclose(clean_outputs(agent, path), outputs, atol=1e-12)


def test_a_zip_with_a_custom_extractor_needs_trust_and_says_so():
    with pytest.raises(AgentError, match=r"features.CustomCombinedExtractor.*--trust_agent_code"):
        load_agent(LAVA, agent_file="agent.zip")


def test_a_zip_with_a_custom_extractor_loads_with_trust(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "features", raising=False)
    agent = load_agent(LAVA, agent_file="agent.zip", trust_agent_code=True)
    names, outputs = truth(LAVA, "layer_names", "clean_output")
    assert list(agent.layers) == names.tolist()
    assert agent.output_kind == "Q-values"
    np.testing.assert_allclose(clean_outputs(agent, LAVA), outputs, atol=1e-12)


def test_a_zip_of_a_newer_numpy_is_refused_with_what_to_install(monkeypatch):
    from stable_baselines3.common import save_util

    def load(*_, **__):
        raise ModuleNotFoundError(
            "No module named 'numpy._core.numeric'", name="numpy._core.numeric"
        )

    monkeypatch.setattr(save_util, "load_from_zip_file", load)
    with pytest.raises(AgentError, match="saved with NumPy 2: pip install 'numpy>=2'"):
        load_agent(LAVA, agent_file="agent.zip", trust_agent_code=True)


def test_trust_leaves_the_import_path_as_it_was():
    import sys

    before = list(sys.path)
    load_agent(LAVA, agent_file="agent.zip", trust_agent_code=True)
    assert sys.path == before


@pytest.mark.parametrize("algorithm", ["DQN", "PPO", "A2C"])
@pytest.mark.parametrize("arch", [[], [7], [9, 5, 3]])
def test_a_zip_saved_by_the_library_gives_the_librarys_outputs(tmp_path, algorithm, arch):
    import gymnasium
    import stable_baselines3 as sb3

    env = gymnasium.make("CartPole-v1")
    kind = getattr(sb3, algorithm)
    model = kind("MlpPolicy", env, policy_kwargs={"net_arch": arch}, device="cpu", seed=1)
    model.save(tmp_path / "dqn-CartPole-v1.zip")
    agent = load_agent(tmp_path)
    obs = torch.randn(6, 4)
    with torch.no_grad():
        if algorithm == "DQN":
            expected = model.policy.q_net(obs)
        else:
            expected = model.policy.get_distribution(obs).distribution.logits
            found = agent.network(obs)
            found = found - found.logsumexp(1, keepdim=True)
            torch.testing.assert_close(found, expected)
            return
    torch.testing.assert_close(agent.network(obs), expected)


def test_an_activation_of_the_policy_kwargs_is_used(tmp_path):
    import gymnasium
    import stable_baselines3 as sb3

    env = gymnasium.make("CartPole-v1")
    kwargs = {"activation_fn": nn.ELU, "net_arch": [8]}
    model = sb3.DQN("MlpPolicy", env, policy_kwargs=kwargs, device="cpu", seed=1)
    model.save(tmp_path / "agent.zip")
    obs = torch.randn(6, 4)
    with torch.no_grad():
        torch.testing.assert_close(load_agent(tmp_path).network(obs), model.policy.q_net(obs))


def test_a_continuous_action_space_is_noticed(tmp_path):
    import gymnasium
    import stable_baselines3 as sb3

    model = sb3.PPO("MlpPolicy", gymnasium.make("Pendulum-v1"), device="cpu", seed=1)
    model.save(tmp_path / "agent.zip")
    agent = load_agent(tmp_path)
    assert not agent.discrete and agent.output_kind == "mean"


def test_pickles_in_an_archive_are_never_run(tmp_path):
    proof = tmp_path / "executed"
    bomb = pickle.dumps(Payload(proof))
    for member in ("policy.pth", "pytorch_variables.pth", "policy.optimizer.pth"):
        path = edited_zip(CARTPOLE / "agent.zip", tmp_path / "agent.zip", **{member: bomb})
        try:
            load_agent(tmp_path, agent_file=path.name)
        except AgentError as error:
            assert "policy.pth" in str(error) and member == "policy.pth"
    assert not proof.exists()


def test_a_pickled_module_is_refused_without_running_it(tmp_path):
    proof = tmp_path / "executed"
    torch.save(Payload(proof), tmp_path / "policy.pt")
    with pytest.raises(AgentError, match="loading them would run code"):
        load_agent(tmp_path, activation="relu")
    assert not proof.exists()


def test_layers_come_from_the_weights_where_the_network_cannot_be_built(tmp_path):
    shutil.copy(LAVA / "policy.pt", tmp_path)
    layers, n_outputs, doubt = read_layer_structure(tmp_path, AgentOptions())
    assert doubt is not None and "does not say its activation" in doubt
    assert layers == {"features_extractor.mlp.0": 64, "q_net.0": 64, "q_net.2": 64, "q_net.4": 3}
    assert n_outputs == 3


def test_a_nested_state_dict_is_found(tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    obs = torch.randn(5, 3)
    torch.testing.assert_close(
        load_agent(tmp_path, activation="tanh").network(obs), network.requires_grad_(False)(obs)
    )


def write_state(tmp_path, **tensors):
    torch.save({k.replace("__", "."): v for k, v in tensors.items()}, tmp_path / "a.pt")


BAD_DIRECTORIES = [
    (lambda p: None, {}, "no agent here"),
    (lambda p: (p / "agent.json").write_text("{"), {}, "not a readable JSON manifest"),
    (lambda p: (p / "agent.json").write_text("[]"), {}, 'an object with "file"'),
    (lambda p: (p / "agent.json").write_text('{"file": "x.pt"}'), {}, "'x.pt' does not exist"),
    (lambda p: (p / "agent.json").write_text('{"file": "../x.pt"}'), {}, "outside the agent's"),
    (lambda p: (p / "agent.json").write_text('{"file": "x", "typo": "y"}'), {}, "unknown key 'typo'"),
    (lambda p: [(p / n).write_bytes(b"") for n in ("a.zip", "b.zip")], {}, "several agents: a.zip, b.zip"),
    (lambda p: (p / "a.zip").write_bytes(b"not a zip"), {}, "damaged archive"),
    (lambda p: zipfile.ZipFile(p / "a.zip", "w").close(), {}, "not a Stable-Baselines3 archive"),
    (lambda p: (p / "a.pt").write_bytes(b"junk"), {"activation": "relu"}, "a.pt"),
    (lambda p: write_state(p, a__weight=torch.ones(2, 3)), {}, "--activation relu"),
    (lambda p: write_state(p, a__weight=torch.ones(2, 3)), {"activation": "rulu"}, "unknown activation 'rulu'"),
    (
        lambda p: write_state(p, a__weight=torch.ones(2, 3), b__weight=torch.ones(2, 3)),
        {"activation": "relu"}, "do not chain.*--agent_output",
    ),
    (lambda p: (p / "dqn.cleanrl_model").write_bytes(b""), {}, "one of dqn.cleanrl_model, name it with --agent_file"),
    (lambda p: [(p / "x.pt").touch(), (p / "agent.json").write_text('{"file": "x.pt", "actions": "box"}')], {}, "'box' is not one of discrete, continuous"),
    (
        lambda p: [(p / "x.zip").touch(), (p / "agent.json").write_text('{"file": "x.zip", "actions": "continuous"}')],
        {}, "leave out 'actions'",
    ),
    (lambda p: torch.save((1, {}), p / "a.pt"), {"activation": "relu"}, "no state dict .* but a tuple of int, dict"),
    (
        lambda p: torch.save({"epoch": 1, "model": {"w": torch.ones(2)}}, p / "a.pt"),
        {"activation": "relu"}, "no state dict .* but a dict of epoch, model",
    ),
    (lambda p: write_state(p, a__weight=torch.ones(2, 3, 3, 3)), {"activation": "relu"}, "only linear layers"),
    (
        lambda p: write_state(p, a__weight=torch.ones(2, 3), norm__weight=torch.ones(2)),
        {"activation": "relu"}, "'norm.weight'",
    ),
    (
        lambda p: write_state(p, a__weight=torch.full((2, 3), torch.nan)),
        {"activation": "relu"}, "holds NaN or infinity",
    ),
]  # fmt: skip


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    shutil.copytree(LAVA, tmp_path / "agent")
    manifest = tmp_path / "agent" / "agent.json"
    manifest.write_text(manifest.read_text(), encoding="utf-8-sig")
    assert load_agent(tmp_path / "agent").loaded_as == load_agent(LAVA).loaded_as


@pytest.mark.parametrize("given", [{"activation": "relu"}, {"agent_output": "actor"}])
def test_what_a_file_says_itself_cannot_be_said_otherwise(given):
    with pytest.raises(InputError, match=r"agent.zip: leave out .* itself defines it"):
        load_agent(CARTPOLE, **given)


@pytest.mark.parametrize(("make", "options", "message"), BAD_DIRECTORIES)
def test_a_directory_that_cannot_be_loaded_is_refused_in_one_line(tmp_path, make, options, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_agent(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_compiled_networks_and_of_training_loops_are_read(tmp_path):
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    state = {f"_orig_mod.{name}": value for name, value in network.state_dict().items()}
    torch.save({"model_state_dict": state, "optimizer": {"state": {}}}, tmp_path / "ckpt.pt")
    agent = load_agent(tmp_path, activation="tanh")
    obs = torch.randn(3, 4)
    assert list(agent.layers) == ["0", "2"]
    torch.testing.assert_close(agent.network(obs), network(obs))


def test_the_observations_shape_is_that_of_the_inputs_that_are_named(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(
        "from torch import nn\n"
        "def conv():\n"
        "    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    conv = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 4))
    torch.save(conv.state_dict(), tmp_path / "conv.pt")
    with pytest.raises(AgentError, match="observation's shape is unknown"):
        load_agent(tmp_path, agent_factory="made:conv")
    np.savez(tmp_path / "elsewhere.npz", ids=["x"], inputs=np.zeros((1, 2, 4, 4), np.float32))
    named = str(tmp_path / "elsewhere.npz")
    assert load_agent(tmp_path, agent_factory="made:conv", inputs=named).observation_shape == (
        2,
        4,
        4,
    )
    beside = tmp_path / "activation_inputs"
    beside.mkdir()
    (beside / "clean_inputs.json").write_text("{")
    with pytest.raises(InputError, match=r"clean_inputs.json: not readable JSON"):
        load_agent(tmp_path, agent_factory="made:conv")
    (beside / "clean_inputs.json").write_text('{"x": {"input": {"obs": [1.0], "h": [2.0]}}}')
    with pytest.raises(AgentError, match=r"several parts \(obs, h\).*raypatch.patch takes tuples"):
        load_agent(tmp_path, agent_factory="made:conv")


def test_two_agents_with_factories_of_one_name_are_not_taken_for_each_other(tmp_path):
    for name, activation in (("one", "ReLU"), ("two", "Tanh")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "of_one_name.py").write_text(
            "from torch import nn\n"
            "def make():\n"
            f"    return nn.Sequential(nn.Linear(3, 4), nn.{activation}(), nn.Linear(4, 2))\n"
        )
        network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        torch.save(network.state_dict(), folder / "policy.pt")
    for _ in range(2):  # the same one again is no other
        agent = load_agent(tmp_path / "one", agent_factory="of_one_name:make")
        assert isinstance(agent.network[1], nn.ReLU)
    with pytest.raises(
        AgentError, match=r"two/of_one_name.py: 'of_one_name' was already imported from"
    ):
        load_agent(tmp_path / "two", agent_factory="of_one_name:make")
    with pytest.raises(InputError, match="sys has no function 'nothing'"):
        load_agent(tmp_path / "one", agent_factory="sys:nothing")


@pytest.mark.timeout(20)
def test_many_layers_of_which_one_fits_nowhere_are_refused_at_once(tmp_path):
    layers = {f"layer{i}.weight": torch.ones(4, 4) for i in range(14)}
    save_file({**layers, "odd.weight": torch.ones(2, 3)}, tmp_path / "policy.safetensors")
    with pytest.raises(AgentError, match="odd.weight|do not chain|fit"):
        load_agent(tmp_path, activation="relu")


def test_a_network_that_squeezes_away_the_axis_of_a_lone_observation_is_loaded(
    tmp_path, monkeypatch
):
    (tmp_path / "squeezing.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).squeeze()\n"
        "class Outer(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = Net(4, 3)\n"
        "    def forward(self, x):\n"
        "        return self.net(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save({"net.weight": torch.ones(3, 4), "net.bias": torch.ones(3)}, tmp_path / "net.pt")
    agent = load_agent(tmp_path, agent_factory="squeezing:Outer")
    assert agent.output_size == 3 and agent.layers["net"].neurons == 3


def test_actions_of_a_file_that_does_not_tell_may_be_said_to_be_continuous(tmp_path):
    write_state(tmp_path, a__weight=torch.ones(2, 3))
    assert load_agent(tmp_path, activation="relu").discrete
    agent = load_agent(tmp_path, activation="relu", actions="continuous")
    assert not agent.discrete and agent.output_kind == "mean"


def test_fields_go_before_options_that_are_given_with_them(tmp_path):
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.save(network.state_dict(), tmp_path / "policy.pt")
    options = AgentOptions(activation="tanh")
    agent = load_agent(tmp_path, options, activation="relu")
    x = torch.randn(3, 2)
    torch.testing.assert_close(agent.network(x), network(x))


def test_a_file_instead_of_a_directory_is_refused():
    with pytest.raises(AgentError, match="give its directory"):
        load_agent(LAVA / "policy.pt")


def test_a_manifest_says_that_actions_are_continuous(tmp_path, run_inline, command):
    """The file is as CleanRL saves it, actor and critic together."""
    parts = {}
    for part, n_outputs in (("critic", 1), ("actor_mean", 2)):
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs))
        parts |= {f"{part}.{name}": value for name, value in network.state_dict().items()}
    torch.save(parts, tmp_path / "ppo.cleanrl_model")
    manifest = {"file": "ppo.cleanrl_model", "output": "actor_mean", "activation": "tanh"}
    digests = []
    for actions in ("continuous", "discrete"):
        (tmp_path / "agent.json").write_text(json.dumps({**manifest, "actions": actions}))
        agent = load_agent(tmp_path)
        assert agent.discrete == (actions == "discrete")
        digests.append(files_digest(agent.files))
    assert digests[0] != digests[1]  # a run of one is never resumed as the other
    (tmp_path / "agent.json").write_text(json.dumps({**manifest, "actions": "continuous"}))
    (tmp_path / "activation_inputs").mkdir()
    for side in ("clean", "corrupted"):
        inputs = {"a": torch.randn(3).tolist(), "b": torch.randn(3).tolist()}
        (tmp_path / "activation_inputs" / f"{side}_inputs.json").write_text(json.dumps(inputs))
    definition = tmp_path / "definition.json"
    definition.write_text('[{"0": [1]}, {"0": [2]}]')
    out = run_inline(tmp_path, definition)
    table = raypatch.open_results(out).to_pandas()
    assert table["patched_action"].isna().all() and "kl_divergence" not in table
    assert command("verify", out).code == 0


def test_a_script_says_that_actions_are_continuous(tmp_path):
    write_state(tmp_path, a__weight=torch.ones(2, 3))
    agent = load_agent(tmp_path, activation="relu", actions="continuous")
    assert not agent.discrete and agent.files == (tmp_path / "a.pt",)


def test_a_factory_in_a_manifest_needs_trust(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"")
    (tmp_path / "agent.json").write_text('{"file": "x.pt", "factory": "m:f"}')
    with pytest.raises(AgentError, match="'m:f' runs code.*--trust_agent_code"):
        load_agent(tmp_path)
