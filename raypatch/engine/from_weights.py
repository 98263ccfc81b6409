"""Layers that hold given tensors as they are: nothing is drawn, copied or trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by a weight's axes


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of a weight ``[outputs, inputs]``."""
    n_outputs, n_inputs = weight.shape
    return _filled(nn.Linear(n_inputs, n_outputs, bias is not None, device="meta"), weight, bias)


def convolution_of(weight: Tensor, bias: Tensor | None, groups: int = 1, **options: Any) -> Any:
    """A convolution of a weight ``[outputs, inputs / groups, *kernel]``; ``options`` are stride,
    padding and dilation as torch's modules take them."""
    n_outputs, of_group, *kernel = weight.shape
    layer = CONVOLUTIONS[weight.dim()](
        of_group * groups, n_outputs, tuple(kernel), groups=groups, bias=bias is not None,
        device="meta", **options,
    )  # fmt: skip
    return _filled(layer, weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer
