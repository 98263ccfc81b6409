"""What a sweep patches into what: inputs by side, and the values that each direction patches in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raypatch.results.schema import SOURCE_SIDE, TARGET_SIDE
from raypatch.sweeps.shipping import tensor_on


@dataclass(frozen=True)
class Sides:
    """Inputs float32 ``[inputs, *observation]`` by side, and how they are patched.

    ``kind`` is a source kind of :meth:`raypatch.Patcher.prepare`; ``given`` holds recorded
    activations by layer, for the kind "given".
    """

    inputs: Mapping[str, np.ndarray]
    directions: tuple[str, ...]
    kind: str
    seed: int = 0
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    def source_and_target(self, direction: str) -> tuple[Any, torch.Tensor]:
        """What is patched in, as :meth:`raypatch.Patcher.prepare` takes it, and into what."""
        source: Any = None
        if self.kind == "pair":
            source = tensor_on(self.inputs[SOURCE_SIDE[direction]])
        elif self.kind == "given":
            source = {name: tensor_on(value) for name, value in self.given.items()}
        return source, tensor_on(self.inputs[TARGET_SIDE[direction]])
