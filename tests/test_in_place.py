"""Rows that nobody reads any more are written over, whatever form an operation has; others never."""

from __future__ import annotations

import pytest
import torch
from networks import NotTraced, check_equal, checked_patcher
from torch import fx, nn
from torch.nn import functional as F

from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs


class Between(nn.Module):
    """An operation on rows that are dense when the first layer is patched."""

    def __init__(self, operation, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.operation, self.last = operation, nn.Linear(width, 3)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        h = self.second(torch.sin(self.first(x)))
        return self.last(self.operation(h))


class Exported(NotTraced, Between):
    pass


FORMS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU(inplace)": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "relu": lambda h: h.relu(),
    "nn.Tanh": nn.Tanh(),
    "torch.tanh": torch.tanh,
    "tanh": lambda h: h.tanh(),
    "nn.Sigmoid": nn.Sigmoid(),
    "torch.sigmoid": torch.sigmoid,
    "nn.GELU": nn.GELU("tanh"),
    "F.gelu": lambda h: F.gelu(h, approximate="tanh"),
    "nn.ELU": nn.ELU(0.5),
    "F.elu": lambda h: F.elu(h, 0.5),
    "nn.SiLU": nn.SiLU(),
    "F.silu": F.silu,
    "nn.LeakyReLU": nn.LeakyReLU(0.2),
    "F.leaky_relu": lambda h: F.leaky_relu(h, negative_slope=0.2),
    "nn.Hardtanh": nn.Hardtanh(-0.5, 0.3),
    "torch.clamp": lambda h: torch.clamp(h, -0.3, 0.5),
    "clamp": lambda h: h.clamp(min=0.1),
    "operators": lambda h: (2 * h - 1) ** 2 / 3,
    "torch.mul": lambda h: torch.mul(h, 0.7),
    "out": lambda h: torch.tanh(h, out=None),
    "alpha": lambda h: torch.add(h, 0.5, alpha=3),
    "sub with alpha": lambda h: h.sub(0.5, alpha=3),
}


def compared(network, shape=(6,)):
    """Every neuron and whole layers against plain hooks; also the steps after a patch of the first
    layer."""
    torch.manual_seed(0)
    source, target = torch.randn(5, *shape), torch.randn(5, *shape)
    patcher = Patcher(network, dtype=torch.float64)
    run = patcher.prepare(source, target)
    counts = patcher.neuron_counts
    experiments = [{layer: [i]} for layer, n in counts.items() for i in range(n)]
    experiments += [{layer: "all"} for layer in counts]
    experiments += [{one: [0], other: [1]} for one, other in zip(counts, list(counts)[1:])]
    expected = reference_outputs(network, experiments, source, target)
    for _ in range(2):  # the first time changes nothing that the second reads
        check_equal(run(experiments), expected, torch.float64)
    programs = [run._kept.program(group) for group in run.plan([{"first": [0]}]).groups]
    return patcher.path, [step for step in programs[0].steps if step.operation is not step.node]


@pytest.mark.parametrize("kind", [Between, Exported])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_elementwise_operation_writes_over_its_argument(form, kind):
    torch.manual_seed(0)
    path, overwriting = compared(kind(FORMS[form]).eval())
    assert path.startswith("incremental (torch." + ("fx" if kind is Between else "export"))
    assert overwriting


def test_the_end_of_a_residual_block_writes_over_either_branch():
    class Blocks(Between):
        def forward(self, x):
            h = torch.sin(self.first(x))
            h = h + self.second(F.relu(self.second(h)))
            return self.last(h + self.second(torch.cos(h)))

    _, overwriting = compared(Blocks(None).eval())
    assert sum("add" in str(step.node.target) for step in overwriting) == 2


def _cached(h, kept={}):  # noqa: B006
    """The same tensor every time, as positions are that depend on shapes only."""
    return kept.setdefault(h.shape, torch.linspace(0, 1, 8, dtype=torch.float64).repeat(len(h), 1))


fx.wrap("_cached")


READ_LATER = {
    "itself": lambda self, h: torch.relu(h) + h,
    "a part": lambda self, h: torch.cat([F.relu(h.chunk(2, 1)[0]), h[:, 4:]], 1) + h,
    "a part by a module": lambda self, h: self.act(h.chunk(2, 1)[0]).repeat(1, 2) + h,
    "a view": lambda self, h: torch.relu(h.view(-1, 2, 4)).flatten(1) * h,
    "transposed": lambda self, h: torch.relu(h.t()).t() * h,
    "a column": lambda self, h: h.add(h[:, :1]) * 2,
    "every other": lambda self, h: h[:, ::2].mul(h[:, 1::2]).repeat(1, 2) - h,
    "expanded": lambda self, h: self.scale.expand_as(h) * h,
    "its own weights": lambda self, h: self.scale[None].expand_as(h).mul(2) * h,
    "unfolded": lambda self, h: h.unfold(1, 2, 1).mul(2).sum(2).repeat(1, 2)[:, :8] - h,
    "a detour": lambda self, h: torch.stack([h, h.relu()]).amax(0) + h.detach(),
    "another type": lambda self, h: (h.float() * 2).double() + h,
    "wider": lambda self, h: (h[:, :1] + h) * 2,
}


@pytest.mark.parametrize("name", READ_LATER)
def test_what_is_read_later_is_not_written_over(name):
    torch.manual_seed(0)

    class Network(Between):
        def forward(self, x):
            h = self.second(torch.sin(self.first(x)))
            return self.last(READ_LATER[name](self, h))

    network = Network(None)
    network.act = nn.ReLU()
    path, _ = compared(network.eval())
    assert path == "incremental (torch.fx)"


