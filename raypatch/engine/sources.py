"""Where the patched-in values come from (design 2)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

# Layer, number of its call and its activation [inputs, ...] to the values to patch in.
Fill = Callable[[str, int, Tensor], Tensor]
SourceKind = Literal["pair", "zero", "mean", "resample", "given"]
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


def noise_fill(layer: str, call: int, activation: Tensor) -> Tensor:
    """For trials: the activation with seeded noise, the same for every input."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{layer} {call}".encode()))
    noise = torch.randn(activation.shape[1:], generator=generator)
    return activation + noise.to(activation)


@dataclass(frozen=True)
class GivenFill:
    """Activations recorded elsewhere: ``values`` holds ``[inputs, ...]`` a layer.

    A layer without values gives NaN: whoever patches it sees that at once.
    """

    values: Mapping[str, Tensor]

    def part(self, first: int, last: int) -> GivenFill:
        """The values of inputs ``first`` to ``last``."""
        return GivenFill({name: value[first:last] for name, value in self.values.items()})

    def __call__(self, layer: str, call: int, activation: Tensor) -> Tensor:
        if layer not in self.values:
            return torch.full_like(activation, torch.nan)
        return self.values[layer].to(activation).reshape(activation.shape)


@dataclass(frozen=True)
class MeanFill:
    """Mean ablation: a patched neuron becomes its mean over the target side's inputs.

    ``means`` holds one ``[1, ...]`` tensor a layer and call.
    """

    means: dict[str, list[Tensor]]

    def __call__(self, layer: str, call: int, activation: Tensor) -> Tensor:
        return self.means[layer][call].expand_as(activation)
