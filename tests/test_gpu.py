"""What only a GPU can show: numbers, kept memory and whole sweeps on one.

Without a GPU these are left out; ``tests/pretend_gpu.py`` looks for tensors on the wrong side.
"""

from __future__ import annotations

import pytest
import torch
from conftest import CARTPOLE, outputs_of
from networks import AS_IF_LARGE, ZOO, build, check_equal, counts_of, mlp
from torch import nn

import raypatch
from raypatch.definitions import Experiments
from raypatch.engine import patch_run, prepared, updates
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.metrics.formulas import METRICS
from raypatch.metrics.table import MetricTable
from raypatch.metrics.terms import Baselines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def experiments_of(network, args):
    """Every neuron, every layer, and neurons of two layers at once."""
    counts = counts_of(network, args)
    single = [{layer: [i]} for layer, n in counts.items() for i in range(n)]
    whole = [{layer: "all"} for layer in counts]
    pairs = [
        {one: [0], other: [n - 1, 0] if n > 1 else [0]}
        for one in counts for other, n in counts.items() if one != other
    ]  # fmt: skip
    return single + whole + pairs


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_kind_of_network_equals_plain_hooks(name, dtype, large, monkeypatch):
    network, source, target = build(name, 0)
    for one, other in zip(source, target):
        one[:2] = other[:2]  # nothing changes there
    experiments = experiments_of(network, target)
    expected = reference_outputs(network, experiments, source, target)
    if large:
        for constant, value in AS_IF_LARGE.items():
            monkeypatch.setattr(prepared, constant, value)
    found = Patcher(network, dtype=dtype, device="cuda")(experiments, source, target)
    assert found.is_cuda
    check_equal(found.cpu(), expected, dtype)


def test_metrics_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    target, source = torch.randn(2, 9, 5, generator=generator)
    patched = target + torch.randn(400, 9, 5, generator=generator)
    patched[1], patched[2], patched[3] = target, -target, 1e4 * patched[3]
    found = {}
    for device in ("cpu", "cuda"):
        values = torch.empty(len(METRICS), 400, 9, dtype=torch.float64, device=device)
        statistics = torch.empty(4, len(METRICS), 400, dtype=torch.float64, device=device)
        table = MetricTable(list(METRICS), Baselines(target.to(device), source.to(device)))
        table.compute(patched.to(device), values, statistics=statistics)
        found[device] = [values.cpu(), statistics.cpu()]
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_sweep_on_the_gpu_gives_the_results_of_one_on_the_cpu(
    run_inline, single_neurons, tmp_path
):
    definition, found = single_neurons(CARTPOLE), {}
    for device in ("cpu", "cuda"):
        out = run_inline(CARTPOLE, definition, "--device", device, out=tmp_path / device)
        results = raypatch.open_results(out)
        assert results.sweep["device"] == device
        found[device] = torch.tensor(outputs_of(results))
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-5, atol=1e-5)


def test_batches_follow_the_memory_that_is_free(monkeypatch):
    network, source, target = build("dueling_cnn", 0)
    experiments = experiments_of(network, target)
    expected = reference_outputs(network, experiments, source, target)
    monkeypatch.setattr(patch_run, "_free_on_gpu", lambda _: 1 << 14)
    run = Patcher(network, device="cuda").prepare(source, target)
    check_equal(run(Experiments.from_list(experiments)).cpu(), expected, torch.float32)


def test_after_running_out_of_memory_batches_are_smaller(monkeypatch):
    network = nn.Sequential(
        nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(),
        nn.Linear(1024, 4),
    )  # fmt: skip
    source, target = torch.randn(2, 512, 64)
    experiments = [{"0": [i]} for i in range(1024)]
    expected = Patcher(network)(experiments, source, target)
    _, total = torch.cuda.mem_get_info()
    run = Patcher(network, device="cuda", batch_rows=1 << 24).prepare(source, target)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    try:
        found = run(experiments).cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert run._halvings > 0


def test_calls_that_come_again_are_replayed_on_new_inputs():
    network = mlp([6, 32, 32, 4], nn.ReLU)
    experiments = [{"0": [i]} for i in range(32)] + [{"2": [3, 1]}, {"0": [0], "2": "all"}] * 2
    patcher = Patcher(network, device="cuda")
    for number in range(6):
        source, target = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(number))
        found = patcher(experiments, source, target)
        expected = reference_outputs(network, experiments, (source,), (target,))
        check_equal(found.cpu(), expected, torch.float32)
        assert [bool(asked.replay) for asked in patcher._replays._asked.values()] == [number > 0]
    # Another number of inputs is another call, and memory of the first is its own.
    source, target = torch.randn(2, 64, 6)
    patcher(experiments, source, target)
    check_equal(
        patcher(experiments, source[:16], target[:16]).cpu(),
        reference_outputs(network, experiments, (source[:16],), (target[:16],)), torch.float32,
    )  # fmt: skip


