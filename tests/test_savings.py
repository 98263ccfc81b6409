"""What the engine leaves out, computes once, or takes in parts; the numbers stay the same."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from networks import build, changed_by, check_equal, counts_of, mlp
from torch import nn

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine import patch_run
from raypatch.engine.incremental import Incremental
from raypatch.engine.patch_run import Limits
from raypatch.engine.patcher import Patcher
from raypatch.engine.prepared import Prepared
from raypatch.engine.reference import reference_outputs
from raypatch.engine.sources import SOURCE_KINDS
from raypatch.errors import NoRoomError

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
    changed = torch.cat([changed_by(prepared, name) for name in ("0", "2")])
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
    first, real = run._engine.graph.nodes[1], nn.Linear.forward

    def counted(module, x):
        calls.append(module)
        return real(module, x)

    counted.__module__ = nn.Linear.forward.__module__  # another's forward has no rules
    monkeypatch.setattr(type(first.target), "forward", counted)
    run([{"2": [1]}, {"4": [0]}])
    assert first.path == "0" and first.target not in calls


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


def test_a_batch_on_a_gpu_may_take_what_torch_keeps_there_unused(monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * gib, 16 * gib))
    counts = {"reserved_bytes": 10 * gib, "allocated_bytes": 4 * gib}
    counts = {name: {"all": {"current": number}} for name, number in counts.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: counts)
    limits = Limits(torch.device("cuda"), memory_bytes=100 * gib)
    assert limits.rows_for(1024) == (2 + 10 - 4) * gib // 4 // 3 // 1024


def test_one_of_several_patchers_takes_its_share_and_looks_anew_on_another_machine(monkeypatch):
    free = iter([64 << 30, 8 << 30])
    monkeypatch.setattr(patch_run, "_free_on_gpu", lambda _: next(free))
    limits = Limits(torch.device("cuda"), gpu_share=0.25)
    assert limits.rows_for(1 << 20) == limits.rows_for(1 << 20) == (8 << 30) // 4 // 3 // (1 << 20)
    assert replace(limits).rows_for(1 << 20) == (1 << 30) // 4 // 3 // (1 << 20)
    patcher = pickle.loads(pickle.dumps(Patcher(mlp([4, 3, 2], nn.ReLU))))
    assert "_free" not in vars(patcher._limits)


def test_what_is_gathered_for_many_neurons_counts_in_a_batchs_memory():
    network = mlp([4, 64, 64, 3], nn.ReLU)
    run = Patcher(network).prepare(torch.randn(8, 4), torch.randn(8, 4))
    prepared = run._prepare(0)
    one, many = (prepared.row_bytes(run.plan([{"2": list(range(k))}]).groups[0]) for k in (1, 60))
    assert many - one == 2 * 59 * 4


def test_what_is_gathered_counts_where_a_neuron_has_most_features():
    network = nn.Sequential(nn.Conv1d(2, 8, 1), nn.Upsample(scale_factor=5), nn.Conv1d(8, 3, 20))
    network.append(nn.Flatten())
    run = Patcher(network).prepare(torch.randn(3, 2, 4), torch.randn(3, 2, 4))
    prepared = run._prepare(0)
    one, two = (prepared.row_bytes(run.plan([{"0": list(range(k))}]).groups[0]) for k in (1, 2))
    assert two - one == 2 * 20 * 4


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


def test_batches_are_halved_down_to_one_experiment_on_a_part_of_the_inputs(monkeypatch):
    network = mlp([4, 8, 2], nn.ReLU)
    source, target = torch.randn(64, 4), torch.randn(64, 4)
    patcher = Patcher(network)
    whole = patcher([{"0": [0]}, {"0": [1]}], source, target)
    run = Patcher(network, memory_bytes=20_000).prepare(source, target)
    assert run.inputs_at_a_time < 32
    real = Prepared.evaluate

    def evaluate(prepared, group, out, batch_rows):
        if batch_rows > run.inputs_at_a_time:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(prepared, group, out, batch_rows)

    monkeypatch.setattr(Prepared, "evaluate", evaluate)
    torch.testing.assert_close(run([{"0": [0]}, {"0": [1]}]), whole)


def test_out_of_memory_with_one_experiment_says_what_to_lower(monkeypatch):
    network, source, target = build("residual", 0)
    run = Patcher(network, batch_rows=8).prepare(source, target)

    def evaluate(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(run._prepare(0), "evaluate", evaluate)
    with pytest.raises(NoRoomError, match="lower --memory_per_actor"):
        run([{"a": [0]}])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
    ],
    ids=str,
)
def test_every_way_to_run_out_of_memory_halves_the_batch_and_gives_scratch_memory_back(
    monkeypatch, error
):
    network, source, target = build("residual", 0)
    run = Patcher(network, batch_rows=64).prepare(source, target)
    run([{"a": [0]}])
    prepared, engine, errors = run._prepare(0), run._engine, [error]
    real, scratch = prepared.evaluate, []

    def evaluate(*args):
        scratch.append(len(engine.scratch._buffers))
        if errors:
            raise errors.pop()
        return real(*args)

    monkeypatch.setattr(prepared, "evaluate", evaluate)
    run([{"a": [0]}])
    assert run._halvings == 1 and scratch[0] > 0 and scratch[1] == 0
