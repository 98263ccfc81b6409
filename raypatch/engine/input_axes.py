"""Along which axis the values of a graph hold the inputs, and which values are the same for all of
them: sizes, positions and masks made from sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from raypatch.engine.arguments import count_inputs, inputs_between, together
from raypatch.engine.graph import CaptureError, Graph, Node
from raypatch.engine.layers import Args, tensors_in

# Methods, attributes and exported operations that tell of a tensor's form, not of its numbers.
ASKS_FOR_FORM = {"size", "dim", "ndimension", "sym_size", "shape", "ndim", "device", "dtype"}
# How far values of an input may differ, by rounding, where it is alone and where it is not.
MET = 1e-3
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


class AxisUnsettled(CaptureError):
    """The inputs that an axis was found by do not tell which of its entries are an input's; these
    ``inputs`` do."""

    def __init__(self, inputs: Args) -> None:
        super().__init__("which entries of an axis are an input's could not be told")
        self.inputs = inputs


@dataclass(frozen=True)
class Following:
    """How the values of a graph's nodes follow from the inputs.

    ``depends``: whether a value may differ from input to input, or by how many there are.
    ``numbered``: nodes whose tensors number the inputs, as ``torch.arange(len(x))``, and what is
    made of these and of inputs until it is the same for an input wherever it stands.
    ``axes``: along which :data:`Axis` a value holds the inputs, None where along none; of several
    tensors in one value a structure of the same form.
    ``possible``: axes by which the values could lie where there are several, by node.
    """

    depends: list[bool]
    numbered: set[int]
    axes: list[Any]
    possible: dict[int, list[Merged]]

    def check(self, args: Args, values: list[Any], sample: list[Any]) -> None:
        """Raises AxisUnsettled where ``values`` of a run on ``args`` are not the same whichever of
        several possible axes hold the inputs; ``sample`` are those for the first of the inputs that
        the axes were found by."""
        for index, axes in self.possible.items():
            found = [inputs_first(values[index], axis).flatten(1) for axis in axes]
            if not any(_unlike(rows, found[0]).any() for rows in found[1:]):
                continue
            told: list[Args] = []
            for axis, rows in zip(axes, found):
                # If this is the axis, here is an input unlike the one that it was found by.
                unlike = _unlike(rows, inputs_first(sample[index], axis).flatten(1))
                told += [inputs_between(args, i, i + 1) for i in unlike.nonzero().flatten()[:1]]
            if told:
                raise AxisUnsettled(reduce(together, told))


def _unlike(rows: Tensor, others: Tensor) -> Tensor:
    """``[inputs]``: where rows ``[inputs, ...]`` differ by more than rounding."""
    rounding = 64 * torch.finfo(rows.dtype).eps if rows.is_floating_point() else 0.0
    return (_differences(rows, others) > rounding).any(1)


def _differences(found: Tensor, wanted: Tensor) -> Tensor:
    """As shares of the largest number; what is infinite or none is like itself alone."""
    found, wanted = found.double(), wanted.double()
    finite = wanted.nan_to_num(0.0, 0.0, 0.0)
    size = max(1.0, float(finite.abs().max())) if wanted.numel() else 1.0
    found, wanted = (x.nan_to_num(3 * size, 2 * size, -2 * size) for x in (found, wanted))
    return (found - wanted).abs() / size


def follow_inputs(graph: Graph, inputs: Args, sample: list[Any]) -> Following:
    """Found by comparing the values of runs on each of two or more inputs and on all of them;
    ``sample`` are those on the first."""
    others = range(1, count_inputs(inputs))
    each = [sample, *(graph.run(inputs_between(inputs, i, i + 1)) for i in others)]
    runs = [RunValues(list(one), of_all) for *one, of_all in zip(*each, graph.run(inputs))]
    depends: list[bool] = []
    form: set[int] = set()  # nodes that follow from the inputs' form alone
    for node in graph.nodes:
        i = node.index
        asked = node.inputs[:1] if node.name in CASTS and node.is_torchs else node.inputs
        seen = [used for used in asked if depends[used]]
        is_size = not tensors_in(sample[i])
        if node.op != "input" and (form.issuperset(seen) or (is_size and _asks_for_form(node))):
            form.add(i)
        is_fixed = is_size and i in form and bool(sample[i] == runs[i].of_all)
        depends.append(node.op == "input" or (bool(seen) and not is_fixed))
    leaves = [values.leaves() for values in runs]
    axes = [
        tree_unflatten([_input_axis(leaf) for leaf in some], tree_flatten(values)[1])
        for some, values in zip(leaves, sample)
    ]
    possible = {
        i: found
        for i, some in enumerate(leaves)
        if isinstance(sample[i], Tensor) and len(found := _divisions(some[0])) > 1
    }
    numbered = _numbered(graph, {i for i in form if depends[i]}, leaves, axes)
    for i, some in enumerate(leaves):
        if i not in numbered and i not in form and depends[i]:
            kept = [_kept_apart(*both) for both in zip(some, tree_flatten(axes[i])[0])]
            axes[i] = tree_unflatten(kept, tree_flatten(sample[i])[1])
    return Following(depends, numbered, axes, possible)


def _kept_apart(values: RunValues, axis: Axis) -> Axis:
    """The axis, unless what lies there for an input follows from other inputs, too."""
    if not isinstance(values.of_all, Tensor) or not isinstance(axis, int):
        return axis  # of a merged axis the division has been found by the same distance
    return axis if values.distance(axis) <= MET else None


class RunValues(NamedTuple):
    """A node's values in runs on each of some inputs, and on all of them."""

    of_each: list[Any]
    of_all: Any

    def leaves(self) -> list[RunValues]:
        """Of each of several tensors in one value."""
        parts = zip(*(tree_flatten(value)[0] for value in (self.of_all, *self.of_each)))
        return [RunValues(of_each, of_all) for of_all, *of_each in parts]

    def distance(self, axis: Axis) -> float:
        """How far what lies along an axis for each input is from its value alone, as a share of the
        largest."""
        if not self.of_all.numel():
            return 0.0
        alone = torch.stack([inputs_first(one, axis)[0] for one in self.of_each])
        return float(_differences(inputs_first(self.of_all, axis), alone).max())


