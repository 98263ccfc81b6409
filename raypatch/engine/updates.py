"""Base outputs plus what one patched feature adds to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Elements from which a kernel of its own saves more than its launch costs: torch's computes where
# every element comes from, and writes at a third of the memory's speed.
LARGE_UPDATE = 1 << 22


def rank_one(base: Tensor, delta: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Into ``out`` ``[E, N, H]``: ``base`` ``[N, H]`` plus ``delta`` ``[E, N, 1]`` times
    ``columns`` ``[E, 1, H]``."""
    if out.is_cuda and out.numel() >= LARGE_UPDATE:
        kernel = _kernel(out.dtype, out.device)
        if kernel is not None and all(x.is_contiguous() for x in (base, delta, columns, out)):
            kernel(base, delta, columns, out)
            return out
    return torch.addcmul(base, delta, columns, out=out)


@cache
def _kernel(
    dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
    """The one of :mod:`raypatch.engine.gpu_kernels`; None where it cannot be had."""
    if dtype not in (torch.float32, torch.float64):
        return None
    try:
        from raypatch.engine import gpu_kernels

        one = torch.ones(1, 1, 1, dtype=dtype, device=device)
        gpu_kernels.rank_one(one[0], one, one, torch.empty_like(one))
    except Exception:  # no Triton, no compiler for it, or a GPU that it knows nothing of
        return None
    return gpu_kernels.rank_one
