"""An export takes modules apart; layers of every kind are found in it again."""

from __future__ import annotations

import pytest
import torch
from networks import NotTraced, checked_patcher, counts_of
from torch import nn
from torch.nn import functional as F


class Own(nn.Module):
    """A layer of the user's own, with more than a product in it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, x):
        return F.linear(x, self.weight).tanh() * 2


class WithLayers(nn.Module):
    """A layer that has others in it and gives what the last of them does."""

    def __init__(self):
        super().__init__()
        self.positions, self.inner = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x + self.positions)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


class OnChannels(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(6, 6, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


LAYERS = {
    "of one's own": Own,
    "with layers in it": WithLayers,
    "a subclass": lambda: Doubled(6, 6),
    "attention": Attending,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "convolution": lambda: OnChannels(nn.Conv1d(6, 6, 3, padding="same")),
    "circular convolution": lambda: OnChannels(nn.Conv1d(6, 6, 3, 1, 1, padding_mode="circular")),
    "transposed convolution": lambda: OnChannels(nn.ConvTranspose1d(6, 6, 1)),
    "bilinear": lambda: Bilinear(),
}


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(6, 6, 6)

    def forward(self, x):
        return self.layer(x, x)


class Layers(nn.Module):
    def __init__(self, make, calls=1):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(4, 6), make(), nn.Linear(30, 3)
        self.unread, self.calls = nn.Linear(6, 2), calls

    def forward(self, x):
        h = torch.relu(self.first(x))
        for _ in range(self.calls):
            h = self.between(h)
        self.unread(h)
        return self.last(h.flatten(1))


class Network(NotTraced, Layers):
    pass


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_of_any_kind_is_patched_incrementally(name, calls):
    torch.manual_seed(0)
    network = Network(LAYERS[name], calls)
    patcher = checked_patcher(network, (5, 4))
    counts = counts_of(network, (torch.zeros(1, 5, 4),))
    assert patcher.path.startswith("incremental (torch.export")
    assert len(counts) > 4 and list(patcher.layers) == list(counts)[:-1]
