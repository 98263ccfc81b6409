"""How dense rows go through a linear layer: products of a good shape, into kept memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Products with fewer columns than this run faster with the rows as columns: a library's
# kernels are built for wide outputs (measured: 5 columns five times faster, 18 by a quarter).
NARROW_OUTPUT = 24


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
    """A linear layer's output ``[R, ..., outputs]`` for rows ``x`` ``[R, ..., features]``;
    ``buffer(*shape)`` gives scratch memory."""
    n_outputs, bias = weights.rows.shape[0], weights.bias
    if x.dim() == 2 and n_outputs < NARROW_OUTPUT and x.device.type == "cpu":
        out = torch.mm(weights.rows, x.t(), out=buffer(n_outputs, x.shape[0]))
        return (out if bias is None else out.add_(bias[:, None])).t()
    out = buffer(*x.shape[:-1], n_outputs)
    flat, into = x.reshape(-1, x.shape[-1]), out.view(-1, n_outputs)
    if bias is None:
        torch.mm(flat, weights.columns, out=into)
    else:
        torch.addmm(bias, flat, weights.columns, out=into)
    return out
