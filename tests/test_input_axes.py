"""Along which axis values hold the inputs, and what follows from no input or from their number."""

from __future__ import annotations

import pytest
import torch
from networks import PATHS, checked_by, checked_on, checked_patcher
from torch import fx, nn

from raypatch.engine.patcher import Patcher
from raypatch.errors import InputError

# --------------------------------------------- values that depend on how many inputs there are


def _scores(net, h):
    """A number for each place that a patch of the first layer changes."""
    return (h.sum(-1) > 0).long()


NUMBERED = {
    "the last of each": lambda net, h, x: h[torch.arange(x.shape[0]), (x[:, 0, 0] > 0).long() + 3],
    "by a patched value": lambda net, h, x: h[torch.arange(len(x)), _scores(net, h)[:, 0]],
    "of neurons": lambda net, h, x: h[:, 0][torch.arange(x.shape[0]), (x[:, 0, 0] > 0).long() - 1][
        :, None
    ].expand(-1, 6),
    "of neurons there and back": lambda net, h, x: (
        torch.cat([h, h.flip(2)], 2)[:, 0][torch.arange(len(x)), (x[:, 0, 0] > 0).long() * 3]
    )[:, None].expand(-1, 6),
    "of places and neurons": lambda net, h, x: h[
        torch.arange(x.shape[0])[:, None], 1, torch.tensor([[0, 3, 2, 1, 5, 4]])
    ],
    "of entries": lambda net, h, x: h.flatten(0, 1)[
        torch.arange(x.shape[0] * 5).view(-1, 5).flip(1).flatten()
    ].view(-1, 5, 6)[:, 1],
    "counted": lambda net, h, x: h[torch.ones(x.shape[0]).cumsum(0).long() - 1, 3],
    "by gather": lambda net, h, x: h.gather(
        1, ((x[:, 0, :1] > 0).long() + 3)[..., None].expand(-1, 1, 6)
    )[:, 0],
    "of all steps": lambda net, h, x: h.reshape(-1, 6)[
        torch.arange(x.shape[0]) * 5 + (x[:, 0, 0] > 0).long()
    ],
    "cast": lambda net, h, x: h[torch.arange(len(x)).to(x.long()[:, 0, 0]), 1],
    "a mesh": lambda net, h, x: h[
        torch.meshgrid(torch.arange(len(x)), torch.arange(2), indexing="ij")
    ].sum(1),
    "a step of its own": lambda net, h, x: h[torch.arange(x.shape[0]) + 0, 2],
}


