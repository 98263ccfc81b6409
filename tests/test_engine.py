"""The engine against plain hooks, one experiment at a time, in float64."""

from __future__ import annotations

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
from networks import ACTIVATIONS, AS_IF_LARGE, ZOO, MixesInputs, build, check_equal, counts_of, mlp
from torch import nn

import raypatch
from raypatch.agents import load_agent
from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine import prepared
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.engine.sources import SOURCE_KINDS
from raypatch.engine.structure import Savings

EXPORTED = {"shape_dependent", "pooled_outside_tracing", "gpt"}
CAPTURED = sorted(set(ZOO) - {"untraceable", "deciding"} - EXPORTED)


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
    return patch.multiple(prepared, **AS_IF_LARGE) if yes else nullcontext()


# ------------------------------------------------------------------------- every path


@pytest.mark.parametrize("name", sorted(ZOO))
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([k for k in SOURCE_KINDS if k != "given"]),
    large=st.booleans(),
)
def test_random_experiments_equal_plain_hooks(name, data, dtype, seed, kind, large):
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
    savings=st.builds(Savings, *[st.booleans()] * 7),
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


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_torch_export_captures_what_symbolic_tracing_cannot(name):
    network, source, target = build(name, 0)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    assert patcher.path.startswith("incremental (torch.export; torch.fx: TraceError")


def test_a_network_that_cannot_be_captured_runs_stacked_and_says_why():
    network, source, target = build("untraceable", 0)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    assert patcher.path.startswith(
        "stacked (not captured: torch.fx: TypeError: 'Proxy' object does not support item"
    )


def test_a_network_that_decides_by_values_runs_one_experiment_at_a_time_and_says_why():
    network, source, target = build("deciding", 0)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    assert patcher.path.startswith("single (torch.fx: TraceError: symbolically traced")
    assert patcher.path.endswith("its Python decides by values)")


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


def test_on_a_device_that_refuses_what_a_gpu_refuses_the_numbers_are_the_same():
    # What torch transposes in place keeps its shape on the pretended device.
    names = sorted(set(ZOO) - {"recurrent"})
    script = str(ROOT / "tests" / "pretend_gpu.py")
    done = subprocess.run([sys.executable, script, *names], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *(f"{name} equals plain hooks" for name in names),
        "metrics are the CPU's",
        "a worker's results are the CPU's",
    ], done.stderr
