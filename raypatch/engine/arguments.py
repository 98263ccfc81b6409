"""Inputs of a network: tuples of tensors that share one number of inputs along axis 0."""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from raypatch.engine.layers import Args
from raypatch.errors import InputError


def _leaves(args: Args) -> list[Tensor]:
    leaves, _ = tree_flatten(args)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]


def shapes_of(args: Args) -> list[list[int]]:
    return [list(leaf.shape) for leaf in _leaves(args)]


def count_inputs(args: Args) -> int:
    """Number of inputs, the same in every tensor."""
    sizes = {len(leaf) for leaf in _leaves(args)}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            f"inputs of shapes {shapes_of(args)} do not share one number of inputs above 0"
        )
    return sizes.pop()


def inputs_between(args: Args, first: int, last: int) -> Args:
    """Inputs ``first`` to ``last`` (exclusive)."""
    sliced: Args = tree_map(
        lambda x: x[first:last] if isinstance(x, Tensor) and x.dim() else x, args
    )
    return sliced


def in_parts(args: Args, n_inputs: int, size: int) -> list[Args]:
    return [inputs_between(args, i, i + size) for i in range(0, n_inputs, size)]
