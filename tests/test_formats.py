"""Agents as plain PyTorch saves them: every format gives the module's own outputs and layers."""

from __future__ import annotations

import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import LAVA
from safetensors.torch import save_file
from torch import nn

import raypatch
from raypatch.agents.activations import ACTIVATIONS
from raypatch.engine.reference import reference_outputs
from raypatch.errors import AgentError

pytestmark = pytest.mark.filterwarnings("ignore")

CLEANRL = """
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

class Dueling(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten())
        self.value, self.advantage = nn.Linear(12, 1), nn.Linear(12, 3)

    def forward(self, obs):
        x = self.body(obs)
        a = self.advantage(x)
        return self.value(x) + a - a.mean(1, keepdim=True)

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


def assert_same_outputs(agent, module, shape, n=9):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(agent.network(x), module(x), rtol=1e-5, atol=1e-6)
    experiments = [{layer: [0]} for layer in agent.layers] + [{"output_logits": [1]}]
    found = raypatch.patch(agent.network, experiments, x[:4], x[4:8])
    truth = reference_outputs(agent.network, experiments, x[:4], x[4:8])
    np.testing.assert_allclose(found, truth, atol=1e-5)
    return found, x


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
    with pytest.raises(AgentError, match=message):
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


def exported(module, obs, path):
    free = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(module, (obs,), dynamic_shapes=free), path)


def test_an_exported_program_runs_as_it_is_with_its_layers_names(folder):
    import agent_code

    torch.manual_seed(0)
    module = agent_code.Dueling().eval()
    exported(module, torch.randn(2, 1, 4, 4), folder / "agent.pt2")
    agent = raypatch.load_agent(folder)
    assert list(agent.layers) == ["body.0", "advantage", "value"]
    found, x = assert_same_outputs(agent, module, (1, 4, 4))
    truth = reference_outputs(module, [{"body.0": [0]}], x[:4], x[4:8])
    np.testing.assert_allclose(found[:1], truth, atol=1e-5)


class Everything(nn.Module):
    """Parts that export as in-place, symbolic, tuple-valued and constant operations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 2, padding=1, groups=2)
        self.out = nn.Linear(64, 5)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        h = torch.relu_(self.norm(self.conv(x * self.scale)))
        h = nn.functional.max_pool2d(self.mix(h), 2, 1).view(x.shape[0], -1)
        a, b = h.chunk(2, 1)
        h = torch.cat([a * torch.sigmoid(b), nn.functional.gelu(b, approximate="tanh")], 1)
        return self.out(nn.functional.dropout(h, training=self.training)) + torch.arange(5) / 7


def older_layout(path):
    """The archive as torch wrote it before: one file of each kind."""
    with zipfile.ZipFile(path) as archive:
        members = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    states = []
    for folder in ("weights", "constants"):
        config = json.loads(members[f"data/{folder}/model_{folder}_config.json"])["config"]
        states.append(
            {
                name: torch.frombuffer(
                    bytearray(members[f"data/{folder}/{entry['path_name']}"]),
                    dtype=torch.int64 if entry["tensor_meta"]["dtype"] == 5 else torch.float32,
                ).reshape([n["as_int"] for n in entry["tensor_meta"]["sizes"]])
                for name, entry in config.items()
            }
        )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", members["models/model.json"])
        for name, state in zip(("state_dict", "constants"), states):
            stream = io.BytesIO()
            torch.save(state, stream)
            archive.writestr(f"serialized_{name}.pt", stream.getvalue())
        archive.writestr("version", "8.8")


@pytest.mark.parametrize("layout", ["new", "old"])
def test_an_exported_program_of_many_kinds_of_operation_gives_the_modules_outputs(folder, layout):
    torch.manual_seed(0)
    module = Everything().eval()
    exported(module, torch.randn(2, 2, 10, 10), folder / "agent.pt2")
    if layout == "old":
        older_layout(folder / "agent.pt2")
    agent = raypatch.load_agent(folder)
    assert list(agent.layers) == ["conv", "mix", "out"]
    assert_same_outputs(agent, module, (2, 10, 10))


def test_a_program_of_an_unknown_format_names_the_torch_that_wrote_it(folder, cleanrl):
    exported(cleanrl.actor, torch.randn(2, 4), folder / "agent.pt2")
    with zipfile.ZipFile(folder / "agent.pt2") as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(folder / "agent.pt2", "w") as archive:
        for name, content in members.items():
            if name.endswith("model.json"):
                model = json.loads(content) | {"torch_version": "9.1"}
                model["schema_version"]["major"] = 9
                content = json.dumps(model).encode()
            archive.writestr(name, content)
    with pytest.raises(AgentError, match="saved by torch 9.1"):
        raypatch.load_agent(folder)


def test_a_program_exported_for_one_batch_size_is_refused_with_the_way_out(folder, cleanrl):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor = cleanrl.actor

        def forward(self, obs):
            return self.actor(obs.reshape(obs.shape[0], 4) * 1.0)

    program = torch.export.export(Fixed(), (torch.randn(1, 2, 2),))
    torch.export.save(program, folder / "agent.pt2")
    with pytest.raises(AgentError, match="free batch dimension"):
        raypatch.load_agent(folder)


def test_a_scripted_and_a_traced_chain_are_rebuilt(tmp_path, cleanrl):
    for name, script in (
        ("scripted", torch.jit.script(cleanrl.actor)),
        ("traced", torch.jit.trace(cleanrl.actor, torch.randn(1, 4))),
    ):
        path = tmp_path / name
        path.mkdir()
        script.save(path / "policy.ts")
        agent = raypatch.load_agent(path)
        assert list(agent.layers) == ["0", "2", "4"]
        assert_same_outputs(agent, cleanrl.actor, (4,))


