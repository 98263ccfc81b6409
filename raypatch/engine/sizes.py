"""Sizes that are the same for all inputs, ``x.shape[1]``, as the numbers that they are: a captured
graph is for one form of inputs."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from raypatch.engine.graph import Bounds, Graph, Node, Ref, is_ref, item_between
from raypatch.engine.input_axes import Following
from raypatch.engine.layers import Args

SIZES = (int, float, torch.Size, torch.dtype, torch.device)


def settle_squeezes(graph: Graph, several: Args) -> None:
    """Let every squeeze name the axes that it takes away from values of ``several`` inputs: from
    those of a lone one it would take the inputs' axis too."""
    squeezes = [node for node in graph.nodes if node.key in ("squeeze", torch.squeeze)]
    values = graph.run(several) if squeezes else []
    for node in squeezes:
        shape, of = values[node.inputs[0]].shape, Ref(node.inputs[0])
        given = [a for a in (*node.args, *node.kwargs.values()) if not is_ref(a)]
        axes = given[0] if given else range(len(shape))
        asked = [axes] if isinstance(axes, int) else axes
        gone = tuple(axis % len(shape) for axis in asked if shape[axis] == 1)
        node.op, node.target, node.args, node.kwargs = "method", "squeeze", (of, gone), {}


def with_sizes(graph: Graph, following: Following, sample: list[Any]) -> Graph | None:
    """The graph with numbers for such sizes, None where it has none; ``sample`` are all nodes'
    values for one input."""
    fixed = {
        i: value
        for i, value in enumerate(sample)
        if not following.depends[i] and isinstance(value, SIZES)
    }
    if not fixed:
        return None

    def settled(leaf: Any) -> Any:
        return fixed.get(leaf.node, leaf) if isinstance(leaf, Ref) else leaf

    nodes = []
    for node in graph.nodes:
        args, kwargs = tree_map(settled, (node.args, node.kwargs), is_leaf=is_ref)
        nodes.append(_with_slices(replace(node, args=args, kwargs=kwargs)))
    return graph.with_nodes(nodes)


def _with_slices(node: Node) -> Node:
    """An index of known bounds, as Python has it."""
    if node.target is not item_between:
        return node

    def as_slice(leaf: Any) -> Any:
        if isinstance(leaf, Bounds) and not any(map(is_ref, leaf)):
            return slice(*leaf)
        return leaf

    index = tree_map(as_slice, node.args[1], is_leaf=lambda leaf: isinstance(leaf, Bounds))
    each = index if type(index) is tuple else (index,)
    is_plain = not any(isinstance(one, Bounds) for one in each)
    target = operator.getitem if is_plain else item_between
    return replace(node, target=target, args=(node.args[0], index))
