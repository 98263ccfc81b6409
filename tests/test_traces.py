"""A trace that takes another way than the network itself is not used, whatever its numbers say."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)


class AsksForATensor(Base):
    def forward(self, x):
        if isinstance(x, (list, tuple)):
            x = torch.cat(x, -1)
        elif isinstance(x, torch.Tensor):
            x = x.clamp(-5, 5)
        return self.o(self.a(x).relu())


class AsksTorch(Base):
    def forward(self, x):
        h = self.a(x)
        return self.o(h.clamp(-8, 8) if torch.is_tensor(h) else h)


class AsksForTheType(Base):
    def forward(self, x):
        h = self.a(x)
        return self.o(h.clamp(-8, 8) if type(h) is torch.Tensor else h)


class AsksForAnAttribute(Base):
    def forward(self, x):
        h = self.a(x)
        return self.o(h if hasattr(h, "no_tensor_has_this") else h.clamp(-8, 8))


class AsksWhetherItIsTraced(Base):
    def forward(self, x):
        h = self.a(x)
        return self.o(h if torch.fx._symbolic_trace.is_fx_tracing() else h.clamp(-8, 8))


class Casts(Base):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.o(self.a(x)).float()


class BeforeCalled(Base):
    def __call__(self, x):
        return super().__call__(x.clamp(-5, 5))

    def forward(self, x):
        return self.o(self.a(x))


def with_hook():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    network.register_forward_pre_hook(lambda _, args: (args[0].clamp(-5, 5),))
    return network


def with_its_own_forward():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    network.forward = types.MethodType(
        lambda self, x: nn.Sequential.forward(self, x.clamp(-5, 5)), network
    )
    return network


def with_a_layer_of_its_own_forward():
    network = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 3))
    network[2].forward = types.MethodType(
        lambda self, x: nn.functional.linear(x.clamp(-8, 8), self.weight, self.bias), network[2]
    )
    return network


def with_an_activation_of_its_own():
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    network[1].forward = lambda x: torch.where(x.norm(dim=-1, keepdim=True) > 20, x, x.tanh())
    return network


@pytest.mark.parametrize(
    "make",
    [
        AsksForATensor, AsksTorch, AsksForTheType, AsksForAnAttribute, AsksWhetherItIsTraced,
        BeforeCalled, with_hook, with_its_own_forward, with_a_layer_of_its_own_forward,
        with_an_activation_of_its_own,
    ],
)  # fmt: skip
def test_what_shows_on_later_inputs_only_is_not_lost(make):
    torch.manual_seed(0)
    network = make().eval()
    first = next(n for n, module in network.named_modules() if isinstance(module, nn.Linear))
    experiments = [{first: [i]} for i in range(8)]
    patcher = Patcher(network, dtype=torch.float64)
    for scale in (1, 30):
        source, target = scale * torch.randn(2, 4, 6)
        expected = reference_outputs(network, experiments, source, target)
        torch.testing.assert_close(
            patcher(experiments, source, target), expected, atol=1e-9, rtol=1e-9
        )


def test_an_export_that_took_another_way_is_seen_before_inputs_show_it():
    patcher = Patcher(AsksForTheType().eval())
    patcher.prepare(*torch.randn(2, 4, 6) / 10)
    assert patcher.path.startswith("stacked (")


def test_what_is_computed_in_fewer_digits_stays_so():
    torch.manual_seed(0)
    patcher = Patcher(Casts().eval())
    patcher.prepare(*torch.randn(2, 4, 6))
    assert "torch.fx)" not in patcher.path


class ReadLater(Base):
    def forward(self, x):
        turned, (left, right) = self.a(x).T, self.a(x).T.chunk(2)
        h = torch.cat([right, left]) + turned
        return self.o(h.T)


def test_the_order_in_which_attributes_are_read_is_no_difference():
    patcher = Patcher(ReadLater().eval())
    patcher.prepare(*torch.randn(2, 4, 6))
    assert patcher.path == "incremental (torch.fx)"
