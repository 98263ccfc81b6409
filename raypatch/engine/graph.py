"""A network's forward pass as data: nodes, each one module, function or method on the values of
earlier ones.

The graph holds no user classes unless a user's own layer is a node of it, so it travels to actors
that have neither the agent's files nor its code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import attrgetter, getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map

from raypatch.engine.layers import float64_is_default, is_altered, tensors_in, widened


class CaptureError(Exception):
    """The network cannot be captured as a graph; the text says why."""


class InputsMeetError(CaptureError):
    """A value is one of several inputs together, so that experiments cannot be stacked either."""


@dataclass(frozen=True)
class Ref:
    """Stands for another node's value among a node's arguments."""

    node: int


@dataclass(frozen=True)
class AtenOperation:
    """An aten operator by name: unlike the operator itself it can be pickled.

    Rules know it by the name of the method or function it belongs to.
    """

    name: str
    overload: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packet = getattr(torch.ops.aten, self.name)
        return getattr(packet, self.overload)(*args, **kwargs)


# What a forward makes to be written over may hold anything, as zeros; then it tells no input from
# others.
FILLED = {"new_empty": "new_zeros", "empty_like": "zeros_like"}


def aten_operation(target: torch._ops.OpOverload) -> AtenOperation:
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    if name == "view" and overload == "default":
        name = "reshape"  # rows may lie otherwise in memory than the network's own values
    return AtenOperation(FILLED.get(name, name), overload)


@dataclass
class Node:
    """One operation; its index is its place in the forward pass."""

    index: int
    op: str  # "input", "constant", "module", "function" or "method"
    target: Any  # an input's place in the arguments, tensor, module, callable or method name
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    # Path of the module that is called, where one is; a layer's name if it owns weights.
    path: str | None = None
    users: int = 0
    is_wide: bool = False  # what it makes without a type is float64

    # Indices of the nodes whose values are needed, in the order of the arguments; and
    # whether arguments are values and references only, with nothing nested.
    inputs: tuple[int, ...] = ()
    flat: bool = True

    @property
    def key(self) -> Any:
        """What rules are registered under: module type, function, or method name."""
        if self.op == "module":
            # What a hook of the user's makes of it, no rule knows.
            return type(self.target) if not is_altered(self.target) else None
        # An exported operation goes by the name of the method it stands for.
        return getattr(self.target, "name", self.target)

    @property
    def name(self) -> str:
        """Of the function or method, or of the module's class."""
        return str(getattr(self.key, "__name__", self.key))

    @property
    def is_torchs(self) -> bool:
        """Whether the operation is torch's or Python's own, so that its name says what it does."""
        if self.op == "method" or isinstance(self.target, AtenOperation):
            return True
        own = self._home in ("torch", "_operator", "builtins")
        return self.op in ("module", "function") and own

    @property
    def is_networks(self) -> bool:
        """Whether the operation is code of the network's own, or has hooks of its own."""
        if self.op == "method" or isinstance(self.target, AtenOperation):
            return False
        return self.op in ("module", "function") and (
            self.key is None or not (self.is_torchs or self._home == "raypatch")
        )

    @property
    def _home(self) -> str:
        code = type(self.target) if self.op == "module" else self.target
        # Many of torch's own functions name no module.
        return (getattr(code, "__module__", None) or "torch").split(".")[0]

    def option(self, place: int, name: str) -> Any:
        """An argument by its place or its name; None where it is not given."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name)

    def call(self, value_of: Callable[[int], Any], argument: Any = None) -> Any:
        """Run the operation on the values of its inputs."""
        if self.op == "input":
            return argument
        if self.op == "constant":
            return self.target
        if self.is_wide:
            with float64_is_default():
                return self._called(value_of)
        return self._called(value_of)

    def _called(self, value_of: Callable[[int], Any]) -> Any:
        if self.flat:
            args: Any = [value_of(a.node) if type(a) is Ref else a for a in self.args]
            kwargs: Any = {
                name: value_of(a.node) if type(a) is Ref else a for name, a in self.kwargs.items()
            }
        else:
            args, kwargs = tree_map(
                lambda leaf: value_of(leaf.node) if isinstance(leaf, Ref) else leaf,
                (self.args, self.kwargs),
                is_leaf=is_ref,
            )
        if self.op == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def move(self, device: torch.device) -> None:
        """Move weights and constants, and what it makes of no inputs."""

        def moved(argument: Any) -> Any:
            # An export writes down the device that a forward asked its input for.
            return device if isinstance(argument, torch.device) else argument

        self.args, self.kwargs = tree_map(moved, (self.args, self.kwargs))
        if self.op == "function" and self.target in _device_constructors():
            self.kwargs.setdefault("device", device)
        if self.op == "module":
            self.target.to(device)
        elif self.op == "constant" and isinstance(self.target, Tensor):
            self.target = self.target.to(device)


def attribute(root: Any, path: str) -> Any:
    """What lies at a dotted path, with no graph of gradients."""
    value = attrgetter(path)(root)
    return value.detach() if isinstance(value, Tensor) else value


def is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)


@dataclass
class Graph:
    """Nodes in the order of the forward pass; the last one is the network's output."""

    nodes: list[Node]
    how: str  # "torch.fx" or "torch.export"
    unread: frozenset[str]  # paths of modules whose outputs the network's does not depend on
    guarded: bool = False  # the network may raise for some inputs, which is not in the graph

    def widen(self, args: tuple[Any, ...]) -> None:
        """Let casts to float32 be casts to float64, and so what is made of no float numbers;
        ``args`` are such as it will get."""
        values: list[Any] = []
        for node in self.nodes:
            if node.op == "method" and node.target == "float":
                node.target = "double"
            node.args, node.kwargs = widened((node.args, node.kwargs))
            made = self._value(node, values, args)
            own = node.op not in ("input", "constant")
            if own and any(x.dtype is torch.float32 for x in tensors_in(made)):
                node.is_wide = True
                made = self._value(node, values, args)
            values.append(made)

    @property
    def holds_networks_code(self) -> bool:
        """Whether a node is code of the network's own, which may do anything with its arguments."""
        return any(node.is_networks for node in self.nodes)

    def with_nodes(self, nodes: list[Node]) -> Graph:
        """The graph with others of its nodes, of which the last is the output."""
        return finished_graph(nodes, len(nodes) - 1, self.how, self.unread, self.guarded)

    def run(self, args: tuple[Any, ...]) -> list[Any]:
        """Values of all nodes in one plain forward."""
        values: list[Any] = []
        for node in self.nodes:
            values.append(self._value(node, values, args))
        return values

    def _value(self, node: Node, values: list[Any], args: tuple[Any, ...]) -> Any:
        argument = reduce(getitem, node.target, args) if node.op == "input" else None
        return node.call(values.__getitem__, argument)


