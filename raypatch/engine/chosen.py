"""What is done with inputs that a forward chooses by values, ``h[h > 8]`` or ``h[rows]``.

Where several of them become one number or change places, inputs meet; for which ones that is, a
trial on a few does not show. So all is a meeting but what is known to keep each by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raypatch.engine.layers import tensors_in

ELEMENTWISE = set(
    """
    abs acos add addcdiv addcmul and asin atan atan2 batch_norm bool ceil celu clamp clamp_max
    clamp_min clip clone contiguous copysign cos cosh cpu detach div double dropout elu embedding
    empty_like eq erf exp exp2 expm1 fill float floor floor_divide floordiv fmod full_like ge gelu
    gt hardsigmoid hardswish hardtanh iadd imul int invert isfinite isinf isnan isub itruediv
    layer_norm le leaky_relu lerp log log10 log1p log2 logical_and logical_not logical_or
    logsigmoid long lt masked_fill maximum minimum mish mul nan_to_num ne neg new_empty new_full
    new_ones new_zeros one_hot ones_like or pow prelu radd rdiv reciprocal relu relu6 remainder
    rmul round rpow rsqrt rsub rtruediv selu sigmoid sign silu sin sinh softplus softsign sqrt
    square sub tan tanh tanhshrink threshold to true_divide truediv trunc type type_as where
    xlogy xor zero zeros_like
    """.split()
)
# Over which axis these go where none is named; None is all.
ACROSS: dict[str, int | None] = {
    **dict.fromkeys(
        """
        all amax amin any argmax argmin cummax cummin cumprod cumsum log_softmax logcumsumexp
        logsumexp max mean median min nanmean nansum norm prod softmax softmin std std_mean sum
        var var_mean
        """.split()
    ),
    **dict.fromkeys(["argsort", "sort", "topk"], -1),
    **dict.fromkeys(["cat", "chunk", "concat", "concatenate", "split", "stack", "unbind"], 0),
    "normalize": 1,
}
AXIS_LAST = {"chunk", "norm", "normalize", "split", "topk"}  # after another argument
BY_WEIGHTS = {"addmm": 1, "conv1d": 0, "conv2d": 0, "conv3d": 0, "linear": 0, "matmul": 0, "mm": 0}
RESHAPING = {"expand", "flatten", "repeat", "reshape", "squeeze", "unflatten", "view", "view_as"}
MOVING = {"movedim", "permute", "swapaxes", "transpose"}
WRITING = set("index_add index_copy index_fill index_put scatter scatter_add setitem".split())
TAKING = {"gather", "getitem", "index_select", "take_along_dim"}


def let_meet(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    is_chosen: Callable[[Any], bool],
) -> bool:
    """Whether a function of torch's lets chosen inputs meet; they lie along the first axis of what
    ``is_chosen``."""
    args = args or tuple(kwargs.values())
    name = str(getattr(func, "__name__", "")).strip("_")
    if not tensors_in(result) and name != "setitem":
        return False  # a size, or a number that Python reads
    first = args[0]
    if name in ELEMENTWISE:
        return False
    if name in WRITING:
        return is_chosen(first)
    if name in TAKING:
        return is_chosen(first) and (name != "getitem" or not _keeps_first(args[1]))
    if name in BY_WEIGHTS:
        return any(map(is_chosen, args[BY_WEIGHTS[name] + 1 :]))
    if name in RESHAPING:
        return result.shape[:1] != first.shape[:1]
    if name == "unsqueeze":
        return kwargs.get("dim", args[-1]) in (0, -first.dim() - 1)
    if name in MOVING:
        moved = [axis for given in args[1:] for axis in (given if _is_several(given) else [given])]
        return moved[:1] != [0] if name == "permute" else _has_first(moved, first)
    if name not in ACROSS:
        return True
    place = 2 if name in AXIS_LAST else 1
    usual = args[place] if len(args) > place else ACROSS[name]
    axes: Any = kwargs.get("dim", kwargs.get("axis", usual))
    if isinstance(axes, Tensor) or isinstance(kwargs.get("other"), Tensor):
        return False  # element by element
    of = first if isinstance(first, Tensor) else first[0]
    return axes is None or _has_first(axes if _is_several(axes) else [axes], of)


def _is_several(axes: Any) -> bool:
    return isinstance(axes, (tuple, list))


def _has_first(axes: Any, of: Tensor) -> bool:
    return any(axis is None or axis in (0, -of.dim()) for axis in axes)


def _keeps_first(index: Any) -> bool:
    """Whether ``value[index]`` has all along the first axis, or by truths or places of its own."""
    index = index[0] if isinstance(index, tuple) and index else index
    if isinstance(index, Tensor):
        return index.dtype is torch.bool
    return index is Ellipsis or index == slice(None)
