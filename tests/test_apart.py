"""Layers that see no input are patched like any other, wherever what they give is read."""

from __future__ import annotations

import pytest
import torch
from networks import PATHS, checked_by, checked_patcher
from torch import nn

from raypatch.engine.identity import _operations
from raypatch.engine.patcher import Patcher


class Apart(nn.Module):
    """``operation`` mixes a sequence with layers that see nothing of it."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.places, self.second = nn.Embedding(8, 6), nn.Linear(6, 6)
        self.mask = nn.Parameter(torch.randn(1, 2, 2, 2))
        self.conv, self.deconv = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 6, 2, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm, self.operation = nn.LSTM(6, 6, batch_first=True), operation

    def forward(self, x):
        h = self.operation(self, self.first(x), x.shape[0])
        return self.last(torch.relu(h)).mean(1)


def _embedded(net):
    return net.places(torch.arange(5))


APART = {
    "added": lambda net, h, n: h + _embedded(net),
    "with an axis": lambda net, h, n: h + _embedded(net)[None],
    "unsqueezed": lambda net, h, n: h + _embedded(net).unsqueeze(0),
    "expanded": lambda net, h, n: h + _embedded(net).expand(n, -1, -1),
    "repeated": lambda net, h, n: h + _embedded(net).repeat(n, 1, 1),
    "repeated in turn": lambda net, h, n: (
        h + _embedded(net).repeat_interleave(n, 0).view(5, n, 6).transpose(0, 1)
    ),
    "behind a layer": lambda net, h, n: h + torch.tanh(net.second(_embedded(net)))[None],
    "of one row": lambda net, h, n: h + net.places(torch.arange(5)[None]),
    "of one row, repeated": lambda net, h, n: h + net.places(torch.arange(5)[None]).repeat(n, 1, 1),
    "of one row, without it": lambda net, h, n: h + net.places(torch.arange(5)[None]).squeeze(0),
    "joined": lambda net, h, n: torch.cat([h, _embedded(net)[None].expand(n, -1, -1)], 1),
    "along the first axis": lambda net, h, n: (h.mT.mT.transpose(0, 1) + _embedded(net)[:, None])
    .transpose(0, 1),
    "a product": lambda net, h, n: h @ (_embedded(net).t() @ _embedded(net)),
    "einsum": lambda net, h, n: torch.einsum("bth,kh->btk", h, _embedded(net)).repeat(1, 1, 2)[
        ..., :6
    ],
    "a number": lambda net, h, n: h * net.places(torch.tensor(2)).sum(),
    "a task": lambda net, h, n: h * (net.places(torch.tensor([2])) + 1)[:, None],
    "where": lambda net, h, n: torch.where(h > 0, h, _embedded(net)),
    "outer": lambda net, h, n: (h[:, :, None] * _embedded(net)).mean(2),
    "maps": lambda net, h, n: h[:, :4] + net.deconv(torch.relu(net.conv(net.mask)))
    .flatten(2)
    .mT,
    "of several results": lambda net, h, n: h + _embedded(net).max(0)[0] * _embedded(net).chunk(2, 1)[1].repeat(1, 2),
    "attention to themselves": lambda net, h, n: (
        h + net.attention(_embedded(net)[None], _embedded(net)[None], _embedded(net)[None])[0]
    ),
    "a state": lambda net, h, n: net.lstm(
        h, (_embedded(net)[:1].expand(1, n, 6).clone(), _embedded(net)[1:2].expand(1, n, 6).clone())
    )[0],
    "without a batching rule": lambda net, h, n: h + net.lstm(_embedded(net)[None])[0],
    "of more axes the second time": lambda net, h, n: torch.cat(
        [net.second(_embedded(net))[None].expand(n, -1, -1), net.second(h)], 1
    ),
    "queries": lambda net, h, n: net.attention(_embedded(net)[:3].expand(n, -1, -1), h, h)[0],
}  # fmt: skip


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("name", APART)
def test_a_layer_that_sees_no_input_is_patched_incrementally_wherever_it_is_read(name, how):
    assert checked_by(how, Apart, APART[name]).startswith(PATHS[how])


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("name", ["with an axis", "along the first axis", "maps"])
def test_a_layer_that_sees_no_input_is_ablated_as_by_hooks(name, kind):
    torch.manual_seed(0)
    assert checked_patcher(Apart(APART[name]), (5, 4), kind=kind).path == PATHS["fx"]


class Mixed(nn.Module):
    """A layer of the user's own that tracing cannot look into, on what sees no input."""

    def __init__(self, scale):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), scale
        self.places, self.mix = nn.Embedding(5, 6), Mixer()

    def forward(self, x):
        h, steps = self.first(x), self.places(torch.arange(x.shape[1]))
        return self.last(self.mix(steps, h, self.scale)).mean(1)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6))

    def forward(self, steps, h, scale):
        if h.shape[-1] != 6:
            raise ValueError
        return h + scale * (steps @ self.weight)


def test_what_is_run_one_input_at_a_time_belongs_to_a_networks_digest():
    digests = set()
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        patcher = Patcher(Mixed(scale).eval())
        patcher.prepare(torch.randn(3, 5, 4), torch.randn(3, 5, 4))
        assert patcher.path == "incremental (torch.fx)"
        digests.add(tuple(_operations(patcher.graph)))
    assert len(digests) == 2
