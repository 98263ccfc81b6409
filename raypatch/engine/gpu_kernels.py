"""Kernels for GPUs in Triton's language, compiled where they are first used.

Triton comes with torch's builds for GPUs and wants a C compiler; :mod:`raypatch.engine.updates`
does without where either is missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of the output that one program computes.
TILE = 4096
WIDEST = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _rank_one(  # type: ignore[no-untyped-def]
    base, delta, columns, out, n_rows, n_inputs, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    experiment, number = (rows // n_inputs)[:, None], (rows % n_inputs)[:, None]
    inside = (rows < n_rows)[:, None] & (at < width)[None, :]
    difference = tl.load(delta + rows, mask=rows < n_rows, other=0.0)[:, None]
    column = tl.load(columns + experiment * width + at[None, :], mask=inside, other=0.0)
    unpatched = tl.load(base + number * width + at[None, :], mask=inside, other=0.0)
    tl.store(out + rows[:, None] * width + at[None, :], unpatched + difference * column, inside)


def rank_one(base: Tensor, delta: Tensor, columns: Tensor, out: Tensor) -> None:
    """Into ``out`` ``[E, N, H]``: ``base`` ``[N, H]`` plus ``delta`` ``[E, N, 1]`` times
    ``columns`` ``[E, 1, H]``; all contiguous, float32 or float64."""
    n_experiments, n_inputs, width = out.shape
    block = min(WIDEST, triton.next_power_of_2(width))
    rows, n_rows = TILE // block, n_experiments * n_inputs
    grid = (triton.cdiv(n_rows, rows), triton.cdiv(width, block))
    with torch.cuda.device(out.device):
        _rank_one[grid](base, delta, columns, out, n_rows, n_inputs, width, rows, block)
