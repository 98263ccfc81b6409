"""Small calls recorded for a GPU: what is computed without a look at any number on the CPU.

``tests/test_gpu.py`` replays them on one.
"""

from __future__ import annotations

import pickle
import warnings
from enum import IntEnum
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from networks import ZOO, build, check_equal, counts_of, mlp
from torch import nn

from raypatch.definitions import Experiments
from raypatch.engine import replaying
from raypatch.engine.incremental import Incremental
from raypatch.engine.patch_run import Limits
from raypatch.engine.patcher import Patcher
from raypatch.engine.plan import plan_experiments
from raypatch.engine.prepared import Unassumed
from raypatch.engine.reference import reference_outputs
from raypatch.engine.replaying import MOST_KEPT, Replays, key_of, outputs_unseen, waits_are_errors
from raypatch.engine.scratch import Scratch
from raypatch.engine.structure import Savings
from raypatch.engine.two_sides import TwoSides

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


def test_looking_for_what_waits_warns_of_nothing_and_ends_whatever_happens(monkeypatch):
    modes = [0]

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("a prototype", stacklevel=1)  # an error in these tests

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(RuntimeError), waits_are_errors():
        assert modes == [0, "error"]
        raise RuntimeError("called a synchronizing CUDA operation")
    assert modes == [0, "error", 0]


SIDE = (torch.randn(3, 4),)


def _key(experiments, source, target, device="cuda"):
    return key_of(torch.device(device), experiments, TwoSides(source, target, "pair", {}))


def test_calls_are_the_same_where_experiments_and_forms_are():
    one, other = ([{"0": [1]}, {"2": "all"}] for _ in range(2))
    key = _key(one, SIDE, SIDE)
    assert key is not None and key == _key(other, (torch.zeros(3, 4),), SIDE)
    columns, same = (Experiments.from_list(one) for _ in range(2))
    assert _key(columns, SIDE, SIDE) == _key(same, SIDE, SIDE)
    same.neurons[0] = 2  # written over
    assert _key(columns, SIDE, SIDE) != _key(same, SIDE, SIDE)
    plans = [plan_experiments(Experiments.from_list(e)) for e in (one, other, [{"0": [2]}])]
    keys = [_key(plan, SIDE, SIDE) for plan in plans]
    assert keys[0] == keys[1] and len(set(keys)) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.randn(3, 4),), (torch.randn(2, 4),)),
        ((torch.randn(3, 4),), (torch.randn(3, 4).double(),)),
        (({"a": SIDE[0], "b": SIDE[0]},), ({"b": SIDE[0], "a": SIDE[0]},)),
        ((SIDE[0], torch.tensor(1)), (SIDE[0], torch.tensor(0.5))),
        ((SIDE[0], {"x": 1, "y": 2}), (SIDE[0], {"y": 1, "x": 2})),
        ((SIDE[0], 1), (SIDE[0], True)),
    ],
)
def test_inputs_that_a_recording_would_mix_up_are_other_calls(one, other):
    assert _key([], one, one) != _key([], other, other)


@pytest.mark.parametrize(
    "experiments",
    [
        [{"0": np.array([1])}],
        [{"0": torch.tensor([1])}],
        [{"0": [torch.tensor(1)]}],
        [{"0": range(2)}],
        [{"0": [IntEnum("Neuron", "a").a]}],
        [{type("Name", (str,), {})("0"): []}],
        ["all"],
    ],
)
def test_experiments_in_other_forms_are_never_recorded(experiments):
    assert _key(experiments, SIDE, SIDE) is None
    assert _key([], (SIDE[0], object()), SIDE) is None


def test_nothing_is_recorded_on_a_cpu_where_it_is_switched_off_or_of_code_that_may_do_more_than_compute():
    plain, hooked = mlp([4, 3, 2], nn.ReLU), mlp([4, 3, 2], nn.ReLU)
    hooked[1].register_forward_hook(lambda *_: None)
    limits = Limits(torch.device("cuda"), memory_bytes=1 << 30)
    for network, is_recorded in ((plain, True), (hooked, False)):
        patcher = Patcher(network)
        patcher.prepare(torch.randn(3, 4), torch.randn(3, 4))
        assert (Replays.of(patcher._engine, limits) is not None) == is_recorded
    patcher = Patcher(plain, savings=Savings(replay=False))
    patcher.prepare(torch.randn(3, 4), torch.randn(3, 4))
    assert Replays.of(patcher._engine, limits) is None
    assert _key([], SIDE, SIDE) is not None and _key([], SIDE, SIDE, "cpu") is None


