"""Small calls recorded for a GPU: what is computed without a look at any number on the CPU.

``tests/test_gpu.py`` replays them on one.
"""

from __future__ import annotations

import pytest
import torch
from networks import ZOO, build, check_equal, counts_of, mlp
from torch import nn

from raypatch.definitions import Experiments
from raypatch.engine.incremental import Incremental
from raypatch.engine.patch_run import Limits
from raypatch.engine.patcher import Patcher
from raypatch.engine.prepared import Unassumed
from raypatch.engine.reference import reference_outputs
from raypatch.engine.replaying import Replays, _key, outputs_unseen
from raypatch.engine.scratch import Scratch

ON_CPU = Limits(torch.device("cpu"))


def unseen(network, experiments, source, target, dtype=torch.float32):
    """Outputs, and whether what was assumed is so."""
    patcher = Patcher(network, dtype=dtype)
    run = patcher.prepare(source, target)
    if not isinstance(patcher._engine, Incremental):
        pytest.skip("goes by hooks")
    plan, args = run.plan(experiments), (run._parts[0][0], run._parts[0][1])
    with torch.no_grad():
        outputs, as_assumed = outputs_unseen(patcher._engine, Scratch(), ON_CPU, plan, *args)
    return outputs, bool(as_assumed)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_all_rows_computed_unseen_equal_plain_hooks(name):
    network, source, target = build(name, 0)
    for one, other in zip(source, target):
        one[:2] = other[:2]  # nothing changes there
    counts = counts_of(network, target)
    experiments = [{layer: [i]} for layer, n in counts.items() for i in range(n)]
    experiments += [{layer: "all"} for layer in counts] + experiments[:3]
    experiments += [
        {one: [0], other: [n - 1, 0] if n > 1 else [0]}
        for one in counts for other, n in counts.items() if one != other
    ]  # fmt: skip
    try:
        outputs, as_assumed = unseen(network, experiments, source, target)
    except Unassumed:
        pytest.skip("rows to compute whole are looked for")
    assert as_assumed
    check_equal(outputs, reference_outputs(network, experiments, source, target), torch.float32)


def test_rows_that_do_not_change_are_the_baseline_bit_for_bit():
    network = mlp([6, 32, 32, 4], nn.ReLU)
    source, target = torch.randn(2, 16, 6)
    experiments = [{"0": [i]} for i in range(32)]
    outputs, _ = unseen(network, experiments, source, target)
    run = Patcher(network).prepare(source, target)
    seen = run(experiments)
    still = (seen == run.baseline).all(-1)
    assert still.any()
    assert torch.equal(outputs[still], seen[still])


@pytest.mark.parametrize("what", ["infinite", "large"])
def test_what_is_not_as_it_is_as_a_rule_is_told(what):
    network = mlp([6, 8, 8, 4], nn.ReLU)
    source, target = torch.randn(2, 4, 6)
    if what == "infinite":
        source[0, 0] = torch.inf
    else:
        network[2].weight.data *= 1000
    assert unseen(network, [{"0": [0]}], source, target)[1] is False
    assert unseen(network, [{"4": [0]}], torch.randn(4, 6), target)[1] is True


def test_calls_are_the_same_for_equal_lists_and_the_same_experiments_alone():
    source, target = (torch.randn(3, 4),), (torch.randn(3, 4),)
    one, other = ([{"0": [1]}, {"2": "all"}] for _ in range(2))
    assert _key(one, source, target) == _key(other, source, target)
    assert _key(one, source, target) != _key(one[:1], source, target)
    assert _key(one, source, target) != _key(one, (source[0][:2],), (target[0][:2],))
    assert _key(one, source, target) != _key(one, None, target)
    assert _key([{"0": torch.tensor([1])}], source, target) is None
    columns, same = (Experiments.from_list(one) for _ in range(2))
    assert _key(columns, source, target) != _key(same, source, target)


def test_nothing_is_recorded_on_a_cpu_or_of_code_that_may_do_more_than_compute():
    plain, hooked = mlp([4, 3, 2], nn.ReLU), mlp([4, 3, 2], nn.ReLU)
    hooked[1].register_forward_hook(lambda *_: None)
    on_gpu = Limits(torch.device("cuda"))
    for network, limits, is_recorded in (
        (plain, on_gpu, True), (plain, ON_CPU, False), (hooked, on_gpu, False),
    ):  # fmt: skip
        patcher = Patcher(network)
        patcher.prepare(torch.randn(3, 4), torch.randn(3, 4))
        assert (Replays.of(patcher._engine, limits) is not None) == is_recorded
