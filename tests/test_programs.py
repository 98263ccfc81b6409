"""Exported programs and TorchScript: taken apart into layers, they give the module's own outputs."""

from __future__ import annotations

import io
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from agent_files import Dueling, assert_same_outputs, exported
from conftest import LAVA
from torch import nn

import raypatch
from raypatch.agents.activations import ACTIVATIONS
from raypatch.engine.reference import reference_outputs
from raypatch.errors import AgentError

pytestmark = pytest.mark.filterwarnings("ignore")


def actor():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def test_an_exported_program_runs_as_it_is_with_its_layers_names(folder):
    torch.manual_seed(0)
    module = Dueling().eval()
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


def test_a_program_of_an_unknown_format_names_the_torch_that_wrote_it(folder):
    exported(actor(), torch.randn(2, 4), folder / "agent.pt2")
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


def test_a_program_exported_for_one_batch_size_is_refused_with_the_way_out(folder):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor = actor()

        def forward(self, obs):
            return self.actor(obs.reshape(obs.shape[0], 4) * 1.0)

    program = torch.export.export(Fixed(), (torch.randn(1, 2, 2),))
    torch.export.save(program, folder / "agent.pt2")
    with pytest.raises(AgentError, match="free batch dimension"):
        raypatch.load_agent(folder)


def test_a_scripted_and_a_traced_chain_are_rebuilt(tmp_path):
    for name, script in (
        ("scripted", torch.jit.script(actor())),
        ("traced", torch.jit.trace(actor(), torch.randn(1, 4))),
    ):
        path = tmp_path / name
        path.mkdir()
        script.save(path / "policy.ts")
        agent = raypatch.load_agent(path)
        assert list(agent.layers) == ["0", "2", "4"]
        assert_same_outputs(agent, actor(), (4,))


def test_the_example_agents_script_equals_its_state_dict(tmp_path):
    path = tmp_path / "agent"
    path.mkdir()
    (path / "q_net.pt").write_bytes((LAVA / "q_net.ts").read_bytes())  # by content, not suffix
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, that such files are of the past, is no user's
        agent = raypatch.load_agent(path)
    other = raypatch.load_agent(LAVA)
    assert list(agent.layers) == list(other.layers)
    assert_same_outputs(agent, other.network, (151,))


def test_a_script_whose_layers_do_not_follow_one_another_points_to_export(tmp_path, folder):
    script = torch.jit.trace(Dueling(), torch.randn(1, 1, 4, 4))
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
    line, changed = b"    weight = self.weight\n", 0
    with (
        zipfile.ZipFile(tmp_path / "good") as old,
        zipfile.ZipFile(tmp_path / "policy.ts", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            changed += line in content
            new.writestr(
                name, content.replace(line, b'    ops.prim.RaiseException("run")\n' + line)
            )
    (tmp_path / "good").unlink()
    assert changed == 1
    with pytest.raises(torch.jit.Error, match="run"):
        torch.jit.load(tmp_path / "policy.ts")(torch.zeros(1, 4))
    with pytest.raises(AgentError, match="cannot be rebuilt: 0, a Linear, does more than one"):
        raypatch.load_agent(tmp_path)


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
