"""Capture: a network as a :class:`~raypatch.engine.graph.Graph`, traced once by torch.fx."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from raypatch.engine.graph import (
    Bounds,
    CaptureError,
    Graph,
    Node,
    Ref,
    aten_operation,
    attribute,
    finished_graph,
    is_ref,
    item_between,
)
from raypatch.engine.guards import truth_that_goes_on
from raypatch.engine.input_axes import ASKS_FOR_FORM
from raypatch.engine.layers import Args, as_in_forward, owns_weights
from raypatch.engine.overwriting import OverwritingError, Proxy, out_of_place
from raypatch.engine.performed import checked_overwrites
from raypatch.engine.transformers import steps_of
from raypatch.errors import one_line

# Where Python asks a value of the trace for its truth.
TRACING = {__name__, "torch.fx.proxy", "torch.fx._symbolic_trace"}


def capture(network: nn.Module, args: Args) -> Graph:
    """Trace with torch.fx; raises CaptureError with the reason where that is impossible.

    ``args`` are such as it will get. The graph refers to the network's own modules; give it a
    copy.
    """
    reason = ""
    # Buffers as values of the graph can be cut to a traced length, but not decide anything.
    for looked_into, proxy_buffers in ((True, True), (True, False), (False, True), (False, False)):
        tracer = _Tracer(looked_into, proxy_buffers)
        try:
            with lengths_traced(network), _sizes_traced(), as_in_forward(network, args):
                traced = tracer.trace(network, concrete_args=_defaults(network, len(args)))
            if tracer.refused:  # and some "except" of the network's went on
                raise CaptureError(f"torch.fx: {tracer.refused}")
            overwrites = checked_overwrites(traced, network, args)
            nodes, output = _nodes(traced, network, overwrites, len(args))
            return finished_graph(nodes, output, "torch.fx", guarded=tracer.guarded)
        except CaptureError as error:
            reason = str(error)
        except Exception as error:  # user code runs under symbolic values: anything may be raised
            reason = f"torch.fx: {one_line(error)}"
        if not (proxy_buffers or tracer.own_layers):
            break  # nothing would be another way
    raise CaptureError(reason)


class _Tracer(fx.Tracer):
    """Layers of the user's own are ``looked_into``, or else are one operation each; buffers are
    values of the graph, or else what they hold now."""

    def __init__(self, looked_into: bool, proxy_buffers: bool) -> None:
        super().__init__()
        self.looked_into = looked_into
        self.proxy_buffer_attributes = proxy_buffers
        self.own_layers = False  # whether there are any
        self.guarded = False  # whether there is code that only raises, and what for is not known
        self.refused = ""  # what was asked of a value that its trace cannot tell

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if steps_of(module) is not None:
            return False
        if super().is_leaf_module(module, qualified_name):
            return True
        # A layer that has others in it, as an extractor with positions of its own, is looked into.
        if not owns_weights(module) or _has_layers(module):
            return False
        self.own_layers = True
        return not self.looked_into

    def to_bool(self, obj: fx.Proxy) -> bool:
        asking = inspect.currentframe()
        while asking is not None and asking.f_globals.get("__name__") in TRACING:
            asking = asking.f_back
        truth = None if asking is None else truth_that_goes_on(asking, capture.__code__)
        if truth is None:
            self.refused = "the network decides by a value"
            return super().to_bool(obj)
        self.guarded |= not _is_of_form(obj.node)
        return truth

    def iter(self, obj: fx.Proxy) -> Any:
        self.refused = "the network iterates over a value"
        return super().iter(obj)

    def proxy(self, node: fx.Node) -> Proxy:
        return Proxy(node, self)

    def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if (steps := steps_of(module)) is not None:
            forward = partial(steps, module)
        result = super().call_module(module, forward, args, kwargs)
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            return result[0], result[1]  # each taken once, wherever they are read
        path = self.path_of_module(module)
        if owns_weights(module) and not self.is_leaf_module(module, path):
            return self.create_proxy("call_function", output_of, (result, path), {})
        return result


def _is_of_form(node: fx.Node) -> bool:
    """Whether a value follows from the inputs' form alone: for others a graph is captured anew."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        asked = one.args[1] if one.target is getattr else one.target
        if asked is not len and not (isinstance(asked, str) and asked in ASKS_FOR_FORM):
            if not one.all_input_nodes:
                return False
            waiting += one.all_input_nodes
    return True


@contextmanager
def lengths_traced(network: nn.Module) -> Iterator[None]:
    """Let the network's own code ask for the ``len`` of a value: Python wants that to be a number,
    whatever traces it."""
    kinds = {kind for module in network.modules() for kind in type(module).__mro__}
    code = [part for kind in kinds for part in vars(kind).values() if inspect.isfunction(part)]
    own = [part for part in code if str(part.__module__).split(".")[0] != "torch"]
    homes = {id(part.__globals__): part.__globals__ for part in own}
    changed = [home for home in homes.values() if "len" not in home]
    for home in changed:
        home["len"] = _length
    try:
        yield
    finally:
        for home in changed:
            home.pop("len", None)


def _length(value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", len, (value,), {})
    has_axes = isinstance(value, Tensor) and value.dim() > 0
    return value.shape[0] if has_axes else len(value)


@contextmanager
def _sizes_traced() -> Iterator[None]:
    """Let torch make tensors of sizes that are traced, ``torch.zeros(len(x), 8)``."""

    def traced(make: Any) -> Any:
        def made(*sizes: Any, **options: Any) -> Any:
            first = sizes[0] if sizes else None
            if not isinstance(first, fx.Proxy):
                return make(*sizes, **options)
            return first.tracer.create_proxy("call_function", make, (sizes,), options)

        return made

    before = {name: getattr(torch, name) for name in ("zeros", "ones", "empty")}
    for name, make in before.items():
        setattr(torch, name, traced(make))
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(torch, name, make)


def _has_layers(module: nn.Module) -> bool:
    return any(owns_weights(inner) for inner in module.modules() if inner is not module)


def output_of(value: Any, path: str) -> Any:
    """The value as it is: marks what a layer gives that has others in it."""
    return value


def _defaults(network: nn.Module, n_given: int) -> dict[str, Any]:
    """Optional arguments of ``forward`` after those given, fixed at their defaults."""
    parameters = list(inspect.signature(network.forward).parameters.values())[n_given:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


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
            nodes.append(Node(index, "constant", attribute(network, item.target)))
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
        is_leaf=is_ref,
    )
    return dict(mapped) if isinstance(arguments, dict) else mapped


def _in_slice(leaf: Any) -> bool:
    return isinstance(leaf, slice) and any(map(is_ref, (leaf.start, leaf.stop, leaf.step)))


def _has_bounds(index: Any) -> bool:
    each = index if type(index) is tuple else (index,)
    return any(isinstance(one, Bounds) for one in each)
