"""A trial tells what is another network from what is rounding, whatever the outputs' size."""

import random

import numpy as np
import pytest
import torch
from networks import NotTraced, check_equal, checked_patcher, counts_of
from torch import nn
from torch.distributions import Categorical, Distribution, Normal
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import raypatch
from raypatch.engine.layers import hooked
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.errors import InputError


class Two(nn.Module):
    def __init__(self, n_inputs=6):
        super().__init__()
        self.a, self.b = nn.Linear(n_inputs, 8), nn.Linear(8, 3)


def checked(network, source, target, dtype=torch.float64, layers=None):
    """A patcher whose outputs were compared with those of plain hooks; float32's with what patches
    change, too."""
    network.eval()
    args = target if isinstance(target, tuple) else (target,)
    counts = counts_of(network, args)
    chosen = layers or list(counts)
    experiments = [{name: [i]} for name in chosen for i in range(counts[name])]
    experiments += [{name: "all"} for name in chosen]
    patcher = Patcher(network, dtype=dtype)
    found = patcher(experiments, source, target)
    expected = reference_outputs(network, experiments, source, target)
    check_equal(found, expected, dtype)
    with torch.no_grad():
        effect = (expected - network(*args)).abs().amax()
    assert (found.double() - expected).abs().amax() <= 1e-2 * effect
    return patcher


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------- outputs of very unlike sizes


class Mixes(Two):
    """Mixes the inputs of a batch, and masks an output."""

    def __init__(self, fill):
        super().__init__()
        self.fill = fill

    def forward(self, x, mask):
        h = torch.relu(self.a(x))
        return self.b(h - h.mean(0, keepdim=True)).masked_fill(mask == 0, self.fill)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [-1e10, -torch.inf])
