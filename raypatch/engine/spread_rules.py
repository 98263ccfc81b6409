"""Rules for operations that turn a sparse value into dense rows by a low-rank update.

A linear operation of ``base + difference`` is its base output plus the operation of the
difference, and the difference lives on the patched neurons' features only. A rule gives
dense output ``[E, N * A, ...]`` for all rows of a batch, or None where running the operation
whole is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypatch.engine.graph import Node
from raypatch.engine.plan import Selection
from raypatch.engine.updates import rank_one
from raypatch.engine.values import Batch, Sparse

# Past this share of a layer's inputs patched, one full product beats many small ones.
LOW_RANK_SHARE = 0.25


class Context(Protocol):
    """What a rule may ask of the engine."""

    def base(self, node: int) -> Any:
        """The node's value in the target's unpatched run."""

    def buffer(self, node: Node, *shape: int) -> Tensor:
        """Scratch memory for the node's output, kept between batches; uninitialised."""

    def weight_columns(self, node: Node) -> Tensor:
        """The node's weight with input features first, contiguous; computed once."""

    def once(self, node: Node, make: Callable[[], Any]) -> Any:
        """What follows from a node alone and no other rule asks for, made once."""


SpreadRule = Callable[[Context, Node, Sparse, Selection, Batch], "Tensor | None"]
SPREAD_RULES: dict[Any, SpreadRule] = {}


def spreads(*keys: Any) -> Callable[[SpreadRule], SpreadRule]:
    """Register a rule for module types."""

    def register(rule: SpreadRule) -> SpreadRule:
        SPREAD_RULES.update(dict.fromkeys(keys, rule))
        return rule

    return register


@spreads(nn.Linear)
def linear(
    context: Context, node: Node, sparse: Sparse, index: Selection, batch: Batch
) -> Tensor | None:
    """Base output plus patched differences times the patched columns of the weight."""
    base = context.base(node.index)
    n_outputs = base.shape[-1]
    if sparse.of.owner.dim() > 1:
        return _linear_on_last_axis(context, node, sparse, index, batch)
    rank = index.shape[1] * sparse.of.positions.shape[1]
    if rank > max(1, LOW_RANK_SHARE * sparse.of.owner.numel()):
        return None
    n_experiments = batch.n_experiments
    columns = context.weight_columns(node)
    out = context.buffer(node, n_experiments, *base.shape)
    if rank == 1 and sparse.of.is_plain:
        return rank_one(base, index.take(sparse.delta), index.take(columns)[:, None], out)
    delta = batch.gather(sparse.delta, index)
    if sparse.of.is_plain:
        columns = index.take(columns.view(sparse.of.neurons, -1, n_outputs))
    else:
        features = index.take(sparse.of.positions).clamp(min=0).flatten()
        columns = columns.index_select(0, features)
    columns = columns.view(n_experiments, rank, n_outputs)
    if rank == 1:
        return rank_one(base, delta, columns, out)
    return torch.baddbmm(base.expand_as(out), delta, columns, out=out)


def _linear_on_last_axis(
    context: Context, node: Node, sparse: Sparse, index: Selection, batch: Batch
) -> Tensor | None:
    """A linear layer at every place of a sequence; places count as further inputs."""
    if sparse.of.channel_axis != sparse.base.dim() - 1:
        return None
    k, size = index.shape[1], sparse.of.neurons
    if k > max(1, LOW_RANK_SHARE * size):
        return None
    base = context.base(node.index)
    delta = batch.gather(sparse.delta, index)  # [E, N * A, k * places]
    delta = delta.view(*delta.shape[:2], k, -1).transpose(2, 3)
    delta = delta.reshape(batch.n_experiments, -1, k)
    columns = index.take_each(context.weight_columns(node))
    out = context.buffer(node, batch.n_experiments, *base.shape)
    flat = out.view(batch.n_experiments, -1, base.shape[-1])
    places = base.reshape(-1, base.shape[-1])
    if k == 1:
        rank_one(places, delta, columns, flat)
    else:
        torch.baddbmm(places.expand_as(flat), delta, columns, out=flat)
    return out


