"""float32 that is float32: no TF32 and no bfloat16 inside of products, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_MKLDNN: list[Any] = [
    part
    for name in ("matmul", "conv", "rnn")
    if hasattr(part := getattr(torch.backends.mkldnn, name, None), "fp32_precision")
]


@contextmanager
def exact_math() -> Iterator[None]:
    """Products of float32 in float32, whatever the user has allowed; restored afterwards.

    Tensors are plain ones, also within the user's ``torch.inference_mode``, as they may be used
    after it.
    """
    held = _switches()
    for part, name, _, exact in held:
        setattr(part, name, exact)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for part, name, before, _ in held:
            setattr(part, name, before)


def _switches() -> list[tuple[Any, str, Any, Any]]:
    """Every switch that allows less: its owner, its name, its value now, its exact value."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    found: list[tuple[Any, str, Any, Any]] = []
    try:
        for part in (cuda.matmul, cudnn):
            found.append((part, "allow_tf32", part.allow_tf32, False))
    except RuntimeError:
        # The user has set newer switches; torch refuses the older ones then, but only then.
        parts = [cuda.matmul, *(getattr(cudnn, name) for name in ("conv", "rnn"))]
        found = [(part, "fp32_precision", part.fp32_precision, "ieee") for part in parts]
    held = [(part, part.fp32_precision) for part in _MKLDNN]
    return found + [(part, "fp32_precision", now, "ieee") for part, now in held if now != "none"]
