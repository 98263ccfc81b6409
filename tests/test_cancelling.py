"""What a low-rank update leaves where patches take nearly everything away: no rounding errors that
the next operation makes large."""

from __future__ import annotations

import pytest
import torch
from networks import mlp
from torch import nn
from torch.nn import functional as F

from raypatch import Patcher
from raypatch.engine.cancelling import Magnitudes
from raypatch.engine.reference import reference_outputs

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Through(nn.Module):
    """Few live units, and a function after the next layer that asks how much is left of them."""

    def __init__(self, after, off: float = 0.5) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 8, bias=False)
        self.o = nn.Linear(after(torch.ones(1, 8)).shape[1], 4)
        self.after, self.off = after, off

    def forward(self, x):
        return self.o(self.after(self.b(F.relu(self.a(x) - self.off))))


class Reduced(nn.Module):
    """The same of sums of the units themselves, of several groups of them side by side."""

    def __init__(self, after) -> None:
        super().__init__()
        self.a, self.o, self.after = nn.Linear(6, 12), nn.Linear(4, 3), after

    def forward(self, x):
        return self.o(self.after(self.a(x).view(-1, 4, 3)))


class OverPlaces(nn.Module):
    """A direction at every place of a map, after a convolution or a linear layer."""

    def __init__(self, mixing: nn.Module) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 1)
        self.b = mixing
        self.o = nn.Linear(16, 3)

    def forward(self, x):
        h = F.relu(self.a(x) - 0.8)
        if isinstance(self.b, nn.Linear):
            h = self.b(h.flatten(2).transpose(1, 2)).transpose(1, 2)
        else:
            h = self.b(h)
        return self.o(F.normalize(h, dim=1).flatten(1))


def direction(h):
    return F.normalize(h, dim=-1)


def length(h):
    return h.pow(2).sum(-1, keepdim=True).sqrt()


def logarithm(h):
    return torch.log(h.abs() + 1e-9)


def sign(h):
    return (h > 0).to(h.dtype)


def by_mean(h):
    return h / (h.abs().mean(-1, keepdim=True) + 1e-9)


NETWORKS = {
    **{f.__name__: lambda f=f: Through(f) for f in (direction, length, logarithm, sign, by_mean)},
    "layer_norm": lambda: Through(nn.LayerNorm(8, eps=1e-12)),
    "lengths": lambda: Reduced(lambda h: h.pow(2).sum(-1).sqrt()),
    "logarithms of means": lambda: Reduced(lambda h: torch.log(h.relu().mean(-1) + 1e-9)),
    "convolution": lambda: OverPlaces(nn.Conv2d(6, 4, 1, bias=False)),
    "linear over places": lambda: OverPlaces(nn.Linear(6, 4, bias=False)),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["pair", "zero"])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_made_of_rounding_errors_that_are_left(name, kind, dtype):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    shape = (2, 2, 2) if isinstance(network, OverPlaces) else (6,)
    source, target = torch.randn(2, 60, *shape)
    n = network.a.out_channels if shape[1:] else network.a.out_features
    experiments = [{"a": [j]} for j in range(n)] + [{"a": [j, j + 1]} for j in range(n - 1)]
    experiments += [{"a": list(range(j, j + 3))} for j in range(0, n, 3) if j + 3 <= n]
    found = Patcher(network, dtype=dtype)(experiments, source, target, kind=kind)
    expected = reference_outputs(network, experiments, source, target, kind=kind)
    # Where hooks themselves are at a jump, there is nothing to compare with.
    plain = reference_outputs(network, experiments, source, target, kind=kind, dtype=dtype)
    sure = (plain - expected).abs() <= TOLERANCE[dtype] * expected.abs().clamp(min=1)
    assert sure.float().mean() > 0.97
    error = (found - expected).abs() / expected.abs().clamp(min=1)
    assert float(error[sure].max()) <= 4 * TOLERANCE[dtype]


