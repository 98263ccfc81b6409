"""A patch stays sparse through operations that mix no neurons, whatever else they mix."""

from __future__ import annotations

import pytest
import torch
from networks import AS_IF_LARGE, NotTraced, changed_by, check_equal, checked_on, checked_patcher
from torch import fx, nn
from torch.nn import functional as F

from raypatch.agents.exported import with_layers
from raypatch.engine.capture_export import exported_graph_module
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs


class Between(nn.Module):
    """An operation on a layer's neurons at several places; ``constant`` is the same in every pass
    and ``other`` depends on the input, but not on the patched layer."""

    def __init__(self, first, operation, shape, module=None):
        super().__init__()
        self.first, self.operation, self.module = first, operation, module
        self.other = nn.Linear(shape[-1], 5)
        self.constant = nn.Parameter(torch.randn(5, 5))
        with torch.no_grad():
            self.last = nn.Linear(self.mixed(torch.zeros(1, *shape))[0].shape[1], 3)

    def mixed(self, x):
        h, other = self.first(x), self.other(x)
        return self.operation(self, h, other).flatten(1), other.flatten(1)[:, :3]

    def forward(self, x):
        mixed, other = self.mixed(x)
        return self.last(mixed) + other


class Exported(NotTraced, Between):
    pass


def _attended(net, h, other):
    return F.scaled_dot_product_attention(other, other, h)


# On [N, 5 places, 6 neurons].
OF_SEQUENCES = {
    "mean": lambda net, h, other: h.mean(1),
    "mean, kept": lambda net, h, other: h - h.mean(dim=1, keepdim=True),
    "torch.mean": lambda net, h, other: torch.mean(h, -2),
    "sum": lambda net, h, other: h.sum(axis=1),
    "amax": lambda net, h, other: h.amax(dim=(1,)),
    "max, by name": lambda net, h, other: h.max(1).values,
    "max, by place": lambda net, h, other: torch.max(h, dim=1, keepdim=True)[0],
    "where the largest is": lambda net, h, other: h.max(1).indices.to(h.dtype),
    "min": lambda net, h, other: h.min(1)[0],
    "prod": lambda net, h, other: h.prod(1),
    "var": lambda net, h, other: h.var(1),
    "std": lambda net, h, other: torch.std(h, dim=1, unbiased=False),
    "logsumexp": lambda net, h, other: h.logsumexp(1),
    "softmax": lambda net, h, other: h * torch.softmax(h, 1),
    "F.log_softmax": lambda net, h, other: F.log_softmax(h, dim=1),
    "cumsum": lambda net, h, other: h.cumsum(1),
    "with another value": lambda net, h, other: torch.cat([h, other.tanh()], -1).mean(1),
    "beside another value": lambda net, h, other: torch.cat([h, other[..., :1] * h], 1).amax(1),
    "linear": lambda net, h, other: F.linear(h.transpose(1, 2), net.constant),
    "matmul from the left": lambda net, h, other: net.constant @ h,
    "matmul from the right": lambda net, h, other: torch.matmul(h.mT, net.constant),
    "bmm": lambda net, h, other: torch.bmm(other, h),
    "what attends": lambda net, h, other: (other @ other.mT).softmax(-1).matmul(h),
    "attention": _attended,
    "heads": lambda net, h, other: _attended(
        net, h.view(-1, 5, 2, 3).transpose(1, 2), other[:, None]
    ),
    "padding": lambda net, h, other: F.pad(h, (0, 0, 2, 1), value=0.3),
    "circular padding": lambda net, h, other: F.pad(h.mT, (2, 0), "circular"),
    "repeated places": lambda net, h, other: h.repeat_interleave(2, 1),
    "chosen places": lambda net, h, other: torch.stack([h[:, [3, 0]], h[:, 1:3]], 1),
    "zeros of its form": lambda net, h, other: torch.where(h > 0, h, torch.zeros_like(h)),
    "ones of its form": lambda net, h, other: torch.cat([h, h.new_ones(len(h), 5, 1)], 2),
    "a constant cast": lambda net, h, other: h * net.constant[:, :1].to(h) + torch.ones(6).to(h),
    "a constant of its type": lambda net, h, other: h + net.constant[:, 1:2].type_as(h),
    "a mask": lambda net, h, other: h * (h > 0),
    "where": lambda net, h, other: torch.where(h.lt(0), 0.1 * h, h),
    "masked_fill": lambda net, h, other: h.masked_fill((h > -0.5) & (h < 0.5), 0.3),
    "either mask": lambda net, h, other: (((h > 1) | (h < -1)) ^ (h > 2)).float() + h % 1,
    "not a mask": lambda net, h, other: (~(h >= 0)).to(h.dtype) + torch.ne(h, 0),
}
# On [N, 6 channels, 4, 3].
OF_MAPS = {
    "mean": lambda net, h, other: h.mean((2, 3)),
    "amax": lambda net, h, other: torch.amax(h, (-1, -2), keepdim=True),
    "softmax": lambda net, h, other: F.softmax(h.flatten(2), dim=-1),
    "squeeze and excite": lambda net, h, other: h * h.mean([2, 3], keepdim=True).sigmoid(),
}
MODULES = {
    "nn.Linear": (lambda: nn.Linear(5, 4), "sequence"),
    "nn.Softmax": (lambda: nn.Softmax(2), "sequence"),
    "nn.Softmin": (lambda: nn.Softmin(-1), "sequence"),
    "nn.CircularPad1d": (lambda: nn.CircularPad1d((2, 0)), "sequence"),
    "nn.ConstantPad3d": (lambda: nn.ConstantPad3d((1, 0, 0, 1, 2, -2), 0.3), "map"),
    "nn.ReplicationPad2d": (lambda: nn.ReplicationPad2d(1), "map"),
    "nn.UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), "map"),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), "map"),
    "depthwise, twice": (lambda: nn.Conv2d(6, 12, 2, stride=2, groups=6, bias=False), "map"),
    "depthwise in one dimension": (lambda: nn.Conv1d(6, 12, 3, groups=6), "sequence"),
}
MIXING_NEURONS = {
    "sum": lambda net, h, other: h.sum(-1),
    "softmax": lambda net, h, other: h.softmax(2),
    "linear": lambda net, h, other: F.linear(h, net.constant[:, :1].expand(-1, 6)),
    "of itself": lambda net, h, other: h @ h.mT,
    "attention to itself": lambda net, h, other: F.scaled_dot_product_attention(h, h, h),
    "both": lambda net, h, other: h.mean((1, 2), keepdim=True),
    "a count": lambda net, h, other: (h > 0).sum(-1, keepdim=True).to(h.dtype),
    "a place in a table": lambda net, h, other: net.constant[(h > 0).long()].flatten(2),
    "places chosen": lambda net, h, other: net.constant.index_select(
        0, (h > 0).long().flatten()
    ).view(-1, 5, 30),
    "masks that meet": lambda net, h, other: h * (h.flip(2) > 0),
}


