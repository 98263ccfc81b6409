"""Networks whose experiments cannot be stacked, also where the first inputs do not show it."""

from collections import namedtuple

import pytest
import torch
from networks import BetweenTwo, check_equal, checked_on_small_then_large
from torch import nn

from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.errors import InputError

MIXES = {
    "largest": lambda h: h / torch.clamp(h.amax(), min=8),
    "any": lambda h: torch.where((h > 8).any(), h / 2, h),
    "count": lambda h: h / (1 + (h > 8).sum()),
    "no number replaced": lambda h: h / torch.nan_to_num(h).max().clamp(min=8),
    "places": lambda h: h * (1 + (h.argmax(0)[None] == 0) * (h > 8)),
}


@pytest.mark.parametrize("mixes", MIXES)
def test_what_mixes_inputs_for_large_values_only_goes_one_experiment_at_a_time(mixes):
    assert checked_on_small_then_large(MIXES[mixes]).startswith("single (")


def test_mixing_that_no_capture_sees_is_found_by_what_is_no_number():
    def between(h):
        out = torch.zeros_like(h)
        for i, row in enumerate(h):
            out[i] = row / torch.clamp(h.amax(), min=8)
        return out

    path = checked_on_small_then_large(between)
    assert path.startswith("single (") and "for one input depends on others" in path


def raises_and_catches(h):
    try:
        if (h.abs() > 8).any():
            raise ValueError("saturated")
    except ValueError:
        return torch.tanh(h)
    return h