class Numbered(nn.Module):
    """``operation`` picks of a sequence of each input."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.last, self.operation = nn.Linear(4, 6), nn.Linear(6, 2), operation

    def forward(self, x):
        h = self.operation(self, torch.tanh(self.first(x)), x)
        return self.last(torch.relu(h))


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("name", NUMBERED)
def test_places_chosen_by_the_number_of_an_input_are_those_of_its_row(name, how):
    assert checked_by(how, Numbered, NUMBERED[name]).startswith(PATHS[how])


@pytest.mark.parametrize("name", ["of neurons", "of neurons there and back"])
def test_an_index_that_only_later_inputs_move_is_no_place_of_a_neuron(name):
    """The inputs of the trial all choose the same neuron."""
    torch.manual_seed(0)
    network = Numbered(NUMBERED[name]).eval()
    source, target = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    source[:, 0, 0], target[:, 0, 0] = -1, torch.tensor([-1.0, -1, -1, 1, 1, 1])
    assert checked_on(network, source, target).path == PATHS["fx"]


@pytest.mark.parametrize("name", ["the last of each", "by gather"])
def test_a_step_chosen_for_each_input_leaves_a_patch_sparse(name):
    torch.manual_seed(0)
    patcher = checked_patcher(Numbered(NUMBERED[name]), (5, 4))
    structure = patcher._engine.structure
    last = next(node for node in structure.nodes if node.path == "last")
    assert last.inputs[0] in structure.chains.after(structure.calls["first"][0])


# ------------------------------------------------------------- inputs that share an axis


class Masked(nn.Module):
    """Padded places are left out, with the places before the inputs or two halves after each
    other."""

    def __init__(self, halves):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.halves = halves

    def forward(self, x):
        n, size = x.shape[:2]
        mask = (x.abs().sum(-1, keepdim=True) > 0).to(x.dtype)
        if self.halves:
            h, mask = torch.cat([x, x.flip(1)]), torch.cat([mask, mask.flip(1)])
            h = torch.relu(self.second(torch.relu(self.first(h))) * mask).sum(1)
            return self.last(h[:n] - h[n:])
        h, mask = (v.transpose(0, 1).reshape(size * n, -1) for v in (self.first(x), mask))
        return self.last(torch.relu(self.second(torch.relu(h)) * mask)).view(size, n, 2).mean(0)


@pytest.mark.parametrize("kind", ["pair", "mean"])
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("halves", [True, False])
def test_inputs_are_told_apart_by_those_that_differ(halves, side, kind):
    """The first ones have no padding, so that any order of the mask fits them."""
    torch.manual_seed(0)
    network = Masked(halves)
    source, target = torch.randn(8, 5, 3), torch.randn(8, 5, 3)
    for i in range(3, 8):
        (source if side == "source" else target)[i, i - 3 :] = 0
    assert checked_on(network, source, target, kind=kind).path == PATHS["fx"]


def test_what_inputs_differ_in_by_rounding_alone_need_not_tell_them_apart():
    class Shares(Masked):
        def forward(self, x):
            n, size = x.shape[:2]
            ones = x.softmax(-1).sum(-1).transpose(0, 1).reshape(size * n, 1)
            h = torch.relu(self.first(x)).transpose(0, 1).reshape(size * n, -1) * ones
            return self.last(torch.relu(self.second(h))).view(size, n, 2).mean(0)

    torch.manual_seed(0)
    source, target = 9 * torch.randn(8, 5, 3), 9 * torch.randn(8, 5, 3)
    assert checked_on(Shares(False), source, target).path == PATHS["fx"]


def test_targets_that_are_all_the_same_are_told_apart_by_their_sources():
    torch.manual_seed(0)
    source, target = torch.randn(4, 5, 3), torch.zeros(4, 5, 3)
    assert checked_on(Masked(False), source, target).path == PATHS["fx"]


def test_where_all_inputs_were_the_same_others_are_captured_anew():
    torch.manual_seed(0)
    patcher = Patcher(Masked(False).eval())
    zeros = torch.zeros(4, 5, 3)
    patcher.prepare(zeros, zeros)
    assert patcher.path.startswith("single")
    patcher.prepare(torch.randn(4, 5, 3), zeros)
    assert patcher.path == PATHS["fx"]


class Quantiles(nn.Module):
    """Each state is repeated for every quantile, which are outermost or innermost."""

    def __init__(self, outermost, of_input):
        super().__init__()
        self.outermost, self.of_input = outermost, of_input
        self.state, self.phi, self.out = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 2)
        self.fractions = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        h, n = torch.relu(self.state(x)), x.shape[0]
        if self.outermost:
            given = x.sum(1).sin()[None] * self.fractions[:, :1]  # [3, N]
            phi = torch.relu(self.phi(given.view(-1, 1) * self.fractions[:1]))
            if not self.of_input:
                phi = torch.relu(self.phi(self.fractions)).repeat_interleave(n, 0)
            return self.out(h.repeat(3, 1) * phi).view(3, n, 2).mean(0)
        given = x.sum(1).sin()[:, None] * self.fractions[:, 0]  # [N, 3]
        phi = torch.relu(self.phi(given.view(-1, 1) * self.fractions[:1]))
        if not self.of_input:
            phi = torch.relu(self.phi(self.fractions)).repeat(n, 1)
        return self.out(h.repeat_interleave(3, 0) * phi).view(n, 3, 2).mean(1)


@pytest.mark.parametrize("kind", ["pair", "mean"])
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("outermost", [True, False])
def test_inputs_are_told_from_entries_that_are_the_same_for_each(outermost, of_input, kind):
    torch.manual_seed(0)
    network = Quantiles(outermost, of_input)
    assert checked_patcher(network, (4,), kind=kind).path == PATHS["fx"]


class Iqn(nn.Module):
    """A quantile network: every input several times, beside an embedding that sees none."""

    def __init__(self):
        super().__init__()
        self.a, self.tau, self.b = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("taus", torch.linspace(0.1, 0.9, 5))

    def forward(self, x):
        n_inputs = x.shape[0]
        taus = self.taus.repeat(n_inputs, 1).view(n_inputs * 5, 1)
        embedded = torch.relu(self.tau(torch.cos(taus * torch.arange(1, 7))))
        h = torch.relu(self.a(x)).repeat_interleave(5, 0) * embedded
        return self.b(torch.relu(h)).view(n_inputs, 5, 3).mean(1)


@pytest.mark.parametrize("kind", ["pair", "zero", "mean"])
@pytest.mark.parametrize("n_inputs", [1, 4])
def test_inputs_that_share_an_axis_with_something_else_are_told_apart(n_inputs, kind):
    torch.manual_seed(0)
    source, target = torch.randn(n_inputs, 4), torch.randn(n_inputs, 4)
    assert checked_on(Iqn(), source, target, kind=kind).path == PATHS["fx"]


def test_the_mean_of_inputs_that_hooks_cannot_tell_apart_is_refused():
    class Chosen(Iqn):
        def forward(self, x):
            on = x > 0
            clipped = torch.zeros_like(x)
            clipped[on] = x[on]  # not captured
            return super().forward(clipped)

    with pytest.raises(
        InputError, match=r"'mean': 'tau' holds inputs and something else along one"
    ):
        Patcher(Chosen())([{"b": [0]}], target=torch.randn(4, 4), kind="mean")


# ------------------------------------------------------------------------- other people's names


@fx.wrap
def to(scale, x):
    """A function of the user's that is called as torch's cast is."""
    return scale * (1 + (x > 6).to(x.dtype).sum(-1, keepdim=True))


class OwnCast(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.last(x * to(self.scale, self.first(x)))


def test_a_function_of_the_users_is_not_taken_for_torchs_of_that_name():
    torch.manual_seed(0)
    source, target = 20 * torch.randn(4, 4), torch.randn(4, 4)
    assert checked_on(OwnCast(), source, target).path == PATHS["fx"]
