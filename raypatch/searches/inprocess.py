"""An agent and its pairs at hand, for searches that patch in this process.

What ``raypatch run`` does on actors for a fixed definition, ``coalition`` and ``screen`` do
here, since each step depends on the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypatch.agents import AgentOptions, load_agent
from raypatch.definitions import Experiment
from raypatch.engine.patch_run import PatchRun
from raypatch.engine.patcher import Patcher
from raypatch.errors import InputError, offer
from raypatch.inputs import INPUTS_FOLDER, SIDES, ObservationShape, find_inputs, read_inputs
from raypatch.metrics.formulas import METRICS, choose_metrics
from raypatch.metrics.table import MetricTable
from raypatch.metrics.terms import Baselines
from raypatch.results.schema import DIRECTIONS, SOURCE_SIDE, TARGET_SIDE


class Bench:
    """A loaded agent, its clean and corrupted inputs, and a patcher on both directions."""

    def __init__(
        self,
        agent_path: str,
        *,
        direction: str = "both",
        clean_inputs: str | None = None,
        corrupted_inputs: str | None = None,
        **agent_options: Any,
    ) -> None:
        if direction not in ("both", *DIRECTIONS):
            raise InputError(f"--direction: {direction!r} is not both, {' or '.join(DIRECTIONS)}")
        named = clean_inputs or corrupted_inputs
        self.agent = load_agent(agent_path, AgentOptions(**agent_options, inputs=named))
        folder = Path(agent_path) / INPUTS_FOLDER
        given = {"clean": clean_inputs, "corrupted": corrupted_inputs}
        paths = {side: Path(given[side] or find_inputs(folder, side)) for side in SIDES}
        shape = ObservationShape(self.agent.observation_shape, self.agent.observation_parts)
        self.inputs = read_inputs(paths, shape)
        self.directions = DIRECTIONS if direction == "both" else (direction,)
        self.sides = {side: torch.from_numpy(v) for side, v in self.inputs.sides.items()}
        self.patcher = Patcher(self.agent.network, device="cpu")
        self.runs: dict[str, PatchRun] = {}
        for name in self.directions:
            source, target = self.sides[SOURCE_SIDE[name]], self.sides[TARGET_SIDE[name]]
            self.runs[name] = self.patcher.prepare(source, target)

    def outputs(self, experiments: Sequence[Experiment]) -> dict[str, Tensor]:
        """Patched outputs ``[experiments, inputs, outputs]`` by direction."""
        return {name: run(list(experiments)) for name, run in self.runs.items()}

    def baselines(self) -> dict[str, Tensor]:
        """Unpatched outputs ``[inputs, outputs]`` of the target by direction."""
        return {name: run.baseline for name, run in self.runs.items()}

    def neurons(self) -> list[tuple[str, int]]:
        """Every neuron of the layers before the outputs: patching those of the last layer is
        patching the outputs themselves."""
        last = list(self.agent.layers)[-1]
        before = [layer for layer in self.agent.layers if layer != last] or [last]
        return [(layer, i) for layer in before for i in range(self.agent.layers[layer].neurons)]

    def check_metric(self, metric: str) -> None:
        """Raises InputError for a metric this agent has not."""
        if metric not in METRICS:
            raise InputError(f"--metric: unknown metric {metric!r}; {offer(metric, list(METRICS))}")
        choose_metrics(metric, discrete=self.agent.discrete, option="--metric")

    def scores(
        self, metric: str, outputs: Mapping[str, Tensor], against: Mapping[str, Tensor]
    ) -> np.ndarray:
        """Mean of a metric over the inputs, float64 ``[directions, experiments]``.

        ``against`` ``[inputs, outputs]`` is what counts as unpatched.
        """
        rows = []
        for name, patched in outputs.items():
            table = MetricTable([metric], Baselines(against[name], self.runs[name].source_baseline))
            values = torch.empty(1, *patched.shape[:2], dtype=torch.float64)
            table.compute(patched, values)
            rows.append(values[0].nanmean(-1).numpy())
        return np.stack(rows)

    def flips(self, outputs: Mapping[str, Tensor]) -> np.ndarray:
        """How many greedy actions change, over inputs and directions, int64 ``[experiments]``."""
        changed = [
            (patched.argmax(-1) != self.runs[name].baseline.argmax(-1)).sum(-1)
            for name, patched in outputs.items()
        ]
        return torch.stack(changed).sum(0).numpy()