def test_the_example_agents_script_equals_its_state_dict(tmp_path):
    path = tmp_path / "agent"
    path.mkdir()
    (path / "q_net.pt").write_bytes((LAVA / "q_net.ts").read_bytes())  # by content, not suffix
    agent, other = raypatch.load_agent(path), raypatch.load_agent(LAVA)
    assert list(agent.layers) == list(other.layers)
    assert_same_outputs(agent, other.network, (151,))


def test_a_script_whose_layers_do_not_follow_one_another_points_to_export(tmp_path, folder):
    import agent_code

    script = torch.jit.trace(agent_code.Dueling(), torch.randn(1, 1, 4, 4))
    script.save(tmp_path / "policy.ts")
    with pytest.raises(AgentError, match=r"no layer known here .*torch\.export\.save"):
        raypatch.load_agent(tmp_path)


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.two(self.one(x))


class Clipped(nn.Module):
    """What it does to large observations shows on no small one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.net(nn.functional.hardtanh(x, -500.0, 500.0))


class Linear(nn.Linear):
    def forward(self, x):
        return nn.functional.relu(super().forward(x))


class Twice(nn.Tanh):
    def forward(self, x):
        return torch.tanh(torch.tanh(x))


Twice.__name__ = "Tanh"


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize(
    "layer",
    [nn.LeakyReLU(0.2), nn.ELU(2.0), nn.Hardtanh(-10.0, 10.0), nn.Softplus(2), nn.GELU("tanh")],
)
def test_a_layer_with_options_of_its_own_is_not_taken_for_one_without(tmp_path, layer, scripted):
    module = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2)).eval()
    script = torch.jit.script(module) if scripted else torch.jit.trace(module, torch.randn(1, 4))
    script.save(tmp_path / "policy.ts")
    with pytest.raises(AgentError, match="has options of its own"):
        raypatch.load_agent(tmp_path)


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("kind", sorted({k.__name__: k for k in ACTIVATIONS.values()}))
def test_every_known_activation_in_a_script_is_rebuilt(tmp_path, kind, scripted):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), getattr(nn, kind)(), nn.Linear(4, 2)).eval()
    script = torch.jit.script(module) if scripted else torch.jit.trace(module, torch.randn(1, 4))
    script.save(tmp_path / "policy.ts")
    assert_same_outputs(raypatch.load_agent(tmp_path), module, (4,))


def test_a_script_is_never_run(tmp_path):
    """Its code may believe that its objects are what they are not, which torch does not check."""
    module = nn.Sequential(nn.Linear(4, 2))
    torch.jit.script(module).save(tmp_path / "good")
    with (
        zipfile.ZipFile(tmp_path / "good") as old,
        zipfile.ZipFile(tmp_path / "policy.ts", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("linear.py"):
                line = b"    weight = self.weight\n"
                assert line in content
                content = content.replace(line, b'    ops.prim.RaiseException("run")\n' + line)
            new.writestr(name, content)
    (tmp_path / "good").unlink()
    assert list(raypatch.load_agent(tmp_path).layers) == ["0"]


@pytest.mark.parametrize(
    "module",
    [
        Skip(),
        Clipped(),
        nn.Sequential(Linear(4, 2), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 2), Twice()),
    ],
)
def test_a_script_that_does_more_than_call_its_layers_is_not_believed(tmp_path, module):
    torch.jit.trace(module, torch.randn(1, 4)).save(tmp_path / "policy.ts")
    with pytest.raises(
        AgentError, match="one after another|uses relu|no layer known here needs|more than one"
    ):
        raypatch.load_agent(tmp_path)


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
    import io
    import zipfile

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


class TwoBiases(nn.Module):
    """One weight in two operations, which cannot be one layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)
        self.other = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.two(self.one(x) * nn.functional.linear(x, self.one.weight, self.other))


class Nested(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return super().forward(torch.tanh(self.inner(x)))


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        bias = self.two.weight.sum(0)
        return self.two(nn.functional.linear(x, self.one.weight, bias))


@pytest.mark.parametrize("module", [TwoBiases, Nested, Computed])
def test_a_program_taken_apart_into_layers_gives_its_own_outputs(folder, module):
    torch.manual_seed(0)
    module = module().eval()
    exported(module, torch.randn(2, 4), folder / "agent.pt2")
    assert_same_outputs(raypatch.load_agent(folder), module, (4,))


def test_an_exported_program_is_swept_through_its_files(folder, run_inline, tmp_path):
    torch.manual_seed(0)
    exported(Everything().eval(), torch.randn(2, 2, 10, 10), folder / "agent.pt2")
    (folder / "activation_inputs").mkdir()
    for side in ("clean", "corrupted"):
        path = folder / "activation_inputs" / f"{side}_inputs.npz"
        np.savez(path, ids=["a", "b"], inputs=np.random.rand(2, 2, 10, 10).astype(np.float32))
    (tmp_path / "d.json").write_text('[{"conv": [1]}, {"mix": "all"}, {"out": [0]}]')
    results = raypatch.open_results(
        run_inline(
            folder, tmp_path / "d.json",
            *(f"--{side}_inputs={folder}/activation_inputs/{side}_inputs.npz"
              for side in ("clean", "corrupted")),
        )
    )  # fmt: skip
    assert results.complete and results.sweep["agent"]["engine"].startswith("incremental")


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
