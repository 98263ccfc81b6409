"""The patcher as its users meet it: nothing left behind, refusals, pickles, source kinds."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import build, counts_of
from torch import nn

import raypatch
from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.engine.sources import resample_order
from raypatch.errors import InputError

# ------------------------------------------------------------------ nothing left behind

REDUCED = """
import torch, raypatch
from raypatch.engine.patch_run import PatchRun
{allowed}
parts = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
def show():
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # newer switches are set
        whole = None
    return [whole, *(part.fp32_precision for part in parts)]
before, inside, plan = show(), [], PatchRun.plan
PatchRun.plan = lambda *args: (plan(*args), inside.append(show()))[0]
evaluate = PatchRun._evaluate
PatchRun._evaluate = lambda *args: (inside.append(show()), evaluate(*args))[1]
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
raypatch.patch(net, [{{"0": [3]}}], torch.randn(5, 4), torch.randn(5, 4))
print(before == show(), any(held in ("tf32", "bf16") for held in inside[-1][1:]))
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch's older switches")
@pytest.mark.parametrize(
    "allowed",
    ["torch.set_float32_matmul_precision('medium')", "torch.backends.fp32_precision = 'tf32'"],
)
def test_products_are_exact_whatever_is_allowed_and_that_is_left_as_it_was(allowed):
    # In a process of its own: torch does not forget which kind of switch was used.
    script = REDUCED.format(allowed=allowed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def state_of(network):
    return (
        {name: tensor.clone() for name, tensor in network.state_dict().items()},
        [module.training for module in network.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()],
        [p.requires_grad for p in network.parameters()],
        [getattr(m, "inplace", None) for m in network.modules()],
    )


def check_same_state(one, two):
    assert one[1:] == two[1:]
    for name, tensor in one[0].items():
        assert torch.equal(tensor, two[0][name])


@pytest.mark.parametrize("name", ["residual", "dueling_cnn", "untraceable", "cnn3d"])
def test_no_hook_weight_or_flag_is_left_changed(name):
    network, source, target = build(name, 0)
    network.train()
    before = state_of(network)
    raypatch.patch(
        network,
        [{next(iter(counts_of(copy.deepcopy(network).eval(), target))): [0]}],
        source,
        target,
    )
    check_same_state(before, state_of(network))


def test_no_hook_is_left_after_an_error_in_the_middle():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(2, 3), nn.Linear(3, 2), 0

        def forward(self, x):
            self.calls += 1
            if x.sum() == x.sum() and self.calls > 600:
                raise ZeroDivisionError("in the middle")
            return self.b(torch.relu(self.a(x)))

    network = Fails()
    patcher = Patcher(network)
    run = patcher.prepare(torch.randn(3, 2), torch.randn(3, 2))
    inner = run._engine.network
    with pytest.raises(ZeroDivisionError):
        for _ in range(1000):
            run([{"a": [0]}])
    assert all(not m._forward_hooks for m in [*network.modules(), *inner.modules()])


def test_a_patcher_does_not_follow_later_changes_to_the_network():
    network, source, target = build("residual", 0)
    patcher = Patcher(network)
    before = patcher([{"a": [1]}], source, target)
    network.a.weight.data.zero_()
    assert torch.equal(before, patcher([{"a": [1]}], source, target))


# ------------------------------------------------------------------------------ faces


@pytest.mark.parametrize("name", ["dueling_cnn", "shape_dependent", "norm_and_concatenate"])
def test_a_patcher_survives_pickling_with_the_same_bits(name):
    network, source, target = build(name, 0)
    patcher = Patcher(network)
    experiments = [{layer: [0]} for layer in counts_of(network, target)]
    before = patcher(experiments, source, target)
    again = pickle.loads(pickle.dumps(patcher))
    assert torch.equal(before, again(experiments, source, target))


def test_the_readmes_notebook_example_runs_as_printed():
    text = (ROOT / "README.md").read_text()
    code = next(b for b in text.split("```python\n")[1:] if "raypatch.Patcher" in b).split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["outputs"].shape == (66, 32, 2) and names["ablated"].shape == (66, 32, 2)


def test_outputs_are_in_one_piece_in_the_order_of_their_axes():
    network, source, target = build("residual", 0)
    assert raypatch.patch(network, [{"a": [0]}, {"b": [1]}], source, target).is_contiguous()


def test_unknown_layers_and_neurons_are_refused():
    network, source, target = build("residual", 0)
    with pytest.raises(InputError, match="experiment 0: unknown layer 'z'"):
        raypatch.patch(network, [{"z": [0]}], source, target)
    with pytest.raises(InputError, match="neuron 8 is out of range"):
        raypatch.patch(network, [{"a": [8]}], source, target)


@pytest.mark.parametrize(
    ("source", "target", "kind", "message"),
    [
        (torch.randn(3, 6), torch.randn(4, 6), "pair", r"got 3 of float32 \[inputs, 6\] as source"),
        (torch.randn(4, 7), torch.randn(4, 6), "pair", r"\[inputs, 7\] as source, 4 of float32"),
        (torch.ones(4, 6).long(), torch.randn(4, 6), "pair", "got 4 of int64"),
        (torch.randn(4, 5), torch.randn(4, 5), "pair", r"fails on inputs of float32 \[inputs, 5\]"),
        (None, torch.ones(4, 6).long(), "zero", "fails on inputs of int64"),
        (None, (torch.randn(4, 6), torch.randn(4, 6)), "zero", "fails on inputs of .*takes 2"),
        (None, torch.randn(1, 6), "resample", "'resample' takes another input; there is only one"),
        (torch.randn(4, 6), torch.randn(4, 6), "given", "maps layers to recorded .*got Tensor"),
        (None, torch.randn(4, 6), "pair", "needs a target, and for kind .* a source"),
        (None, None, "zero", "needs a target"),
        (None, torch.randn(0, 6), "zero", "number of inputs above 0"),
        (None, torch.randn(4, 6), "other", "source kind 'other'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(source, target, kind, message):
    network, _, _ = build("residual", 0)
    with pytest.raises(InputError, match=message):
        raypatch.patch(network, [{"a": [0]}], source, target, kind=kind)


def test_inputs_of_another_shape_are_refused_in_a_later_call_as_in_the_first():
    network, source, target = build("residual", 0)
    patcher = Patcher(network)
    patcher([{"a": [0]}], source, target)
    with pytest.raises(InputError, match=r"the network fails on inputs of float32 \[inputs, 5\]"):
        patcher([{"a": [0]}], source[0][:, :5], target[0][:, :5])


@pytest.mark.parametrize("side", [0, 1])
def test_an_input_the_network_fails_on_is_refused_where_the_first_ones_pass(side):
    network = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    inputs = [torch.randint(0, 10, (8, 3)), torch.randint(0, 10, (8, 3))]
    inputs[side][6, 1] = 99
    with pytest.raises(InputError, match=r"fails on inputs of int64 \[inputs, 3\]: IndexError"):
        raypatch.patch(network, [{"2": [1]}], *inputs)


class _ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.a(x["u"]) - self.b(x["v"])))


def test_named_inputs_are_matched_by_name_in_any_order():
    torch.manual_seed(0)
    source, target = ({"u": torch.randn(4, 3), "v": torch.randn(4, 3)} for _ in range(2))
    patcher = Patcher(_ByName())
    expected = patcher([{"a": "all"}, {"b": [0]}], source, target)
    turned = dict(reversed(source.items()))
    assert torch.equal(patcher([{"a": "all"}, {"b": [0]}], turned, target), expected)
    with pytest.raises(InputError, match=r"'u': float32 .* as source, 4 of 'u'.*, 'v': float32"):
        patcher([{"a": [0]}], {"u": source["u"]}, target)


def test_longer_sequences_in_a_later_call_are_captured_anew_but_not_by_a_copy():
    network, source, target = build("transformer", 0)
    patcher = Patcher(network)
    experiments = [{name: [0]} for name in counts_of(network, target)]
    patcher(experiments, source, target)
    longer = [torch.cat([side[0], side[0][:, :4].flip(1)], 1) for side in (source, target)]
    expected = reference_outputs(network, experiments, *longer)
    found = patcher(experiments, *longer)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert patcher.path.startswith("incremental")
    copied = pickle.loads(pickle.dumps(patcher))
    assert torch.equal(copied(experiments, *longer), found)
    with pytest.raises(
        InputError, match=r"takes inputs of float32 \[inputs, 10\] only, not of .*6\]"
    ):
        copied(experiments, source, target)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "float64"}, "dtype 'float64': valid are torch.float32"),
        ({"dtype": torch.int64}, r"dtype torch.int64: valid are torch.float32"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
    ],
)
def test_what_is_no_type_of_numbers_or_no_device_is_refused(option, message):
    network, source, target = build("residual", 0)
    with pytest.raises(InputError, match=message):
        raypatch.patch(network, [{"a": [0]}], source, target, **option)


