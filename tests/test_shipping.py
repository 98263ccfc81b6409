"""Packing: the same object again, its tensors on memory that is not copied."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import raypatch
from raypatch.sweeps.shipping import pack, tensor_on, unpack
from raypatch.sweeps.sides import Sides


def test_weights_leave_the_pickle_and_come_back_on_the_same_memory():
    network = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2)).eval()
    shipment = pack(network)
    assert len(shipment.content) < 20_000 and len(shipment.arrays) == 4
    again = unpack(pickle.loads(pickle.dumps(shipment)))
    x = torch.randn(3, 300)
    torch.testing.assert_close(again(x), network(x), rtol=0, atol=0)
    shared = unpack(shipment)
    assert np.shares_memory(shared[0].weight.detach().numpy(), shipment.arrays[0])


def test_tensors_that_are_one_object_stay_one():
    layer = nn.Linear(4, 4)
    one, two = unpack(pack([layer.weight, layer.weight]))
    assert one is two and isinstance(one, nn.Parameter)


def test_a_patcher_on_read_only_memory_gives_the_same_numbers():
    network = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    source, target = torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    experiments = [{"0": [1]}, {"3": [0]}, {"0": "all"}]
    patcher = raypatch.Patcher(network)
    expected = patcher(experiments, source, target)
    shipment = pack(patcher)
    for array in shipment.arrays:
        array.flags.writeable = False
    torch.testing.assert_close(unpack(shipment)(experiments, source, target), expected)


@pytest.mark.parametrize("offset", [0, 8, 24])
def test_tensors_begin_where_torchs_own_do_and_lie_on_the_arrays_memory_where_that_does(offset):
    raw = np.zeros(256, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    array = raw[start : start + 80].view(np.float32)
    array[:] = np.arange(20)
    tensor = tensor_on(array)
    assert tensor.data_ptr() % 64 == 0 and tensor.tolist() == list(range(20))
    assert (tensor.data_ptr() == array.ctypes.data) == (offset == 0)


def test_what_a_worker_computes_does_not_depend_on_where_its_inputs_lie():
    raw = np.zeros(1024, np.uint8)
    start = -raw.ctypes.data % 64 + 8  # as Ray lays small arrays
    clean = raw[start : start + 140].view(np.float32).reshape(7, 5)
    clean[:] = np.random.default_rng(0).normal(size=(7, 5))
    both = {"clean": clean, "corrupted": clean}
    for kind in ("pair", "zero", "given"):
        sides = Sides(both, ("denoising",), kind, given={"a": clean})
        source, target = sides.source_and_target("denoising")
        taken = [target, *(source or {}).values()] if kind == "given" else [target, source]
        assert all(x.data_ptr() % 64 == 0 for x in taken if x is not None)
