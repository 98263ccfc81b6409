"""Linear and convolution layers that a network writes out as functions, as modules.

``F.linear(x, self.weight_mu, self.bias_mu)`` of a noisy layer, ``x @ self.weight``, and what an
exporter leaves of either become ``nn.Linear``, so that one set of rules serves all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from raypatch.engine.from_weights import convolution_of, linear_of
from raypatch.engine.graph import Graph, Node, Ref


def with_modules(graph: Graph) -> Graph:
    """The graph with modules for functions whose weights follow from no input."""
    fixed = _Fixed(graph.nodes)
    nodes = [_as_module(node, fixed) for node in graph.nodes]
    return graph.with_nodes(nodes)


class _Fixed:
    """Values of nodes that are or follow from the network's own tensors alone."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = nodes
        self._fixed: set[int] = set()
        self._values: dict[int, Any] = {}
        for node in nodes:
            computed = node.op in ("function", "method") and node.is_torchs and bool(node.inputs)
            if node.op == "constant" or (computed and self._fixed.issuperset(node.inputs)):
                self._fixed.add(node.index)

    def __contains__(self, argument: Any) -> bool:
        return isinstance(argument, Ref) and argument.node in self._fixed

    def tensor(self, argument: Any) -> Tensor | None:
        """An argument's value where it is such a tensor."""
        if argument not in self:
            return None
        value = self._value(argument.node)
        return value.detach() if isinstance(value, Tensor) else None

    def _value(self, index: int) -> Any:
        if index not in self._values:
            self._values[index] = self._nodes[index].call(self._value)
        return self._values[index]


# A function or method by its name; None for the forms that no layer has.
Form = Callable[[Node, _Fixed], "tuple[Any, nn.Module] | None"]


def _as_module(node: Node, fixed: _Fixed) -> Node:
    form = FORMS.get(node.name) if node.op in ("function", "method") and node.is_torchs else None
    found = form(node, fixed) if form is not None else None
    if found is None:
        return node
    value, module = found
    if not isinstance(value, Ref) or value in fixed:
        return node
    return replace(node, op="module", target=module.eval(), args=(value,), kwargs={})


def _linear(node: Node, fixed: _Fixed) -> tuple[Any, nn.Module] | None:
    weight = node.option(1, "weight")
    value, bias = node.option(0, "input"), node.option(2, "bias")
    return _layer(value, fixed, fixed.tensor(weight), bias)


def _product(node: Node, fixed: _Fixed) -> tuple[Any, nn.Module] | None:
    right = fixed.tensor(node.args[1]) if len(node.args) == 2 else None
    if right is None or right.dim() != 2:
        return None
    return _layer(node.args[0], fixed, right.t())


def _product_and_bias(node: Node, fixed: _Fixed) -> tuple[Any, nn.Module] | None:
    right = fixed.tensor(node.args[2]) if len(node.args) == 3 and not node.kwargs else None
    return None if right is None else _layer(node.args[1], fixed, right.t(), node.args[0])


def _layer(
    value: Any, fixed: _Fixed, weight: Tensor | None, bias: Any = None
) -> tuple[Any, nn.Module] | None:
    given = fixed.tensor(bias)
    if weight is None or weight.dim() != 2 or (bias is not None and given is None):
        return None
    if given is not None and list(given.shape) != [len(weight)]:
        return None
    return value, linear_of(weight, given)


def _convolution(node: Node, fixed: _Fixed) -> tuple[Any, nn.Module] | None:
    weight, bias = fixed.tensor(node.option(1, "weight")), node.option(2, "bias")
    given = fixed.tensor(bias)
    if weight is None or (bias is not None and given is None):
        return None
    names = ("stride", "padding", "dilation", "groups")
    options = {n: node.option(place, n) for place, n in enumerate(names, 3)}
    options = {n: plain_option(value) for n, value in options.items() if value is not None}
    return node.option(0, "input"), convolution_of(weight, given, **options)


def plain_option(option: Any) -> Any:
    """A stride or the like as modules take it: fx has lists of its own."""
    return tuple(option) if isinstance(option, (list, tuple)) else option


FORMS: dict[str, Form] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm"), _product),
    "addmm": _product_and_bias,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}
