"""Whether a forward's Python decides by values: then experiments cannot be stacked.

``if h.max() > 20`` is one decision for the whole batch. One experiment's values would make it for
all that are stacked with it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from raypatch.engine.guards import distributions_unchecked, truth_that_goes_on
from raypatch.engine.layers import Args, forward, tensors_in

READS_VALUES = {
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.is_nonzero),
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.equal, Tensor.allclose),
    *(torch.is_nonzero, torch.equal, torch.allclose, Tensor.__contains__, Tensor.__dlpack__),
}
# How long what these give is, depends on values; so does what is computed from that.
SIZED_BY_VALUES = {
    *("nonzero", "argwhere", "masked_select", "bincount", "unique", "unique_consecutive"),
}
READS_SIZES = {Tensor.__len__, Tensor.size, Tensor.numel, torch.numel, Tensor.shape.__get__}  # type: ignore[attr-defined]


def decides_by_values(network: nn.Module, args: Args) -> bool:
    """Whether, in a forward on ``args``, Python reads the numbers of what follows from them."""
    watch = _Watch()

    def start(_: nn.Module, given: Any) -> None:
        watch.follow(given)

    handle = network.register_forward_pre_hook(start)
    try:
        with torch.no_grad(), distributions_unchecked(), watch:
            forward(network, args)
    finally:
        handle.remove()
    return watch.found


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self._following: dict[int, Tensor] = {}  # held, so that no other gets the same id
        self._sized: set[int] = set()  # of those, whose sizes depend on values

    def follow(self, value: Any) -> None:
        self._following.update({id(tensor): tensor for tensor in tensors_in(value)})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_flatten((args, kwargs))[0]}
        if not given.isdisjoint(self._following):
            is_sized = not given.isdisjoint(self._sized)
            self.found |= func in READS_VALUES and not _only_guards(func)
            self.found |= func in READS_SIZES and is_sized
            self.follow(result)
            if is_sized or _sizes_by_values(func, args):
                self._sized.update(map(id, tensors_in(result)))
        return result


def _only_guards(func: Any) -> bool:
    if func is not Tensor.__bool__:
        return False
    asking = sys._getframe(1)
    while asking.f_back is not None and asking.f_code.co_name == "__torch_function__":
        asking = asking.f_back  # past the modes' own functions
    return truth_that_goes_on(asking, forward.__code__) is not None


def _sizes_by_values(func: Any, args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "where":
        return len(args) == 1
    if name == "repeat_interleave":
        return len(args) > 1 and isinstance(args[1], Tensor)
    if func is Tensor.__getitem__:
        return any(index.dtype is torch.bool for index in tensors_in(args[1:]))
    return name in SIZED_BY_VALUES
