"""Capture with torch.export, for networks whose Python cannot run on symbolic values.

``torch.export`` runs the forward once on real inputs and records aten operations, so control
flow that depends on shapes only is no obstacle. Operations come out functional; linear and
convolution layers are given back as modules, so that one set of rules serves both captures.
"""

from __future__ import annotations

import inspect
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from threading import RLock
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten_with_path

from raypatch.engine.capture import lengths_traced, replaced
from raypatch.engine.graph import (
    CaptureError,
    Graph,
    Node,
    Ref,
    aten_operation,
    attribute,
    finished_graph,
)
from raypatch.engine.layers import Args, as_in_forward, is_altered, owns_weights
from raypatch.errors import one_line

# Modules that are given back, and the operation that each is.
KINDS: dict[type | None, str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}


def capture_export(network: nn.Module, args: Args) -> Graph:
    """Export the network with a free number of inputs; raises CaptureError where impossible.

    ``args`` hold at least two inputs; the batch is axis 0 of every tensor.
    """
    from torch.export import Dim, export

    def free(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: free(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(free, value))
        return {0: Dim.AUTO} if isinstance(value, torch.Tensor) else None

    shapes = tuple(map(free, args))
    parameters = list(inspect.signature(network.forward).parameters.values())
    named = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), len(shapes))
    if named < len(shapes):
        shapes = (*shapes[:named], shapes[named:])
    try:
        with _silence(), torch.no_grad(), lengths_traced(network), as_in_forward(network, args):
            program = export(network, args, dynamic_shapes=shapes, strict=False)
            traced = exported_graph_module(program)
    except Exception as error:  # user code runs under the exporter: anything may be raised
        raise CaptureError(f"torch.export: {one_line(error)}") from None
    names = _Names(network)
    inside = _inside_layers(traced, names)
    places = [path for path, _ in tree_flatten_with_path(args)[0]]
    nodes, output = _nodes(traced, names, places, _outputs(inside))
    layers = {path for path, module in network.named_modules() if path and owns_weights(module)}
    unread = layers - {path for path, _ in inside}
    return finished_graph(nodes, output, "torch.export", frozenset(unread))


def exported_graph_module(program: Any) -> Any:
    """An exported program as a graph module of functional aten operations."""
    with _silence(), torch.no_grad():
        return program.run_decompositions({}).module()


# What is silenced is the whole process's: of two threads, the second would put back nothing.
_silencing = RLock()


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints whole graphs where it fails; its one-line reason is kept instead."""
    _silencing.acquire()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        _silencing.release()


class _Names:
    """The modules that an export names by where they were called, by their first names."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._first = {id(module): name for name, module in network.named_modules()}

    def of(self, place: str) -> tuple[str, nn.Module | None]:
        path = place.partition("@")[0]
        try:
            module = self._network.get_submodule(path)
        except AttributeError:
            return path, None
        return self._first[id(module)], module


def _inside_layers(traced: Any, names: _Names) -> dict[tuple[str, str], dict[fx.Node, None]]:
    """The operations of each call of a layer, by the layer's path and a name of the call; of outer
    layers before those in them."""
    inside: dict[tuple[str, str], dict[fx.Node, None]] = {}
    for item in traced.graph.nodes:
        for call, (path, _) in (item.meta.get("nn_module_stack") or {}).items():
            path, module = names.of(path)
            if path and module is not None and owns_weights(module):
                inside.setdefault((path, call), {})[item] = None
    return inside


def _outputs(inside: dict[tuple[str, str], dict[fx.Node, None]]) -> dict[fx.Node, list[str]]:
    """The nodes that are what a layer gives, and its path; of several the innermost first. Layers
    of which several values are read outside have none."""
    found: dict[fx.Node, list[str]] = {}
    for (path, _), items in inside.items():
        tensors = [item for item in items if isinstance(item.meta.get("val"), torch.Tensor)]
        given = [item for item in tensors if any(user not in items for user in item.users)]
        if len(given) > 1:  # the first of several results is the layer's
            given = [item for item in given if _result_number(item, items) == 0]
        if len(given) == 1 and not items.keys() & given[0].users.keys():
            found.setdefault(given[0], []).insert(0, path)
    return found


def _result_number(item: fx.Node, within: dict[fx.Node, None]) -> int | None:
    """Which of several results of an operation ``item`` is a form of."""
    while item.target is not operator.getitem:
        before = [used for used in item.all_input_nodes if used in within]
        if len(before) != 1:
            return None
        item = before[0]
    return int(item.args[1])  # type: ignore[arg-type]


def _nodes(
    traced: Any, names: _Names, places: list[Any], outputs: dict[fx.Node, list[str]]
) -> tuple[list[Node], int]:
    """The nodes, and which of them is the output; ``places`` of the inputs in the arguments and
    layers by what is their output."""
    nodes: list[Node] = []
    current: dict[fx.Node, int] = {}
    n_inputs = 0
    for item in traced.graph.nodes:
        if item.op == "output":
            result = item.args[0]
            output = result[0] if isinstance(result, (tuple, list)) else result
            return nodes, current[output]
        index = len(nodes)
        if item.op == "placeholder":
            place = tuple(
                getattr(key, "idx", getattr(key, "key", None)) for key in places[n_inputs]
            )
            nodes.append(Node(index, "input", place))
            n_inputs += 1
        elif item.op == "get_attr":
            nodes.append(Node(index, "constant", attribute(traced, item.target)))
        elif item.op == "call_function":
            nodes.append(_operation(index, item, current, names))
        else:
            continue  # a guard on the inputs' shapes: what is traced has no other module
        for path in outputs.get(item, ()):
            if nodes[-1].path != path:
                marked = Ref(len(nodes) - 1)
                nodes.append(Node(len(nodes), "module", nn.Identity(), (marked,), path=path))
        current[item] = len(nodes) - 1
    raise CaptureError("torch.export: the exported program has no output")


def _operation(index: int, item: fx.Node, current: dict[fx.Node, int], names: _Names) -> Node:
    args, kwargs = replaced(item.args, current), replaced(item.kwargs, current)
    target = item.target
    if not isinstance(target, torch._ops.OpOverload):
        return Node(index, "function", target, args, kwargs)
    stack = list((item.meta.get("nn_module_stack") or {}).values())
    path, module = names.of(stack[-1][0] if stack else "")
    name = target._schema.name.removeprefix("aten::")
    if module is not None and is_altered(module):
        return Node(index, "function", aten_operation(target), args, kwargs)
    is_padded = getattr(module, "padding_mode", "zeros") != "zeros"  # by an operation of its own
    if KINDS.get(type(module)) == name and not is_padded:
        return Node(index, "module", module, args[:1], path=path)
    if type(module) is nn.Embedding and name == "embedding":
        return Node(index, "module", module, args[1:2], path=path)
    return Node(index, "function", aten_operation(target), args, kwargs)
