"""Agents as plain PyTorch saves them: every format gives the module's own outputs and layers."""

from __future__ import annotations

import inspect
import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from agent_files import Dueling, assert_same_outputs
from conftest import LAVA
from safetensors.torch import save_file
from torch import nn

import raypatch
from raypatch.engine.reference import reference_outputs
from raypatch.errors import AgentError, InputError

pytestmark = pytest.mark.filterwarnings("ignore")


CLEANRL = f"""
import torch
from torch import nn

class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.actor = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
        )
        self.log_std = nn.Parameter(torch.zeros(1, 2))

{inspect.getsource(Dueling)}
def build():
    return Agent()

def dueling():
    return Dueling()

def broken():
    raise RuntimeError("no such agent")
"""


@pytest.fixture
def folder(tmp_path):
    """An agent's directory with a module of classes in CleanRL's shape."""
    path = tmp_path / "agent"
    path.mkdir()
    (path / "agent_code.py").write_text(CLEANRL)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    sys.modules.pop("agent_code", None)


@pytest.fixture
def cleanrl(folder):
    import agent_code

    torch.manual_seed(0)
    return agent_code.Agent()


def test_a_cleanrl_agent_by_factory_and_output(folder, cleanrl):
    torch.save(cleanrl.state_dict(), folder / "agent.pt")
    agent = raypatch.load_agent(folder, agent_factory="agent_code:build", agent_output="actor")
    assert list(agent.layers) == ["0", "2", "4"]
    assert_same_outputs(agent, cleanrl.actor, (4,))


def test_a_cleanrl_state_dict_needs_no_code_with_an_activation(folder, cleanrl):
    torch.save(cleanrl.state_dict(), folder / "agent.pt")
    agent = raypatch.load_agent(folder, activation="tanh", agent_output="actor")
    assert list(agent.layers) == ["0", "2", "4"]
    assert_same_outputs(agent, cleanrl.actor, (4,))


def test_the_manifest_says_the_same_as_the_options(folder, cleanrl):
    torch.save(cleanrl.state_dict(), folder / "weights.pth")
    (folder / "agent.json").write_text(
        json.dumps({"file": "weights.pth", "activation": "tanh", "output": "actor"})
    )
    assert_same_outputs(raypatch.load_agent(folder), cleanrl.actor, (4,))


def test_a_factory_in_a_manifest_needs_consent(folder, cleanrl):
    torch.save(cleanrl.state_dict(), folder / "weights.pth")
    manifest = {"file": "weights.pth", "factory": "agent_code:build", "output": "actor"}
    (folder / "agent.json").write_text(json.dumps(manifest))
    with pytest.raises(AgentError, match="--trust_agent_code"):
        raypatch.load_agent(folder)
    agent = raypatch.load_agent(folder, trust_agent_code=True)
    assert_same_outputs(agent, cleanrl.actor, (4,))


def test_a_module_without_forward_asks_for_its_output_and_names_the_parts(folder, cleanrl):
    torch.save(cleanrl.state_dict(), folder / "agent.pt")
    with pytest.raises(AgentError, match="--agent_output, one of: critic, actor"):
        raypatch.load_agent(folder, agent_factory="agent_code:build")


@pytest.mark.parametrize(
    ("factory", "message"),
    [("agent_code", "module:function"), ("nowhere:build", "importing 'nowhere'"),
     ("agent_code:nothing", "no function 'nothing'"), ("agent_code:broken", "no such agent"),
     ("agent_code:CLEANRL", "no function"), ("builtins:dict", "gave dict, not a torch module"),
     ("agent_code:dueling", "does not fit")],
)  # fmt: skip
def test_a_factory_that_does_not_work_is_named(folder, cleanrl, factory, message):
    torch.save(cleanrl.state_dict(), folder / "agent.pt")
    with pytest.raises(InputError, match=message):
        raypatch.load_agent(folder, agent_factory=factory)


def test_safetensors_are_read_in_the_order_of_their_layers_numbers(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(12)]
    module = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
    save_file(module.state_dict(), tmp_path / "policy.safetensors")
    agent = raypatch.load_agent(tmp_path, activation="relu")
    assert list(agent.layers) == [str(2 * i) for i in range(12)]
    assert_same_outputs(agent, module, (6,))


