"""Rules for operations that keep a sparse value sparse.

An operation is *local* to a value if each output feature depends on features of one neuron
only. A local rule says which neuron owns each output feature; the values themselves come
from running the operation once on the tensor with every neuron patched (see
:class:`raypatch.engine.values.Sparse`). A new operation is one line in a table here, or a
function with ``@local``.

Owners are int64 tensors of the form of a value for one input, -1 where no patched neuron has a
say. Inputs lie along axis 0, which may hold several entries of each.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from raypatch.engine.graph import Node, Ref, is_ref, item_between


class Owners(Protocol):
    """What a rule may ask about the inputs of a node."""

    def of(self, node: int) -> Tensor | None:
        """Owners of an input's elements; None where no patched neuron reaches it."""

    def varies(self, node: int) -> bool:
        """Whether an input is a tensor that may differ between the network's inputs."""

    def argument(self, node: int) -> Any:
        """A stand-in to run the operation on: owners, -1 where there are none; sizes and
        index tensors as they are, for a batch of one."""


# A node, the owners of its inputs, and the shape of its output for one input, of several outputs
# the first one's. The result is the owners of the output, or None where the operation is not
# local after all.
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
    hardshrink softplus softshrink softsign tanhshrink threshold logsigmoid log_sigmoid rrelu
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout abs neg exp exp2 expm1 log
    log1p logit sqrt rsqrt square sin cos sinh cosh atan atan2 erf sign reciprocal round floor
    ceil frac clamp clamp_min clamp_max clip pow add sub mul div rsub true_divide floor_divide
    fmod remainder maximum minimum hypot logaddexp copysign heaviside where lerp addcmul addcdiv
    masked_fill nan_to_num gt ge lt le eq ne logical_not logical_and logical_or logical_xor
    bitwise_not bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ float double half bool
    int long to _to_copy type contiguous clone detach
""".split()
MOVEMENT_NAMES = """
    flatten unflatten reshape view permute transpose t squeeze unsqueeze movedim moveaxis swapaxes
    swapdims chunk split tensor_split unbind select narrow slice index_select expand expand_as
    repeat repeat_interleave tile flip roll ravel view_as reshape_as broadcast_to pixel_shuffle
    pixel_unshuffle channel_shuffle unfold cat concat concatenate stack hstack vstack dstack index
    _unsafe_view
""".split()
CHANNELWISE_NAMES = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d _max_pool1d _max_pool2d _max_pool3d
    _adaptive_max_pool1d _adaptive_max_pool2d _adaptive_max_pool3d batch_norm interpolate
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d prelu
    _adaptive_avg_pool2d _adaptive_avg_pool3d
""".split()
# The same as exported programs have them, which give several results.
CHANNELWISE_OF_SEVERAL = """
    _native_batch_norm_legit_no_training max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool2d adaptive_max_pool3d
""".split()
POINTWISE_OPERATORS = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    operator.pos, operator.abs, operator.gt, operator.ge, operator.lt, operator.le, operator.eq,
    operator.ne, operator.invert, operator.and_, operator.or_, operator.xor, operator.mod,
    operator.floordiv,
)  # fmt: skip
PADDING_MODULES = {
    f"{kind}Pad{n}d": mode
    for kind, mode in {
        "Zero": "constant", "Constant": "constant", "Circular": "circular",
        "Reflection": "reflect", "Replication": "replicate",
    }.items()
    for n in (1, 2, 3)
}  # fmt: skip
# Channelwise also where there are no places.
OF_TWO_AXES = (
    "BatchNorm1d", "batch_norm", "_native_batch_norm_legit_no_training", "PReLU", "prelu",
)  # fmt: skip
# What makes one number of those along some axes, or changes them by each other.
ALONG_AXES_NAMES = """
    mean sum prod amax amin max min var std logsumexp softmax log_softmax _softmax _log_softmax
    cumsum cumprod
""".split()


