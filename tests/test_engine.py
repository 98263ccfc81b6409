"""The engine against plain hooks, one experiment at a time, in float64."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, LAVA, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, AS_IF_LARGE, ZOO, MixesInputs, build, mlp
from torch import nn

import raypatch
from raypatch.agents import load_agent
from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine import incremental
from raypatch.engine.incremental import Incremental
from raypatch.engine.layers import find_layers
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.engine.sources import SOURCE_KINDS, resample_order
from raypatch.engine.structure import Savings
from raypatch.errors import InputError, RunError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
CAPTURED = sorted(set(ZOO) - {"untraceable", "sequence_first", "shape_dependent"})


def check_equal(found, expected, dtype):
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) <= TOLERANCE[dtype]


def experiments_for(counts, draw):
    """Random experiments: single, groups, several layers, whole layers, logits, repeats."""
    names = sorted(counts)

    def selection(name):
        if draw(st.integers(0, 4)) == 0:
            return "all"
        return draw(st.lists(st.integers(0, counts[name] - 1), min_size=1, max_size=6, unique=True))

    found = []
    for _ in range(draw(st.integers(1, 10))):
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        found.append({name: selection(name) for name in chosen})
    return found + found[: draw(st.integers(0, 2))]


def as_if_large(yes):
    return patch.multiple(incremental, **AS_IF_LARGE) if yes else nullcontext()


def counts_of(network, args):
    counts = {name: layer.neurons for name, layer in find_layers(network, args).items()}
    with torch.no_grad():
        return {**counts, OUTPUT_LOGITS: network(*args).shape[1]}


# ------------------------------------------------------------------------- every path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(ZOO))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([k for k in SOURCE_KINDS if k != "given"]),
    large=st.booleans(),
)
def test_random_experiments_equal_plain_hooks(name, dtype, data, seed, kind, large):
    network, source, target = build(name, seed)
    experiments = experiments_for(counts_of(network, target), data.draw)
    patcher = Patcher(network, dtype=dtype)
    with as_if_large(large):
        found = patcher(experiments, source, target, kind=kind, seed=seed)
    assert found.dtype == dtype
    check_equal(
        found, reference_outputs(network, experiments, source, target, kind=kind, seed=seed), dtype
    )


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    n_inputs=st.integers(1, 9),
    savings=st.builds(Savings, *[st.booleans()] * 6),
    batch_rows=st.sampled_from([None, 1, 5, 64]),
    n_same=st.integers(0, 9),
    large=st.booleans(),
)
def test_random_mlps_equal_plain_hooks_with_any_savings_and_batch(
    data, sizes, activation, n_inputs, savings, batch_rows, n_same, large
):
    torch.manual_seed(len(sizes))
    network = mlp(sizes, activation).eval()
    source, target = torch.randn(n_inputs, sizes[0]), torch.randn(n_inputs, sizes[0])
    source[:n_same] = target[:n_same]  # nothing changes there
    experiments = experiments_for(counts_of(network, (target,)), data.draw)
    patcher = Patcher(network, dtype=torch.float64, savings=savings, batch_rows=batch_rows)
    with as_if_large(large):
        found = patcher(experiments, source, target)
    check_equal(found, reference_outputs(network, experiments, source, target), torch.float64)
    assert patcher.path.startswith("incremental")


@pytest.mark.parametrize("name", CAPTURED)
def test_what_can_be_captured_is_evaluated_incrementally(name):
    network, source, target = build(name, 0)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    assert patcher.path == "incremental (torch.fx)"


def test_torch_export_captures_what_symbolic_tracing_cannot():
    network, source, target = build("shape_dependent", 0)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    assert patcher.path.startswith("incremental (torch.export; torch.fx: TraceError")


def test_a_network_that_cannot_be_captured_runs_stacked_and_says_why():
    network, source, target = build("untraceable", 0)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    assert patcher.path.startswith(
        "stacked (not captured: torch.fx: TraceError: symbolically traced"
    )


def test_a_network_that_mixes_its_inputs_runs_one_experiment_at_a_time():
    torch.manual_seed(0)
    network = MixesInputs().eval()
    source, target = torch.randn(4, 6), torch.randn(4, 6)
    patcher = Patcher(network, dtype=torch.float64)
    experiments = [{"a": [i]} for i in range(8)]
    found = patcher(experiments, source, target)
    assert patcher.path.startswith("single (")
    check_equal(found, reference_outputs(network, experiments, source, target), torch.float64)


@pytest.mark.parametrize("agent", [LAVA, CARTPOLE], ids=["lavacrossing", "cartpole"])
def test_the_example_agents_equal_their_independent_truth(agent):
    loaded = load_agent(agent)
    truth = np.load(agent / "expected.npz")
    from raypatch.inputs import ObservationShape, read_inputs

    folder = agent / "activation_inputs"
    inputs = read_inputs(
        {side: folder / f"{side}_inputs.json" for side in ("clean", "corrupted")},
        ObservationShape(loaded.observation_shape),
    )
    clean, corrupted = (torch.from_numpy(inputs.sides[s]) for s in ("clean", "corrupted"))
    experiments = [{n: [i]} for n, layer in loaded.layers.items() for i in range(layer.neurons)]
    patcher = Patcher(loaded.network, dtype=torch.float64)
    denoising = patcher(experiments, clean, corrupted)
    noising = patcher(experiments, corrupted, clean)
    np.testing.assert_allclose(denoising.numpy(), truth["denoising"], atol=1e-12)
    np.testing.assert_allclose(noising.numpy(), truth["noising"], atol=1e-12)


# --------------------------------------------------------------------- solved by hand


def test_a_tiny_network_solved_by_hand():
    """x -> (x, 2x) -> relu -> sum: clean 3 gives 9, corrupted -1 gives 0."""
    network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    network[0].weight.data = torch.tensor([[1.0], [2.0]])
    network[2].weight.data = torch.tensor([[1.0, 1.0]])
    clean, corrupted = torch.tensor([[3.0]]), torch.tensor([[-1.0]])
    experiments = [{"0": [0]}, {"0": [1]}, {"0": "all"}, {OUTPUT_LOGITS: [0]}]
    assert raypatch.patch(network, experiments, clean, corrupted).flatten().tolist() == [3, 6, 9, 9]
    assert raypatch.patch(network, experiments, corrupted, clean).flatten().tolist() == [6, 3, 0, 0]
    assert raypatch.patch(network, experiments, target=clean, kind="zero").flatten().tolist() == [
        6,
        3,
        0,
        0,
    ]


def test_the_patch_is_before_the_activation_and_upstream_patches_do_not_change_it():
    network = mlp([1, 1, 1, 1], nn.Identity).double()
    for module in network[::2]:
        module.weight.data.fill_(2.0)
        module.bias.data.zero_()
    one, ten = torch.tensor([[1.0]]), torch.tensor([[10.0]])
    assert raypatch.patch(network, [{"0": [0], "2": [0]}], ten, one).item() == 80


# ------------------------------------------------------------------ nothing left behind


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


def test_on_a_device_that_refuses_what_a_gpu_refuses_the_numbers_are_the_same():
    # The pretended device has no kernels for a few of torch's larger operations.
    names = sorted(set(ZOO) - {"norm_and_concatenate", "recurrent", "sequence_first"})
    script = str(ROOT / "tests" / "pretend_gpu.py")
    done = subprocess.run([sys.executable, script, *names], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} equals plain hooks" for name in names], done.stderr


# ------------------------------------------------------------------------- the savings


@pytest.mark.parametrize("seed", range(5))
def test_skipped_rows_are_exactly_those_equal_to_the_baseline_bit_for_bit(seed):
    torch.manual_seed(seed)
    network = mlp([6, 32, 32, 4], nn.ReLU).double()
    source, target = torch.randn(16, 6).double(), torch.randn(16, 6).double()
    experiments = [{"0": [i]} for i in range(32)] + [{"2": [i]} for i in range(32)]
    run = Patcher(network).prepare(source, target)
    prepared = run._prepare(0)
    assert isinstance(run._engine, Incremental)
    changed = torch.cat(
        [prepared.active(prepared.structure.calls[name][0])[0] for name in ("0", "2")]
    )
    expected = reference_outputs(network, experiments, source, target)
    with torch.no_grad():
        baseline = network(target)
    # The reference patches one experiment at a time: where both units are off, nothing moves.
    same = (expected == baseline).all(-1)
    assert torch.equal(same, ~changed)
    outputs = run(experiments)
    assert torch.equal((outputs == run.baseline).all(-1), ~changed)
    assert 0 < int(changed.sum()) < changed.numel()


def test_a_whole_layer_on_a_cut_gives_the_sources_own_output_and_computes_nothing():
    network, source, target = build("residual", 0)
    run = Patcher(network).prepare(source, target)
    outputs = run([{"a": "all"}, {OUTPUT_LOGITS: "all"}])
    assert torch.equal(outputs[0], run.source_baseline)
    assert torch.equal(outputs[1], run.source_baseline)
    assert run.rows_computed == 0


def test_duplicates_are_computed_once():
    network, source, target = build("residual", 0)
    run = Patcher(network).prepare(source, target)
    outputs = run([{"a": [1, 2]}, {"b": [3]}, {"a": [2, 1]}, {"a": [1, 2]}])
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[0], outputs[3])
    assert run.rows_computed <= 2 * 4


def test_nothing_upstream_of_the_patch_is_computed_again(monkeypatch):
    calls = []
    network = mlp([4, 8, 8, 3], nn.ReLU)
    run = Patcher(network).prepare(torch.randn(5, 4), torch.randn(5, 4))
    first = run._engine.graph.nodes[1]
    monkeypatch.setattr(type(first.target), "forward", lambda *_: calls.append(1))
    run([{"2": [1]}, {"4": [0]}])
    assert first.path == "0" and calls == []


@pytest.mark.parametrize("batch_rows", [1, 7, 4096])
def test_the_answer_does_not_depend_on_the_batch_size(batch_rows):
    network, source, target = build("dueling_cnn", 0)
    counts = counts_of(network, target)
    experiments = [{name: [i]} for name, n in counts.items() for i in range(n)]
    whole = Patcher(network, dtype=torch.float64)(experiments, source, target)
    cut = Patcher(network, dtype=torch.float64, batch_rows=batch_rows)(experiments, source, target)
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-13)


def test_experiments_come_back_in_the_definitions_order():
    network, source, target = build("residual", 0)
    experiments = [{"c": [0]}, {"a": [1]}, {"b": "all"}, {"a": [0], "c": [2]}, {"a": [2]}]
    run = Patcher(network, dtype=torch.float64).prepare(source, target)
    together = run(experiments)
    for number, experiment in enumerate(experiments):
        torch.testing.assert_close(together[number], run([experiment])[0], rtol=0, atol=1e-13)


# ----------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", [k for k in SOURCE_KINDS if k != "given"])
def test_inputs_are_taken_in_parts_under_a_memory_ceiling(kind):
    network = mlp([4, 16, 3], nn.Tanh)
    source, target = torch.randn(200, 4), torch.randn(200, 4)
    experiments = [{"0": [i]} for i in range(16)] + [{"0": "all"}]
    patcher = Patcher(network, dtype=torch.float64, memory_bytes=1 << 17)
    run = patcher.prepare(source, target, kind=kind)
    assert len(run._parts) > 1
    check_equal(
        run(experiments),
        reference_outputs(network, experiments, source, target, kind=kind),
        torch.float64,
    )


def test_batches_are_halved_when_memory_runs_out_and_stay_halved(monkeypatch):
    network, source, target = build("residual", 0)
    run = Patcher(network, batch_rows=64).prepare(source, target)
    prepared = run._prepare(0)
    sizes = []
    real = prepared.evaluate

    def evaluate(group, out, batch_rows):
        sizes.append(batch_rows)
        if batch_rows > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(group, out, batch_rows)

    monkeypatch.setattr(prepared, "evaluate", evaluate)
    run([{"a": [0]}, {"a": [1]}])
    run([{"b": [0]}])
    assert sizes == [64, 32, 16, 16]


def test_out_of_memory_with_one_experiment_says_what_to_lower(monkeypatch):
    network, source, target = build("residual", 0)
    run = Patcher(network, batch_rows=8).prepare(source, target)

    def evaluate(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(run._prepare(0), "evaluate", evaluate)
    with pytest.raises(RunError, match="lower --memory_per_actor"):
        run([{"a": [0]}])


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
        (torch.randn(3, 6), torch.randn(4, 6), "pair", "source shapes"),
        (None, torch.randn(4, 6), "pair", "needs target inputs, and source"),
        (None, None, "zero", "needs target inputs"),
        (None, torch.randn(0, 6), "zero", "number of inputs above 0"),
        (None, torch.randn(4, 6), "other", "source kind 'other'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(source, target, kind, message):
    network, _, _ = build("residual", 0)
    with pytest.raises(InputError, match=message):
        raypatch.patch(network, [{"a": [0]}], source, target, kind=kind)


def test_a_network_without_one_row_of_outputs_an_input_is_refused():
    network = nn.Conv2d(1, 2, 1)
    with pytest.raises(InputError, match=r"needs|patching needs one tensor \[inputs, outputs\]"):
        raypatch.patch(
            network, [{OUTPUT_LOGITS: [0]}], torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_resampling_moves_every_input_and_is_seeded(n_inputs, seed):
    order = resample_order(n_inputs, seed)
    assert sorted(order.tolist()) == list(range(n_inputs))
    assert n_inputs == 1 or not bool((order == torch.arange(n_inputs)).any())
    assert torch.equal(order, resample_order(n_inputs, seed))


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
