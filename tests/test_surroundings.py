"""Results do not depend on what surrounds a call, and what cannot be patched is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from networks import Deciding
from torch import nn

from raypatch.engine.patcher import Patcher
from raypatch.engine.precision import exact_math
from raypatch.errors import InputError

EXPERIMENTS = [{"0": [i]} for i in range(8)] + [{"0": "all"}, {"2": [0]}]


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_results_are_plain_float32_within_autocast_and_inference_mode():
    torch.manual_seed(0)
    network, source, target = plain(), torch.randn(5, 6), torch.randn(5, 6)
    patcher = Patcher(network)
    with torch.autocast("cpu"):
        lowered = patcher(EXPERIMENTS, source, target)
    with torch.inference_mode():
        inside = patcher(EXPERIMENTS, source, target)
    outside = patcher(EXPERIMENTS, source, target)
    assert lowered.dtype is torch.float32
    assert torch.equal(lowered, outside) and torch.equal(inside, outside)


def test_threads_leave_the_default_type_as_it_was():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    patchers = [Patcher(Deciding(), dtype=torch.float64) for _ in range(3)]
    for patcher in patchers:  # torch cannot trace in several threads
        patcher.prepare(x, x.flip(0))

    def work(patcher: Patcher) -> None:
        for _ in range(5):
            patcher([{"a": [0]}, {"b": "all"}], x, x.flip(0))

    threads = [threading.Thread(target=work, args=(patcher,)) for patcher in patchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() is torch.float32


def test_threads_leave_the_precision_of_products_as_it_was_and_have_it_exact():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        one, other = exact_math(), exact_math()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert not matmul.allow_tf32  # the other is still inside
        other.__exit__(None, None, None)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def test_a_default_device_of_the_users_is_no_place_for_what_a_patcher_makes(monkeypatch):
    torch.manual_seed(0)
    network, x = plain(), torch.randn(5, 6)
    found = {}
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            kinds = ("zero", "mean", "resample")
            found[device] = [Patcher(network)(EXPERIMENTS, target=x, kind=kind) for kind in kinds]
        finally:
            torch.set_default_device(None)
    assert all(map(torch.equal, found["cpu"], found["meta"]))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_is_the_one_that_it_wraps():
    torch.manual_seed(0)
    network, x = plain(), torch.randn(4, 6)
    found = Patcher(torch.compile(network, backend="eager"))(EXPERIMENTS, x, x.flip(0))
    assert torch.equal(found, Patcher(network)(EXPERIMENTS, x, x.flip(0)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_that_cannot_be_copied_are_refused():
    with pytest.raises(InputError, match="is a ScriptModule; give the nn.Module"):
        Patcher(torch.jit.trace(plain(), torch.randn(2, 6)))
    with pytest.raises(InputError, match="lazy layers of unknown size"):
        Patcher(nn.Sequential(nn.LazyLinear(3)))


def test_outputs_that_are_no_float_numbers_are_refused():
    class Acts(nn.Sequential):
        def forward(self, x):
            return super().forward(x) > 0

    with pytest.raises(InputError, match=r"gives torch.bool; patching needs logits"):
        Patcher(Acts(*plain()))([{"0": [0]}], torch.randn(3, 6), torch.randn(3, 6))
