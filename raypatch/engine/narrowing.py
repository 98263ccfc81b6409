"""Of a sequence only what the output reads: places that are dropped later are not computed.

A policy that ends in ``h[:, -1]`` needs its last block at one step, and of the steps before only
what attention looks at. The captured graph is rewritten so that places are picked as early as that
is exact; values keep their number of axes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from raypatch.engine.graph import Graph, Node, Ref
from raypatch.engine.local_rules import LOCAL_RULES, movement, pointwise
from raypatch.engine.sources import Places


@dataclass(frozen=True)
class Part:
    """Stands among a node's arguments for some places of another node's value."""

    node: int
    places: Places


@dataclass(frozen=True)
class Values:
    """What rules may ask: every node, its value in a run on one input, along which axis that holds
    the inputs, and of layers the axis of their neurons."""

    nodes: list[Node]
    sample: list[Any]
    axes: list[Any]
    neurons: dict[int, int]

    def shape(self, node: int) -> torch.Size:
        value: Tensor = self.sample[node]
        return value.shape

    def has_axes(self, argument: Any, n_axes: int) -> bool:
        """Whether an argument is a node's value of so many axes."""
        return isinstance(argument, Ref) and len(self.shape(argument.node)) == n_axes

    def part(self, argument: Any, places: Places) -> Any:
        """Those places of an argument; all of it where it has the same for every place."""
        if not isinstance(argument, Ref) or not isinstance(self.sample[argument.node], Tensor):
            return argument
        shape = self.shape(argument.node)
        is_there = 0 <= places.axis < len(shape) and shape[places.axis] == places.size
        return Part(argument.node, places) if is_there else argument


# A node whose value is needed at some places only: the node that computes just these, with a
# Part wherever it needs no more of an argument; None where all places are needed for that.
Rule = Callable[[Values, Node, Places], Node | None]
RULES: dict[Any, Rule] = {}
RESHAPES = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"}
MOVES = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "contiguous", "slice"}