def test_an_image_network_by_factory_takes_its_shape_from_the_inputs(folder):
    import agent_code

    torch.manual_seed(0)
    module = agent_code.Dueling()
    torch.save(module.state_dict(), folder / "agent.pt")
    with pytest.raises(AgentError, match="shape is unknown"):
        raypatch.load_agent(folder, agent_factory="agent_code:dueling")
    (folder / "activation_inputs").mkdir()
    inputs = {"a": {"input": np.zeros((1, 4, 4)).tolist()}}
    (folder / "activation_inputs" / "clean_inputs.json").write_text(json.dumps(inputs))
    agent = raypatch.load_agent(folder, agent_factory="agent_code:dueling")
    assert_same_outputs(agent, module, (1, 4, 4))


def test_a_pickled_module_needs_consent(folder, cleanrl):
    torch.save(cleanrl, folder / "agent.pt")
    with pytest.raises(AgentError, match="--trust_agent_code"):
        raypatch.load_agent(folder)
    agent = raypatch.load_agent(folder, trust_agent_code=True, agent_output="actor")
    assert_same_outputs(agent, cleanrl.actor, (4,))


def test_several_files_of_one_kind_are_listed_and_chosen_by_option(folder, cleanrl):
    for name in ("a.pt", "b.pt"):
        torch.save(cleanrl.state_dict(), folder / name)
    with pytest.raises(AgentError, match=r"a\.pt, b\.pt; choose with --agent_file"):
        raypatch.load_agent(folder, activation="tanh", agent_output="actor")
    raypatch.load_agent(folder, agent_file="b.pt", activation="tanh", agent_output="actor")


def test_the_first_kind_of_the_contracts_order_is_taken(folder, cleanrl):
    torch.save(cleanrl.state_dict(), folder / "a.pt")
    save_file(cleanrl.actor.state_dict(), folder / "b.safetensors")
    agent = raypatch.load_agent(folder, activation="tanh")
    assert "b.safetensors" in agent.loaded_as


def test_inspect_writes_a_manifest_that_loads_the_same(folder, cleanrl, command):
    torch.save(cleanrl.state_dict(), folder / "weights.pt")
    ended = command(
        "inspect", folder, "--activation", "tanh", "--agent_output", "actor", "--write_manifest"
    )
    assert ended.code == 0, ended.err
    assert json.loads((folder / "agent.json").read_text()) == {
        "file": "weights.pt", "activation": "tanh", "output": "actor",
    }  # fmt: skip
    assert_same_outputs(raypatch.load_agent(folder), cleanrl.actor, (4,))
    again = command("inspect", folder, "--write_manifest")
    assert again.code == 2 and "exists already" in again.err


def test_running_statistics_beside_an_agent_are_noticed_and_used_from_a_safe_form(tmp_path):
    import shutil

    from conftest import CARTPOLE

    folder = tmp_path / "zoo"
    (folder / "CartPole-v1").mkdir(parents=True)
    shutil.copy(CARTPOLE / "agent.zip", folder / "best_model.zip")
    plain = raypatch.load_agent(folder)
    assert plain.notes == ()
    (folder / "CartPole-v1" / "vecnormalize.pkl").write_bytes(b"never read")
    (note,) = raypatch.load_agent(folder).notes
    assert "observations were normalised" in note and "numpy.savez" in note
    mean, var = np.array([0.1, -0.2, 0.0, 0.4]), np.array([1.0, 4.0, 0.25, 9.0])
    np.savez(folder / "vecnormalize.npz", mean=mean, var=var, epsilon=1e-8, clip_obs=1.5)
    agent = raypatch.load_agent(folder)
    assert "are normalised with" in agent.notes[0]
    assert list(agent.layers) == list(plain.layers)
    x = torch.randn(50, 4) * 3
    normal = ((x - torch.tensor(mean)) / torch.tensor(var + 1e-8).sqrt()).clamp(-1.5, 1.5).float()
    with torch.no_grad():
        torch.testing.assert_close(agent.network(x), plain.network(normal))
    experiments = [{layer: [0]} for layer in agent.layers]
    found = raypatch.patch(agent.network, experiments, x[:5], x[5:10])
    truth = reference_outputs(agent.network, experiments, x[:5], x[5:10])
    np.testing.assert_allclose(found, truth, atol=1e-5)
    np.savez(folder / "vecnormalize.npz", mean=mean[:2], var=var)
    with pytest.raises(AgentError, match="mean has shape"):
        raypatch.load_agent(folder)