def _on_sequence(operation, kind=Between, module=None):
    return kind(nn.Linear(4, 6), operation, (5, 4), module), (5, 4)


def _on_map(operation, kind=Between, module=None):
    return kind(nn.Conv2d(2, 6, 3, padding=1), operation, (2, 4, 3), module), (2, 4, 3)


def _with_module(name):
    module, of = MODULES[name]
    if of == "map":
        return _on_map(lambda net, h, other: net.module(h), Between, module())
    return _on_sequence(lambda net, h, other: net.module(h.mT), Between, module())


CASES = {
    **{f"sequence: {name}": (lambda f=f: _on_sequence(f)) for name, f in OF_SEQUENCES.items()},
    **{f"map: {name}": (lambda f=f: _on_map(f)) for name, f in OF_MAPS.items()},
    **{
        f"exported: {name}": (lambda f=f: _on_sequence(f, Exported))
        for name, f in OF_SEQUENCES.items()
    },
    **{f"exported map: {name}": (lambda f=f: _on_map(f, Exported)) for name, f in OF_MAPS.items()},
    **{f"module: {name}": (lambda name=name: _with_module(name)) for name in MODULES},
}


def _checked(build, kind="pair"):
    torch.manual_seed(3)
    return checked_patcher(*build(), kind=kind)


def _stays_sparse(patcher):
    """Whether the last layer is given a sparse value when the first is patched."""
    structure = patcher._engine.structure
    last = next(node for node in structure.nodes if node.path == "last")
    return last.inputs[0] in structure.chains.after(structure.calls["first"][0])


@pytest.mark.parametrize("kind", ["pair", "zero"])
@pytest.mark.parametrize("name", CASES)
def test_what_mixes_no_neurons_keeps_a_patch_sparse_and_its_numbers(name, kind):
    patcher = _checked(CASES[name], kind)
    assert patcher.path.startswith("incremental") and _stays_sparse(patcher)
    assert ("torch.export" in patcher.path) == name.startswith("exported")


@pytest.mark.parametrize("name", MIXING_NEURONS)
def test_what_mixes_neurons_makes_it_dense(name):
    patcher = _checked(lambda: _on_sequence(MIXING_NEURONS[name]))
    assert patcher.path.startswith("incremental") and not _stays_sparse(patcher)


def test_a_convolution_with_some_channels_a_group_makes_it_dense():
    module = nn.Conv2d(6, 6, 3, groups=3)
    patcher = _checked(lambda: _on_map(lambda net, h, other: net.module(h), module=module))
    assert not _stays_sparse(patcher)


