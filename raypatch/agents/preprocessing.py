"""From the numbers of an observation to what the first layer sees, as part of the network.

An observation is one array ``[inputs, *shape]``; one with several keys is packed into a single
row of numbers, key after key, and taken apart again here, so that everything else handles
one tensor. Scaling and one-hot codes are those of Stable-Baselines3's ``preprocess_obs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypatch.agents.spaces import Space


class Preprocess(nn.Module):
    """One space's numbers as its features: images scaled to 0..1, choices as one-hot codes."""

    def __init__(self, space: Space, *, scale_images: bool = True) -> None:
        super().__init__()
        self.counts = space.counts
        self.scale = space.image and scale_images

    def forward(self, obs: Tensor) -> Tensor:
        if self.scale:
            return obs / 255.0
        if self.counts:
            flat = obs.reshape(obs.shape[0], len(self.counts)).long()
            codes = [F.one_hot(flat[:, i], n) for i, n in enumerate(self.counts)]
            return torch.cat(codes, 1).to(obs.dtype)
        return obs


class Unpack(nn.Module):
    """A packed row ``[inputs, size]`` as observations by key, in the keys' order."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = dict(shapes)

    def forward(self, packed: Tensor) -> dict[str, Tensor]:
        obs, start = {}, 0
        for key, shape in self.shapes.items():
            stop = start + math.prod(shape)
            obs[key] = packed[:, start:stop].reshape(-1, *shape)
            start = stop
        return obs


class PreprocessDict(nn.Module):
    """:class:`Unpack`, then :class:`Preprocess` key by key."""

    def __init__(self, space: Space, *, scale_images: bool = True) -> None:
        super().__init__()
        self.unpack = Unpack({key: part.shape for key, part in space.parts.items()})
        # A key may be any text, which the name of a module may not.
        self.keys = tuple(space.parts)
        self.parts = nn.ModuleList(
            Preprocess(part, scale_images=scale_images) for part in space.parts.values()
        )

    def forward(self, packed: Tensor) -> dict[str, Tensor]:
        obs = self.unpack(packed)
        return {key: part(obs[key]) for key, part in zip(self.keys, self.parts)}


def preprocessing(space: Space, *, scale_images: bool = True) -> nn.Module:
    """The module that turns an observation of ``space`` into features."""
    kind = PreprocessDict if space.parts else Preprocess
    return kind(space, scale_images=scale_images)


class Normalise(nn.Module):
    """Running statistics of a ``VecNormalize`` wrapper: ``clip((x - mean) / sqrt(var + eps))``."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, var: Tensor, epsilon: float, clip: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", (var.double() + epsilon).rsqrt().float())
        self.clip = clip

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) * self.scale).clamp(-self.clip, self.clip)