def narrows(*keys: Any) -> Callable[[Rule], Rule]:
    """Register a rule for module types, functions, and names of functions and methods."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(keys, rule))
        return rule

    return register


def elementwise(values: Values, node: Node, places: Places) -> Node | None:
    n_axes = len(values.shape(node.index))

    def part(argument: Any) -> Any:
        if not isinstance(argument, Ref) or not isinstance(values.sample[argument.node], Tensor):
            return argument
        missing = n_axes - len(values.shape(argument.node))
        return values.part(argument, places.along(places.axis - missing))

    kwargs = {name: part(argument) for name, argument in node.kwargs.items()}
    return replace(node, args=tuple(map(part, node.args)), kwargs=kwargs) if node.flat else None


@narrows(nn.Linear, nn.LayerNorm, nn.RMSNorm, "layer_norm", "linear", nn.Softmax, "softmax")
def along_other_axes(values: Values, node: Node, places: Places) -> Node | None:
    """What mixes the numbers along its own axes only."""
    n_axes, layer = len(values.shape(node.index)), node.target
    own: Any = n_axes - 1
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) or node.name == "layer_norm":
        shape = getattr(layer, "normalized_shape", None) or node.option(1, "normalized_shape")
        if isinstance(shape, Ref):
            return None
        own = n_axes - (1 if isinstance(shape, int) else len(shape))
    elif isinstance(layer, nn.Softmax) or node.name == "softmax":
        dim = getattr(layer, "dim", None) if node.op == "module" else node.option(1, "dim")
        if not isinstance(dim, int) or dim % n_axes == places.axis:
            return None
        own = n_axes
    if places.axis >= own or not node.args:
        return None
    return replace(node, args=(values.part(node.args[0], places), *node.args[1:]))


def moved(values: Values, node: Node, places: Places) -> Node | None:
    """What gives elements other places: where the axis comes from is found by trying."""
    if node.name not in RESHAPES | MOVES or not node.args or not isinstance(node.args[0], Ref):
        return None
    first, inputs = node.args[0].node, values.axes[node.index]
    if type(inputs) is not int or type(values.axes[first]) is not int:
        return None  # places that share an axis with the inputs are not places along it
    result, given = values.shape(node.index), values.shape(first)
    for axis in (i for i, size in enumerate(given) if size == places.size):
        numbers = torch.arange(places.size, device=values.sample[first].device)
        probe = _along(numbers, axis, given)
        there = node.call(lambda i, probe=probe: probe if i == first else values.sample[i])  # type: ignore[misc]
        if torch.equal(there, _along(numbers, places.axis, result)):
            break
    else:
        return None
    source = values.part(node.args[0], places.along(axis))
    if node.name in MOVES:
        return replace(node, args=(source, *node.args[1:]))
    shape = list(result)
    shape[places.axis], shape[inputs] = places.length, -1
    return replace(
        node, op="function", target=torch.reshape, args=(source, tuple(shape)), kwargs={}
    )


def _along(numbers: Tensor, axis: int, shape: torch.Size) -> Tensor:
    view = [1] * len(shape)
    view[axis] = len(numbers)
    return numbers.view(view).expand(shape).contiguous()


@narrows(operator.matmul, "matmul", "bmm")
def product(values: Values, node: Node, places: Places) -> Node | None:
    n_axes, first = len(values.shape(node.index)), node.args[0] if node.args else None
    if places.axis != n_axes - 2 or not values.has_axes(first, n_axes):
        return None
    return replace(node, args=(values.part(first, places), *node.args[1:]))


@narrows("scaled_dot_product_attention")
def attention(values: Values, node: Node, places: Places) -> Node | None:
    """Of the queries those places; of keys and values all."""
    n_axes = len(values.shape(node.index))
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args)), **node.kwargs}
    if places.axis != n_axes - 2 or not values.has_axes(given.get("query"), n_axes):
        return None
    if given.get("is_causal"):
        n_keys = values.shape(given["key"].node)[-2]
        if (places.start, places.length, n_keys) != (places.size - 1, 1, places.size):
            return None
        given["is_causal"] = False  # the last place sees all
    given["query"] = values.part(given["query"], places)
    mask = given.get("attn_mask")
    if isinstance(mask, Ref):
        given["attn_mask"] = values.part(mask, places.along(len(values.shape(mask.node)) - 2))
    return replace(node, args=(), kwargs=given)


@narrows(nn.MultiheadAttention)
def multi_head_attention(values: Values, node: Node, places: Places) -> Node | None:
    layer, mask = node.target, node.kwargs.get("attn_mask")
    of_rows = isinstance(mask, Ref) and len(values.shape(mask.node)) == 2
    if (
        places.axis != int(layer.batch_first)
        or len(node.args) != 3
        or not (mask is None or of_rows)
    ):
        return None
    kwargs = {**node.kwargs, "attn_mask": values.part(mask, places.along(0)), "is_causal": False}
    query = values.part(node.args[0], places)
    return replace(node, args=(query, *node.args[1:]), kwargs=kwargs)


@narrows(operator.getitem)
def first_output(values: Values, node: Node, places: Places) -> Node | None:
    """What attention gives beside its weights."""
    taken, number = node.args
    if not isinstance(taken, Ref) or number != 0:
        return None
    whole = values.nodes[taken.node]
    if type(whole.target) is not nn.MultiheadAttention or whole.users > 1:
        return None
    if multi_head_attention(values, whole, places) is None:
        return None
    return replace(node, args=(Part(taken.node, places), 0))


def _rule(values: Values, node: Node, places: Places) -> Rule | None:
    if not node.is_torchs or values.neurons.get(node.index) == places.axis:
        return None
    for key in (node.key, node.name):
        if key in RULES:
            return RULES[key]
    local = LOCAL_RULES.get(node.key)
    return elementwise if local is pointwise else moved if local is movement else None


# ------------------------------------------------------------------------- what is picked


def picked(values: Values, node: Node) -> Node | None:
    """A node that picks places along one axis and nothing else, as a pick from just these; None
    for any other node."""
    if not node.is_torchs or not node.args or type(node.args[0]) is not Ref:
        return None
    value, inputs = values.sample[node.args[0].node], values.axes[node.args[0].node]
    if not isinstance(value, Tensor) or type(inputs) is not int:
        return None
    index = _index(node, value.dim())
    taken = [_taken(one, size) for one, size in zip(index, value.shape)]
    if len(index) != value.dim() or any(some is None for some in taken):
        return None
    picks = [
        axis
        for axis, some in enumerate(taken)
        if type(index[axis]) is int or len(some or ()) < value.shape[axis]
    ]
    if len(picks) != 1 or picks[0] == inputs:
        return None
    (axis,) = picks
    some, size = taken[axis], value.shape[axis]
    if not some or len(some) == size:
        return None
    index[axis] = 0 if type(index[axis]) is int else slice(None)
    source = Part(node.args[0].node, Places(axis, some[0], len(some), size))
    return replace(
        node, op="function", target=operator.getitem, args=(source, tuple(index)), kwargs={}
    )


def _index(node: Node, n_axes: int) -> list[Any]:
    """What a node takes along every axis, as in ``value[...]``; empty for others than picks."""
    index: list[Any] = [slice(None)] * n_axes
    if node.target is operator.getitem:
        given = node.args[1] if type(node.args[1]) is tuple else (node.args[1],)
        dots = [i for i, one in enumerate(given) if one is ...]
        if dots:
            filled = index[: n_axes - len(given) + 1]
            given = (*given[: dots[0]], *filled, *given[dots[0] + 1 :])
        index[: len(given)] = given
        return index
    if len(node.args) < 2 or type(node.args[1]) is not int:
        return []
    if node.name == "select" and len(node.args) == 3:
        index[node.args[1]] = node.args[2]
    elif node.name == "slice" and len(node.args) >= 4:
        index[node.args[1]] = slice(*node.args[2:])
    else:
        return []
    return index


def _taken(index: Any, size: int) -> range | None:
    """Which places an index takes; None for what is no index of an integer or a plain slice."""
    if type(index) is int:
        return range(index % size, index % size + 1)
    if type(index) is not slice or index.step not in (None, 1):
        return None
    bounds = index.start, index.stop
    whole = all(bound is None or type(bound) is int for bound in bounds)
    return range(size)[index] if whole else None


# ---------------------------------------------------------------------------- the rewriting


def narrowed(graph: Graph, values: Values) -> tuple[Graph, dict[int, Places]] | None:
    """The graph that computes no places which its output does not depend on, and the places of
    the nodes that it computes less of, by their old numbers; None where nothing is saved."""
    demand: dict[int, Places | None] = {len(graph.nodes) - 1: None}
    picks: dict[int, Node] = {}
    plans: dict[int, Node] = {}
    for node in reversed(graph.nodes):
        places, plan = demand.get(node.index), picked(values, node)
        if plan is not None:
            picks[node.index] = plan
        elif places is not None and (rule := _rule(values, node, places)) is not None:
            plan = rule(values, node, places)
            if plan is not None:
                plans[node.index] = plan
        for leaf in _leaves(plan or node):
            wanted = leaf.places if isinstance(leaf, Part) else None
            same = demand.get(leaf.node, wanted) == wanted
            demand[leaf.node] = wanted if same else None
    if not any(_is_work(graph.nodes[index]) for index in plans):
        return None
    kept = {index: places for index in plans if (places := demand[index]) is not None}
    usable = {index for index, plan in picks.items() if plan.args[0].node in kept}
    plans.update((index, picks[index]) for index in usable)
    return _rewritten(graph, plans, kept), kept


def _is_work(node: Node) -> bool:
    """Whether it pays to leave out some of its places."""
    is_layer = node.key in (nn.Linear, nn.MultiheadAttention)
    return is_layer or RULES.get(node.name) in (product, attention)


def _leaves(node: Node) -> Iterator[Any]:
    leaves, _ = tree_flatten((node.args, node.kwargs), is_leaf=_stands_for_value)
    return (leaf for leaf in leaves if _stands_for_value(leaf))


def _stands_for_value(leaf: Any) -> bool:
    return isinstance(leaf, (Ref, Part))


def _rewritten(graph: Graph, plans: dict[int, Node], kept: dict[int, Places]) -> Graph:
    nodes: list[Node] = []
    place: dict[int, int] = {}
    cut: dict[Part, int] = {}

    def reference(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return Ref(place[leaf.node])
        if not isinstance(leaf, Part):
            return leaf
        if kept.get(leaf.node) == leaf.places:
            return Ref(place[leaf.node])
        return Ref(cut[leaf])

    for node in graph.nodes:
        node = plans.get(node.index, node)
        for leaf in _leaves(node):
            if isinstance(leaf, Part) and kept.get(leaf.node) != leaf.places and leaf not in cut:
                some = leaf.places
                args = Ref(place[leaf.node]), some.axis, some.start, some.length
                cut[leaf] = len(nodes)
                nodes.append(Node(len(nodes), "function", torch.narrow, args))
        args, kwargs = tree_map(reference, (node.args, node.kwargs), is_leaf=_stands_for_value)
        place[node.index] = len(nodes)
        nodes.append(replace(node, index=len(nodes), args=args, kwargs=kwargs))
    return graph.with_nodes(nodes)
