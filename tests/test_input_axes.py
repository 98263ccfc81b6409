"""Along which axis values hold the inputs, and what follows from no input or from their number."""

from __future__ import annotations

import pytest
import torch
from networks import NotTraced, check_equal, checked_patcher
from torch import fx, nn

from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs

PATHS = {"fx": "incremental (torch.fx)", "export": "incremental (torch.export"}

# -------------------------------------------------------------- layers that see no input


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


class ApartNotTraced(NotTraced, Apart):
    pass


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
    torch.manual_seed(0)
    network = (Apart if how == "fx" else ApartNotTraced)(APART[name])
    assert checked_patcher(network, (5, 4)).path.startswith(PATHS[how])


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("name", ["with an axis", "along the first axis", "maps"])
def test_a_layer_that_sees_no_input_is_ablated_as_by_hooks(name, kind):
    torch.manual_seed(0)
    assert checked_patcher(Apart(APART[name]), (5, 4), kind=kind).path == PATHS["fx"]


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


class Numbered(Apart):
    def forward(self, x):
        h = self.operation(self, torch.tanh(self.first(x)), x)
        return self.last(torch.relu(h))


class NumberedNotTraced(NotTraced, Numbered):
    pass


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("name", NUMBERED)
def test_places_chosen_by_the_number_of_an_input_are_those_of_its_row(name, how):
    torch.manual_seed(0)
    network = (Numbered if how == "fx" else NumberedNotTraced)(NUMBERED[name])
    assert checked_patcher(network, (5, 4)).path.startswith(PATHS[how])


@pytest.mark.parametrize("name", ["of neurons", "of neurons there and back"])
def test_an_index_that_only_later_inputs_move_is_no_place_of_a_neuron(name):
    """The inputs of the trial all choose the same neuron."""
    torch.manual_seed(0)
    network = Numbered(NUMBERED[name]).eval()
    source, target = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    source[:, 0, 0], target[:, 0, 0] = -1, torch.tensor([-1.0, -1, -1, 1, 1, 1])
    experiments = [{"first": [i]} for i in range(6)]
    outputs = Patcher(network, dtype=torch.float64)(experiments, source, target)
    check_equal(outputs, reference_outputs(network, experiments, source, target), torch.float64)


def test_a_step_chosen_for_each_input_leaves_a_patch_sparse():
    for name in ("the last of each", "by gather"):
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
    network = Masked(halves).eval()
    source, target = torch.randn(8, 5, 3), torch.randn(8, 5, 3)
    for i in range(3, 8):
        (source if side == "source" else target)[i, i - 3 :] = 0
    experiments = [{layer: [i]} for layer in ("first", "second") for i in range(6)]
    given = source if kind == "pair" else None
    patcher = Patcher(network, dtype=torch.float64)
    outputs = patcher(experiments, given, target, kind=kind)
    expected = reference_outputs(network, experiments, given, target, kind=kind)
    check_equal(outputs, expected, torch.float64)
    assert patcher.path == PATHS["fx"]


def test_targets_that_are_all_the_same_are_told_apart_by_their_sources():
    torch.manual_seed(0)
    network, experiments = Masked(False).eval(), [{"first": [i]} for i in range(6)]
    source, target = torch.randn(4, 5, 3), torch.zeros(4, 5, 3)
    patcher = Patcher(network, dtype=torch.float64)
    outputs = patcher(experiments, source, target)
    check_equal(outputs, reference_outputs(network, experiments, source, target), torch.float64)
    assert patcher.path == PATHS["fx"]


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
    network = OwnCast().eval()
    source, target = 20 * torch.randn(4, 4), torch.randn(4, 4)
    experiments = [{"first": "all"}, {"first": [0]}]
    patcher = Patcher(network, dtype=torch.float64)
    outputs = patcher(experiments, source, target)
    check_equal(outputs, reference_outputs(network, experiments, source, target), torch.float64)
    assert patcher.path == PATHS["fx"]