def swallows(h):
    try:
        large = int(h.max())
    except Exception:
        large = 0
    return h / (1 + min(large // 8, 1))


@pytest.mark.parametrize("decides", [raises_and_catches, swallows])
def test_a_decision_whose_error_in_tracing_the_network_catches_is_no_graph(decides):
    path = checked_on_small_then_large(decides)
    assert path.startswith("single (torch.fx: the network ") and "decides by values" in path


def test_a_check_that_reads_numbers_keeps_no_network_from_being_traced():
    def between(h):
        shares = torch.softmax(h, -1)
        if not torch.allclose(shares.sum(-1), torch.ones(h.shape[0], dtype=h.dtype)):
            raise ValueError("no shares")
        if torch.isnan(h).any().item():
            raise ValueError("no numbers")
        return shares

    assert checked_on_small_then_large(between) == "incremental (torch.fx)"


def test_a_forward_that_cannot_be_watched_is_patched():
    def between(h):
        return torch.cond(h.sum() > 50, lambda h: h * 2.0, lambda h: h - 0.5, (h,))

    assert checked_on_small_then_large(between).startswith("single (")


class Slow(nn.Module):
    """Moves its statistics a little in every forward."""

    def __init__(self, count):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.count = count

    def forward(self, x):
        self.mean += (x.mean(0) - self.mean) / self.count
        return self.b(torch.relu(self.a(x - self.mean)))


@pytest.mark.parametrize("count", [1e2, 1e6])
def test_a_network_that_changes_in_every_forward_is_refused_however_little(count):
    with pytest.raises(InputError, match="other outputs for the same inputs"):
        Patcher(Slow(count))([{"a": [0]}], torch.randn(4, 6) + 1, torch.randn(4, 6) + 1)


class Routes(nn.Module):
    """Each input by one of two experts, which get only theirs."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 4), nn.Linear(2, 4)])

    def forward(self, x):
        out = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            (places,) = torch.where((x[:, 0] > 0) == bool(i))
            if len(places):
                out.index_copy_(0, places, expert(x[places]))
        return out


def test_as_many_inputs_of_a_layer_on_both_sides_need_not_be_the_same():
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 3.0]])
    network, experiments = Routes(), [{"experts.1": [0]}]
    with pytest.raises(InputError, match="which inputs reach it depends on their values"):
        Patcher(network)(experiments, torch.cat([one, other]), torch.cat([other, one]))
    found = Patcher(network)(experiments, 2 * one, one)
    check_equal(found, reference_outputs(network, experiments, 2 * one, one), torch.float32)


class Halts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.a(x)
        for _ in range(4):
            h = torch.tanh(self.b(h))
            if bool((h.sum(1) > 0).all()):
                break
        return h


def test_a_layer_that_is_called_as_often_as_inputs_say_has_no_mean():
    torch.manual_seed(1)
    with pytest.raises(InputError, match="how often 'b' is called depends on its inputs"):
        Patcher(Halts())([{"b": [0]}], target=torch.randn(8, 6) * 3, kind="mean")


# ------------------------------------------------------------- what modules give and hold

Pair = namedtuple("Pair", ["logits", "value"])


class Head(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.randn(6, 8)), kind

    def forward(self, x):
        h = x @ self.weight
        return self.kind(h, h.sum(-1, keepdim=True))


class ReadsPair(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.head, self.out, self.kind = Head(kind), nn.Linear(9, 3), kind

    def forward(self, x):
        given = self.head(x)
        if self.kind is Pair:
            return self.out(torch.cat([given.logits.tanh(), given.value], 1))
        return self.out(torch.cat(given.copy(), 1))


@pytest.mark.parametrize("kind", [Pair, lambda *several: list(several)], ids=["named", "list"])
def test_a_layer_may_give_a_named_tuple_or_a_list(kind):
    network, source, target = ReadsPair(kind).eval(), torch.randn(4, 6), torch.randn(4, 6)
    found = Patcher(network, dtype=torch.float64)([{"head": [3]}, {"head": "all"}], source, target)
    expected = reference_outputs(network, [{"head": [3]}, {"head": "all"}], source, target)
    check_equal(found, expected, torch.float64)
    assert not torch.equal(found[0], found[1])


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def trunk(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))))

    def forward(self, x):
        return self.c(self.trunk(x))


class CompiledInClass(Compiled):
    @torch.compile(backend="eager")
    def trunk(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))))


class CompiledInInstance(Compiled):
    def __init__(self):
        super().__init__()
        self.trunk = torch.compile(self.trunk, backend="eager")


@pytest.mark.parametrize("kind", [CompiledInClass, CompiledInInstance])
def test_layers_in_a_compiled_method_are_patched_and_the_users_network_stays_compiled(kind):
    network, plain = kind().eval(), Compiled().eval()
    plain.load_state_dict(network.state_dict())
    source, target = torch.randn(4, 6), torch.randn(4, 6)
    experiments = [{"a": [1]}, {"b": [2], "a": [0]}, {"c": [0]}]
    found = Patcher(network, dtype=torch.float64)(experiments, source, target)
    check_equal(found, reference_outputs(plain, experiments, source, target), torch.float64)
    assert hasattr(network.trunk, "_torchdynamo_orig_callable")


class Ensemble(nn.Module):
    """Runs one module with the weights of several (torch.vmap)."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(6, 3), nn.Linear(3, 3)
        self.weights = nn.Parameter(torch.randn(4, 3, 6))

    def one(self, weight, x):
        return torch.func.functional_call(self.base, {"weight": weight}, (x,))

    def forward(self, x):
        return self.head(torch.vmap(self.one, in_dims=(0, None))(self.weights, x).mean(0))


def test_layers_that_are_called_for_several_weights_at_once_are_left_out():
    torch.manual_seed(0)
    network, source, target = Ensemble().eval(), torch.randn(4, 6), torch.randn(4, 6)
    patcher = Patcher(network, dtype=torch.float64)
    found = patcher([{"head": [0]}, {"output_logits": [1]}], source, target)
    with torch.no_grad():
        wide = Ensemble().double()
        wide.load_state_dict(network.state_dict())
        given, own = wide(source.double()), wide(target.double())
    for number, neuron in enumerate((0, 1)):
        expected = own.clone()
        expected[:, neuron] = given[:, neuron]
        check_equal(found[number], expected, torch.float64)
    with pytest.raises(
        InputError, match="'base' is not called by the forward on the first inputs, or gives no"
    ):
        patcher([{"base": [0]}], source, target)


def test_a_module_of_tensors_that_hold_no_numbers_may_be_part_of_a_network():
    network = BetweenTwo(torch.tanh).eval()
    network.form = nn.Linear(6, 8, device="meta")  # as ensembles keep one
    source, target = torch.randn(4, 6), torch.randn(4, 6)
    found = Patcher(network)([{"a": [1]}], source, target)
    check_equal(found, reference_outputs(network, [{"a": [1]}], source, target), torch.float32)


class Experts(nn.Module):
    """Inputs go to one of many experts each, so that some get none."""

    def __init__(self):
        super().__init__()
        self.choice, self.last = nn.Linear(6, 8), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))

    def forward(self, x):
        chosen, out = self.choice(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            places = (chosen == number).nonzero().flatten()
            out = out.index_add(0, places, expert(x[places]))
        return self.last(x + out)


def test_layers_that_get_no_input_are_no_hindrance_to_others():
    torch.manual_seed(0)
    network, (source, target) = Experts().eval(), torch.randn(2, 6, 6)
    experiments = [{"last": [0]}, {"choice": [2]}, {"last": "all"}, {"output_logits": [1]}]
    found = Patcher(network, dtype=torch.float64)(experiments, source, target)
    check_equal(found, reference_outputs(network, experiments, source, target), torch.float64)


class Capacity(nn.Module):
    """Two experts, of which each takes the first inputs of a batch that choose it."""

    def __init__(self):
        super().__init__()
        self.choice = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x):
        chosen = nn.functional.one_hot(self.choice(x).argmax(-1), 2)
        place = chosen.cumsum(0) * chosen
        kept = ((place > 0) & (place <= 16)).to(x.dtype)
        return sum(kept[:, k : k + 1] * expert(x) for k, expert in enumerate(self.experts))


