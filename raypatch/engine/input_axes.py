"""Along which axis the values of a graph hold the inputs, and which values are the same for all of
them: sizes, positions and masks made from sizes, and layers that see nothing else.

A network that embeds positions, ``pos(torch.arange(x.shape[1]))``, has a layer whose output holds
no inputs. Given an axis for them, it is a layer like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from raypatch.engine.graph import CaptureError, Graph, Node, Ref, finished_graph, renumbered
from raypatch.engine.layers import Args, holds_tensors, map_tensors

# Methods, attributes and exported operations that tell of a tensor's form, not of its numbers.
ASKS_FOR_FORM = {"size", "dim", "ndimension", "sym_size", "shape", "ndim", "device", "dtype"}
# Methods that ask it of all their arguments but the first.
CASTS = {"to", "type_as"}


@dataclass(frozen=True)
class Merged:
    """An axis of ``before * inputs * after`` places, as ``x.flatten(0, 1)`` and attention make."""

    axis: int
    before: int
    after: int

    def apart(self, value: Tensor) -> Tensor:
        """``[..., before, inputs, after, ...]``."""
        shape = value.shape
        around = shape[: self.axis], shape[self.axis + 1 :]
        return value.reshape(*around[0], self.before, -1, self.after, *around[1])


Axis = Union[int, Merged, None]


@dataclass(frozen=True)
class Following:
    """How the values of a graph's nodes follow from the inputs.

    ``depends``: whether a value may differ from input to input, or by how many there are.
    ``axes``: along which :data:`Axis` it holds the inputs, None where along none; of several
    tensors in one value a structure of the same form.
    """

    depends: list[bool]
    axes: list[Any]


def follow_inputs(graph: Graph, one_input: Args, sample: list[Any]) -> Following:
    """Found by comparing ``sample``, the values of a run on one input, with those on two."""
    doubled: Args = map_tensors(lambda x: torch.cat([x, x]) if x.dim() else x, one_input)
    of_two = graph.run(doubled)
    depends: list[bool] = []
    form: set[int] = set()  # nodes that follow from the inputs' form alone
    for node in graph.nodes:
        i = node.index
        asked = node.inputs[:1] if node.name in CASTS and node.is_torchs else node.inputs
        seen = [used for used in asked if depends[used]]
        if not holds_tensors(sample[i]) and (_asks_for_form(node) or form.issuperset(seen)):
            form.add(i)
        is_fixed = i in form and bool(sample[i] == of_two[i])
        depends.append(node.op == "input" or (bool(seen) and not is_fixed))
    return Following(depends, [tree_map(_input_axis, *pair) for pair in zip(sample, of_two)])


def _input_axis(of_one: Any, of_two: Any) -> Axis:
    if not isinstance(of_one, Tensor) or of_one.dim() != of_two.dim():
        return None
    different = [
        i for i, sizes in enumerate(zip(of_one.shape, of_two.shape)) if len(set(sizes)) > 1
    ]
    if len(different) != 1:
        return None
    (axis,) = different
    size = of_one.shape[axis]
    if size == 1:
        return axis
    # The two inputs are the same, and so is what a right division gives for each.
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    for division in (Merged(axis, before, size // before) for before in divisors):
        if of_two.shape[axis] == 2 * size and _is_repeated(of_one, of_two, division):
            return division
    return None


def _is_repeated(of_one: Tensor, of_two: Tensor, division: Merged) -> bool:
    one, two = (division.apart(value).double() for value in (of_one, of_two))
    scale = max(1.0, float(one.abs().max())) if one.numel() else 1.0
    return bool(((two - one).abs() <= 1e-4 * scale).all())


def _asks_for_form(node: Node) -> bool:
    asked = node.args[1] if node.target is getattr else node.key
    return asked in ASKS_FOR_FORM if isinstance(asked, str) else asked is len


def with_inputs_in(apart: set[int], graph: Graph, axes: list[Any]) -> Graph:
    """The graph with the values of the nodes ``apart`` repeated for every input.

    Raises CaptureError for one of several outputs, and for one that comes before anything that
    holds the inputs first.
    """
    holders = [i for i, axis in enumerate(axes) if type(axis) is int and axis == 0]
    nodes: list[Node] = []
    place: dict[int, int] = {}
    for node in graph.nodes:
        number = node.index
        node.args, node.kwargs = renumbered(node, place)
        place[number] = node.index = len(nodes)
        nodes.append(node)
        if number in apart:
            if node.path is None or not holders or holders[0] > number:
                raise CaptureError(f"layer {node.path or node.target!r} sees no input")
            args = Ref(place[number]), Ref(place[holders[0]])
            place[number] = len(nodes)
            nodes.append(Node(len(nodes), "function", for_inputs_of, args, path=node.path))
            node.path = None
    return finished_graph(nodes, len(nodes) - 1, graph.how, graph.unread)


def for_inputs_of(value: Tensor, holder: Tensor) -> Tensor:
    """``[inputs, ...]``, each its own memory, for as many inputs as ``holder`` has."""
    return for_each_input(value, len(holder)).clone(memory_format=torch.contiguous_format)


def for_each_input(value: Tensor, n_inputs: int) -> Tensor:
    """``[...]`` or ``[1, ...]`` to ``[inputs, ...]``."""
    one = value if len(value) == 1 else value[None]
    return one.expand(n_inputs, *one.shape[1:])


def inputs_first(value: Tensor, axis: Axis) -> Tensor:
    """A value that holds its inputs along ``axis``, with them along axis 0; what was merged with
    them is two axes in the place of one."""
    if isinstance(axis, Merged):
        return axis.apart(value).movedim(axis.axis + 1, 0)
    return value.movedim(axis, 0) if axis else value


def inputs_at(axis: Axis, rows: Tensor) -> Tensor:
    """Rows with their inputs along ``axis`` instead of axis 0; in one piece."""
    if isinstance(axis, Merged):
        return rows.movedim(0, axis.axis + 1).flatten(axis.axis, axis.axis + 2)
    return rows.movedim(0, axis).contiguous() if axis else rows


def per_input(axis: Axis) -> int | None:
    """How many entries of axis 0 each input has, one after the other; None where inputs lie along
    another axis."""
    if isinstance(axis, Merged):
        return axis.after if axis.axis == 0 and axis.before == 1 else None
    return 1 if axis == 0 else None


def entries_first(value: Tensor, axis: Axis) -> Tensor:
    """A value with its inputs along axis 0, of which each may have several entries."""
    return inputs_first(value, axis) if per_input(axis) is None else value


def entries_at(axis: Axis, rows: Tensor) -> Tensor:
    """What :func:`entries_first` gives, as rows lie in the value itself."""
    return inputs_at(axis, rows) if per_input(axis) is None else rows


def place_of(axis: int, inputs: Axis) -> int:
    """Where an axis of a value is once :func:`inputs_first` has moved the ``inputs``."""
    at = inputs.axis if isinstance(inputs, Merged) else inputs or 0
    if axis < at:
        return axis + 1
    return axis + 2 if isinstance(inputs, Merged) else axis


def shape_of(sample: Tensor, axis: Axis, n_inputs: int) -> list[int]:
    """The shape of a value for ``n_inputs``, by ``sample`` for one."""
    shape = list(sample.shape)
    if axis is not None:
        shape[axis.axis if isinstance(axis, Merged) else axis] *= n_inputs
    return shape
