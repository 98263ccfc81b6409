"""Patches of several layers, or of several calls of one, that meet on the way to the output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AS_IF_LARGE, NotTraced, check_equal
from torch import nn
from torch.nn import functional as F

from raypatch.engine import prepared
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs

# Each gives nothing, or what it gave, for many patches of either argument alone.
MEETINGS = {
    "sum": lambda a, b: torch.relu(a + b),
    "difference": lambda a, b: F.relu(a - b),
    "product": lambda a, b: torch.relu(a) * torch.relu(b),
    "largest": torch.maximum,
    "mask": lambda a, b: a * (b > 0),
    "where": lambda a, b: torch.where(a > 0, b, torch.zeros_like(b)),
    "pool": lambda a, b: torch.stack([a, b], 2).amax(2),
    "clamp": lambda a, b: F.hardtanh(a + 2 * b),
}


class Branches(nn.Module):
    """Two layers of the same input meet, and what they give meets a third before the head."""

    def __init__(self, meet):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 6)
        self.head, self.meet = nn.Linear(6, 3), meet

    def forward(self, x):
        h = self.meet(self.a(x), self.b(x))
        return self.head(self.meet(self.c(h), h))


class BranchesExported(NotTraced, Branches):
    pass


class DownstreamOfAll(Branches):
    """Both that meet depend on a third layer, which may be patched too."""

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.head(self.meet(self.c(h) + self.b(x), self.c(h + 1)) + h)


class Steps(Branches):
    """One layer is called at every step, and its calls meet in a state."""

    def forward(self, x):
        state = x.new_zeros(len(x), 6)
        for step in range(3):
            state = self.meet(0.9 * state, self.a(x - step))
        return self.head(state)


class Blocks(Branches):
    """A residual block of convolutions with a projection."""

    def __init__(self, meet):
        super().__init__(meet)
        self.a, self.b = nn.Conv1d(1, 6, 3, padding=1), nn.Conv1d(1, 6, 1)
        self.c, self.head = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.Linear(24, 3)

    def forward(self, x):
        h = self.meet(self.a(x[:, None]), self.b(x[:, None]))
        return self.head(self.meet(self.c(h), h).flatten(1))


def together(network, draw):
    """Experiments that patch the same neurons of several layers."""
    names = [name for name, _ in network.named_children() if name != "head"]
    found = []
    for _ in range(12):
        neurons = draw(st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True))
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        found.append(dict.fromkeys(chosen, neurons))
        if draw(st.booleans()):
            found[-1][draw(st.sampled_from(["head", "output_logits"]))] = [draw(st.integers(0, 2))]
    return found


@pytest.mark.parametrize("kind", [Branches, BranchesExported, DownstreamOfAll, Steps, Blocks])
@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    meet=st.sampled_from(sorted(MEETINGS)),
    source=st.sampled_from(["pair", "zero", "mean"]),
    large=st.booleans(),
)
def test_patches_that_meet_equal_plain_hooks(kind, data, seed, meet, source, large):
    torch.manual_seed(seed)
    network = kind(MEETINGS[meet]).eval()
    called = [n for n, _ in network.named_children() if kind is not Steps or n in ("a", "head")]
    experiments = [
        kept
        for one in together(network, data.draw)
        if (kept := {n: v for n, v in one.items() if n in called or n == "output_logits"})
    ]
    inputs, target = torch.randn(6, 4), torch.randn(6, 4)
    given_source = inputs if source == "pair" else None
    patcher = Patcher(network, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in AS_IF_LARGE.items() if large else ():
            patched.setattr(prepared, name, value)
        found = patcher(experiments, given_source, target, kind=source)
    expected = reference_outputs(network, experiments, given_source, target, kind=source)
    assert patcher.path.startswith("incremental")
    check_equal(found, expected, torch.float64)


def test_rows_are_computed_where_two_patches_that_change_nothing_alone_meet():
    network = Branches(MEETINGS["sum"]).eval()
    with torch.no_grad():
        for layer in (network.a, network.b):
            layer.weight.copy_(torch.eye(6, 4))
            layer.bias.fill_(-0.6)
    source, target = torch.ones(2, 4), torch.zeros(2, 4)
    experiments = [{"a": [0]}, {"b": [0]}, {"a": [0], "b": [0]}, {"a": [5], "b": [5]}]
    run = Patcher(network, dtype=torch.float64).prepare(source, target)
    found = run(experiments)
    changes = (found != run.baseline).any(2).any(1).tolist()
    assert changes == [False, False, True, False]  # 0.4 - 0.6 < 0 < 0.4 + 0.4
    check_equal(found, reference_outputs(network, experiments, source, target), torch.float64)
