"""Torch's operators that a stranger's program may use: those that networks are made of.

Each computes on tensors and numbers and checks what it is given. What is not named here, such
as reading and writing files, tensors over foreign memory or the state of random numbers, is
refused. A trailing underscore, for computing in place, is as good as none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ELEMENTWISE = """
abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not
bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip cos cosh div divide eq elu erf erfc
exp exp2 expm1 float_power floor floor_divide fmax fmin fmod frac ge gelu glu gt hardshrink
hardsigmoid hardswish hardtanh isclose isfinite isinf isnan le leaky_relu lerp log log10 log1p log2
log_sigmoid log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lt
masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative positive pow prelu
reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinh softmax
_softmax _log_softmax softplus softshrink sqrt square sub subtract tan tanh threshold true_divide
trunc where xlogy
"""
_PRODUCTS = """
addmm addmv baddbmm bilinear bmm cdist conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d convolution cosine_similarity dot einsum inner linear matmul mm mv outer
pairwise_distance scaled_dot_product_attention tensordot
"""
_NORMS_AND_POOLS = """
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm dropout feature_alpha_dropout
feature_dropout group_norm instance_norm layer_norm
linalg_vector_norm max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
native_group_norm native_layer_norm norm pixel_shuffle pixel_unshuffle rms_norm upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d
"""
_SHAPES = """
_to_copy alias broadcast_to cat channel_shuffle chunk clone concat concatenate constant_pad_nd
contiguous copy detach diagonal expand expand_as flatten flip gather hstack index index_put
index_select lift_fresh_copy movedim narrow one_hot pad permute ravel reflection_pad1d
reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
replication_pad3d reshape reshape_as roll scatter scatter_add select slice split split_with_sizes
squeeze stack swapaxes swapdims sym_numel sym_size t take_along_dim tile to transpose tril triu
type_as unbind unflatten unsqueeze view view_as vstack
"""
_REDUCTIONS = """
all amax amin any argmax argmin argsort count_nonzero cumprod cumsum max mean median min prod sort
std std_mean sum topk var var_mean
"""
_MADE = """
arange embedding eye full full_like linspace new_full new_ones new_zeros ones ones_like
scalar_tensor zeros zeros_like
"""
_RECURRENT = "gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell"
_CHECKS = "_assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size"

OPERATORS = frozenset(
    " ".join(
        [
            _ELEMENTWISE,
            _PRODUCTS,
            _NORMS_AND_POOLS,
            _SHAPES,
            _REDUCTIONS,
            _MADE,
            _RECURRENT,
            _CHECKS,
        ]
    ).split()
)


def checked_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``scaled_dot_product_attention``, whose CPU kernel believes that sizes agree."""
    if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"attention over keys {list(key.shape)} and values {list(value.shape)} with queries "
            f"{list(query.shape)}"
        )
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def only_computes(name: str) -> bool:
    """Whether ``aten::name`` is an operator that networks are made of."""
    return name.removesuffix("_") in OPERATORS
