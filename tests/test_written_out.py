"""Layers written out as functions are evaluated as modules are, whoever wrote them."""

from __future__ import annotations

import pytest
import torch
from networks import NotTraced, checked_patcher
from torch import nn
from torch.nn import functional as F

from raypatch.engine.identity import network_digest
from raypatch.engine.patcher import Patcher


class Noisy(nn.Module):
    """A noisy layer (Fortunato et al. 2018), in evaluation without its noise."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight_mu = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)
        self.weight_sigma = nn.Parameter(torch.rand(n_out, n_in))
        self.bias_mu = nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        if self.training:
            noise = torch.randn_like(self.weight_sigma)
            return F.linear(x, self.weight_mu + self.weight_sigma * noise, self.bias_mu)
        return F.linear(x, self.weight_mu, self.bias_mu)


class Masked(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.register_buffer("mask", (torch.rand(n_out, n_in) > 0.3).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, bias=self.bias)


class Written(nn.Module):
    """A layer whose forward is ``form`` of itself and its input."""

    def __init__(self, form, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) / 3)
        self.bias, self.form = nn.Parameter(torch.randn(shape[0])), form

    def forward(self, x):
        return self.form(self, x)


LINEAR = {
    "F.linear": lambda own, x: F.linear(x, own.weight, own.bias),
    "no bias": lambda own, x: F.linear(x, own.weight, bias=None),
    "@": lambda own, x: x @ own.weight.T + own.bias,
    "matmul": lambda own, x: torch.matmul(x, own.weight.t()),
    "mm": lambda own, x: x.mm(own.weight.transpose(0, 1)),
    "addmm": lambda own, x: torch.addmm(own.bias, x, own.weight.t()),
    "by names": lambda own, x: F.linear(input=x, weight=own.weight, bias=own.bias),
    "halved": lambda own, x: F.linear(x, (own.weight + own.weight.abs()) / 2, own.bias * 2),
}  # fmt: skip
KEPT = {
    "einsum": lambda own, x: torch.einsum("bi,oi->bo", x, own.weight),
    "addmm, scaled": lambda own, x: torch.addmm(own.bias, x, own.weight.t(), alpha=0.5),
    "by the input": lambda own, x: F.linear(x, own.weight, own.bias) * x.mean(1, keepdim=True),
}


class Network(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), make(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.tanh(self.first(x)))))


class OwnWeights(nn.Module):
    """No layer of its own at all but the first: weights that the network holds itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return self.last(torch.relu(torch.tanh(self.first(x)) @ self.weight))


class Functional(NotTraced, OwnWeights):
    pass


def _low_rank(patcher):
    """Kinds of the modules that add a low-rank update where the first layer is patched."""
    steps = patcher._engine.structure.program((("first", 1),), source_runs=True).steps
    return [type(step.node.target) for step in steps if step.spread is not None]


@pytest.mark.parametrize("name", LINEAR)
def test_a_layer_of_the_users_own_is_updated_as_a_linear_layer_is(name):
    torch.manual_seed(0)
    patcher = checked_patcher(Network(lambda: Written(LINEAR[name], 8, 8)), (6,))
    assert patcher.path == "incremental (torch.fx)" and _low_rank(patcher) == [nn.Linear]
    assert list(patcher.layers) == ["first", "second", "last"]
    assert patcher.layers["second"].kind == "Written"


@pytest.mark.parametrize("kind", [Noisy, Masked])
def test_noisy_and_masked_layers_are_updated_as_a_linear_layer_is(kind):
    torch.manual_seed(0)
    patcher = checked_patcher(Network(lambda: kind(8, 8)), (6,))
    assert patcher.path == "incremental (torch.fx)" and _low_rank(patcher) == [nn.Linear]


def test_a_product_with_the_networks_own_weight_is_one_too_also_exported():
    torch.manual_seed(0)
    patcher = checked_patcher(Functional(), (6,))
    assert patcher.path.startswith("incremental (torch.export")
    assert _low_rank(patcher) == [nn.Linear]


@pytest.mark.parametrize(
    "form",
    [
        lambda own, x: F.conv1d(x, own.weight, own.bias, 2, padding=1),
        lambda own, x: F.conv1d(x, own.weight, stride=(1,), padding="same", dilation=2),
    ],
)
def test_a_convolution_written_out_is_updated_as_a_convolution_is(form):
    torch.manual_seed(0)

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(2, 8, 3), Written(form, 4, 8, 3)
            self.last = nn.LazyLinear(3)

        def forward(self, x):
            return self.last(self.second(self.first(x).relu()).flatten(1))

    network = Maps().eval()
    network(torch.zeros(1, 2, 9))
    patcher = checked_patcher(network, (2, 9))
    assert patcher.path == "incremental (torch.fx)" and _low_rank(patcher) == [nn.Conv1d]


@pytest.mark.parametrize("name", KEPT)
def test_other_forms_run_as_they_are(name):
    torch.manual_seed(0)
    patcher = checked_patcher(Network(lambda: Written(KEPT[name], 8, 8)), (6,))
    assert patcher.path == "incremental (torch.fx)"


def test_a_layer_that_cannot_be_looked_into_is_one_operation():
    def form(own, x):
        x = x if x.shape[1] == 8 else x[:, :8]  # symbolic tracing cannot follow
        return F.linear(x, own.weight, own.bias)

    torch.manual_seed(0)
    patcher = checked_patcher(Network(lambda: Written(form, 8, 8)), (6,))
    assert patcher.path == "incremental (torch.fx)" and _low_rank(patcher) == []


def test_networks_that_differ_in_which_weight_they_use_are_not_the_same():
    class Either(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.first, self.name = nn.Linear(6, 8), name
            self.one, self.two = (nn.Parameter(torch.randn(3, 8)) for _ in range(2))

        def forward(self, x):
            return F.linear(self.first(x), getattr(self, self.name))

    one, two = Either("one").eval(), Either("two").eval()
    two.load_state_dict(one.state_dict())
    patchers = [Patcher(network) for network in (one, two, one)]
    for patcher in patchers:
        patcher.prepare(torch.zeros(3, 6), torch.zeros(3, 6))
        assert type(patcher.graph.nodes[-1].target) is nn.Linear
    digests = [network_digest(one, patcher.graph) for patcher in patchers]
    assert digests[0] != digests[1] and digests[0] == digests[2]
