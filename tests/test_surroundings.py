"""Results do not depend on what surrounds a call, and what cannot be patched is refused."""

from __future__ import annotations

import copy
import functools
import threading
from typing import NamedTuple

import pytest
import torch
from networks import Deciding, check_equal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raypatch.engine.patcher import Patcher
from raypatch.engine.precision import exact_math
from raypatch.engine.reference import reference_outputs
from raypatch.errors import InputError

EXPERIMENTS = [{"0": [i]} for i in range(8)] + [{"0": "all"}, {"2": [0]}]


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_results_are_plain_float32_within_autocast_and_inference_mode():
    torch.manual_seed(0)
    network, source, target = plain(), torch.randn(5, 6), torch.randn(5, 6)
    patcher = Patcher(network)
    with torch.autocast("cpu"):
        lowered = patcher(EXPERIMENTS, source, target)
    with torch.inference_mode():
        inside = patcher(EXPERIMENTS, source, target)
    outside = patcher(EXPERIMENTS, source, target)
    assert lowered.dtype is torch.float32
    assert torch.equal(lowered, outside) and torch.equal(inside, outside)


def test_threads_leave_the_default_type_as_it_was():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    patchers = [Patcher(Deciding(), dtype=torch.float64) for _ in range(3)]
    for patcher in patchers:  # torch cannot trace in several threads
        patcher.prepare(x, x.flip(0))

    def work(patcher: Patcher) -> None:
        for _ in range(5):
            patcher([{"a": [0]}, {"b": "all"}], x, x.flip(0))

    threads = [threading.Thread(target=work, args=(patcher,)) for patcher in patchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() is torch.float32


def test_threads_leave_the_precision_of_products_as_it_was_and_have_it_exact():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        one, other = exact_math(), exact_math()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert not matmul.allow_tf32  # the other is still inside
        other.__exit__(None, None, None)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def test_a_default_device_of_the_users_is_no_place_for_what_a_patcher_makes(monkeypatch):
    torch.manual_seed(0)
    network, x = plain(), torch.randn(5, 6)
    found = {}
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            kinds = ("zero", "mean", "resample")
            found[device] = [Patcher(network)(EXPERIMENTS, target=x, kind=kind) for kind in kinds]
        finally:
            torch.set_default_device(None)
    assert all(map(torch.equal, found["cpu"], found["meta"]))


def test_resampling_within_inference_mode_is_as_without():
    torch.manual_seed(0)
    network, x = plain(), torch.randn(5, 6)
    expected = Patcher(network)(EXPERIMENTS, target=x, kind="resample")
    with torch.inference_mode():
        found = Patcher(network)(EXPERIMENTS, target=x.clone(), kind="resample")
    assert torch.equal(found, expected)
    assert not found.is_inference()  # it may be used after it


def test_attention_takes_the_plain_way_and_the_users_choice_is_as_it_was():
    cuda = torch.backends.cuda
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        with exact_math():
            assert (cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()) == (False, True)
        assert (cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()) == (True, False)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_is_the_one_that_it_wraps():
    torch.manual_seed(0)
    network, x = plain(), torch.randn(4, 6)
    found = Patcher(torch.compile(network, backend="eager"))(EXPERIMENTS, x, x.flip(0))
    assert torch.equal(found, Patcher(network)(EXPERIMENTS, x, x.flip(0)))


@pytest.mark.filterwarnings("ignore:`torch.jit.")
def test_networks_that_cannot_be_copied_are_refused():
    with pytest.raises(InputError, match="is a ScriptModule; give the nn.Module"):
        Patcher(torch.jit.trace(plain(), torch.randn(2, 6)))
    with pytest.raises(InputError, match="lazy layers of unknown size"):
        Patcher(nn.Sequential(nn.LazyLinear(3)))


def test_outputs_that_are_no_float_numbers_are_refused():
    class Acts(nn.Sequential):
        def forward(self, x):
            return super().forward(x) > 0

    with pytest.raises(InputError, match=r"gives torch.bool; patching needs logits"):
        Patcher(Acts(*plain()))([{"0": [0]}], torch.randn(3, 6), torch.randn(3, 6))


def test_a_first_call_may_be_made_within_inference_mode_and_a_later_one_outside():
    torch.manual_seed(0)
    network = plain()
    with torch.inference_mode():
        source, target = torch.randn(2, 5, 6)
        patcher = Patcher(network)
        inside = patcher(EXPERIMENTS, source, target)
    assert torch.equal(patcher(EXPERIMENTS, source, target), inside)


def test_making_a_patcher_takes_no_step_of_spectral_norm():
    spectral = nn.utils.parametrizations.spectral_norm
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), spectral(nn.Linear(8, 3))).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    Patcher(network)(EXPERIMENTS, *torch.randn(2, 5, 6))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_run_whose_inputs_were_written_over_refuses_to_go_on():
    patcher, (source, target) = Patcher(plain()), torch.randn(2, 5, 6)
    run = patcher.prepare(source, target)
    run(EXPERIMENTS)
    target[0].zero_()
    with pytest.raises(InputError, match="written over since they were prepared"):
        run(EXPERIMENTS)
    patcher(EXPERIMENTS, source, target)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(3, 6).to_sparse(), "of layout torch.sparse_coo"),
        (torch.randn(3, 6, device="meta"), "on the meta device"),
    ],
)
def test_inputs_without_values_at_every_place_are_refused(inputs, message):
    with pytest.raises(InputError, match=message):
        Patcher(plain())(EXPERIMENTS, inputs, inputs)


