"""In float64 a network is computed in float64 throughout, also what says no type or another."""

from __future__ import annotations

import pytest
import torch
from networks import PATHS, checked_by, checked_patcher
from torch import nn

from raypatch.engine.patcher import Patcher


class Made(nn.Module):
    """``operation`` makes numbers that are of no float type before."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.lstm, self.operation = nn.LSTM(6, 6, batch_first=True), operation

    def forward(self, x):
        return self.last(self.operation(self, torch.relu(self.first(x)), x)).mean(1)


MADE = {
    "a state": lambda net, h, x: net.lstm(
        h, (torch.zeros(1, x.shape[0], 6), torch.zeros(1, x.shape[0], 6))
    )[0],
    "a share": lambda net, h, x: h * ((h > 0).sum(-1, keepdim=True) / 3),
    "a root": lambda net, h, x: h * (x > 0).sum((1, 2), keepdim=True).sqrt(),
    "positions": lambda net, h, x: h * (torch.arange(5) / 7)[:, None],
    "numbers": lambda net, h, x: h * torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.7]),
    "a range": lambda net, h, x: h * torch.linspace(0, 1, 6),
    "named float32": lambda net, h, x: h * torch.full((6,), 0.1, dtype=torch.float32),
}


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("name", MADE)
def test_numbers_that_a_forward_makes_are_float64(name, how):
    assert checked_by(how, Made, MADE[name]).startswith(PATHS[how])
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("name", MADE)
def test_in_float32_they_stay_float32(name):
    torch.manual_seed(0)
    patcher = checked_patcher(Made(MADE[name]), (5, 4), torch.float32)
    assert patcher.path == "incremental (torch.fx)"
    assert not any(node.is_wide for node in patcher.graph.nodes)


class Normalised(nn.Module):
    """Statistics in float64, as running means are often kept, and the rest in float32."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("mean", torch.full((4,), 1234567.89, dtype=torch.float64))
        self.register_buffer("std", torch.full((4,), 0.25, dtype=torch.float64))

    def forward(self, x):
        return self.o(self.a(((x - self.mean) / self.std).to(self.a.weight.dtype)).relu())


class WideHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 8), nn.Linear(8, 2).double()

    def forward(self, x):
        return self.o(self.a(x).relu().double())


@pytest.mark.parametrize(("kind", "centre"), [(Normalised, 1234567.89), (WideHead, 0)])
def test_what_is_float64_in_a_network_of_float32_stays_so(kind, centre):
    torch.manual_seed(0)
    network, x = kind().eval(), torch.randn(3, 4) + centre
    patched = Patcher(network)([{"a": [1]}, {"a": "all"}], x, x)
    with torch.no_grad():
        torch.testing.assert_close(patched, network(x).expand(2, -1, -1), atol=1e-6, rtol=1e-6)
