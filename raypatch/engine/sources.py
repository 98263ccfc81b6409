"""Where the patched-in values come from (design 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

# Layer, number of its call and its activation [inputs, ...] to the values to patch in.
Fill = Callable[[str, int, Tensor], Tensor]
SourceKind = Literal["pair", "zero", "mean", "resample"]
SOURCE_KINDS: tuple[str, ...] = get_args(SourceKind)


def resample_order(n_inputs: int, seed: int) -> Tensor:
    """A seeded order of the inputs in which, for two or more, none stays in its place.

    Sattolo's algorithm (Sattolo 1986): a uniformly drawn cyclic permutation.
    """
    generator = torch.Generator().manual_seed(seed)
    order = list(range(n_inputs))
    for i in range(n_inputs - 1, 0, -1):
        j = int(torch.randint(i, (1,), generator=generator))
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, dtype=torch.int64)


def zero_fill(layer: str, call: int, activation: Tensor) -> Tensor:
    """Zero ablation: every patched neuron becomes 0."""
    return torch.zeros_like(activation)


@dataclass(frozen=True)
class MeanFill:
    """Mean ablation: a patched neuron becomes its mean over the target side's inputs.

    ``means`` holds one ``[1, ...]`` tensor a layer and call.
    """

    means: dict[str, list[Tensor]]

    def __call__(self, layer: str, call: int, activation: Tensor) -> Tensor:
        return self.means[layer][call].expand_as(activation)
