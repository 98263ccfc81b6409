"""Operations on dense rows that torch runs much slower on a CPU than others of the same result.

Its max pooling goes from window to window, at a fifth to a tenth of the speed of comparing whole
slices; its maximum along an axis takes twenty times as long where it looks for the place as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raypatch.engine.graph import Node

# By the names of functions and of modules' classes: along how many axes they go.
MAX_POOLS = {
    name.format(n): n for name in ("max_pool{}d", "_max_pool{}d", "MaxPool{}d") for n in (1, 2, 3)
}


class Extreme(NamedTuple):
    """What ``max`` along an axis gives, where nobody reads the places."""

    values: Tensor
    indices: None = None


def largest(x: Tensor, dim: int, keepdim: bool | None) -> Extreme:
    return Extreme(x.amax(dim, bool(keepdim)))


def smallest(x: Tensor, dim: int, keepdim: bool | None) -> Extreme:
    return Extreme(x.amin(dim, bool(keepdim)))


EXTREMES = {"max": largest, "min": smallest}


def faster(node: Node, readers: Iterable[Node], value: Any) -> Node:
    """The node, or one with the same results in less time; ``value`` is what it gives."""
    tensor = value[0] if isinstance(value, tuple) and value else value
    is_here = isinstance(tensor, Tensor) and tensor.device.type == "cpu"
    if not is_here or not tensor.is_floating_point() or not node.is_torchs:
        return node
    if isinstance(value, Tensor):
        windows = _windows(node) if node.name in MAX_POOLS else None
        if windows is None:
            return node
        args = node.option(0, "input"), *windows
        return replace(node, op="function", target=max_pool, args=args, kwargs={})
    along_axis = node.name in EXTREMES and type(node.option(1, "dim")) is int
    if not along_axis or not all(map(_takes_first, readers)):
        return node
    args = tuple(node.option(place, n) for place, n in enumerate(("input", "dim", "keepdim")))
    return replace(node, op="function", target=EXTREMES[node.name], args=args, kwargs={})


def _takes_first(reader: Node) -> bool:
    return (reader.target, reader.args[1:]) in ((getattr, ("values",)), (operator.getitem, (0,)))


def _windows(node: Node) -> list[tuple[int, ...]] | None:
    """Size, step and padding of a max pooling's windows along each axis; None for forms that are
    rare."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if node.op == "module":
        given = [getattr(node.target, name) for name in names]
    else:
        given = [node.option(place, name) for place, name in enumerate(names, 1)]
    size, step, padding, dilation, ceil_mode = given
    found = []
    for one in (size, step or size, padding or 0, dilation or 1):
        each = tuple(one) if isinstance(one, (tuple, list)) else (one,)
        each = each * MAX_POOLS[node.name] if len(each) == 1 else each
        found.append(each)
    is_plain = set(found.pop()) == {1} and not ceil_mode
    is_known = all(type(number) is int for each in found for number in each)
    return found if is_plain and is_known else None


def max_pool(
    x: Tensor, size: tuple[int, ...], step: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """The maximum of each window along the last axes, one axis after the other."""
    for axis, window in enumerate(zip(size, step, padding), x.dim() - len(size)):
        x = _pooled(x, axis, *window)
    return x


def _pooled(x: Tensor, axis: int, size: int, step: int, padding: int) -> Tensor:
    """``x`` has its windows along ``axis``; what is past its ends has no say."""
    length, shape = x.shape[axis], list(x.shape)
    shape[axis] = n_windows = (length + 2 * padding - size) // step + 1
    found = None
    for offset in sorted(range(-padding, size - padding), key=abs):
        # Windows that have an element there, counted from where they start without padding.
        first = max(0, -(offset // step))
        last = min(n_windows, (length - 1 - offset) // step + 1)
        if first >= last:
            continue
        index = [slice(None)] * axis + [slice(first * step + offset, None, step)]
        there = x[tuple(index)].narrow(axis, 0, last - first)
        if found is None and last - first == n_windows:
            found = there.clone(memory_format=torch.contiguous_format)
            continue
        if found is None:
            found = x.new_full(shape, -torch.inf)
        some = found.narrow(axis, first, last - first)
        torch.maximum(some, there, out=some)
    assert found is not None
    return found
