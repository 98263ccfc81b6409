"""What takes the place of a slow operation of torch's gives the same numbers, bit for bit."""

from __future__ import annotations

import itertools

import cloudpickle
import pytest
import torch
from networks import NotTraced, check_equal
from torch import nn
from torch.nn import functional as F

from raypatch.engine.faster import largest, max_pool, smallest
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs

# Size, step and padding of windows that torch takes: the padding is at most half the size.
WINDOWS = [
    (size, step, padding)
    for size, step, padding in itertools.product(range(1, 5), range(1, 5), range(3))
    if 2 * padding <= size
]


@pytest.mark.parametrize("special", [0.0, torch.nan, -torch.inf, torch.inf])
def test_a_maximum_of_slices_is_torchs_max_pooling(special):
    generator = torch.Generator().manual_seed(0)
    for length, (size, step, padding) in itertools.product(range(4, 10), WINDOWS):
        x = torch.randn(2, 3, length, length + 1, generator=generator)
        x[torch.rand(x.shape, generator=generator) < 0.2] = special
        expected = F.max_pool2d(x, size, step, padding)
        found = max_pool(x, (size, size), (step, step), (padding, padding))
        assert torch.equal(found.nan_to_num(99), expected.nan_to_num(99))


def test_max_pooling_along_one_and_three_axes_with_windows_of_their_own():
    x = torch.randn(2, 5, 6, 7)
    found = max_pool(x, (2, 3, 1), (1, 2, 3), (1, 1, 0))
    assert torch.equal(found, F.max_pool3d(x, (2, 3, 1), (1, 2, 3), (1, 1, 0)))
    assert torch.equal(max_pool(x[0], (3,), (2,), (0,)), F.max_pool1d(x[0], 3, 2))


class Pooled(nn.Module):
    """Dense rows go through ``operation`` when the first layer is patched."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.operation = operation
        with torch.no_grad():
            pooled = operation(self.second(self.first(torch.zeros(1, 2, 8, 6)))).flatten(1)
        self.last = nn.Linear(pooled.shape[1], 3)

    def forward(self, x):
        return self.last(self.operation(self.second(self.first(x).relu())).flatten(1))


class Exported(NotTraced, Pooled):
    pass


REPLACED = {
    "nn.MaxPool2d": (nn.MaxPool2d(3, 2, 1), max_pool),
    "nn.MaxPool3d": (nn.MaxPool3d((1, 2, 2)), max_pool),
    "F.max_pool2d": (lambda h: F.max_pool2d(h, 2), max_pool),
    "the input by name": (lambda h: F.max_pool2d(input=h, kernel_size=2), max_pool),
    "torch.max, all by name": (lambda h: torch.max(input=h, dim=1)[0][:, None], largest),
    "F.max_pool2d, by name": (
        lambda h: F.max_pool2d(h, kernel_size=(2, 3), stride=[1, 2], padding=(0, 1)), max_pool
    ),
    "torch.max_pool2d": (lambda h: torch.max_pool2d(h, 2, padding=1), max_pool),
    "F.max_pool1d": (lambda h: F.max_pool1d(h.flatten(2), 4, 3), max_pool),
    "max, by name": (lambda h: h.max(1).values, largest),
    "max, by place": (lambda h: h.flatten(2).max(dim=-1, keepdim=True)[0], largest),
    "torch.min": (lambda h: torch.min(h, 2)[0], smallest),
}  # fmt: skip
KEPT = {
    "an empty shape": lambda h: h.reshape(h.shape[:1] + h.shape[4:] + (-1,)),
    "ceil_mode": lambda h: F.max_pool2d(h, 4, 3, ceil_mode=True),
    "dilation": nn.MaxPool2d(2, dilation=2),
    "places are read": lambda h: F.max_pool2d(h, 2, return_indices=True)[1].to(h.dtype),
    "of two values": lambda h: torch.max(h, 1 - h),
    "all results": lambda h: (lambda found: found[0] * found[1])(h.max(1)),
    "average": nn.AvgPool2d(3, 2, 1),
}


def _operations(operation, kind, dtype):
    """What runs on dense rows after the numbers were compared with those of plain hooks."""
    torch.manual_seed(0)
    network = kind(operation).eval()
    source, target = torch.randn(4, 2, 8, 6), torch.randn(4, 2, 8, 6)
    experiments = [{"first": [i]} for i in range(4)] + [{"second": [1]}, {"first": "all"}]
    patcher = Patcher(network, dtype=dtype)
    outputs = patcher(experiments, source, target)
    check_equal(outputs, reference_outputs(network, experiments, source, target), dtype)
    assert patcher.path.startswith("incremental")
    assert ("torch.export" in patcher.path) == (kind is Exported)
    return {step.operation.target for step in _steps(patcher)}


def _steps(patcher):
    structure = patcher._engine.structure
    return structure.program((("first", 1),), source_runs=True).steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [Pooled, Exported])
@pytest.mark.parametrize("name", REPLACED)
def test_slow_operations_of_every_form_are_replaced(name, kind, dtype):
    operation, expected = REPLACED[name]
    assert expected in _operations(operation, kind, dtype)


@pytest.mark.parametrize("kind", [Pooled, Exported])
@pytest.mark.parametrize("name", KEPT)
def test_forms_that_need_more_run_as_they_are(name, kind):
    found = _operations(KEPT[name], kind, torch.float64)
    assert not found & {max_pool, largest, smallest}


@pytest.mark.parametrize("name", REPLACED)
def test_in_another_process_a_network_is_computed_in_the_same_way(name):
    torch.manual_seed(0)
    patcher = Patcher(Pooled(REPLACED[name][0]).eval())
    patcher.prepare(torch.randn(3, 2, 8, 6), torch.randn(3, 2, 8, 6))
    sent = cloudpickle.loads(cloudpickle.dumps(patcher))
    here, there = (p._engine.structure for p in (patcher, sent))
    for layer in ("first", "second"):
        (entry,) = here.calls[layer]
        assert here.chains.after(entry).keys() == there.chains.after(entry).keys()
    assert [s.operation.name for s in _steps(patcher)] == [s.operation.name for s in _steps(sent)]