class OnlySo(nn.Module):
    """Takes one number of inputs: state in a buffer, as of environments that run side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("state", torch.randn(5, 8))

    def forward(self, x):
        return self.o(self.a(x).relu() + self.state)


class InSlices(nn.Module):
    """Large batches go through in slices, to save memory."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return torch.cat([self.o(self.a(part).relu()) for part in x.split(16)])


@pytest.mark.parametrize(("kind", "n_inputs"), [(OnlySo, 5), (InSlices, 12), (InSlices, 40)])
def test_networks_that_treat_numbers_of_inputs_differently_are_patched(kind, n_inputs):
    torch.manual_seed(0)
    network, (source, target) = kind().eval(), torch.randn(2, n_inputs, 6)
    experiments = [{"a": [0]}, {"a": [3, 5]}, {"o": [1]}]
    expected = reference_outputs(network, experiments, source, target)
    found = Patcher(network, dtype=torch.float64)(experiments, source, target)
    check_equal(found, expected, torch.float64)


def test_a_patch_on_which_an_operation_fails_is_an_error_of_ours():
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.e = nn.Linear(6, 4), nn.Embedding(10, 4)

        def forward(self, x):
            return self.e(self.a(x - x.mean(1, keepdim=True)).abs().long().amax(1))

    torch.manual_seed(0)
    source, target = 1e4 * torch.randn(4, 6), torch.zeros(4, 6)
    with pytest.raises(InputError, match="the network fails on"):
        Patcher(Looked())([{"a": "all"}], source, target)


def test_means_of_a_network_that_runs_on_no_lone_input_are_refused():
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False))
    with pytest.raises(InputError, match="does not run on each input alone"):
        Patcher(network)([{"0": [0]}], target=torch.randn(5, 6), kind="mean")


def head_of(network):
    def head(x, scale=2.0, *, last=network.o):
        return last(x) * scale

    return head


class Closures(nn.Module):
    """Functions that hold on to the network, in every way that a function can."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.o = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.head = head_of(self)
        self.first = [lambda x: torch.relu(self.norm(self.a(x)))]
        self.all = functools.partial(lambda name, x: self.head(self.first[0](x)), "all")

    def forward(self, x):
        return self.all(x)


def test_functions_that_hold_on_to_the_network_hold_on_to_the_copy_in_a_copy():
    torch.manual_seed(0)
    network, (source, target) = Closures().train(), torch.randn(2, 5, 4)
    before = copy.deepcopy(network.state_dict())
    experiments = [{"a": [0]}, {"a": [5]}, {"o": [1]}]
    patcher = Patcher(network)
    found = patcher(experiments, source, target)
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())
    expected = reference_outputs(network, experiments, source, target)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        network.a.weight.mul_(3)
    torch.testing.assert_close(patcher(experiments, source, target), found)


class Noted:
    """An object of a policy that is no module."""


def test_what_a_forward_with_gradients_left_in_an_object_is_no_hindrance():
    torch.manual_seed(0)
    network, (source, target) = plain(), torch.randn(2, 4, 6)
    network.noted = Noted()
    network.noted.normal = torch.distributions.Normal(network(target), 1.0)
    without = nn.Sequential(*network)
    expected = Patcher(without)(EXPERIMENTS, source, target)
    assert torch.equal(Patcher(network)(EXPERIMENTS, source, target), expected)
    assert network.noted.normal.loc.requires_grad


class Shared(nn.Module):
    """Modules that share lists, dictionaries and variables, with functions in them or not."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.o = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.down.skips = self.up.skips = []
        self.calls = {"relu": torch.relu, "head": lambda x: self.o(x)}
        self.up.calls = self.calls
        self.both = (self.calls, self.down.skips)
        seen = 0

        def count(module, args):
            nonlocal seen
            seen += 1

        def scaled(x):
            nonlocal seen
            factor, seen = seen, 0
            return self.calls["head"](x) * factor

        self.down.register_forward_pre_hook(count)
        self.up.register_forward_pre_hook(count)
        self.scaled = scaled

        def folded(x, times):
            return x if not times else torch.relu(folded(x, times - 1)) + self.o.bias.sum()

        self.folded = folded

    def forward(self, x):
        h = self.up.calls["relu"](self.down(x))
        self.down.skips.append(h)
        h = self.up(h) + self.up.skips.pop()
        assert not self.both[1] and self.both[0] is self.up.calls
        return self.scaled(self.folded(h, 2))


