"""Layers that see no input, as those that embed positions, ``pos(torch.arange(x.shape[1]))``: given
an axis for the inputs, they are layers like any other.

What follows from them and from no input is then held for every input, along a new axis 0. Where it
meets what follows from the inputs, element-wise operations go on as they are, and all others on the
values for one input at a time, as the network's author wrote them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Union

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from raypatch.engine.graph import CaptureError, Graph, Node, Ref, renumbered
from raypatch.engine.input_axes import (
    Following,
    Merged,
    for_each_input,
    inputs_at,
    inputs_first,
)
from raypatch.engine.layers import tensors_in
from raypatch.engine.local_rules import LOCAL_RULES, pointwise


@contextmanager
def _vmap_says_nothing() -> Iterator[None]:
    """It would warn, past Python's own streams, of every operation that it runs row by row."""
    name = "_set_vmap_fallback_warning_enabled"
    switch = getattr(torch._C._functorch, name, lambda _: None)
    switch(False)
    try:
        yield
    finally:
        switch(True)  # as torch has it; it cannot be asked


@dataclass(frozen=True)
class NewAxis:
    """The axis 0 that a value gets for the inputs, before its own."""


# Where a value holds the inputs.
Place = Union[int, Merged, NewAxis]


@dataclass(frozen=True, eq=False, repr=False)
class OneByOne:
    """An operation on the values for one input at a time.

    ``node``'s references count the arguments; ``places`` tells where each holds the inputs, None
    where it is the same for all, and ``result`` where the result does, of several tensors a
    structure of the same form.
    """

    node: Node
    places: tuple[Place | None, ...]
    result: Any

    def __repr__(self) -> str:
        return f"{self.node.name}, one input at a time"

    def __call__(self, *values: Any) -> Any:
        rows = [_rows(v, place) for v, place in zip(values, self.places) if place is not None]
        forms = []

        def of_one(*row: Tensor) -> list[Tensor]:
            given = iter(row)
            all_ = [v if p is None else next(given) for v, p in zip(values, self.places)]
            leaves, form = tree_flatten(self.node.call(all_.__getitem__))
            forms.append(form)
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        try:
            with _vmap_says_nothing():
                found = iter(torch.vmap(of_one)(*rows))
        except (RuntimeError, ValueError):  # what torch has no such rule for
            found = map(torch.stack, zip(*(of_one(*row) for row in zip(*rows))))
        places = tree_flatten(self.result)[0]
        leaves = [None if place is None else _in_place(next(found), place) for place in places]
        return tree_unflatten(leaves, forms[0])


def _rows(value: Tensor, place: Place) -> Tensor:
    """``[inputs, ...]``, each row of the form of the value for one input."""
    if isinstance(place, NewAxis):
        return value
    rows = inputs_first(value, place)
    if isinstance(place, Merged):
        return rows.flatten(place.axis + 1, place.axis + 2)
    return rows.unsqueeze(place + 1)


def _in_place(rows: Tensor, place: Place) -> Tensor:
    """What :func:`_rows` has taken apart."""
    if isinstance(place, NewAxis):
        return rows
    if isinstance(place, Merged):
        return inputs_at(place, torch.unflatten(rows, place.axis + 1, (place.before, place.after)))
    return inputs_at(place, rows.squeeze(place + 1))


def _place_for(value: Any) -> Place | None:
    """Where a value that is the same for all inputs is to hold them: along an axis of its own that
    seems to be meant for them, if there is one."""
    if not isinstance(value, Tensor):
        return None
    return 0 if value.shape[:1] == (1,) else NewAxis()


def for_inputs_of(value: Tensor, holder: Tensor) -> Tensor:
    """``[inputs, ...]``, each its own memory, for as many inputs as ``holder`` has."""
    return for_each_input(value, len(holder)).clone(memory_format=torch.contiguous_format)


def with_inputs_in(
    layers: set[int], graph: Graph, following: Following, sample: list[Any]
) -> Graph:
    """The graph with the values of the nodes ``layers`` repeated for every input; ``sample`` are
    all nodes' values for one.

    Raises CaptureError where that is impossible.
    """
    return _Rewriting(layers, graph, following, sample).graph()