def test_a_value_that_drowns_all_others_leaves_them_whole_when_it_is_patched_away():
    network = mlp([3, 8, 8, 2], nn.ReLU)
    target = torch.tensor([[1e7, 0.3, -0.2], [1.0, 2.0, 3.0]])
    source = torch.tensor([[0.5, 0.3, -0.2], [1.5, 1.0, 2.0]])
    experiments = [{"0": [j]} for j in range(8)] + [{"0": "all"}, {"0": [0, 1]}]
    found = Patcher(network)(experiments, source, target)
    expected = reference_outputs(network, experiments, source, target)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_what_has_overflowed_is_finite_again_without_the_unit_that_did_it():
    network = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0)
    with torch.no_grad():
        network[0].weight[:2, 0] = torch.tensor([1.0, 1e-38])
        network[1].weight[0, :2] = torch.tensor([4.0, 1.0])
    target, source = torch.tensor([[3e38]]), torch.tensor([[0.0]])
    found = Patcher(network)([{"0": [0]}, {"0": [2]}], source, target)
    assert found.flatten().tolist() == pytest.approx([3.0, float("inf")])


def test_rows_are_computed_whole_only_where_little_would_be_left(monkeypatch):
    asked = []
    real = Magnitudes.emptied

    def emptied(*args):
        asked.append(real(*args))
        return asked[-1]

    monkeypatch.setattr(Magnitudes, "emptied", emptied)
    torch.manual_seed(0)
    source, target = torch.randn(2, 20, 6)
    experiments = [{"0": [j]} for j in range(16)]
    Patcher(mlp([6, 16, 16, 2], nn.ReLU))(experiments, source, target)
    assert asked == []  # no operation makes a large error of a small one
    network = Through(direction, off=-3.0)  # all units live
    run = Patcher(network).prepare(source, target)
    asked.clear()  # a trial patches noise
    run([{"a": [j]} for j in range(16)])
    assert asked and not any(rows is not None and rows.any() for rows in asked)


class OneLargeUnit(nn.Module):
    """A unit that outweighs all others, and a function that enlarges what is left without it."""

    def __init__(self, after, largest: float = 20.0, others: float = 0.01) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.after = after
        with torch.no_grad():
            self.a.weight.mul_(others)
            self.a.bias.mul_(others)[0] = largest
            self.b.bias.zero_()

    def forward(self, x):
        return self.o(self.after(self.b(F.relu(self.a(x)))))


def batch_norm_of_what_hardly_varies():
    norm = nn.BatchNorm1d(64)
    norm.running_var.fill_(1e-8)
    return norm


def large_weights():
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.mul_(300)
    return nn.Sequential(nn.Tanh(), layer)


def with_a_common_part(network):
    """Which hides how little is left of the rest."""
    with torch.no_grad():
        network.b.bias.fill_(1.0)
        network.b.weight.mul_(0.5)[:, 0] = 1.0 + 0.1 * torch.randn(64)
    return network


ENLARGING = {
    "factor": lambda: OneLargeUnit(lambda h: torch.tanh(h * 100)),
    "factor first": lambda: OneLargeUnit(lambda h: torch.tanh(100 * h)),
    "factors": lambda: OneLargeUnit(lambda h: torch.tanh(torch.full((64,), 100.0) * h)),
    "divisor": lambda: OneLargeUnit(lambda h: torch.tanh(h / 0.01)),
    "batch norm": lambda: OneLargeUnit(batch_norm_of_what_hardly_varies()),
    "weights": lambda: OneLargeUnit(large_weights()),
    "written out": lambda: OneLargeUnit(
        lambda h: torch.tanh(torch.tanh(h) @ (100 * torch.eye(64)))
    ),
    "vector": lambda: OneLargeUnit(
        lambda h: torch.tanh(torch.tanh(h) @ torch.full((64,), 100.0))[:, None].repeat(1, 64)
    ),
    "named": lambda: OneLargeUnit(lambda h: torch.tanh(torch.mul(h, other=100.0))),
    "named divisor": lambda: OneLargeUnit(lambda h: torch.tanh(torch.div(h, other=0.01))),
    "alpha": lambda: OneLargeUnit(lambda h: torch.tanh(torch.add(h[:, :1], h, alpha=100.0))),
    "lerp": lambda: OneLargeUnit(lambda h: torch.tanh(torch.lerp(h[:, :1], h, 100.0))),
    "batch norm function": lambda: OneLargeUnit(
        lambda h: F.batch_norm(h, torch.zeros(64), torch.full((64,), 1e-8))
    ),
    "slope": lambda: OneLargeUnit(nn.Sequential(nn.PReLU(init=100.0), nn.Tanh())),
    "slope function": lambda: OneLargeUnit(lambda h: torch.tanh(F.leaky_relu(h, 100.0))),
    "sum": lambda: OneLargeUnit(lambda h: torch.tanh(torch.stack([h] * 400, 1).sum(1))),
    "no number among them": lambda: OneLargeUnit(
        lambda h: torch.nan_to_num(
            torch.tanh(h * torch.tensor([torch.nan, *[100.0] * 63])), nan=0.0
        )
    ),
    "layer norm": lambda: with_a_common_part(OneLargeUnit(nn.LayerNorm(64), 12.0, 0.5)),
}


