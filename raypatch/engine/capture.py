"""Capture: a network as a graph of modules and functions, once.

The graph is plain data (no user classes unless a user's own layer is a leaf of it), so it
travels to actors that have neither the agent's files nor its code.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from raypatch.engine.layers import Args, map_tensors, owns_weights, widened
from raypatch.engine.overwriting import OverwritingError, Proxy, out_of_place, overwritten
from raypatch.engine.transformers import FORWARDS


class CaptureError(Exception):
    """The network cannot be captured as a graph; the text says why."""


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


def aten_operation(target: torch._ops.OpOverload) -> AtenOperation:
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    if name == "view" and overload == "default":
        name = "reshape"  # rows may lie otherwise in memory than the network's own values
    return AtenOperation(name, overload)


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

    # Indices of the nodes whose values are needed, in the order of the arguments; and
    # whether arguments are values and references only, with nothing nested.
    inputs: tuple[int, ...] = ()
    flat: bool = True

    @property
    def key(self) -> Any:
        """What rules are registered under: module type, function, or method name."""
        if self.op == "module":
            return type(self.target)
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
        code = type(self.target) if self.op == "module" else self.target
        # Many of torch's own functions name no module.
        home = getattr(code, "__module__", None) or "torch"
        own = home.split(".")[0] in ("torch", "_operator", "builtins")
        return self.op in ("module", "function") and own

    def option(self, place: int, name: str) -> Any:
        """An argument by its place or its name; None where it is not given."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name)

    def call(self, value_of: Callable[[int], Any], argument: Any = None) -> Any:
        """Run the operation on the values of its inputs."""
        if self.op == "input":
            return argument
        if self.op == "constant":
            return self.target
        if self.flat:
            args: Any = [value_of(a.node) if type(a) is Ref else a for a in self.args]
            kwargs: Any = {
                name: value_of(a.node) if type(a) is Ref else a for name, a in self.kwargs.items()
            }
        else:
            args, kwargs = tree_map(
                lambda leaf: value_of(leaf.node) if isinstance(leaf, Ref) else leaf,
                (self.args, self.kwargs),
                is_leaf=_is_ref,
            )
        if self.op == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


def _is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)


@dataclass
class Graph:
    """Nodes in the order of the forward pass; the last one is the network's output."""

    nodes: list[Node]
    how: str  # "torch.fx" or "torch.export"
    unread: frozenset[str]  # paths of modules whose outputs the network's does not depend on

    def widen(self) -> None:
        """Let casts to float32 be casts to float64."""
        for node in self.nodes:
            if node.op == "method" and node.target == "float":
                node.target = "double"
            node.args, node.kwargs = widened((node.args, node.kwargs))

    def run(self, args: tuple[Any, ...]) -> list[Any]:
        """Values of all nodes in one plain forward."""
        values: list[Any] = []
        for node in self.nodes:
            argument = reduce(getitem, node.target, args) if node.op == "input" else None
            values.append(node.call(values.__getitem__, argument))
        return values


def capture(network: nn.Module, args: Args) -> Graph:
    """Trace with torch.fx; raises CaptureError with the reason where that is impossible.

    ``args`` are such as it will get. The graph refers to the network's own modules; give it a
    copy.
    """
    reason = ""
    for looked_into in (True, False):
        tracer = _Tracer(looked_into)
        try:
            with lengths_traced(network):
                traced = tracer.trace(network, concrete_args=_defaults(network, len(args)))
            overwrites = overwritten(traced, network, map_tensors(Tensor.clone, args))
            nodes, output = _nodes(traced, network, overwrites, len(args))
            return finished_graph(nodes, output, "torch.fx")
        except CaptureError as error:
            reason = str(error)
        except Exception as error:  # user code runs under symbolic values: anything may be raised
            reason = f"torch.fx: {first_line(error)}"
        if not tracer.own_layers:
            break  # nothing would be another way
    raise CaptureError(reason)


class _Tracer(fx.Tracer):
    """Layers of the user's own are ``looked_into``, or else are one operation each."""

    def __init__(self, looked_into: bool) -> None:
        super().__init__()
        self.looked_into = looked_into
        self.own_layers = False  # whether there are any

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if type(module) in FORWARDS:
            return False
        if super().is_leaf_module(module, qualified_name):
            return True
        # A layer that has others in it, as an extractor with positions of its own, is looked into.
        if not owns_weights(module) or _has_layers(module):
            return False
        self.own_layers = True
        return not self.looked_into

    def proxy(self, node: fx.Node) -> Proxy:
        return Proxy(node, self)

    def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if (steps := FORWARDS.get(type(module))) is not None:
            forward = partial(steps, module)
        result = super().call_module(module, forward, args, kwargs)
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            return result[0], result[1]  # each taken once, wherever they are read
        path = self.path_of_module(module)
        if owns_weights(module) and not self.is_leaf_module(module, path):
            return self.create_proxy("call_function", output_of, (result, path), {})
        return result


@contextmanager
def lengths_traced(network: nn.Module) -> Iterator[None]:
    """Let the network's own code ask for the ``len`` of a value: Python wants that to be a number,
    whatever traces it."""
    homes = [getattr(type(module).forward, "__globals__", {}) for module in network.modules()]
    own = {id(home): home for home in homes if not home.get("__name__", "").startswith("torch.")}
    changed = [home for home in own.values() if "len" not in home]
    for home in changed:
        home["len"] = _length
    try:
        yield
    finally:
        for home in changed:
            home.pop("len", None)


