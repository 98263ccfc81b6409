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

from raypatch.engine.graph import AtenOperation, Node, Ref
from raypatch.engine.local_rules import LOCAL_RULES, channelwise, pointwise
from raypatch.engine.overwriting import OPERATORS, memory_of

COMMUTATIVE = {"add", "mul"}
# Of the element-wise operations those that copy or not by how a value lies; what always gives its
# argument, as dropout does, is seen to.
COPY_BY_LAYOUT = {"contiguous", "to"}
MAKE_MEMORY = {"matmul", "bmm", "linear", "layer_norm", "softmax", "scaled_dot_product_attention"}
# What holds no memory of a tensor.
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


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
    args, kwargs = node.args, dict(node.kwargs)
    if not node.flat or not args or kwargs.pop("out", None) is not None:
        return None
    if args[0] != Ref(used):
        if node.name not in COMMUTATIVE or len(args) != 2 or args[1] != Ref(used) or kwargs:
            return None
        args = args[::-1]
    if not isinstance(args[0], Ref):
        return None
    target = _overwriting(node)
    if target is None:
        return None
    return replace(node, op="function", target=target, args=args, kwargs=kwargs)


def _overwriting(node: Node) -> Callable[..., Any] | None:
    target, name = node.target, node.name
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
            return partial(target, inplace=True)
    return getattr(Tensor, f"{name}_", None)


def _with_inplace(module: Any) -> Callable[..., Any]:
    module = copy.copy(module)
    module.inplace = True
    return module


class Memory:
    """Which nodes' values may share memory, by ``sample``, the values of a run on one input.

    What copies there may give a view of a batch, whose rows lie otherwise: what is not known to
    make new memory is taken to share its arguments'.
    """

    def __init__(self, nodes: list[Node], sample: list[Any], readers: dict[int, list[int]]) -> None:
        self._nodes = nodes
        self._readers = readers
        self._places: list[set[int]] = []
        for node in nodes:
            leaves = tree_flatten(sample[node.index])[0]
            places = memory_of(sample[node.index])
            if not _makes_memory(node) and not all(isinstance(x, PLAIN) for x in leaves):
                places = places.union(*(self._places[i] for i in node.inputs))
            self._places.append(places)
        self._held: dict[int, list[int]] = {}
        for number, places in enumerate(self._places):
            for place in places:
                self._held.setdefault(place, []).append(number)

    def together(self, index: int) -> set[int]:
        """The nodes whose values may lie where the node's does, and the node itself."""
        return {node for place in self._places[index] for node in self._held[place]} | {index}

    def is_shared(self, index: int) -> bool:
        """Whether a node's value may be (part of) an earlier one's that is read later."""
        earlier = (node for node in self.together(index) if node < index)
        return any(reader > index for node in earlier for reader in self._readers[node])

    def is_free(self, index: int, at: int) -> bool:
        """Whether the operation ``at`` may overwrite its input ``index``: nothing in that memory is
        read later or by another of its arguments, and nothing of the user's may hold it."""
        together = self.together(index)
        return (
            at not in together
            and together.isdisjoint(i for i in self._nodes[at].inputs if i != index)
            and all(reader <= at for node in together for reader in self._readers[node])
            and all(self._nodes[node].is_torchs for node in together)
        )


def _makes_memory(node: Node) -> bool:
    """Whether the result of a node is (part of) an argument only where the sample shows it."""
    if not node.is_torchs or node.name in COPY_BY_LAYOUT:
        return False
    if node.op == "module" and any(True for _ in node.target.parameters()):
        return True
    return LOCAL_RULES.get(node.key) in (pointwise, channelwise) or node.name in MAKE_MEMORY