@pytest.mark.parametrize("name", ENLARGING)
def test_what_enlarges_errors_enlarges_those_of_plain_float32_only(name):
    torch.manual_seed(0)
    network, target = ENLARGING[name]().eval(), torch.randn(32, 8)
    experiments = [{"a": [0]}, {"a": [1]}, {"a": [0, 2]}]
    found = Patcher(network)(experiments, target=target, kind="zero")
    expected, plain = (
        reference_outputs(network, experiments, None, target, kind="zero", dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    size = expected.abs().clamp(min=1)
    of_ours, of_plain = (((x - expected).abs() / size).amax((1, 2)) for x in (found, plain))
    assert (of_ours <= 4 * of_plain + 1e-6).all()


@pytest.mark.parametrize(
    ("after", "is_gentle"),
    [
        (nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.Softmax(-1)), True),
        (lambda h: torch.tanh(h) / 2, True),
        (lambda h: torch.div(h, 2, rounding_mode="floor"), False),
        (lambda h: h / h.sum(-1, keepdim=True), False),
        (lambda h: 2 / h, False),
        (lambda h: h.to(torch.int64).to(h.dtype), False),
        (lambda h: h.max(-1, keepdim=True)[1].to(h.dtype), False),
        (nn.LayerNorm(8), False),
        (lambda h: h * (h > 0), False),
    ],
)
def test_operations_that_jump_or_divide_are_not_taken_for_gentle(after, is_gentle):
    run = Patcher(Through(after)).prepare(torch.randn(4, 6), torch.randn(4, 6))
    (group,) = run.plan([{"a": [0]}]).groups
    assert (run._prepare(0).program(group).gain < torch.inf) is is_gentle


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_whose_weights_are_made_by_hooks_of_torchs_own_are_captured(norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), norm(nn.Linear(8, 8)), nn.LayerNorm(8))
    network.append(norm(nn.Linear(8, 2))).eval()
    source, target = torch.randn(2, 5, 6)
    experiments = [{"0": [j]} for j in range(8)] + [{"2": [3]}, {"0": [1, 2]}]
    patcher = Patcher(network)
    found = patcher(experiments, source, target)
    assert patcher.path.startswith("incremental (torch.fx)")
    expected = reference_outputs(network, experiments, source, target)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_layers_are_captured_and_cancel_as_others_do():
    class Modulus(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 6).to(torch.complex64)
            self.b = nn.Linear(6, 5, bias=False).to(torch.complex64)
            self.o = nn.Linear(5, 3)

        def forward(self, x):
            h = self.a(x.to(self.a.weight.dtype))
            return self.o(F.normalize(self.b(h * (h.real > 0.4)).abs(), dim=-1))

    torch.manual_seed(0)
    network, (source, target) = Modulus(), torch.randn(2, 40, 4)
    experiments = [{"a": [j]} for j in range(6)] + [{"a": [j, j + 1]} for j in range(5)]
    for kind in ("pair", "zero"):
        patcher = Patcher(network)
        found = patcher(experiments, source, target, kind=kind)
        assert patcher.path == "incremental (torch.fx)"
        expected = reference_outputs(network, experiments, source, target, kind=kind)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