def _length(value: Any) -> Any:
    if isinstance(value, Proxy):
        return value.tracer.create_proxy("call_function", len, (value,), {})
    has_axes = isinstance(value, Tensor) and value.dim() > 0
    return value.shape[0] if has_axes else len(value)


def _has_layers(module: nn.Module) -> bool:
    return any(owns_weights(inner) for inner in module.modules() if inner is not module)


def output_of(value: Any, path: str) -> Any:
    """The value as it is: marks what a layer gives that has others in it."""
    return value


def _defaults(network: nn.Module, n_given: int) -> dict[str, Any]:
    """Optional arguments of ``forward`` after those given, fixed at their defaults."""
    parameters = list(inspect.signature(network.forward).parameters.values())[n_given:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def first_line(error: Exception) -> str:
    """Kind and first line of an error that user code raised under capture."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _nodes(
    traced: fx.Graph, network: nn.Module, overwrites: dict[fx.Node, fx.Node], n_given: int
) -> tuple[list[Node], int]:
    """The nodes, and which of them is the output."""
    nodes: list[Node] = []
    # In-place operations are run out of place; whoever reads the overwritten value later
    # must see the new one.
    current: dict[fx.Node, int] = {}
    n_inputs = 0
    for item in traced.nodes:
        says_so = False
        if item.op == "output":
            break
        args, kwargs = replaced(item.args, current), replaced(item.kwargs, current)
        index = len(nodes)
        if item.op == "placeholder":
            if n_inputs < n_given:
                nodes.append(Node(index, "input", (n_inputs,)))
                n_inputs += 1
            else:
                nodes.append(Node(index, "constant", item.args[0] if item.args else None))
        elif item.op == "get_attr":
            nodes.append(Node(index, "constant", _attribute(network, item.target)))
        elif item.op == "call_module":
            module = network.get_submodule(item.target)
            says_so = bool(getattr(module, "inplace", False))
            if says_so:
                module = copy.copy(module)
                module.inplace = False  # type: ignore[assignment]
            nodes.append(Node(index, "module", module, args, kwargs, path=item.target))
        elif item.target is output_of:
            nodes.append(Node(index, "module", nn.Identity(), args[:1], path=args[1]))
        else:
            op = {"call_function": "function", "call_method": "method"}[item.op]
            target, says_so = out_of_place(_by_reference(item.target), kwargs)
            if target == "view" and not any(isinstance(a, torch.dtype) for a in args):
                target = "reshape"  # as for exported operations
            if isinstance(target, torch._ops.OpOverload):
                target = aten_operation(target)
            if target is operator.getitem and _has_bounds(args[1]):
                target = item_between
            nodes.append(Node(index, op, target, args, kwargs))
        if item in overwrites:
            if not says_so:
                raise OverwritingError(f"{item} overwrites what it is given")
            current[overwrites[item]] = index
        current[item] = index
    output = next(item for item in traced.nodes if item.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise CaptureError("the network returns several values, not one tensor")
    return nodes, current[output]


def _by_reference(target: Any) -> Any:
    """The function itself where torch has a closure choose between two: in another process that
    would be one which no rule knows."""
    if getattr(target, "__qualname__", "").startswith("boolean_dispatch."):
        return getattr(nn.functional, f"_{target.__name__}")
    return target


def replaced(arguments: Any, current: dict[fx.Node, int]) -> Any:
    """Arguments of a traced node with references in the place of traced nodes."""
    mapped: Any = fx.map_arg(arguments, lambda n: Ref(current[n]))  # type: ignore[arg-type, return-value]
    mapped = tree_map(
        lambda leaf: Bounds(leaf.start, leaf.stop, leaf.step) if _in_slice(leaf) else leaf,
        mapped,
        is_leaf=_is_ref,
    )
    return dict(mapped) if isinstance(arguments, dict) else mapped


def _in_slice(leaf: Any) -> bool:
    return isinstance(leaf, slice) and any(map(_is_ref, (leaf.start, leaf.stop, leaf.step)))


def _has_bounds(index: Any) -> bool:
    each = index if type(index) is tuple else (index,)
    return any(isinstance(one, Bounds) for one in each)


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
    nodes: list[Node], output: int, how: str, unread: frozenset[str] = frozenset()
) -> Graph:
    """The nodes that ``output`` depends on, numbered anew, with their users counted; ``unread`` as
    of the graph they come from."""
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
    return Graph(kept, how, unread | (paths[0] - paths[1]))


def renumbered(node: Node, number: Mapping[int, int]) -> Any:
    """Arguments and keyword arguments of a node with the new numbers of the nodes they name."""
    return tree_map(
        lambda leaf: Ref(number[leaf.node]) if isinstance(leaf, Ref) else leaf,
        (node.args, node.kwargs),
        is_leaf=_is_ref,
    )


def _references(node: Node) -> list[int]:
    leaves, _ = tree_flatten((node.args, node.kwargs), is_leaf=_is_ref)
    return [leaf.node for leaf in leaves if isinstance(leaf, Ref)]


def _attribute(network: nn.Module, path: str) -> Any:
    value: Any = network
    for part in path.split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else value
