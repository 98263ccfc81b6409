"""Re-check of a random sample of a run's experiments against the brute-force reference."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from raypatch.definitions import Experiments
from raypatch.engine.reference import reference_outputs
from raypatch.errors import VerificationError
from raypatch.sweeps.sides import Sides
from raypatch.sweeps.sweep import Range

# The contract's tolerance: max |difference| within this times max(1, |logit|).
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}


def choose_sample(ranges: list[Range], count: int, seed: int) -> frozenset[int]:
    """Indices of up to ``count`` experiments, drawn from what is still to compute."""
    total = sum(map(len, ranges))
    places = sorted(random.Random(seed).sample(range(total), min(count, total)))
    chosen, offset = [], 0
    for part in ranges:
        inside = [p for p in places if offset <= p < offset + len(part)]
        chosen += [part.first + p - offset for p in inside]
        offset += len(part)
    return frozenset(chosen)


@dataclass
class Verifier:
    """Compares sampled outputs as they come; the largest differences are kept."""

    network: nn.Module
    experiments: Experiments
    sides: Sides
    dtype: str
    checked: int = 0
    largest_difference: float = 0.0

    def check(self, samples: Mapping[int, np.ndarray]) -> None:
        """``samples`` maps experiments to outputs ``[directions, inputs, outputs]``.

        Raises VerificationError where one differs by more than the contract allows.
        """
        for index, outputs in samples.items():
            experiment = self.experiments[index]
            for direction, found in zip(self.sides.directions, outputs):
                expected = reference_outputs(
                    self.network, [experiment], *self.sides.source_and_target(direction),
                    kind=self.sides.kind, seed=self.sides.seed,
                )[0].numpy()  # fmt: skip
                difference = np.abs(found - expected)
                relative = difference / np.maximum(1.0, np.abs(expected))
                self.largest_difference = max(self.largest_difference, float(difference.max()))
                if not relative.max() <= TOLERANCES[self.dtype]:
                    raise VerificationError(
                        f"verification failed: experiment {index} ({direction}) differs from the "
                        f"float64 reference by {relative.max():.2e} x max(1, |logit|), allowed are "
                        f"{TOLERANCES[self.dtype]:.0e}; please report this with your agent"
                    )
            self.checked += 1

    def summary(self) -> dict[str, float | int]:
        return {"checked": self.checked, "largest_difference": self.largest_difference}