def _numbered(
    graph: Graph, form: set[int], leaves: list[list[RunValues]], axes: list[Any]
) -> set[int]:
    def is_apart(index: int) -> bool:
        return any(
            axis is None or values.distance(axis) > 1e-4
            for values, axis in zip(leaves[index], tree_flatten(axes[index])[0])
            if isinstance(values.of_all, Tensor)
        )

    found = {i for i in form if is_apart(i)}
    for node in graph.nodes:
        if node.index not in form and found.intersection(node.inputs) and is_apart(node.index):
            found.add(node.index)
    for node in reversed(graph.nodes):
        if node.index in found:  # it is made of these
            tensors = (i for i in form.intersection(node.inputs) if leaves[i])
            found.update(i for i in tensors if isinstance(leaves[i][0].of_all, Tensor))
    return found


def _divisions(values: RunValues) -> list[Merged]:
    """How an axis that holds the inputs and something else may be divided."""
    axis = _changing_axis(values)
    first = values.of_each[0]
    size = 1 if axis is None else first.shape[axis]
    if axis is None or size == 1 or values.of_all.shape[axis] != len(values.of_each) * size:
        return []
    found = [Merged(axis, n, size // n) for n in range(1, size + 1) if size % n == 0]
    errors = [values.distance(division) for division in found]
    # A right division leaves rounding errors, a wrong one what the inputs differ by.
    least = min(errors)
    if not least <= 1e-4:
        return []
    return [division for division, e in zip(found, errors) if e <= max(10 * least, 1e-6)]


def _changing_axis(values: RunValues) -> int | None:
    first, *others = values.of_each
    if not isinstance(first, Tensor) or first.dim() != values.of_all.dim():
        return None
    if any(other.shape != first.shape for other in others):
        return None
    sizes = enumerate(zip(first.shape, values.of_all.shape))
    different = [axis for axis, (one, all_) in sizes if one != all_]
    return different[0] if len(different) == 1 else None


def _input_axis(values: RunValues) -> Axis:
    axis = _changing_axis(values)
    if axis is None or values.of_each[0].shape[axis] == 1:
        return axis
    return next(iter(_divisions(values)), None)


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