def test_places_in_the_batch_are_what_inputs_meet_in_however_many_there_are():
    torch.manual_seed(0)
    network, (source, target) = Capacity().eval(), torch.randn(2, 40, 6)
    experiments = [{"choice": [0]}, {"choice": [1]}]
    patcher = Patcher(network, dtype=torch.float64)
    expected = reference_outputs(network, experiments, source, target)
    check_equal(patcher(experiments, source, target), expected, torch.float64)
    assert patcher.path.startswith("single (")


RUNNING = {
    "largest so far": lambda h: h / h.abs().cummax(0)[0].clamp(min=20),
    "counted over the batch": lambda h: h / (1 + (doubled(h) > 4).to(h.dtype).sum(0, True)),
}


def doubled(h):
    """What no graph holds: sizes by values."""
    h = h.clone()
    large = h[:, 0] > 5
    h[large] = h[large] * 2
    return h


@pytest.mark.parametrize("between", RUNNING)
def test_what_only_comparisons_show_of_other_inputs_goes_one_experiment_at_a_time(between):
    assert checked_on_small_then_large(RUNNING[between]).startswith("single (")


class Caught(nn.Module):
    """Takes another way where a factorisation fails, for all that are in the batch."""

    def __init__(self, traceable):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 3)
        self.b.load_state_dict(self.a.state_dict())
        self.traceable = traceable

    def forward(self, x):
        square = (self.a(x) - self.b(x)).view(-1, 3, 3)
        if not self.traceable:
            square = doubled(square)
        square = square + square.transpose(1, 2) + 25 * torch.eye(3, dtype=x.dtype)
        try:
            root = torch.linalg.cholesky(square)
        except RuntimeError:
            root = torch.linalg.cholesky(square @ square.transpose(1, 2) + torch.eye(3))
        return self.o(root.flatten(1))


@pytest.mark.parametrize("traceable", [True, False])
def test_an_error_that_the_network_catches_decides_for_no_other_experiment(traceable):
    torch.manual_seed(0)
    network, (source, target) = Caught(traceable).eval(), torch.randn(2, 6, 6)
    source[3:] *= 20
    experiments = [{"a": [0]}, {"a": [1]}, {"a": [4]}, {"b": [4]}]
    patcher = Patcher(network, dtype=torch.float64)
    for scale in (1, 20):
        target[3:] *= scale
        expected = reference_outputs(network, experiments, source, target)
        check_equal(patcher(experiments, source, target), expected, torch.float64)


@torch.fx.wrap
def shrunk(x):
    return x / 10 if x.max() > 20 else x


class OwnCode(nn.Module):
    """One node of a trace that is code of the network's own, between two layers."""

    def __init__(self, between, hook=None, pre_hook=None):
        super().__init__()
        self.a, self.between, self.o = nn.Linear(4, 8), between, nn.Linear(8, 3)
        if hook:
            between.register_forward_hook(hook)
        if pre_hook:
            between.register_forward_pre_hook(pre_hook)

    def forward(self, x):
        return self.o(self.between(self.a(x)))


class Own(nn.Module):
    """A layer of the network's own with a function of what it gives."""

    def __init__(self, after):
        super().__init__()
        self.weight, self.after = nn.Parameter(torch.randn(8, 8) * 0.3), after

    def forward(self, x):
        return self.after(nn.functional.linear(x, self.weight))


class Function(nn.Module):
    def forward(self, x):
        return shrunk(x)


OWN_CODE = {
    "a layer that decides": lambda: OwnCode(Own(lambda y: y / 10 if y.max() > 20 else y)),
    "a wrapped function": lambda: OwnCode(Function()),
    "a hook that decides": lambda: OwnCode(
        nn.ReLU(), hook=lambda m, i, o: o / 10 if o.max() > 20 else o
    ),
    "a hook that mixes": lambda: OwnCode(nn.ReLU(), hook=lambda m, i, o: o / o.max().clamp(min=20)),
    "a hook before a layer that mixes": lambda: OwnCode(
        nn.Linear(8, 8), pre_hook=lambda m, i: (i[0] / i[0].abs().max().clamp(min=20),)
    ),
}


@pytest.mark.parametrize("name", OWN_CODE)
def test_code_that_is_one_node_of_a_trace_sees_one_experiment_at_a_time(name):
    torch.manual_seed(0)
    network = OWN_CODE[name]().eval()
    # Both sources alike and large, so that whole batches and inputs by themselves agree.
    source, target = (torch.randn(1, 4) * 60).repeat(2, 1), torch.randn(2, 4)
    experiments = [{"a": [j]} for j in range(8)]
    found = Patcher(network, dtype=torch.float64)(experiments, source, target)
    expected = reference_outputs(network, experiments, source, target)
    check_equal(found, expected, torch.float64)
