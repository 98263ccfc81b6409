"""Results on their way off a GPU, which goes on computing meanwhile."""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from torch import Tensor


class Leaving:
    """Copies to memory of the host that a GPU writes by itself, in a stream of their own.

    On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @overload
    def array(self, x: Tensor) -> np.ndarray: ...
    @overload
    def array(self, x: Tensor | None) -> np.ndarray | None: ...
    def array(self, x: Tensor | None) -> np.ndarray | None:
        """Of the same shape; its numbers are there after :meth:`wait`."""
        if x is None or self._stream is None:
            return None if x is None else x.numpy(force=True)
        # torch keeps such memory for the next that is as large.
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._stream)
        return host.numpy()

    def wait(self) -> None:
        """Until everything is there."""
        if self._stream is not None:
            self._stream.synchronize()