def test_running_out_of_memory_is_not_called_a_fault_of_the_inputs():
    class Large(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        raypatch.patch(Large(3, 2), [{OUTPUT_LOGITS: [0]}], *torch.randn(2, 4, 3))


@pytest.mark.parametrize(
    "neurons", [np.array([1, 3]), torch.tensor([1, 3]), range(1, 4, 2), (1, 3), [np.int64(1), 3]]
)
def test_neurons_may_come_as_a_script_holds_them(neurons):
    network, source, target = build("residual", 0)
    expected = raypatch.patch(network, [{"a": [1, 3]}], source, target)
    assert torch.equal(raypatch.patch(network, [{"a": neurons}], source, target), expected)


def test_one_experiment_without_its_list_is_said_to_be_none():
    network, source, target = build("residual", 0)
    with pytest.raises(
        InputError, match=r"a definition is a list of experiments.*got {'a': \[3\]}"
    ):
        raypatch.patch(network, {"a": [3]}, source, target)


def test_a_network_without_one_row_of_outputs_an_input_is_refused():
    network = nn.Conv2d(1, 2, 1)
    with pytest.raises(InputError, match=r"needs|patching needs one tensor \[inputs, outputs\]"):
        raypatch.patch(
            network, [{OUTPUT_LOGITS: [0]}], torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero": (4, 8)}, "no activations of '0'.*it holds zero"),
        ({"0": (4, 7)}, r"activations of '0' are \[4, 7\], the layer's are \[4, 8\]"),
        ({"0": (5, 8)}, r"activations of '0' are \[5, 8\], the layer's are \[4, 8\]"),
        ({"0": (8, 4)}, r"activations of '0' are .*, the layer's are \[4, 8\]"),
    ],
)
def test_given_activations_that_do_not_fit_are_refused(given, message):
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    source = {name: torch.randn(shape) for name, shape in given.items()}
    with pytest.raises(InputError, match=message):
        raypatch.patch(network, [{"0": [0]}], source, torch.randn(4, 5), kind="given")


