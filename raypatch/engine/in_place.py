"""Operations on dense rows that write their result into an argument which nobody reads any more.

New memory costs a large element-wise operation more than its numbers do: the system clears it, and
it is not in the cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from raypatch.engine.capture import AtenOperation, Node, Ref
from raypatch.engine.overwriting import OPERATORS

COMMUTATIVE = {"add", "mul"}


def tanh_(x: Tensor) -> Tensor:
    """In place; NumPy's vector kernel is several times faster than torch's on a CPU."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        array = x.numpy()
        np.tanh(array, out=array)
        return x
    return x.tanh_()


# By a module's type, a function, or the name of a function or method.
OVERWRITING: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((nn.Tanh, "tanh"), tanh_),
    nn.Sigmoid: torch.sigmoid_,
    **{without: function for function, without in OPERATORS.items()},
}


def writes_into(node: Node, used: int) -> Node | None:
    """An element-wise operation that writes its result into its input ``used``; None where torch
    has none."""
    args = node.args
    if not node.flat or not args:
        return None
    if args[0] != Ref(used):
        name = getattr(node.key, "__name__", node.key)
        if name not in COMMUTATIVE or len(args) != 2 or args[1] != Ref(used) or node.kwargs:
            return None
        args = args[::-1]
    if not isinstance(args[0], Ref):
        return None
    target = _overwriting(node)
    if target is None:
        return None
    return replace(node, op="function", target=target, args=args)


def _overwriting(node: Node) -> Callable[..., Any] | None:
    target, name = node.target, getattr(node.key, "__name__", node.key)
    for key in (node.key, name):
        if key in OVERWRITING:
            return OVERWRITING[key]
    if node.op == "module":
        if isinstance(target, nn.GELU):
            return partial(torch.ops.aten.gelu_, approximate=target.approximate)
        return _with_inplace(target) if hasattr(target, "inplace") else None
    if isinstance(target, AtenOperation):
        packet = getattr(torch.ops.aten, f"{name}_", None)
        is_there = packet is not None and target.overload in packet.overloads()
        return AtenOperation(f"{name}_", target.overload) if is_there else None
    if target is F.gelu:
        return torch.ops.aten.gelu_
    if getattr(F, name, None) is target and inspect.isfunction(target):
        parameters = list(inspect.signature(target).parameters)
        if "inplace" in parameters[len(node.args) :]:
            return partial(target, **{"inplace": True})
    return getattr(Tensor, f"{name}_", None)


def _with_inplace(module: Any) -> Callable[..., Any]:
    module = copy.copy(module)
    module.inplace = True
    return module


class Memory:
    """Which nodes' values share memory, by ``sample``, the values of a run on one input."""

    def __init__(self, nodes: list[Node], sample: list[Any], readers: dict[int, list[int]]) -> None:
        self._nodes = nodes
        self._readers = readers
        self._places = [
            {storage_of(t) for t in tree_flatten(value)[0] if isinstance(t, Tensor) and t.numel()}
            for value in sample
        ]
        self._held: dict[int, list[int]] = {}
        for number, places in enumerate(self._places):
            for place in places:
                self._held.setdefault(place, []).append(number)

    def together(self, index: int) -> list[int]:
        """The nodes whose values lie where the node's does, and the node itself."""
        return [node for place in self._places[index] for node in self._held[place]]

    def is_free(self, index: int, at: int) -> bool:
        """Whether the operation ``at`` may overwrite its input ``index``: nothing in that memory is
        read later or by another of its arguments, and no module of the user's may hold it."""
        together = set(self.together(index))
        return (
            at not in together
            and together.isdisjoint(i for i in self._nodes[at].inputs if i != index)
            and all(reader <= at for node in together for reader in self._readers[node])
            and all(_is_torchs(self._nodes[node]) for node in together)
        )


def storage_of(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    return tensor.untyped_storage().data_ptr()


def _is_torchs(node: Node) -> bool:
    """What else gives out a value may keep it, as a module its weights."""
    if node.op == "method" or isinstance(node.target, AtenOperation):
        return True
    code = type(node.target) if node.op == "module" else node.target
    # Many of torch's own functions name no module.
    home = getattr(code, "__module__", None) or "torch"
    return node.op in ("module", "function") and home.split(".")[0] in ("torch", "_operator")
