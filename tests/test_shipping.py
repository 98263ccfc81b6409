"""Packing: the same object again, its tensors on memory that is not copied."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from torch import nn

import raypatch
from raypatch.sweeps.shipping import pack, unpack


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
