"""Networks written in ways that invite a wrong answer: the right one, whatever the path."""

from __future__ import annotations

import pytest
import torch
from networks import NotTraced
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from raypatch.engine import trial
from raypatch.engine.graph import CaptureError
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs

EXPERIMENTS = [{"a": [0]}, {"a": [1, 2]}, {"a": "all"}]


class Two(nn.Module):
    """Two layers around what a subclass does."""

    def __init__(self, width=6, hidden=8):
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class InPlaceBeforeResidual(Two):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True))

    def forward(self, x):
        h = self.a(x)
        return self.b(h + self.body(h))


class ChangesItsInput(Two):
    def forward(self, x):
        x /= 2.0
        return super().forward(x)


class InPlaceOnInput(Two):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return super().forward(self.act(x))


class CastsInput(Two):
    def forward(self, x):
        return super().forward(x.float() / 255)


class CastsInTheMiddle(Two):
    def forward(self, x):
        return self.b(torch.relu(self.a(x)).to(torch.float32))


class OneHot(Two):
    def forward(self, x):
        return super().forward(F.one_hot(x[:, 0].abs().long().clamp(0, 5), 6).float())


class ComputedSlice(Two):
    def __init__(self):
        super().__init__(hidden=16)

    def forward(self, x):
        h = self.a(x)
        half = h.shape[1] // 2
        return self.b(torch.tanh(h[:, :half]) + h[:, half:])


class AliasedResidual(Two):
    """Dropout gives its input back in evaluation: two readers of one value."""

    def __init__(self):
        super().__init__()
        self.z, self.drop, self.act = nn.Linear(8, 8), nn.Dropout(), nn.ReLU()

    def forward(self, x):
        h = self.z(torch.relu(self.a(x)))
        return self.b(h + self.act(self.drop(h)))


class OddPool(Two):
    """A pool over [inputs, features] takes the inputs for channels."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool1d(3, 1, 1)

    def forward(self, x):
        return self.b(self.pool(torch.relu(self.a(x))))


class Positions(nn.Module):
    """Layer ``pos`` does not see the observation."""

    def __init__(self):
        super().__init__()
        self.a, self.pos, self.head = nn.Linear(2, 8), nn.Embedding(3, 8), nn.Linear(24, 3)
        self.register_buffer("places", torch.arange(3)[None])

    def forward(self, x):
        h = self.a(x.view(-1, 3, 2)) + self.pos(self.places)
        return self.head(torch.relu(h).flatten(1))


class Squeezes(Two):
    """Gives ``[outputs]``, without the inputs' axis, for a lone input."""

    def forward(self, x):
        return self.b(torch.relu(self.a(x).unsqueeze(2)).squeeze()).squeeze(0)


class SqueezesAndAsksForForm(NotTraced, Squeezes):
    pass


class SqueezesAndReadsValues(Squeezes):
    def forward(self, x):
        return super().forward(x if x.sum().item() < 100 else -x)


class MixesInputs(Two):
    def forward(self, x):
        h = self.a(x)
        return self.b(torch.relu(h - h.mean(0, keepdim=True)))


class AsksForLength(Two):
    def forward(self, x):
        h = torch.cat([self.a(x), x.new_ones(len(x), 1)], 1)
        return self.b(h.view(len(x), 3, 3).tanh().flatten(1)[:, :8])


class AsksForLengthAndForm(NotTraced, AsksForLength):
    pass


AWKWARD = [
    InPlaceBeforeResidual, ChangesItsInput, InPlaceOnInput, CastsInput, CastsInTheMiddle, OneHot,
    ComputedSlice, AliasedResidual, OddPool, Positions, MixesInputs, AsksForLength,
    AsksForLengthAndForm, Squeezes, SqueezesAndAsksForForm, SqueezesAndReadsValues,
]  # fmt: skip


def targets() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "different": torch.randn(4, 6, generator=generator),
        "equal": torch.randn(1, 6, generator=generator).repeat(4, 1),
        "zero": torch.zeros(4, 6),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["different", "equal", "zero"])
@pytest.mark.parametrize("network", AWKWARD)
def test_patched_outputs_are_those_of_plain_hooks(network, which, dtype):
    torch.manual_seed(0)
    module = network().eval()
    source, target = torch.randn(4, 6), targets()[which]
    experiments = [*EXPERIMENTS, *([{"pos": [0]}] if network is Positions else [])]
    for kind in ("pair", "zero"):
        expected = reference_outputs(module, experiments, source, target, kind=kind)
        patcher = Patcher(module, dtype=dtype)
        found = patcher(experiments, source.clone(), target.clone(), kind=kind)
        tolerance = 1e-5 if dtype is torch.float32 else 1e-10
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("network", AWKWARD)
def test_the_baseline_is_the_networks_own_output_and_nothing_of_the_callers_changes(network):
    torch.manual_seed(0)
    module = network().eval()
    source, target = torch.randn(4, 6), torch.randn(4, 6)
    kept = (source.clone(), target.clone())
    run = Patcher(module).prepare(source, target)
    run(EXPERIMENTS)
    reference_outputs(module, EXPERIMENTS, source, target)
    assert torch.equal(source, kept[0]) and torch.equal(target, kept[1])
    with torch.no_grad():
        torch.testing.assert_close(run.baseline, module(target.clone()))