def test_what_a_users_function_or_module_keeps_is_not_written_over():
    torch.manual_seed(0)

    class Network(Between):
        def forward(self, x):
            h = self.second(torch.sin(self.first(x)))
            return self.last(torch.relu(_cached(h)) + h)

    path, _ = compared(Network(None).eval())
    assert path == "incremental (torch.fx)"
    kept = list(_cached.__defaults__[0].values())
    assert kept and all(torch.equal(v, v[:1].expand_as(v)) for v in kept)
    assert all(torch.equal(v[0], torch.linspace(0, 1, 8, dtype=torch.float64)) for v in kept)


class TransposedBranches(nn.Module):
    """Of one input the sum of both is not in one piece, and its flat form a copy."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.flat = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(15, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        h = self.first(x).transpose(1, 2) + self.other(x).transpose(1, 2)
        return self.flat(torch.relu(h.flatten(1))) + self.head(h.mean(1))


class GivesTransposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return torch.matmul(x, self.weight).transpose(1, 2)


class TransposedLayer(TransposedBranches):
    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(4, 4), GivesTransposed()

    def forward(self, x):
        h = self.other(torch.sin(self.first(x)))
        return self.flat(torch.relu(h.contiguous()).flatten(1)) + self.head(h.mean(1))


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.flat, self.head = nn.Linear(64, 3), nn.Linear(4, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        h = self.second(torch.sin(self.first(x)))
        return self.flat(torch.relu(h.flatten(1))) + self.head(h.mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "shape"),
    [(TransposedBranches, (3, 4)), (TransposedLayer, (3, 4)), (ChannelsLast, (2, 4, 4))],
)
def test_rows_that_lie_otherwise_than_one_inputs_value_are_not_written_over(network, shape):
    torch.manual_seed(0)
    path, _ = compared(network().eval(), shape)
    assert path == "incremental (torch.fx)"


class Holder:
    def __init__(self, h):
        self.h = h

    def joined(self):
        return self.h * 1


def _hold(h):
    return Holder(h)


fx.wrap("_hold")


class GivesItsInput(nn.Module):
    """As layers do that add noise in training."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        return x


def test_what_an_object_holds_is_not_written_over():
    class Network(Between):
        def forward(self, x):
            h = self.second(torch.sin(self.first(x)))
            holder = _hold(h)
            return self.last(torch.relu(h) + holder.joined())

    torch.manual_seed(0)
    path, _ = compared(Network(None).eval())
    assert path == "incremental (torch.fx)"


def test_a_patch_is_not_written_into_what_a_layer_was_given():
    class Network(Between):
        def forward(self, x):
            h = self.second(torch.sin(self.first(x)))
            return self.last(torch.sin(self.operation(h)) + h)

    torch.manual_seed(0)
    path, _ = compared(Network(GivesItsInput()).eval())
    assert path == "incremental (torch.fx)"


class Filled(nn.Module):
    """Memory that is made to be written over, in two slices."""

    def __init__(self, make):
        super().__init__()
        self.a, self.o, self.make = nn.Linear(8, 16), nn.Linear(16, 3), make

    def forward(self, x):
        h = self.make(x)
        h[:, :8] = self.a(x)[:, :8]
        h[:, 8:] = self.a(x)[:, 8:].sin()
        return self.o(torch.relu(h))


UNSET = {
    "empty": lambda x: torch.empty(len(x), 16, dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(len(x), 16),
    "empty_like": lambda x: torch.empty_like(x).repeat(1, 2),
    "new_zeros": lambda x: x.new_zeros(len(x), 16),
}


@pytest.mark.parametrize("name", UNSET)
def test_memory_that_is_made_to_be_written_over_is_captured(name):
    torch.manual_seed(0)
    assert checked_patcher(Filled(UNSET[name]), (8,)).path.startswith("incremental")


class Expanded(nn.Module):
    """One value for all outputs, in one place of memory."""

    def __init__(self):
        super().__init__()
        self.a, self.v = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.v(torch.relu(self.a(x))).expand(-1, 4)


def test_an_expanded_output_is_patched_in_one_of_its_places():
    torch.manual_seed(0)
    assert checked_patcher(Expanded(), (8,)).path.startswith("incremental")


class Parts(nn.Module):
    """Slices of a layer that overlap or leave neurons out, each made dense by what it meets."""

    def __init__(self, *slices):
        super().__init__()
        self.a, self.e, self.slices = nn.Linear(8, 12), nn.Linear(8, 6), slices
        self.o = nn.Linear(6 * len(slices), 3)

    def forward(self, x):
        h, e = self.a(x), self.e(x)
        parts = [torch.stack([h[:, s]] * 6, 1) @ e[:, :, None] for s in self.slices]
        return self.o(torch.cat([torch.tanh(part).flatten(1) for part in parts], 1))


@pytest.mark.parametrize("slices", [
    [slice(0, 6), slice(6, 12)], [slice(2, 8), slice(4, 10)], [[3, 3, 3, 5, 7, 0], slice(0, 12, 2)],
])  # fmt: skip
def test_neurons_with_missing_and_several_features_are_written_where_they_belong(slices):
    torch.manual_seed(0)
    assert checked_patcher(Parts(*slices), (8,)).path.startswith("incremental")