def test_masked_outputs_hide_no_wrong_ones(fill, dtype):
    mask = torch.ones(4, 3)
    mask[1:, 2] = 0
    network = Mixes(fill).eval()
    patcher = Patcher(network, dtype=dtype)
    experiments = [{"a": [i]} for i in range(8)]
    source, target = (torch.randn(4, 6), mask), (torch.randn(4, 6), mask)
    found = patcher(experiments, source, target)
    expected = reference_outputs(network, experiments, source, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert patcher.path.startswith("single")


class Recurrent(nn.Module):
    """Time first, and its last layer begins small, as recurrent agents have it."""

    def __init__(self, gain):
        super().__init__()
        self.enc, self.rnn, self.actor = nn.Linear(4, 8), nn.GRU(8, 8), nn.Linear(8, 3)
        nn.init.orthogonal_(self.actor.weight, gain)
        nn.init.zeros_(self.actor.bias)

    def forward(self, *args):
        (x,) = args
        h = torch.relu(self.enc(x.transpose(0, 1).reshape(-1, 4)))
        return self.actor(self.rnn(h.view(x.shape[1], -1, 8))[0][-1])


@pytest.mark.parametrize("gain", [1.0, 1e-3, 1e-6])
def test_small_outputs_hide_no_wrong_ones(gain):
    network = Recurrent(gain)
    patcher = checked(network, torch.randn(4, 3, 4), torch.randn(4, 3, 4), torch.float32)
    assert patcher.path.startswith("incremental (torch.export")


# ------------------------------------------------------------- modules of several names, hooks


class SharedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        encoder = nn.Linear(6, 8)
        self.actor = nn.ModuleDict({"enc": encoder, "head": nn.Linear(8, 3)})
        self.critic = nn.ModuleDict({"enc": encoder, "head": nn.Linear(8, 3)})

    def forward(self, x):
        actor = self.actor["head"](torch.relu(self.actor["enc"](x)))
        return 1e-4 * (actor + self.critic["head"](torch.tanh(self.critic["enc"](2 * x))))


@pytest.mark.parametrize("mixins", [(), (NotTraced,)], ids=["fx", "export"])
def test_a_module_of_two_names_is_patched_wherever_it_is_called(mixins):
    network = type("Network", (*mixins, SharedEncoder), {})()
    patcher = checked(network, torch.randn(3, 6), torch.randn(3, 6))
    assert patcher.path.startswith(f"incremental (torch.{'export' if mixins else 'fx'}")
    assert "actor.enc" in patcher.layers and "critic.enc" not in patcher.layers


@pytest.mark.parametrize("mixins", [(), (NotTraced,)], ids=["fx", "export"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_the_users_own_belong_to_a_layer(before, mixins):
    class Plain(Two):
        def __init__(self):
            super().__init__()
            self.mid = nn.Linear(8, 8)

        def forward(self, x):
            return 1e-4 * self.b(torch.relu(self.mid(torch.relu(self.a(x)))))

    network = type("Network", (*mixins, Plain), {})()
    if before:
        network.mid.register_forward_pre_hook(lambda _, args: (args[0] ** 2,))
    else:
        network.mid.register_forward_hook(lambda _, __, output: output.clamp(-0.2, 0.2))
    patcher = checked(network, torch.randn(3, 6), torch.randn(3, 6))
    assert patcher.path.startswith("incremental")


# ------------------------------------------------------------- what a network may hold and give


class Complex(Two):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, x):
        h = torch.tanh(self.a(x)).to(torch.complex64)
        return self.b((h @ self.mix).imag)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_complex_numbers_stay_complex(dtype):
    network, x = Complex().eval(), torch.randn(3, 6)
    found = raypatch.patch(network, [{"a": "all"}], x, x, dtype=dtype)
    expected = reference_outputs(network, [{"a": "all"}], x, x)
    with torch.no_grad():
        torch.testing.assert_close(found[0].float(), network(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(expected[0].float(), network(x), rtol=1e-5, atol=1e-5)
    checked(network, torch.randn(3, 6), x, dtype or torch.float32, layers=["a", "b"])


class Keeps(Two):
    """Keeps values in its modules, as those of the last forward that a loss is made of."""

    def forward(self, x):
        self.features = [torch.relu(self.a(x))]
        return self.b(self.features[0])


def test_what_a_forward_keeps_is_no_hindrance_and_not_lost():
    network = Keeps()
    network(torch.randn(2, 6)).sum().backward()
    kept = network.features[0]
    assert checked(network, torch.randn(3, 6), torch.randn(3, 6)).path == "incremental (torch.fx)"
    patcher = Patcher(network)
    patcher([{"a": [0]}], torch.randn(3, 6), torch.randn(3, 6))
    assert type(patcher._network.features[0]) is torch.Tensor
    raypatch.patch(Keeps(), [{"a": [0]}], torch.randn(3, 6), torch.randn(3, 6))
    assert kept.shape == (2, 8)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.gru = nn.Linear(4, 6), nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        packed = pack_padded_sequence(self.e(x), lengths, True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][-1])


class GivesADistribution(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Linear(6, 3), nn.Parameter(torch.zeros(1, 3))

    def forward(self, x):
        return Normal(self.mean(x), self.log_std.exp()), None


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.agent = GivesADistribution()

    def forward(self, x):
        return self.agent(x)[0].mean


@pytest.mark.parametrize(
    ("kind", "shape", "no_layer"), [(Packed, (5, 4), "gru"), (Wrapped, (6,), "agent")]
)
def test_a_module_that_gives_no_tensor_is_no_layer(kind, shape, no_layer):
    network, x = kind(), torch.randn(3, *shape)
    assert no_layer not in checked(network, torch.randn(3, *shape), x).layers
    with pytest.raises(InputError, match=f"'{no_layer}' .* gives no tensor"):
        raypatch.patch(network, [{no_layer: [0]}], x, x)


class Policy(Two):
    def forward(self, x):
        return Categorical(logits=self.b(torch.tanh(self.a(x)))).logits


def test_a_distribution_on_the_way_is_captured_and_checked_as_before():
    before = Distribution._validate_args
    try:
        for checks in (True, False):
            Distribution.set_default_validate_args(checks)
            patcher = checked(Policy(), torch.randn(3, 6), torch.randn(3, 6))
            assert patcher.path.startswith("incremental")
            assert Distribution._validate_args is checks
    finally:
        Distribution.set_default_validate_args(before)


class ReadsBoth(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.core, self.head = nn.Linear(6, 8), nn.GRU(8, 8), nn.Linear(16, 3)

    def forward(self, x):
        steps, state = self.core(torch.relu(self.e(x)).unsqueeze(0))
        return self.head(torch.cat([steps[0], state[-1]], 1))


def test_an_exported_recurrent_layer_is_patched_where_its_state_is_read_too():
    network = type("Network", (NotTraced, ReadsBoth), {})()
    patcher = checked(network, torch.randn(3, 6), torch.randn(3, 6))
    assert patcher.path.startswith("incremental (torch.export")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parts_that_torch_compiles_go_by_their_own_names():
    inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    network = nn.Sequential(torch.compile(inner), nn.Linear(8, 3))
    plain = nn.Sequential(inner, network[1])
    x, y = torch.randn(2, 3, 6)
    found = raypatch.patch(network, [{"0.0": [2]}], x, y)
    torch.testing.assert_close(found, raypatch.patch(plain, [{"0.0": [2]}], x, y))


# ------------------------------------------------------------- refused


class Draws(Two):
    def forward(self, x):
        return self.b(F.dropout(torch.relu(self.a(x))))  # in training, whatever mode it is in


class DrawsSeldom(Two):
    """Its first two forwards give the same."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) * (self.draw() > 0.05))


DRAWS = {
    "torch": (torch.manual_seed, lambda: float(torch.rand(()))),
    "numpy": (np.random.seed, lambda: np.random.rand()),
    "python": (random.seed, lambda: random.random()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_network_whose_random_numbers_seldom_show_is_refused(name):
    seed, draw = DRAWS[name]
    network = DrawsSeldom(draw)
    seed(0)
    assert min(draw() for _ in range(4)) > 0.05 > min(draw() for _ in range(80))
    seed(0)
    with pytest.raises(InputError, match="other outputs for the same inputs"):
        raypatch.patch(network, [{"a": [0]}], torch.zeros(3, 6), torch.ones(3, 6))


class Counts(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.n = self.n + 1
        return self.b(torch.relu(self.a(x))) * self.n


@pytest.mark.parametrize("kind", [Draws, Counts])
def test_a_network_that_gives_other_outputs_when_it_is_called_again_is_refused(kind):
    with pytest.raises(InputError, match="other outputs for the same inputs"):
        raypatch.patch(kind(), [{"a": [0]}], torch.randn(3, 6), torch.randn(3, 6))


class DrawsAnAction(Two):
    def forward(self, x):
        logits = self.b(torch.relu(self.a(x)))
        self.action = torch.multinomial(logits.softmax(-1), 1)
        return logits


def test_random_numbers_that_do_not_reach_the_outputs_are_no_hindrance():
    assert checked_patcher(DrawsAnAction(), (6,)).path.startswith("incremental")


class Routes(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x):
        out, on = torch.zeros(len(x), 3, dtype=x.dtype), x[:, 0] > 0
        out[on] = self.one(x[on])
        out[~on] = self.other(x[~on])
        return out


def test_a_layer_that_gets_other_inputs_on_the_other_side_is_named():
    target = torch.tensor([[1.0, 2], [1, 3], [-1, 2], [-1, 1]])
    source = torch.tensor([[1.0, 1], [-1, 1], [-1, 2], [-1, 0]])
    with pytest.raises(InputError, match="layer 'one' gives .* which inputs reach it depends"):
        raypatch.patch(Routes(), [{"one": [0]}], source, target)


def test_a_part_that_is_compiled_to_torchscript_is_named():
    with pytest.warns((DeprecationWarning, FutureWarning)):
        network = nn.Sequential(nn.Linear(6, 8), torch.jit.script(nn.Linear(8, 3)))
    with pytest.raises(InputError, match="its module '1' is a ScriptModule"):
        raypatch.patch(network, [{"0": [0]}], torch.randn(3, 6), torch.randn(3, 6))


# ------------------------------------------------------------- decisions by how much there is


class DecidesBySize(Two):
    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.tanh(h) if self.read(h > 3) else h)


SIZES = {
    "length": lambda m: len(m.nonzero()) > 0,
    "number": lambda m: m.nonzero().numel() > 0,
    "chosen": lambda m: m[m].shape[0] > 0,
    "where": lambda m: torch.where(m)[0].size(0) > 0,
    "in": lambda m: True in m,
    "unique": lambda m: len(torch.unique(m)) > 1,
    "later": lambda m: (m.nonzero() * 2).shape[0] > 0,
}


@pytest.mark.parametrize("name", SIZES)
def test_stacked_experiments_do_not_decide_for_each_other_by_how_many_values_there_are(name):
    source, target = torch.randn(2, 6, 6) / 2
    source[5] *= 20
    patcher = checked(DecidesBySize(SIZES[name]), source, target)
    assert patcher.path.startswith("single")


def test_hooks_see_modules_that_give_no_tensor_without_failing():
    network, x, seen = Packed(), torch.randn(2, 5, 4), []
    expected = network(x)
    with hooked(network, {"gru": lambda _, output: seen.append(output)}):
        found = network(x)
    assert seen == [] and torch.equal(found, expected)


class Squeezes(Two):
    def forward(self, x):
        return self.b(torch.relu(self.a(x)).squeeze()).reshape(x.shape[0], -1)


def test_a_layer_that_gets_an_axis_less_of_one_input_is_patched():
    network, four, one = Squeezes(), torch.randn(4, 1, 6), torch.randn(1, 1, 6)
    patcher = Patcher(network)
    patcher([{"b": [0]}], four, -four)
    experiments = [{"b": [0]}, {"b": [1]}, {"b": "all"}, {"a": [3]}]
    expected = reference_outputs(network, experiments, one, -one)
    check_equal(patcher(experiments, one, -one), expected, torch.float32)
