"""Along which axis the values of a graph hold the inputs, and which values are the same for all of
them: sizes, positions and masks made from sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from raypatch.engine.arguments import inputs_between
from raypatch.engine.graph import Graph, Node
from raypatch.engine.layers import Args, holds_tensors

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
    ``numbered``: nodes whose tensors number the inputs, as ``torch.arange(len(x))``.
    ``axes``: along which :data:`Axis` a value holds the inputs, None where along none; of several
    tensors in one value a structure of the same form.
    """

    depends: list[bool]
    numbered: set[int]
    axes: list[Any]


def follow_inputs(graph: Graph, two_inputs: Args, sample: list[Any]) -> Following:
    """Found by comparing the values of runs on either of two inputs and on both; ``sample`` are
    those on the first."""
    of_second, of_both = graph.run(inputs_between(two_inputs, 1, 2)), graph.run(two_inputs)
    depends: list[bool] = []
    form: set[int] = set()  # nodes that follow from the inputs' form alone
    for node in graph.nodes:
        i = node.index
        asked = node.inputs[:1] if node.name in CASTS and node.is_torchs else node.inputs
        seen = [used for used in asked if depends[used]]
        is_size = not holds_tensors(sample[i])
        if node.op != "input" and (form.issuperset(seen) or (is_size and _asks_for_form(node))):
            form.add(i)
        is_fixed = is_size and i in form and bool(sample[i] == of_both[i])
        depends.append(node.op == "input" or (bool(seen) and not is_fixed))
    axes = [tree_map(_input_axis, *values) for values in zip(sample, of_second, of_both)]
    counted = {i for i in form if depends[i] and isinstance(sample[i], Tensor)}
    numbered: set[int] = set()
    for node in reversed(graph.nodes):
        i, axis = node.index, axes[node.index]
        if i not in counted:
            continue
        if axis is None or _distance(sample[i], sample[i], of_both[i], axis) > 0:
            numbered.add(i)
        if i in numbered:
            numbered.update(counted.intersection(node.inputs))  # it is made of these
    return Following(depends, numbered, axes)


def _input_axis(of_first: Any, of_second: Any, of_both: Any) -> Axis:
    if not isinstance(of_first, Tensor) or of_first.dim() != of_both.dim():
        return None
    shape, both = of_first.shape, of_both.shape
    different = [axis for axis, sizes in enumerate(zip(shape, both)) if len(set(sizes)) > 1]
    if len(different) != 1 or of_second.shape != shape:
        return None
    (axis,) = different
    size = shape[axis]
    if size == 1:
        return axis
    if both[axis] != 2 * size:
        return None
    found = [Merged(axis, n, size // n) for n in range(1, size + 1) if size % n == 0]
    errors = [_distance(of_first, of_second, of_both, division) for division in found]
    # A right division leaves rounding errors, a wrong one what two inputs differ by.
    least = min(errors)
    if not least <= 1e-4:
        return None
    return next(division for division, e in zip(found, errors) if e <= max(10 * least, 1e-6))


def _distance(of_first: Tensor, of_second: Tensor, of_both: Tensor, axis: Axis) -> float:
    """How far values of two inputs that lie along an axis are from those of either alone, as a
    share of the largest."""
    if not of_first.numel():
        return 0.0
    found = inputs_first(of_both, axis)
    wanted = torch.stack([inputs_first(one, axis)[0] for one in (of_first, of_second)])
    found, wanted = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (found, wanted))
    return float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def _asks_for_form(node: Node) -> bool:
    asked = node.args[1] if node.target is getattr else node.key
    return asked in ASKS_FOR_FORM if isinstance(asked, str) else asked is len


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