def _named(names: list[str]) -> list[Any]:
    """Methods, torch functions and torch.nn.functional functions of these names."""
    found: list[Any] = list(names)
    for home in (torch, F, torch._C._nn):
        found += [getattr(home, name) for name in names if hasattr(home, name)]
    return found


@local(*POINTWISE_MODULES, *POINTWISE_OPERATORS, *_named(POINTWISE_NAMES))
def pointwise(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    result = torch.full(shape, -1)
    for one in map(owners.of, node.inputs):
        if one is None:
            continue
        if one.dim() > len(shape):
            return None
        one = one.expand_as(result)
        if bool(((result >= 0) & (one >= 0) & (result != one)).any()):
            return None  # two neurons meet in one element
        result = torch.maximum(result, one)
    return result


@local(*_named(["zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"]))
def same_for_every_patch(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """Of an argument only its form counts."""
    return torch.full(shape, -1)


@local(getattr)
def attribute(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """Another form of a value, or one of two results by its name."""
    held, name = owners.of(node.inputs[0]), node.args[1]
    if isinstance(held, tuple):
        return held[("values", "indices").index(name)]
    return getattr(held, name)


@local(
    nn.Flatten, nn.Unflatten, operator.getitem, item_between, *_named(MOVEMENT_NAMES),
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip
def movement(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """Elements only change places: the owners move in the same way."""
    moved = {leaf.node for leaf in tree_flatten(node.args[:1], is_leaf=is_ref)[0] if is_ref(leaf)}
    others = [i for i in node.inputs if i not in moved and owners.varies(i)]
    if not others or node.name.endswith("_as"):
        return node.call(owners.argument)
    # Where to differs from input to input: a patch must have no say in it, and along the one axis
    # where neurons differ, whichever place such an index says must be the same.
    if any(owners.of(i) is not None for i in others):
        return None
    places = {i: _places(owner) for i in moved if isinstance(owner := owners.of(i), Tensor)}

    def with_index(place: int, held: dict[int, Any]) -> Any:
        index = {i: torch.full_like(owners.argument(i), place) for i in others}
        given = {**index, **held}
        return node.call(lambda i: given[i] if i in given else owners.argument(i))

    first, last = with_index(0, places), with_index(-1, places)
    same = first.shape == last.shape and bool((first == last).all())
    return with_index(0, {}) if same else None


def _places(owner: Tensor) -> Tensor:
    """Numbers of the places along the one axis where owners differ; ValueError for several."""
    varying = [i for i in range(owner.dim()) if bool((owner != owner.narrow(i, 0, 1)).any())]
    if len(varying) > 1:
        raise ValueError("neurons lie along several axes")
    view = [1] * owner.dim()
    for axis in varying:
        view[axis] = -1
    size = owner.shape[varying[0]] if varying else 1
    return torch.arange(size).view(view).expand(owner.shape)


@local(*_named(["gather", "take_along_dim"]))
def gathered(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """Elements of the same place along all axes but one."""
    owner, axis, index = owners.of(node.inputs[0]), node.option(1, "dim"), node.option(2, "index")
    if node.name == "take_along_dim":
        axis, index = node.option(2, "dim"), node.option(1, "indices")
    is_plain = isinstance(index, Ref) and type(axis) is int and owners.of(index.node) is None
    if owner is None or not is_plain or owner.dim() != len(shape):
        return None
    shared = _shared(owner, [axis])
    if shared is None:
        return None
    for other in range(len(shape)):
        shared = shared if other == axis % len(shape) else shared.narrow(other, 0, shape[other])
    return shared.expand(shape)


@local(
    *(getattr(nn.modules.padding, name) for name in PADDING_MODULES),
    *_named(["pad", "constant_pad_nd"]),
)
def padding(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    owner = owners.of(node.inputs[0])
    if node.op == "module":
        sizes, mode = node.target.padding, PADDING_MODULES[node.name]
    else:
        sizes, mode = node.option(1, "pad"), "constant"
        if node.name == "pad":
            mode = node.option(2, "mode") or mode
    if owner is None or len(node.inputs) > 1:
        return None
    fill = -1 if mode == "constant" else None
    return F.pad(owner.double(), sizes, mode, fill).long()


@local(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.LPPool3d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
    *_named(CHANNELWISE_NAMES),
)  # fmt: skip
def channelwise(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """Each output channel depends on the input channel of the same index."""
    owner, *others = map(owners.of, node.inputs)
    if any(other is not None for other in others):
        return None
    if owner is None or owner.dim() < 2 or owner.shape[1] != shape[1]:
        return None
    if owner.dim() == 2 and node.name not in OF_TWO_AXES:
        return None  # to others the inputs are the channels then
    return _by_channel(owner, shape)


@local(*CHANNELWISE_OF_SEVERAL)
def channelwise_of_several(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    found = channelwise(node, owners, shape)
    if found is None or node.name.startswith("_native_batch_norm"):
        return None if found is None else (found, *[torch.empty(0, dtype=torch.int64)] * 2)
    return found, found  # the largest and their places


@local(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def depthwise_convolution(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """With as many groups as channels an output channel depends on one of them."""
    owner = owners.of(node.inputs[0])
    is_depthwise = node.target.groups == node.target.in_channels
    if owner is None or not is_depthwise or owner.dim() != len(shape):
        return None
    return _by_channel(owner, shape)


@local(nn.Softmax, nn.Softmin, nn.LogSoftmax, *_named(ALONG_AXES_NAMES))
def along_axes(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
    """The elements along some axes have a say in one."""
    owner = owners.of(node.inputs[0])
    axes = node.target.dim if node.op == "module" else node.option(1, "dim")
    axes = node.kwargs.get("axis") if axes is None else axes
    axes = [axes] if type(axes) is int else axes
    if owner is None or len(node.inputs) > 1 or not isinstance(axes, (tuple, list)):
        return None
    shared = _shared(owner, axes)
    if shared is None:
        return None
    if shared.numel() == math.prod(shape):
        shared = shared.view(shape)
    shared = shared.expand(shape)
    return (shared, shared) if node.name in ("max", "min") else shared  # values and their places


def _product(*axes: int | None) -> LocalRule:
    """Of one value with what no patch changes. For each argument: the axis whose elements have a
    say in one; None where that is all of them."""

    def rule(node: Node, owners: Owners, shape: tuple[int, ...]) -> Any:
        names = ("query", "key", "value")
        arguments = [node.option(place, names[place]) for place in range(len(axes))]
        patched = [Ref(i) for i in node.inputs if owners.of(i) is not None]
        if len(patched) != 1 or patched[0] not in arguments:
            return None
        axis, owner = axes[arguments.index(patched[0])], owners.of(patched[0].node)
        if axis is None or owner is None or owner.dim() != len(shape):
            return None
        shared = _shared(owner, [axis])
        return None if shared is None else shared.expand(shape)

    return rule


local(nn.Linear, *_named(["linear"]))(_product(-1))
local(operator.matmul, *_named(["matmul", "bmm"]))(_product(-1, -2))
local(*_named(["scaled_dot_product_attention"]))(_product(None, None, -2))


def _shared(owner: Tensor, axes: Sequence[int]) -> Tensor | None:
    """The one owner of what lies along some axes, which become 1; None where there are several or
    one axis is the inputs'."""
    places = {axis % owner.dim() for axis in axes}
    if not places or 0 in places:
        return None
    shared = owner.amax(tuple(places), keepdim=True)
    return None if bool(((owner >= 0) & (owner != shared)).any()) else shared


def _by_channel(owner: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Owners of ``shape``, whose channels depend on those of ``owner`` in their order."""
    whole = _shared(owner, range(2, owner.dim())) if owner.dim() > 2 else owner
    if whole is None:
        return None
    channels = whole.flatten(1).repeat_interleave(shape[1] // owner.shape[1], 1)
    return channels.view(len(owner), -1, *[1] * (len(shape) - 2)).expand(shape)