def test_a_layer_that_sees_no_input_is_patched_incrementally():
    torch.manual_seed(0)
    module, target = Positions().eval(), torch.randn(4, 6)
    patcher = Patcher(module)
    found = patcher([{"pos": [0]}, {"pos": "all", "a": [1]}], target=target, kind="zero")
    assert patcher.path == "incremental (torch.fx)"
    assert (found[0] != patcher.prepare(target=target, kind="zero").baseline).any()


def test_stacked_hooks_patch_a_layer_that_sees_no_input(monkeypatch):
    def fail(*_):
        raise CaptureError("not today")

    monkeypatch.setattr(trial, "capture", fail)
    monkeypatch.setattr(trial, "capture_export", fail)
    torch.manual_seed(0)
    module, target = Positions().eval(), torch.randn(4, 6)
    experiments = [{"pos": [i]} for i in range(8)] + [{"pos": "all", "a": [1]}]
    patcher = Patcher(module)
    found = patcher(experiments, target=target, kind="zero")
    assert patcher.path.startswith("stacked")
    expected = reference_outputs(module, experiments, None, target, kind="zero")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_parametrised_layer_keeps_its_name_and_neurons():
    torch.manual_seed(0)
    network = nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)).eval()
    source, target = torch.randn(3, 6), torch.randn(3, 6)
    patcher = Patcher(network)
    found = patcher([{"0": [1]}], source, target)
    assert patcher.neuron_counts == {"0": 8, "2": 3} and patcher.path.startswith("incremental")
    expected = reference_outputs(network, [{"0": [1]}], source, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_network_that_mixes_its_inputs_is_not_cut_to_fit_into_memory():
    torch.manual_seed(0)
    network = MixesInputs().eval()
    source, target = torch.randn(40, 6), torch.randn(40, 6)
    found = Patcher(network, memory_bytes=20_000)(EXPERIMENTS, source, target)
    expected = reference_outputs(network, EXPERIMENTS, source, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_network_that_cannot_run_on_one_input_is_patched_all_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    source, target = torch.randn(4, 6), torch.randn(4, 6)
    found = Patcher(network)([{"0": [1]}], source, target)
    expected = reference_outputs(network, [{"0": [1]}], source, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pair", "zero", "mean"])
@pytest.mark.parametrize(
    "network, how",
    [
        (Squeezes, "incremental (torch.fx"),
        (SqueezesAndAsksForForm, "incremental (torch.export"),
        (SqueezesAndReadsValues, "single"),
    ],
)
def test_a_lone_input_whose_axis_the_network_squeezes_away_is_patched_like_several(
    network, how, kind
):
    torch.manual_seed(0)
    module = network().eval()
    patcher = Patcher(module, dtype=torch.float64)
    source = torch.randn(3, 6) if kind == "pair" else None
    target = torch.randn(3, 6)
    several = patcher(EXPERIMENTS, source, target, kind=kind)
    lone = None if source is None else source[:1]
    found = patcher(EXPERIMENTS, lone, target[:1], kind=kind)
    expected = reference_outputs(module, EXPERIMENTS, lone, target[:1], kind=kind)
    assert patcher.path.startswith(how) and found.shape[1] == 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if kind != "mean":  # which depends on the others
        torch.testing.assert_close(found, several[:, :1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6])
def test_a_dominating_neuron_is_taken_away_without_losing_digits(scale):
    """A feature like a step counter that one neuron sees; what is left is small beside it."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    with torch.no_grad():
        network[0].weight[:, 5] = 0
        network[0].weight[0, 5] = 1
    source, target = torch.randn(4, 6), torch.randn(4, 6)
    source[:, 5], target[:, 5] = 0, scale
    experiments = [{"0": [0]}, {"0": [0, 3]}, {"0": [5]}]
    expected = reference_outputs(network, experiments, source, target)
    found = Patcher(network)(experiments, source, target)
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) <= 1e-5


class OnEveryStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = self.a(x)
        h = torch.relu(h + h.mean(-1, keepdim=True))
        return self.c(torch.relu(self.b(h)).mean(1))


@pytest.mark.parametrize("kept", [(0,), (0, 1)])
def test_dominating_neurons_are_taken_away_together_and_on_sequences(kept):
    torch.manual_seed(0)
    network = OnEveryStep()
    with torch.no_grad():
        network.a.weight[:, 5] = 0
        network.a.weight[list(kept), 5] = 1 / len(kept)
    source, target = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    source[..., 5], target[..., 5] = 0, 1e4
    experiments = [{"a": [0]}, {"a": list(kept)}, {"a": [*kept, 2]}]
    expected = reference_outputs(network, experiments, source, target)
    found = Patcher(network)(experiments, source, target)
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) <= 1e-5


@pytest.mark.parametrize(
    ("network", "how"), [(AsksForLength, "fx"), (AsksForLengthAndForm, "export")]
)
def test_the_length_of_a_value_is_followed_and_the_users_module_is_left_as_it_was(network, how):
    patcher = Patcher(network().eval())
    patcher.prepare(torch.randn(4, 6), torch.randn(4, 6))
    assert patcher.path.startswith(f"incremental (torch.{how}")
    assert "len" not in globals()