@pytest.mark.parametrize("seed", range(10))
def test_differences_that_are_exactly_zero_stay_so(seed):
    """A comparison with zero turns the last bit of an average into a whole number."""

    def operation(net, h, other):
        h = h - h.mean(1, keepdim=True)
        return torch.where(h > 0, h, net.constant[:, :1])

    torch.manual_seed(seed)
    network, shape = _on_sequence(operation)
    target = torch.randn(4, *shape)
    experiments = [{"first": [i]} for i in range(6)] + [{"first": "all"}]
    outputs = Patcher(network, dtype=torch.float64)(experiments, None, target, kind="zero")
    expected = reference_outputs(network, experiments, None, target, kind="zero")
    check_equal(outputs, expected, torch.float64)


@fx.wrap
def _best_of(found):
    """Reads values and their places together."""
    return found.values + found.indices


def test_several_sparse_results_can_be_read_as_one():
    patcher = _checked(lambda: _on_sequence(lambda net, h, other: _best_of(h.max(1))))
    assert patcher.path == "incremental (torch.fx)" and not _stays_sparse(patcher)


@pytest.mark.parametrize("infinite", ["source", "target"])
def test_infinite_values_leave_no_trace_once_they_are_gone(infinite):
    """Infinity is not taken away by adding a difference."""

    class Logarithms(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)
            self.conv, self.last = nn.Conv1d(6, 5, 1), nn.Linear(10, 3)

        def forward(self, x):
            h = torch.relu(self.first(x) + 3).log()
            h, maps = self.second(h.amax(1)), self.conv(h.mT).amax(2)
            return self.last(torch.cat([h, maps], 1).clamp(-9, 9).nan_to_num(0.5))

    torch.manual_seed(0)
    network = Logarithms().eval()
    source, target = torch.randn(4, 5, 4), torch.randn(4, 5, 4)
    (source if infinite == "source" else target)[1:].mul_(100)
    experiments = [{"first": [i]} for i in range(6)] + [{"first": [0, 3]}, {"first": "all"}]
    patcher = Patcher(network, dtype=torch.float64)
    outputs = patcher(experiments, source, target)
    check_equal(outputs, reference_outputs(network, experiments, source, target), torch.float64)
    assert patcher.path == "incremental (torch.fx)"


def test_one_neuron_that_comes_to_own_everything_takes_no_table_of_all():
    gate = nn.Linear(1, 400)

    def operation(net, h, other):
        return torch.sigmoid(net.module(h[:, 0, :1])) + other.sum((1, 2))[:, None]

    network, shape = _on_sequence(operation, module=gate)
    patcher = checked_patcher(network, shape)
    structure = patcher._engine.structure
    chain = structure.chains.after(structure.calls["first"][0])
    assert max(of.positions.numel() for of in chain.values()) <= 2 * 5 * 6


# --------------------------------------------------- inputs that share an axis with entries


class Entries(nn.Module):
    """Three entries an input, each with five places, in one axis with the inputs."""

    def __init__(self, operation, first=None):
        super().__init__()
        self.first, self.second = first or nn.Linear(4, 6), nn.Linear(6, 5)
        self.conv, self.state = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(4, 6)
        self.fractions, self.operation = nn.Parameter(torch.randn(3, 5, 6)), operation
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        h = self.operation(self, self.first(x.flatten(0, 1)), x)
        return self.last(torch.relu(self.second(h)).view(x.shape[0], -1, 5).mean(1))


def _conditioned(net, h, x):
    """A value of each input times one of each entry, as of quantiles."""
    state = torch.tanh(net.state(x[:, 0, 0]))
    return h + (state[:, None, None] * net.fractions).flatten(0, 1)


OF_ENTRIES = {
    "as they are": lambda net, h, x: h,
    "activations": lambda net, h, x: F.relu(h) * (h > -0.5),
    "an average of places": lambda net, h, x: h - h.mean(1, keepdim=True),
    "a convolution": lambda net, h, x: net.conv(h.mT).mT,
    "quantiles": _conditioned,
    "entries in an axis of their own": lambda net, h, x: (
        h.view(-1, 3, 5, 6).amax(1, keepdim=True).expand(-1, 3, -1, -1).reshape(-1, 5, 6)
    ),
}
# What tells an input's entries apart by neurons: dense, and right.
OF_ENTRIES_APART = {
    "neurons as entries": lambda net, h, x: (
        h.view(-1, 3, 5, 6)
        .transpose(1, 3)
        .reshape(-1, 5, 3)
        .repeat(1, 1, 2)
        .view(-1, 2, 5, 6)[:, 0]
    ),
    "one neuron for one entry": lambda net, h, x: (
        h.view(-1, 3, 5, 6) * torch.eye(3, 6)[:, None].to(h) + h.view(-1, 3, 5, 6).flip(3)
    ).flatten(0, 1),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["pair", "mean"])