def test_what_modules_share_is_shared_by_their_copies():
    torch.manual_seed(0)
    network, (source, target) = Shared().eval(), torch.randn(2, 5, 4)
    experiments = [{"down": [0]}, {"up": [5]}, {"o": [1]}, {"down": "all"}]

    def hooked(layer, neurons):
        with torch.no_grad():
            values = {}
            module = getattr(network, layer)
            handle = module.register_forward_hook(lambda m, i, out: values.update(of=out.clone()))
            network(source)
            handle.remove()

            def patch(_, __, out):
                out = out.clone()
                chosen = slice(None) if neurons == "all" else neurons
                out[:, chosen] = values["of"][:, chosen]
                return out

            handle = module.register_forward_hook(patch)
            found = network(target)
            handle.remove()
        return found

    expected = torch.stack([hooked(*next(iter(one.items()))) for one in experiments])
    found = Patcher(network)(experiments, source, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    reference = reference_outputs(network, experiments, source, target)
    torch.testing.assert_close(reference.float(), expected, rtol=1e-5, atol=1e-5)


def test_a_network_in_training_that_finds_itself_by_a_global_name_is_refused_before_it_runs():
    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.o = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.o(network.norm(self.a(x)))

    network = Global().train()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match="calls a BatchNorm1d of the network itself, in training"):
        Patcher(network)([{"a": [0]}], torch.randn(3, 4), torch.randn(3, 4))
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())


def test_arguments_without_an_axis_may_come_with_resampled_inputs():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x, scale):
            return self.a(x) * scale

    network, args = Scaled(), (torch.randn(6, 4), torch.tensor(2.0))
    found = Patcher(network)([{"a": [0]}], target=args, kind="resample", seed=3)
    expected = reference_outputs(network, [{"a": [0]}], None, args, kind="resample", seed=3)
    torch.testing.assert_close(found, expected.float())


def test_a_network_that_begins_in_float64_is_taken_as_it_is():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8).double(), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.relu(self.stem(x.double())).float())

    network, (source, target) = Stem(), torch.randn(2, 5, 4)
    found = Patcher(network, dtype=torch.float32)([{"stem": [0]}], source, target)
    expected = reference_outputs(network, [{"stem": [0]}], source, target)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_named_tuple_is_one_argument():
    class Observation(NamedTuple):
        position: torch.Tensor

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, observation):
            return self.a(observation.position)

    source, target = (Observation(torch.randn(3, 4)) for _ in range(2))
    assert Patcher(Takes())([{"a": [0]}], source, target).shape == (1, 3, 2)


def test_one_observation_without_an_axis_of_inputs_is_refused_for_that():
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(InputError, match=r"gives \[2\]; patching needs one tensor \[inputs, out"):
        Patcher(network)([{"0": [0]}], torch.randn(4), torch.randn(4))


def test_means_of_masked_values_do_not_overflow():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].bias[0] = torch.finfo(torch.float32).min
        network[1].weight[:, 0] = 0
    found = Patcher(network)([{"0": [0]}], target=torch.randn(5, 3), kind="mean")
    assert found.isfinite().all()