# Of operations that nothing need be looked at for.
SURELY_RECORDED = {"cnn1d", "called_twice", "quantile_head", "residual", "two_inputs"}


class Listed(nn.Module):
    """A list of places is copied to the GPU in every forward."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(2, 3)

    def forward(self, x):
        return self.last(self.first(x).relu()[:, [1, 4]])


def test_what_waits_in_between_is_not_recorded_and_harms_nothing():
    network, experiments = Listed(), [{"first": [i]} for i in range(8)]
    patcher, stream = Patcher(network, device="cuda"), torch.cuda.current_stream()
    for _ in range(4):
        source, target = torch.randn(2, 5, 6)
        expected = reference_outputs(network, experiments, (source,), (target,))
        check_equal(patcher(experiments, source, target).cpu(), expected, torch.float32)
    assert [asked.replay for asked in patcher._replays._asked.values()] == [None]
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0


def test_replays_go_on_in_inference_mode_and_of_inputs_with_gradients():
    network, experiments = mlp([6, 8, 8, 4], nn.Tanh), [{"0": [i]} for i in range(8)]
    patcher = Patcher(network, device="cuda")
    for number in range(5):
        source, target = torch.randn(2, 5, 6)
        expected = reference_outputs(network, experiments, (source,), (target,))
        with torch.inference_mode(number % 2 == 0):
            found = patcher(experiments, source.requires_grad_(), target)
        check_equal(found.cpu(), expected, torch.float32)
    assert all(asked.replay for asked in patcher._replays._asked.values())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_replay_of_every_kind_of_network_equals_plain_hooks(name):
    network, source, target = build(name, 0)
    experiments = experiments_of(network, target)
    patcher = Patcher(network, device="cuda")
    for seed in range(4):
        torch.manual_seed(seed)
        source, target = (tuple(map(torch.randn_like, side)) for side in (source, target))
        found = patcher(experiments, source, target)
        expected = reference_outputs(network, experiments, source, target)
        check_equal(found.cpu(), expected, torch.float32)
    if name in SURELY_RECORDED:
        assert [bool(asked.replay) for asked in patcher._replays._asked.values()] == [True]


def test_a_recording_that_is_dropped_leaves_the_others_as_they_were():
    network = mlp([6, 64, 64, 4], nn.ReLU)
    one, other = ([{layer: [i]} for i in range(64)] for layer in ("0", "2"))
    patcher = Patcher(network, device="cuda")
    for _ in range(3):
        for experiments in (one, other):
            patcher(experiments, *torch.randn(2, 16, 6))
    first = next(iter(patcher._replays._asked.values()))
    assert first.replay is not None
    first.replay = None
    torch.cuda.empty_cache()
    taken = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    source, target = torch.randn(2, 16, 6)
    expected = reference_outputs(network, other, (source,), (target,))
    check_equal(patcher(other, source, target).cpu(), expected, torch.float32)
    assert all(bool(x.isnan().all()) for x in taken)


def test_where_a_replay_does_not_hold_the_call_is_computed_as_ever():
    network = mlp([6, 8, 8, 4], nn.ReLU)
    patcher = Patcher(network, dtype=torch.float64, device="cuda")
    experiments = [{"0": [i]} for i in range(8)]
    source, target = torch.randn(2, 5, 6)
    for _ in range(3):
        patcher(experiments, source, target)
    assert all(asked.replay for asked in patcher._replays._asked.values())
    large = 1e6 * target
    expected = reference_outputs(network, experiments, (source,), (large,))
    check_equal(patcher(experiments, source, large).cpu(), expected, torch.float32)
    assert not any(asked.replay for asked in patcher._replays._asked.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(700, 9, 1000), (3000, 33, 64), (5000, 900, 1), (3, 2, 1 << 20)])
def test_large_updates_by_a_kernel_of_their_own_are_torchs(shape, dtype):
    n_experiments, n_inputs, width = shape
    base, delta, columns = (
        torch.randn(*size, dtype=dtype, device="cuda")
        for size in ((n_inputs, width), (n_experiments, n_inputs, 1), (n_experiments, 1, width))
    )
    out = base.new_full(shape, torch.nan)
    assert updates._kernel(dtype, out.device) is not None
    found = updates.rank_one(base, delta, columns, out)
    torch.testing.assert_close(found, base + delta * columns, rtol=1e-6, atol=1e-6)
