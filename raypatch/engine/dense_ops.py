"""How dense rows go through an operation: in place and well shaped where that is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Products with fewer columns than this run faster with the rows as columns: a library's
# kernels are built for wide outputs (measured: 5 columns five times faster, 18 by a quarter).
NARROW_OUTPUT = 24


def _tanh(x: Tensor, _: nn.Module) -> Tensor:
    """In place; NumPy's vector kernel is several times faster than torch's on a CPU."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        array = x.numpy()
        np.tanh(array, out=array)
        return x
    return x.tanh_()


# Overwrite their argument; only used on rows that nobody else reads.
IN_PLACE: dict[type[nn.Module], Callable[[Tensor, Any], Tensor]] = {
    nn.ReLU: lambda x, _: x.relu_(),
    nn.Tanh: _tanh,
    nn.Sigmoid: lambda x, _: x.sigmoid_(),
    nn.ReLU6: lambda x, _: x.clamp_(0.0, 6.0),
    nn.LeakyReLU: lambda x, module: F.leaky_relu_(x, module.negative_slope),
    nn.ELU: lambda x, module: F.elu_(x, module.alpha),
    nn.SiLU: lambda x, _: F.silu(x, inplace=True),
    nn.Identity: lambda x, _: x,
    nn.Dropout: lambda x, _: x,
}


@dataclass(frozen=True)
class Weights:
    """A linear or convolution layer's weights as products want them.

    ``rows`` is the weight as the layer has it, ``columns`` the same with input features first,
    contiguous.
    """

    rows: Tensor
    columns: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Any) -> Weights:
        rows, bias = layer.weight.detach(), layer.bias
        return cls(rows, rows.transpose(0, 1).contiguous(), None if bias is None else bias.detach())


def linear(x: Tensor, weights: Weights, buffer: Callable[..., Tensor]) -> Tensor:
    """A linear layer's output ``[R, outputs]`` for rows ``x`` ``[R, features]``;
    ``buffer(*shape)`` gives scratch memory."""
    n_rows, n_outputs, bias = x.shape[0], weights.rows.shape[0], weights.bias
    if n_outputs < NARROW_OUTPUT and x.device.type == "cpu":
        out = torch.mm(weights.rows, x.t(), out=buffer(n_outputs, n_rows))
        return (out if bias is None else out.add_(bias[:, None])).t()
    out = buffer(n_rows, n_outputs)
    if bias is None:
        return torch.mm(x, weights.columns, out=out)
    return torch.addmm(bias, x, weights.columns, out=out)