class Recorded:
    """In place of a recording: the same computation, run again on the inputs that it keeps."""

    made = 0

    def __init__(self, engine, limits, plan, sides):
        type(self).made += 1
        self.run = lambda *sides: outputs_unseen(engine, Scratch(), limits, plan, *sides)

    def __call__(self, sides):
        with torch.no_grad():
            outputs, as_assumed = self.run(*sides[:2])
        return outputs if as_assumed else None


@pytest.fixture
def recording(monkeypatch):
    """Calls are counted and recorded as on a GPU."""
    monkeypatch.setattr(Recorded, "made", 0)
    monkeypatch.setattr(replaying, "Replay", Recorded)
    monkeypatch.setattr(replaying, "RECORDED_ON", "cpu")
    return Recorded


EXPERIMENTS = [{"0": [i]} for i in range(8)] + [{"2": [3, 1]}, {"0": [0], "2": "all"}] * 2


def correct(patcher, network, source, target):
    expected = reference_outputs(network, EXPERIMENTS, (source,), (target,))
    check_equal(patcher(EXPERIMENTS, source, target), expected, torch.float32)


def test_a_call_that_comes_a_third_time_is_replayed_on_its_own_inputs(recording, monkeypatch):
    network = mlp([6, 8, 8, 4], nn.ReLU)
    patcher = Patcher(network)
    for _ in range(2):
        correct(patcher, network, *torch.randn(2, 5, 6))
    assert recording.made == 1
    with monkeypatch.context() as patched:
        patched.setattr(patcher, "_prepared", None)  # nothing is computed but by the recording
        for _ in range(3):
            correct(patcher, network, *torch.randn(2, 5, 6))
    correct(patcher, network, *torch.randn(2, 3, 6))  # other inputs in number: another call
    assert recording.made == 1


def test_a_recording_that_does_not_hold_is_dropped_and_the_call_computed(recording):
    network = mlp([6, 8, 8, 4], nn.ReLU)
    patcher, (source, target) = Patcher(network, dtype=torch.float64), torch.randn(2, 5, 6)
    for size in (1, 1, 1, 1e6, 1, 1):
        correct(patcher, network, source, size * target)
    assert recording.made == 1
    assert [asked.replay for asked in patcher._replays._asked.values()] == [None]


def test_what_is_in_the_way_of_a_recording_is_no_harm(recording, monkeypatch):
    network = mlp([6, 8, 8, 4], nn.ReLU)
    patcher, failing = Patcher(network), Mock(side_effect=ValueError("no room"))
    monkeypatch.setattr(replaying, "Replay", failing)
    for _ in range(4):
        correct(patcher, network, *torch.randn(2, 5, 6))
    assert failing.call_count == 1 and patcher.path == "incremental (torch.fx)"


def test_experiments_that_can_be_looked_at_once_only_are_computed(recording):
    network = mlp([6, 8, 8, 4], nn.ReLU)
    patcher, (source, target) = Patcher(network), torch.randn(2, 5, 6)
    expected = reference_outputs(network, EXPERIMENTS, (source,), (target,))
    for _ in range(3):
        found = patcher(iter(EXPERIMENTS), source, target)
        check_equal(found, expected, torch.float32)
    check_equal(patcher(tuple(EXPERIMENTS), source, target), expected, torch.float32)
    assert recording.made == 0


def test_recordings_end_with_their_engine_and_do_not_travel(recording):
    network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    patcher = Patcher(network)
    for _ in range(3):
        patcher([{"0": [0]}], torch.randn(5, 2, 6), torch.randn(5, 2, 6))
    assert pickle.loads(pickle.dumps(patcher))._replays is None
    patcher([{"0": [0]}], torch.randn(5, 2, 9), torch.randn(5, 2, 9))  # longer
    assert not any(asked.replay for asked in patcher._replays._asked.values())
    assert patcher.to("cpu")._replays is None


def test_the_last_few_calls_are_kept_by_their_use_and_only_small_ones_are_recorded(recording):
    network = mlp([6, 8, 8, 4], nn.ReLU)
    patcher, (source, target) = Patcher(network), torch.randn(2, 5, 6)
    for neuron in range(8):
        for _ in range(2):
            patcher([{"0": [0]}], source, target)  # used all the time
        patcher([{"0": [neuron]}, {"2": [0]}], source, target)
    asked = patcher._replays._asked
    assert len(asked) == MOST_KEPT and recording.made == 1
    assert _key([{"0": [0]}], (source,), (target,), "cpu") in asked
    many = torch.randn(2, 4096, 6)
    for _ in range(3):
        patcher([{"0": [i]} for i in range(8)] * 10, *many)
    assert recording.made == 1
    little = Patcher(network, memory_bytes=4000)  # no room for recordings
    for _ in range(3):
        little([{"0": [0]}], source, target)
    assert recording.made == 1