def test_a_module_without_a_weight_matrix_is_said_to_be_no_layer():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    for name, kind in (("1", "LayerNorm"), ("2", "ReLU")):
        with pytest.raises(InputError, match=f"'{name}' is a {kind}.*valid: 0, 3, output_logits"):
            raypatch.patch(network, [{"0": [0]}, {name: [0]}], *torch.randn(2, 5, 3))


def test_a_list_of_arguments_is_a_tuple_of_them():
    network, source, target = build("two_inputs", 0)
    experiments = [{name: [0]} for name in counts_of(network, target)]
    expected = raypatch.patch(network, experiments, source, target)
    assert torch.equal(raypatch.patch(network, experiments, list(source), list(target)), expected)


def test_what_is_no_network_and_what_is_no_tensor_is_said():
    with pytest.raises(InputError, match=r"torch\.nn\.Module, not function"):
        raypatch.Patcher(lambda x: x)
    network = nn.Linear(3, 2)
    numbers = torch.randn(4, 3).numpy()
    with pytest.raises(InputError, match=r"tensors \[inputs, \.\.\.\], not ndarray"):
        raypatch.patch(network, [{"output_logits": [0]}], numbers, numbers)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_resampling_moves_every_input_and_is_seeded(n_inputs, seed):
    order = resample_order(n_inputs, seed)
    assert sorted(order.tolist()) == list(range(n_inputs))
    assert n_inputs == 1 or not bool((order == torch.arange(n_inputs)).any())
    assert torch.equal(order, resample_order(n_inputs, seed))


@pytest.mark.parametrize("seed", ["a", 1.5, 2**70])
def test_a_seed_that_is_no_number_of_64_bits_is_refused(seed):
    with pytest.raises(InputError, match=f"seed {seed!r}: a seed is a whole number"):
        resample_order(4, seed)


def test_given_activations_equal_those_of_the_run_they_come_from():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    source, target = torch.randn(7, 4), torch.randn(7, 4)
    values = {"0": network[0](source), "2": network[:3](source), "output_logits": network(source)}
    values = {name: value.detach() for name, value in values.items()}
    experiments = [{"0": [1, 3]}, {"2": "all", "0": [2]}, {"output_logits": [1]}]
    small = raypatch.Patcher(network, memory_bytes=1 << 10)  # the inputs in parts
    for patcher in (raypatch.Patcher(network), small):
        found = patcher(experiments, source=values, target=target, kind="given")
        torch.testing.assert_close(found, patcher(experiments, source, target))
    truth = reference_outputs(network, experiments, values, target, kind="given")
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "shape_dependent"])
def test_several_threads_may_each_prepare_a_patcher(name):
    """Tracing and exporting change what the whole process shares: calls of modules, stdout."""
    network, source, target = build(name, 0)
    stdout, alone, interval = sys.stdout, Patcher(network), sys.getswitchinterval()
    alone.prepare(source, target)
    patchers = [Patcher(network) for _ in range(8)]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda patcher: patcher.prepare(source, target), patchers))
    finally:
        sys.setswitchinterval(interval)
    assert {patcher.path for patcher in patchers} == {alone.path}
    assert sys.stdout is stdout


def test_a_network_that_is_one_layer_says_what_its_output_is_called():
    network, x = nn.Linear(4, 3), torch.randn(2, 4)
    with pytest.raises(InputError, match="'' is the network itself: its output is 'output_logits'"):
        raypatch.patch(network, [{"": [1]}], x, x)
    assert raypatch.patch(network, [{"output_logits": [1]}], x, -x).shape == (1, 2, 3)
