"""float32 that is float32: no TF32 and no bfloat16 inside of products, on any device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

_MKLDNN: list[Any] = [
    part
    for name in ("matmul", "conv", "rnn")
    if hasattr(part := getattr(torch.backends.mkldnn, name, None), "fp32_precision")
]


_lock = threading.Lock()
_inside = 0
_undo: list[Callable[[], None]] = []


@contextmanager
def exact_math() -> Iterator[None]:
    """Products of float32 in float32, whatever the user has allowed; restored afterwards, as the
    switches are the whole process's by the last of several threads.

    Tensors are plain ones, also within the user's ``torch.inference_mode``, as they may be used
    after it, and lie on the CPU where nothing says otherwise.
    """
    global _inside, _undo
    with _lock:
        if _inside == 0:
            _undo = _made_exact()
        _inside += 1
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            if torch.empty(0).device.type != "cpu":
                stack.enter_context(torch.device("cpu"))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for undo in _undo:
                    undo()


def _made_exact() -> list[Callable[[], None]]:
    """Turn off every switch that allows less; what puts each back, in this order."""
    undo: list[Callable[[], None]] = []

    def switch(part: Any, name: str, exact: Any) -> None:
        undo.append(partial(setattr, part, name, getattr(part, name)))
        setattr(part, name, exact)

    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    mkldnn = [part for part in _MKLDNN if part.fp32_precision != "none"]
    try:
        whole = torch.get_float32_matmul_precision()
        older = [part.allow_tf32 for part in (cuda.matmul, cudnn)]
    except RuntimeError:
        # The user has set newer switches; torch refuses the older ones then, but only then.
        for part in (cuda.matmul, cudnn.conv, cudnn.rnn):
            switch(part, "fp32_precision", "ieee")
    else:
        undo.append(partial(setattr, cuda.matmul, "allow_tf32", older[0]))
        undo.append(partial(setattr, cudnn, "allow_tf32", older[1]))
        undo.append(partial(torch.set_float32_matmul_precision, whole))  # "medium" is more
        cuda.matmul.allow_tf32 = cudnn.allow_tf32 = False
    for part in mkldnn:
        switch(part, "fp32_precision", "ieee")
    if cuda.mem_efficient_sdp_enabled():
        # Queries that are a part of a tensor end in a misaligned address (torch 2.11 on an H200).
        undo.append(partial(cuda.enable_mem_efficient_sdp, True))
        math = cuda.math_sdp_enabled()
        undo.append(partial(cuda.enable_math_sdp, math))
        cuda.enable_mem_efficient_sdp(False)
        cuda.enable_math_sdp(True)
    return undo
