"""Whether a forward's Python decides by values: then experiments cannot be stacked.

``if h.max() > 20`` is one decision for the whole batch. One experiment's values would make it for
all that are stacked with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from raypatch.engine.layers import Args, forward, tensors_in

READS_VALUES = {
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.is_nonzero),
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.equal, Tensor.allclose),
    *(torch.is_nonzero, torch.equal, torch.allclose),
}


def decides_by_values(network: nn.Module, args: Args) -> bool:
    """Whether, in a forward on ``args``, Python reads the numbers of what follows from them."""
    watch = _Watch()

    def start(_: nn.Module, given: Any) -> None:
        watch.follow(given)

    handle = network.register_forward_pre_hook(start)
    try:
        with torch.no_grad(), watch:
            forward(network, args)
    finally:
        handle.remove()
    return watch.found


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self._following: dict[int, Tensor] = {}  # held, so that no other gets the same id

    def follow(self, value: Any) -> None:
        self._following.update({id(tensor): tensor for tensor in tensors_in(value)})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(id(leaf) in self._following for leaf in tree_flatten((args, kwargs))[0]):
            self.found |= func in READS_VALUES
            self.follow(result)
        return result