class Bounds(NamedTuple):
    """A slice whose bounds are computed: unlike in a slice, what they refer to is found."""

    start: Any
    stop: Any
    step: Any


def item_between(value: Any, index: Any) -> Any:
    """``value[index]`` where :class:`Bounds` stand for slices."""
    return value[
        tree_map(
            lambda leaf: slice(*leaf) if isinstance(leaf, Bounds) else leaf,
            index,
            is_leaf=lambda leaf: isinstance(leaf, Bounds),
        )
    ]


def finished_graph(
    nodes: list[Node],
    output: int,
    how: str,
    unread: frozenset[str] = frozenset(),
    guarded: bool = False,
) -> Graph:
    """The nodes that ``output`` depends on, numbered anew, with their users counted; ``unread`` and
    ``guarded`` as of the graph they come from."""
    wanted = {output}
    for node in reversed(nodes):
        if node.index in wanted:
            wanted.update(_references(node))
    kept = [node for node in nodes if node.index in wanted]
    number = {node.index: new for new, node in enumerate(kept)}
    for node in kept:
        node.args, node.kwargs = renumbered(node, number)
        node.index, node.users = number[node.index], 0
        node.inputs = tuple(_references(node))
        leaves = [*node.args, *node.kwargs.values()]
        node.flat = not any(isinstance(leaf, (tuple, list, dict, slice)) for leaf in leaves)
    for node in kept:
        for used in node.inputs:
            kept[used].users += 1
    paths = [{node.path for node in some if node.path} for some in (nodes, kept)]
    return Graph(kept, how, unread | (paths[0] - paths[1]), guarded)


def renumbered(node: Node, number: Mapping[int, int]) -> Any:
    """Arguments and keyword arguments of a node with the new numbers of the nodes they name."""
    return tree_map(
        lambda leaf: Ref(number[leaf.node]) if isinstance(leaf, Ref) else leaf,
        (node.args, node.kwargs),
        is_leaf=is_ref,
    )


def _references(node: Node) -> list[int]:
    leaves, _ = tree_flatten((node.args, node.kwargs), is_leaf=is_ref)
    return [leaf.node for leaf in leaves if isinstance(leaf, Ref)]