def test_an_old_policy_with_shared_layers_and_old_names_of_spaces_is_read(tmp_path):
    import base64

    state, torch_rng = {}, torch.Generator().manual_seed(0)
    shapes = {
        "mlp_extractor.shared_net.0": (6, 3), "mlp_extractor.policy_net.0": (5, 6),
        "mlp_extractor.value_net.0": (4, 6), "action_net": (2, 5), "value_net": (1, 4),
    }  # fmt: skip
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=torch_rng)
        state[f"{name}.bias"] = torch.randn(shape[0], generator=torch_rng)
    stream = io.BytesIO()
    torch.save(state, stream)
    name = b"cstable_baselines3.common.policies\nActorCriticPolicy\n."
    pickle_text = base64.b64encode(name).decode()
    data = {
        "policy_class": {":type:": "<class 'abc.ABCMeta'>", ":serialized:": pickle_text},
        "observation_space": {
            ":type:": "<class 'gym.spaces.box.Box'>", "dtype": "float32", "shape": [3],
            "low": "[-1. -1. -1.]", "high": "[1. 1. 1.]",
        },
        "action_space": {":type:": "<class 'gym.spaces.discrete.Discrete'>", "n": 2},
        "policy_kwargs": {},
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        archive.writestr("data", json.dumps(data))
        archive.writestr("policy.pth", stream.getvalue())
    agent = raypatch.load_agent(tmp_path)
    x = torch.randn(4, 3)
    hidden = x
    for layer in ("mlp_extractor.shared_net.0", "mlp_extractor.policy_net.0"):
        hidden = torch.tanh(hidden @ state[f"{layer}.weight"].T + state[f"{layer}.bias"])
    expected = hidden @ state["action_net.weight"].T + state["action_net.bias"]
    torch.testing.assert_close(agent.network(x), expected)


@pytest.mark.slow
def test_loading_a_large_checkpoint_costs_its_size_about_once(tmp_path):
    import subprocess

    size = 192 << 20
    state = {f"{2 * i}.weight": torch.zeros(4096, 4096) for i in range(3)}
    torch.save(state, tmp_path / "large.pt")
    program = (
        "import resource, sys, raypatch\n"
        "raypatch.load_agent(sys.argv[1], activation='relu')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "raypatch.load_agent(sys.argv[2], activation='relu')\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(LAVA), str(tmp_path)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(found.stdout) < 1.5 * size


def test_safetensors_in_an_order_that_would_be_guessed_are_refused(folder):
    def saved(**shapes):
        state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        save_file(state, folder / "policy.safetensors")

    saved(input=(16, 16), hidden=(16, 16), output=(4, 16))
    with pytest.raises(AgentError, match="several fit: hidden, input, output"):
        raypatch.load_agent(folder, activation="relu")
    saved(output=(4, 16), hidden=(16, 8), first=(8, 6))
    agent = raypatch.load_agent(folder, activation="relu")
    assert list(agent.layers) == ["first", "hidden", "output"]


@pytest.mark.parametrize("name", ["activation", "paths", "a.b"])
def test_a_layer_may_have_almost_any_name(folder, name):
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(8, 4), "a.weight": torch.randn(3, 8)}
    torch.save(state, folder / "policy.pt")
    agent = raypatch.load_agent(folder, activation="relu")
    assert list(agent.layers) == [name, "a"]
    x = torch.randn(5, 4)
    expected = torch.relu(x @ state[f"{name}.weight"].T) @ state["a.weight"].T
    torch.testing.assert_close(agent.network(x), expected)


@pytest.mark.parametrize("name", ["forward", "", "output_logits"])
def test_a_layer_with_a_name_that_means_something_else_is_refused(folder, name):
    torch.save({f"{name}.weight": torch.randn(3, 4)}, folder / "policy.pt")
    with pytest.raises(AgentError, match="name"):
        raypatch.load_agent(folder, activation="relu")


def test_an_input_that_the_network_fails_on_is_named(tmp_path, command):
    folder = tmp_path / "agent"
    (folder / "activation_inputs").mkdir(parents=True)
    (folder / "looks_up.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.e, self.o = nn.Embedding(9, 4), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.o(self.e(x.long()).flatten(1))\n"
    )
    network = nn.ModuleDict({"e": nn.Embedding(9, 4), "o": nn.Linear(8, 3)})
    torch.save(network.state_dict(), folder / "policy.pt")
    for side, last in (("clean", 8), ("corrupted", 9)):
        content = json.dumps({"a": [1, 2], "b": [3, 4], "c": [5, last]})
        (folder / "activation_inputs" / f"{side}_inputs.json").write_text(content)
    (tmp_path / "d.json").write_text('[{"o": [0]}]')
    ended = command(
        "run", "--agent_path", folder, "--agent_factory", "looks_up:Net", "--definition_file",
        tmp_path / "d.json", "--output_dir", tmp_path / "out", "--backend", "inline",
    )  # fmt: skip
    assert ended.code == 2 and not (tmp_path / "out").exists()
    assert "corrupted input 'c': the network fails on inputs of" in ended.err
