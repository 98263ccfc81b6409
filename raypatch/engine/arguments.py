"""Inputs of a network: tuples of tensors that share one number of inputs along axis 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map

from raypatch.engine.layers import Args, map_tensors, tensors_in
from raypatch.errors import InputError


def _leaves(args: Args) -> list[Tensor]:
    plain = all(type(x) is Tensor for x in args)
    return [leaf for leaf in (args if plain else tensors_in(args)) if leaf.dim()]


def shapes_of(args: Args) -> list[list[int]]:
    return [list(leaf.shape) for leaf in _leaves(args)]


def described(args: Args) -> str:
    """Types and shapes, as ``float32 [inputs, 4]``; what has names by its name, in any order."""
    found = []
    for arg in args:
        named = [("", arg)]
        if not isinstance(arg, Tensor):
            named = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(arg)[0]]
        for name, leaf in sorted(named, key=lambda one: one[0]):
            if isinstance(leaf, Tensor) and leaf.dim():
                shape = ", ".join(["inputs", *map(str, leaf.shape[1:])])
                form = f"{str(leaf.dtype).removeprefix('torch.')} [{shape}]"
                found.append(f"{name.strip('[]')}: {form}" if name else form)
    return ", ".join(found)


def form_of(args: Args) -> tuple[str, list[str]]:
    """What a capture holds for: types and shapes, and the values that are no tensors."""
    others = [leaf for leaf in tree_flatten(args)[0] if not isinstance(leaf, Tensor)]
    return described(args), list(map(repr, others))


def count_inputs(args: Args) -> int:
    """Number of inputs, the same in every tensor."""
    sizes = {leaf.shape[0] for leaf in _leaves(args)}
    if not sizes:
        kinds = ", ".join(type(one).__name__ for one in args)
        raise InputError(f"inputs must be tensors [inputs, ...], not {kinds}")
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            f"inputs of shapes {shapes_of(args)} do not share one number of inputs above 0"
        )
    return sizes.pop()


def chosen_inputs(args: Args, which: slice | list[int] | Tensor) -> Args:
    """The inputs at these places; a tensor without an axis is the same for all."""
    chosen: Args = map_tensors(lambda x: x[which] if x.dim() else x, args)
    return chosen


def inputs_between(args: Args, first: int, last: int) -> Args:
    """Inputs ``first`` to ``last`` (exclusive)."""
    return chosen_inputs(args, slice(first, last))


def together(some: Args, others: Args) -> Args:
    """The inputs of both, one after the other; what is no tensor of inputs as in ``some``."""
    joined: Args = tree_map(
        lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.dim() else a, some, others
    )
    return joined


def first_unlike(args: Args) -> int | None:
    """The first input that is not as the very first in every tensor; None where all are."""
    leaves = _leaves(args)
    for i in range(1, count_inputs(args)):  # as a rule the second
        if any(not torch.equal(leaf[i], leaf[0]) for leaf in leaves):
            return i
    return None


def in_parts(args: Args, n_inputs: int, size: int) -> list[Args]:
    """The inputs cut into parts of ``size``; the arguments as they are where one holds all."""
    if size >= n_inputs:
        return [args]
    return [inputs_between(args, i, i + size) for i in range(0, n_inputs, size)]
