"""What formulas of metrics are written in: NumPy's arrays on a CPU, torch's tensors on a GPU.

A formula is written once. Operators and most methods mean the same for both, :func:`library` has
the functions of one name, and the others are here. On a CPU a call of NumPy's costs half of
torch's, which counts where arrays fit the cache; torch's kernels that are faster even so work on
an array's memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Either kind; operators between the two kinds of a union would all be errors to mypy.
Array = Any


def as_array(x: Tensor) -> Array:
    return x.numpy() if x.device.type == "cpu" else x


def as_tensor(x: Array) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def library(x: Array) -> Any:
    """The module with functions for this kind of array."""
    return torch if isinstance(x, Tensor) else np


def count(x: Array) -> Array:
    """0, 1, 2, ... along the first axis."""
    return torch.arange(len(x), device=x.device) if isinstance(x, Tensor) else np.arange(len(x))


def less(x: Array, y: Array) -> Array:
    """``x - y`` where y is repeated along an axis."""
    return as_array(torch.sub(as_tensor(x), as_tensor(y)))


def at_least(x: Array, bound: float) -> Array:
    return as_array(as_tensor(x).clamp(min=bound))


def largest(x: Array) -> Array:
    """Along the second axis."""
    return as_array(as_tensor(x).amax(1))


def dot(x: Array, y: Array) -> Array:
    """Sum of products ``[inputs, outputs, experiments]`` over the outputs; on a CPU without the
    products in between."""
    return (x * y).sum(1) if isinstance(x, Tensor) else np.einsum("noe,noe->ne", x, y)


def weighted(weights: Array, x: Array) -> Array:
    """Sum over the outputs of ``x`` with weights ``[inputs, outputs, 1]``."""
    return library(x).matmul(weights.swapaxes(1, 2), x)[:, 0]


def products(weights: Array, x: Array) -> Array:
    """Several such sums at once, by weights ``[inputs, sums, outputs]``: of three, torch's product
    is a third faster than NumPy's."""
    return as_array(torch.bmm(as_tensor(weights), as_tensor(x)))


def first_argmax(outputs: Array) -> Array:
    """Largest of the outputs ``[..., outputs]``, the first of several; int8 for few outputs on a
    CPU, where comparing one after the other takes a fraction of the time."""
    n_outputs = outputs.shape[-1]
    if n_outputs > 32 or isinstance(outputs, Tensor):
        return outputs.argmax(-1)
    best, place = outputs[..., 0].copy(), np.zeros(outputs.shape[:-1], np.int8)
    for number in range(1, n_outputs):
        # Numbers rise, so the last output that beat all before it has the largest.
        beats = (outputs[..., number] > best).view(np.int8)
        beats *= np.int8(number)
        np.maximum(place, beats, out=place)
        np.maximum(best, outputs[..., number], out=best)
    return place


def sum_of_squares(x: Array) -> Array:
    """Along the first axis of ``[inputs, experiments]``."""
    return (x * x).sum(0) if isinstance(x, Tensor) else np.einsum("ne,ne->e", x, x)


def add_up(x: Array, found: Array) -> None:
    """Sum, sum of squares, least and largest along the first axis of ``[inputs, experiments]``,
    into ``found`` ``[4, experiments]``."""
    if isinstance(x, Tensor):
        found[0], found[1], found[2], found[3] = x.sum(0), sum_of_squares(x), x.amin(0), x.amax(0)
        return
    # A product and ufuncs' own reductions: the methods of arrays cost several times as much.
    np.matmul(np.ones(len(x)), x, out=found[0])
    np.einsum("ne,ne->e", x, x, out=found[1])
    np.minimum.reduce(x, 0, out=found[2])
    np.maximum.reduce(x, 0, out=found[3])
