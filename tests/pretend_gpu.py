"""The engine on a pretend GPU: CPU tensors that say they lie on a device, and refuse what a GPU
refuses. A script of its own, because the pretended device stays with the process.

    python tests/pretend_gpu.py NETWORK ...
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
from networks import AS_IF_LARGE, build, check_equal, counts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from raypatch.engine import incremental, structure
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs

NAME = "pretended"
aten = torch.ops.aten
# Those that take indices or masks from the CPU too, as on a GPU.
INDEXING = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip


class OnDevice(torch.Tensor):
    """A tensor whose numbers are those of ``held``, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, _, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("numpy() on a tensor of a device")
        return self.held.numpy()


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def held(value):
    return value.held if isinstance(value, OnDevice) else value


def compute(function, args, kwargs):
    """The operation on the CPU, its results where they would be on a machine with a device."""
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnDevice)]
    goes_there = device.type == NAME if device is not None else bool(there)
    if there and function not in {aten.copy_.default, aten._to_copy.default}:
        for x in tensors:
            may_mix = x.dim() == 0 or (function in INDEXING and isinstance(args[0], OnDevice))
            if not isinstance(x, OnDevice) and not may_mix:
                raise RuntimeError(f"{function}: {list(x.shape)} lies on the CPU, others do not")
    own = {id(x.held): x for x in there}
    result = function(*tree_map(held, args), **tree_map(held, kwargs))
    if function is aten.copy_.default:
        return args[0]
    if function is aten._to_copy.default:
        return OnDevice(result.clone()) if goes_there else result
    if function is aten._local_scalar_dense.default:
        return result

    def placed(x):
        if not isinstance(x, torch.Tensor):
            return x
        return own.get(id(x)) if id(x) in own else OnDevice(x) if goes_there else x

    return tree_map(placed, result)


def check(name: str) -> None:
    """Single neurons, several at once and whole layers of a network equal plain hooks."""
    network, source, target = build(name, 0)
    for one, other in zip(source, target):
        one[:2] = other[:2]  # nothing changes there
    counts = counts_of(network, target)
    experiments = [{layer: [i]} for layer, n in counts.items() for i in range(n)]
    experiments += [{layer: "all"} for layer in counts]
    experiments += [
        {one: [0], other: [n - 1, 0] if n > 1 else [0]}
        for one in counts for other, n in counts.items() if one != other
    ]  # fmt: skip
    expected = reference_outputs(network, experiments, source, target)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    shares = structure._shares
    for large in (False, True):
        with ExitStack() as stack:
            # It compares storages, which the pretended tensors do not have.
            stack.enter_context(
                patch.object(structure, "_shares", lambda a, b: shares(held(a), held(b)))
            )
            if large:
                stack.enter_context(patch.multiple(incremental, **AS_IF_LARGE))
            stack.enter_context(Device())
            found = patcher.to(NAME)(experiments, source, target)
            assert isinstance(found, OnDevice)
        check_equal(found.held, expected, torch.float32)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME)
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        check(name)
        print(name, "equals plain hooks")