@spreads(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(
    context: Context, node: Node, sparse: Sparse, index: Selection, batch: Batch
) -> Tensor | None:
    """Base output plus the convolution of the patched channels' differences alone.

    Each experiment is a group of one grouped convolution: its k channels, its own slice of
    the weight.
    """
    layer = node.target
    if sparse.of.channel_axis != 1 or layer.groups != 1 or layer.padding_mode != "zeros":
        return None
    n_experiments, k = index.shape
    if k > max(1, LOW_RANK_SHARE * sparse.of.neurons):
        return None
    base = context.base(node.index)
    n_inputs, n_outputs = base.shape[:2]
    spatial = sparse.of.owner.shape[1:]
    delta = index.take(sparse.delta)
    delta = delta.view(n_experiments, k, n_inputs, *spatial)
    out = context.buffer(node, n_experiments, *base.shape)
    if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
        # Patches of the map against the weight slice: products of a good shape.
        maps = delta.transpose(1, 2).reshape(n_experiments * n_inputs, k, *spatial)
        patches = _patches(maps, layer, base.shape[2:])
        rank, places = patches.shape[1:]
        columns = index.take(context.weight_columns(node).flatten(2))
        columns = columns.view(n_experiments, k, n_outputs, -1).transpose(1, 2)
        weight = columns.reshape(n_experiments, 1, n_outputs, rank)
        weight = weight.expand(-1, n_inputs, -1, -1).reshape(-1, n_outputs, rank)
        flat = out.view(n_experiments * n_inputs, n_outputs, places)
        torch.bmm(weight, patches, out=flat)
        return out.add_(base)
    weight = index.take_each(context.weight_columns(node))
    weight = weight.transpose(1, 2).flatten(0, 1)
    stacked = delta.transpose(0, 2).transpose(1, 2).flatten(1, 2)  # [N, E * k, *spatial]
    convolved = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    convolved = F.conv3d if isinstance(layer, nn.Conv3d) else convolved
    update = convolved(
        stacked, weight, None, layer.stride, layer.padding, layer.dilation, n_experiments
    )
    update = update.view(n_inputs, n_experiments, n_outputs, *base.shape[2:]).transpose(0, 1)
    return torch.add(update, base, out=out)


def _patches(maps: Tensor, layer: Any, places: tuple[int, ...]) -> Tensor:
    """``[B, k, H, W]`` to what the kernel sees at each place, ``[B, k * kernel, places]``."""
    (pad_h, pad_w), (step_h, step_w) = layer.padding, layer.stride
    (gap_h, gap_w), kernel = layer.dilation, layer.kernel_size
    padded = F.pad(maps, (pad_w, pad_w, pad_h, pad_h)) if pad_h or pad_w else maps
    width = padded.shape[3]
    seen = padded.as_strided(
        (*padded.shape[:2], *kernel, *places),
        (*padded.stride()[:2], gap_h * width, gap_w, step_h * width, step_w),
    )
    return seen.reshape(len(maps), -1, places[0] * places[1])


@spreads(torch.mean, torch.sum, "mean", "sum")
def reduction(
    context: Context, node: Node, sparse: Sparse, index: Selection, batch: Batch
) -> Tensor | None:
    """Base output plus each patched feature's share of the mean or sum it goes into."""
    base = context.base(node.index)
    if base.dtype != sparse.base.dtype or not base.is_floating_point():
        return None  # counts
    shape = sparse.of.owner.shape
    # Where each input feature goes: the reduction's own gradient tells, place by place.
    target = context.once(node, lambda: reduction_places(node, shape, base))
    if target is None or base.dim() < 2:
        return None
    share = base[0].numel() / sparse.of.owner.numel() if node.name == "mean" else 1.0
    delta = batch.gather(sparse.delta, index) * share
    if delta.shape[2] > 1 and delta.device.type != "cpu":
        return None  # a GPU would add in any order, and the last bit with it
    places = index.take(target[sparse.of.positions.clamp(min=0)])
    places = places.view(batch.n_experiments, 1, -1).expand_as(delta)
    out = repeated_base(context, node, batch, base)
    out.flatten(2).scatter_add_(2, places, delta)
    return out


def repeated_base(context: Context, node: Node, batch: Batch, base: Tensor) -> Tensor:
    """The node's base output once for every experiment, in scratch memory."""
    return context.buffer(node, batch.n_experiments, *base.shape).copy_(
        base.expand(batch.n_experiments, *base.shape)
    )


def reduction_places(node: Node, shape: torch.Size, base: Tensor) -> Tensor | None:
    """``[features]``: the flat feature of the output ``base`` that each flat input feature is
    reduced into; None where inputs are mixed."""
    probe = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        reduced = node.call(lambda _: probe)
        if reduced.shape[0] != 1 or reduced.shape[1:] != base.shape[1:]:
            return None
        numbers = torch.arange(1, reduced.numel() + 1, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((reduced.flatten() * numbers).sum(), probe)
    share = gradient.flatten() / gradient.flatten().min() if len(numbers) else gradient
    return (share.round().long() - 1).to(base.device)
