"""Rules for operations that keep a sparse value sparse.

An operation is *local* to a value if each output feature depends on features of one neuron
only. A local rule says which neuron owns each output feature; the values themselves come
from running the operation once on the tensor with every neuron patched (see
:class:`raypatch.engine.values.Sparse`). A new operation is one line in a table here, or a
function with ``@local``.

Owners are int64 tensors ``[1, *shape]``, -1 where no patched neuron has a say.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypatch.engine.capture import Node, item_between


class Owners(Protocol):
    """What a rule may ask about the inputs of a node."""

    def of(self, node: int) -> Tensor | None:
        """Owners of an input's elements; None where no patched neuron reaches it."""

    def argument(self, node: int) -> Any:
        """A stand-in to run the operation on: owners, -1 where there are none; sizes and
        index tensors as they are, for a batch of one."""


# A node, the owners of its inputs, and the shape of its output for one input. The result is
# the owners of the output, or None where the operation is not local after all.
LocalRule = Callable[[Node, Owners, "tuple[int, ...]"], Any]
LOCAL_RULES: dict[Any, LocalRule] = {}


def local(*keys: Any) -> Callable[[LocalRule], LocalRule]:
    """Register a rule for module types, functions and method names."""

    def register(rule: LocalRule) -> LocalRule:
        LOCAL_RULES.update(dict.fromkeys(keys, rule))
        return rule

    return register


# Each output element depends on the elements at the same place in the (broadcast) inputs.
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink,
    nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold, nn.LogSigmoid,
    nn.RReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
POINTWISE_NAMES = """
    relu relu6 leaky_relu elu celu selu gelu silu mish tanh sigmoid hardtanh hardsigmoid hardswish
    hardshrink softplus softshrink softsign tanhshrink threshold logsigmoid rrelu dropout
    alpha_dropout feature_dropout abs neg exp expm1 log log1p sqrt rsqrt square sin cos sinh cosh
    atan erf sign reciprocal round floor ceil clamp clamp_min clamp_max clip pow add sub mul div
    rsub true_divide maximum minimum where lerp addcmul addcdiv float double to type contiguous
    clone detach nan_to_num
""".split()
MOVEMENT_NAMES = """
    flatten unflatten reshape view permute transpose t squeeze unsqueeze movedim moveaxis swapaxes
    swapdims chunk split tensor_split unbind select narrow slice index_select expand expand_as
    repeat flip roll ravel view_as reshape_as broadcast_to pixel_shuffle pixel_unshuffle
    channel_shuffle unfold
""".split()
CHANNELWISE_NAMES = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d batch_norm interpolate prelu
""".split()
POINTWISE_OPERATORS = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    operator.pos, operator.abs,
)  # fmt: skip


def _named(names: list[str]) -> list[Any]:
    """Methods, torch functions and torch.nn.functional functions of these names."""
    found: list[Any] = list(names)
    for home in (torch, F, torch._C._nn):
        found += [getattr(home, name) for name in names if hasattr(home, name)]
    return found


@local(*POINTWISE_MODULES, *POINTWISE_OPERATORS, *_named(POINTWISE_NAMES))
def pointwise(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    result = torch.full((1, *shape), -1)
    for one in map(owners.of, node.inputs):
        if one is None:
            continue
        if one.dim() > len(shape) + 1:
            return None
        one = one.expand_as(result)
        if bool(((result >= 0) & (one >= 0) & (result != one)).any()):
            return None  # two neurons meet in one element
        result = torch.maximum(result, one)
    return result


@local(
    nn.Flatten, nn.Unflatten, operator.getitem, item_between, torch.cat, torch.concat, torch.stack,
    torch.hstack, torch.vstack,
    *_named(MOVEMENT_NAMES),
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip
def movement(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """Elements only change places: the owners move in the same way."""
    return node.call(owners.argument)


@local(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.Upsample, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    *_named(CHANNELWISE_NAMES),
)  # fmt: skip
def channelwise(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """Each output channel depends on the input channel of the same index."""
    owner = owners.of(node.inputs[0])
    if owner is None or owner.dim() < 2 or owner.shape[1] != shape[0]:
        return None
    if owner.dim() == 2 and node.name not in ("BatchNorm1d", "batch_norm", "PReLU", "prelu"):
        return None  # to others the inputs are the channels then
    channels = owner.flatten(2)[0] if owner.dim() > 2 else owner[0, :, None]
    if not bool((channels == channels[:, :1]).all()):
        return None
    view = channels[:, 0].view(1, -1, *[1] * (len(shape) - 1))
    return view.expand(1, *shape).clone()