@pytest.mark.parametrize("name", [*OF_ENTRIES, *OF_ENTRIES_APART])
def test_patches_of_inputs_with_entries_equal_plain_hooks(name, kind, large, monkeypatch):
    for threshold, value in AS_IF_LARGE.items() if large else ():
        monkeypatch.setattr(f"raypatch.engine.prepared.{threshold}", value)

    def build():
        return Entries({**OF_ENTRIES, **OF_ENTRIES_APART}[name]), (3, 5, 4)

    patcher = _checked(build, kind)
    assert patcher.path == "incremental (torch.fx)"


@pytest.mark.parametrize("name", OF_ENTRIES)
def test_a_patch_stays_sparse_where_inputs_share_an_axis(name):
    patcher = _checked(lambda: (Entries(OF_ENTRIES[name]), (3, 5, 4)))
    structure = patcher._engine.structure
    reader = "conv" if name == "a convolution" else "second"
    node = next(node for node in structure.nodes if node.path == reader)
    for layer in ("first", "state") if name == "quantiles" else ("first",):
        assert structure.chains.after(structure.calls[layer][0])[node.inputs[0]].per_input == 3


def test_an_entry_that_does_not_change_changes_no_row_unless_another_does():
    """Both entries of an input are looked at: here the first is off in both runs."""

    def operation(net, h, x):
        return torch.relu(h)

    torch.manual_seed(0)
    network = Entries(operation).eval()
    source, target = torch.rand(4, 3, 5, 4), torch.rand(4, 3, 5, 4)
    with torch.no_grad():
        network.first.weight.fill_(1.0)
        network.first.bias.fill_(-2.0)
    source[:, :2], target[:, :2] = 0, 0
    target[0], source[1] = 0, target[1]
    experiments = [{"first": [i]} for i in range(6)]
    run = Patcher(network).prepare(source, target)
    check_equal(
        run(experiments), reference_outputs(network, experiments, source, target), torch.float32
    )
    changed = changed_by(run._prepare(0), "first")
    assert changed.tolist() == [[True, False, True, True]] * 6


@pytest.mark.parametrize(
    "between",
    [nn.BatchNorm2d(6), nn.AdaptiveMaxPool2d(2), nn.LogSigmoid(), nn.ConstantPad2d(1, 2.0)],
    ids=lambda module: type(module).__name__,
)
def test_dead_channels_of_an_exported_program_are_the_baseline_bit_for_bit(between):
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 6, 3), between, nn.Threshold(0.1, 0.0), nn.Flatten()]
    network = nn.Sequential(*parts, nn.LazyLinear(3))
    network(torch.randn(4, 2, 8, 8))
    network.eval()
    free = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(network, (torch.zeros(2, 2, 8, 8),), dynamic_shapes=free)
    again = with_layers(exported_graph_module(program))
    source, target = torch.randn(2, 5, 2, 8, 8)
    experiments = [{"0": [i]} for i in range(6)]
    patcher = Patcher(again)
    found = patcher(experiments, source, target)
    expected = reference_outputs(network, experiments, source, target)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    after = parts[2](between(network[0](target))) != parts[2](between(network[0](source)))
    still = ~after.flatten(2).any(-1).t()
    unpatched = patcher.prepare(source, target).baseline.expand_as(found)
    assert torch.equal(found[still], unpatched[still])
    structure = patcher._engine.structure
    (layer,) = structure.calls["0"]
    assert "reshape" in {structure.nodes[i].name for i in structure.chains.after(layer)}


def test_the_sign_of_a_zero_is_a_change():
    class Heading(nn.Module):
        """Rounded features, and the angle of every two."""

        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.round(self.a(x) * 4)
            return self.o(torch.atan2(h[:, :8], h[:, 8:]))

    torch.manual_seed(0)
    assert checked_on(Heading(), *torch.randn(2, 200, 8)).path.startswith("incremental")


@pytest.mark.parametrize("between", [
    lambda h: h * (h > 0.8), lambda h: torch.round(h / 2), lambda h: h * torch.arange(8).clamp(max=1),
])  # fmt: skip
def test_the_sign_of_a_zero_is_no_change_where_nothing_asks_for_it(between):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.o(torch.tanh(self.b(between(self.a(x)))))

    torch.manual_seed(0)
    network, (source, target) = Masked(), torch.randn(2, 50, 6)
    patcher = Patcher(network)
    run = patcher.prepare(source, target)
    found = run([{"a": [j]} for j in range(8)])
    with torch.no_grad():
        changes = between(network.a(source)) != between(network.a(target))
    still = (found == run.baseline).all(-1)
    assert torch.equal(still, ~changes.T) and still.any()