class _Rewriting:
    def __init__(
        self, layers: set[int], graph: Graph, following: Following, sample: list[Any]
    ) -> None:
        self.layers = layers
        self.old = graph
        self.following = following
        self.sample = sample
        self.nodes: list[Node] = []
        self.number: dict[int, int] = {}  # new numbers by old ones
        # Where values hold the inputs that follow from such layers and from no input; of several
        # tensors a structure of the same form.
        self.repeated: dict[int, Any] = {}

    def graph(self) -> Graph:
        for node in self.old.nodes:
            self._take(node)
        return self.old.with_nodes(self.nodes)

    def _add(self, node: Node) -> int:
        self.nodes.append(replace(node, index=len(self.nodes)))
        return len(self.nodes) - 1

    def _take(self, node: Node) -> None:
        index = node.index
        if any(i in self.repeated for i in node.inputs):
            self.number[index] = self._add(self._on_repeated(node))
            return
        args, kwargs = renumbered(node, self.number)
        path = None if index in self.layers else node.path
        self.number[index] = self._add(replace(node, args=args, kwargs=kwargs, path=path))
        if index in self.layers:
            holder = next((i for i, axis in enumerate(self.following.axes) if axis == 0), index)
            if node.path is None or holder >= index:
                raise CaptureError(f"layer {node.path or node.name} sees no input")
            each = Ref(self.number[index]), Ref(self.number[holder])
            self.number[index] = self._add(Node(0, "function", for_inputs_of, each, path=node.path))
            self.repeated[index] = _place_for(self.sample[index])

    def _on_repeated(self, node: Node) -> Node:
        value, depends = self.sample[node.index], self.following.depends[node.index]
        if not tensors_in(value):
            if depends:
                raise CaptureError(f"{node.name}: it takes a layer that sees no input apart")
            return Node(0, "constant", value)
        if not depends:
            self.repeated[node.index] = tree_map(_place_for, value)
        return self._taken(node) or self._element_wise(node) or self._one_by_one(node)

    def _taken(self, node: Node) -> Node | None:
        """One of several results, as it is."""
        held = self.repeated.get(node.inputs[0])
        if not isinstance(held, (tuple, list)) or node.target not in (operator.getitem, getattr):
            return None
        self.repeated[node.index] = node.target(held, node.args[1])
        args, kwargs = renumbered(node, self.number)
        return replace(node, args=args, kwargs=kwargs)

    def _element_wise(self, node: Node) -> Node | None:
        """The operation as it is, on arguments whose axes stand below each other."""
        is_tensor = isinstance(self.sample[node.index], Tensor)
        if LOCAL_RULES.get(node.key) is not pointwise or not node.flat or not is_tensor:
            return None
        n_axes, number = self.sample[node.index].dim(), dict(self.number)
        at = self.repeated.get(node.index, self.following.axes[node.index])
        if at != 0 and not isinstance(at, NewAxis):
            return None
        for i in filter(lambda i: isinstance(self.sample[i], Tensor), node.inputs):
            shape = list(self.sample[i].shape)
            if i in self.repeated:
                wanted = [1] * (n_axes - len(shape)) + shape
                wanted = wanted[1:] if at == 0 else wanted
                if wanted != (shape[1:] if self.repeated[i] == 0 else shape):
                    args = Ref(self.number[i]), (-1, *wanted)
                    number[i] = self._add(Node(0, "function", torch.reshape, args))
            elif self.following.depends[i] and (
                self.following.axes[i] != 0 or len(shape) != n_axes
            ):
                return None
        args, kwargs = renumbered(node, number)
        return replace(node, args=args, kwargs=kwargs)

    def _one_by_one(self, node: Node) -> Node:
        used = list(dict.fromkeys(node.inputs))
        places = tuple(self._place(i) for i in used)
        result = self.repeated.get(node.index, self.following.axes[node.index])
        if isinstance(self.sample[node.index], Tensor) and result is None:
            raise CaptureError(f"{node.name}: it does not keep inputs along one axis")
        args, kwargs = renumbered(node, {i: place for place, i in enumerate(used)})
        inner = replace(node, args=args, kwargs=kwargs, index=0)
        values = tuple(self._value(i) for i in used)
        return Node(0, "function", OneByOne(inner, places, result), values, path=node.path)

    def _place(self, i: int) -> Place | None:
        held = self.repeated.get(i)
        if isinstance(held, (tuple, list)):
            raise CaptureError(f"{self.old.nodes[i].name}: its results are read together")
        if held is not None:
            return held
        if not self.following.depends[i] or not tensors_in(self.sample[i]):
            return None
        axis = self.following.axes[i]
        if not isinstance(axis, (int, Merged)) or i in self.following.numbered:
            raise CaptureError(f"{self.old.nodes[i].name}: it does not keep inputs along one axis")
        return axis

    def _value(self, i: int) -> Any:
        """A reference; of sizes what they are for one input."""
        is_size = self.following.depends[i] and not tensors_in(self.sample[i])
        return self.sample[i] if is_size else Ref(self.number[i])
