"""Where the patched-in values come from (design 2)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from raypatch.engine.layers import Args
from raypatch.errors import InputError, is_not_of_network, one_line

# Layer, number of its call and its activation [inputs, ...] to the values to patch in.
Fill = Callable[[str, int, Tensor], Tensor]
SourceKind = Literal["pair", "zero", "mean", "resample", "given"]
SOURCE_KINDS: tuple[str, ...] = get_args(SourceKind)


def resample_order(n_inputs: int, seed: int) -> Tensor:
    """A seeded order of the inputs in which, for two or more, none stays in its place.

    Sattolo's algorithm (Sattolo 1986): a uniformly drawn cyclic permutation.
    """
    try:
        generator = torch.Generator().manual_seed(seed)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"seed {seed!r}: a seed is a whole number of at most 64 bits") from None
    order = list(range(n_inputs))
    for i in range(n_inputs - 1, 0, -1):
        j = int(torch.randint(i, (1,), generator=generator, device="cpu"))
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, dtype=torch.int64, device="cpu")


def zero_fill(layer: str, call: int, activation: Tensor) -> Tensor:
    """Zero ablation: every patched neuron becomes 0."""
    return torch.zeros_like(activation)


def noise_fill(layer: str, call: int, activation: Tensor) -> Tensor:
    """For trials: the activation with seeded noise along its last axis, the same for every input,
    wherever inputs lie among the other axes, if anywhere, and for every call: a graph does not hold
    the calls that nobody reads."""
    generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
    noise = torch.randn(activation.shape[-1:], generator=generator, device="cpu")
    return activation + noise.to(activation)


@dataclass(frozen=True)
class Places:
    """``length`` of the ``size`` places along an axis, from ``start``."""

    axis: int
    start: int
    length: int
    size: int

    def along(self, axis: int) -> Places:
        return replace(self, axis=axis)


@dataclass(frozen=True)
class GivenFill:
    """Activations recorded elsewhere: ``values`` holds ``[inputs, ...]`` a layer, of which those
    from ``first`` to ``last`` are patched in.

    A layer without values gives NaN until :meth:`check` refuses it. Of layers' calls in ``kept``
    the engine computes these places only.
    """

    values: Mapping[str, Tensor]
    n_inputs: int
    first: int = 0
    last: int | None = None
    kept: Mapping[tuple[str, int], Places] = field(default_factory=dict)

    def check(self, layers: set[str]) -> None:
        """Raises InputError for a layer without values."""
        if missing := sorted(layers - self.values.keys()):
            raise InputError(
                f"source of kind 'given': no activations of {missing[0]!r}, which an experiment "
                f"patches; it holds {', '.join(sorted(self.values)) or 'none'}"
            )

    def part(self, first: int, last: int) -> GivenFill:
        """The values of inputs ``first`` to ``last``."""
        return replace(self, first=first, last=last)

    def __call__(self, layer: str, call: int, activation: Tensor) -> Tensor:
        if layer not in self.values:
            return torch.full_like(activation, torch.nan)
        whole, shape = self.values[layer], list(activation.shape)
        given, places = whole[self.first : self.last], self.kept.get((layer, call))
        if places is not None:
            shape[places.axis] = places.size
        if len(whole) != self.n_inputs or given.numel() != prod(shape) or len(given) != shape[0]:
            raise InputError(
                f"source of kind 'given': activations of {layer!r} are {list(whole.shape)}, the "
                f"layer's are {[self.n_inputs, *shape[1:]]}"
            )
        given = given.to(activation).reshape(shape)
        if places is None:
            return given
        return given.narrow(places.axis, places.start, places.length)


def no_mean(layer: str) -> InputError:
    return InputError(
        f"source kind 'mean': how often {layer!r} is called depends on its inputs, so that a call "
        "has no mean over all of them"
    )


@dataclass(frozen=True)
class MeanFill:
    """Mean ablation: a patched neuron becomes its mean over the target side's inputs.

    ``means`` holds one ``[1, ...]`` tensor a layer and call.
    """

    means: dict[str, list[Tensor]]

    def __call__(self, layer: str, call: int, activation: Tensor) -> Tensor:
        if call >= len(self.means[layer]):
            raise no_mean(layer)
        mean = self.means[layer][call].to(activation.dtype)
        try:
            return mean.expand_as(activation)
        except RuntimeError:
            raise InputError(
                f"source kind 'mean': {layer!r} holds inputs and something else along one axis "
                f"({list(activation.shape)}, {list(mean.shape)} for one input); hooks, the only "
                "way for this network, cannot tell them apart"
            ) from None


def mean_fill(
    layer_values: Callable[[Args], dict[str, list[Tensor]]],
    parts: Iterable[Args],
    n_inputs: int,
    *,
    captured: bool,
) -> MeanFill:
    """Means over all inputs of what ``layer_values`` gives for each part of them, one tensor a
    layer and call: ``[inputs, ...]`` where ``captured``, else what the one input of a part gives.
    """
    sums: dict[str, list[Tensor]] = {}
    for part in parts:
        try:
            values = layer_values(part)
        except Exception as error:  # anything that a network's own code may raise
            if is_not_of_network(error):
                raise
            raise InputError(
                "source kind 'mean': the network does not run on each input alone "
                f"({one_line(error)}); give means as source of kind 'given'"
            ) from error
        for name, calls in values.items():
            # Wide: what masks outputs overflows where it is added up.
            wide = [call.to(torch.promote_types(call.dtype, torch.float64)) for call in calls]
            totals = [call.sum(0, keepdim=True) for call in wide] if captured else wide
            held = sums.get(name)
            if held is not None and len(held) != len(totals):
                raise no_mean(name)
            sums[name] = totals if held is None else [a + b for a, b in zip(held, totals)]
    return MeanFill({name: [t / n_inputs for t in totals] for name, totals in sums.items()})
