"""What one observation of an agent looks like, where its file does not say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from raypatch.errors import AgentError, InputError
from raypatch.inputs import INPUTS_FOLDER, find_inputs, read_observations


def trial_observation(network: nn.Module, directory: Path) -> torch.Tensor:
    """A batch of one observation that the network takes, all zero.

    Tried in turn: the shape of the first clean input beside the agent, and the width of the
    first linear layer. Raises AgentError where the network takes neither.
    """
    shapes = [shape for shape in (_input_shape(directory), _first_width(network)) if shape]
    for shape in shapes:
        observation = torch.zeros(1, *shape)
        try:
            with torch.no_grad():
                network.eval()(observation)
        except Exception:  # a network may raise anything at a shape it does not take
            continue
        return observation
    tried = " and ".join(str(list(shape)) for shape in shapes) or "none"
    raise AgentError(
        f"{directory}: the observation's shape is unknown (tried: {tried}); put the inputs beside "
        f"the agent as {INPUTS_FOLDER}/clean_inputs.json (or .npz, ...), whose shapes are used"
    )


def _input_shape(directory: Path) -> tuple[int, ...] | None:
    try:
        observations = read_observations(find_inputs(directory / INPUTS_FOLDER, "clean"))
        return tuple(np.asarray(next(iter(observations.values())), np.float32).shape)
    except (InputError, TypeError, ValueError):
        return None


def _first_width(network: nn.Module) -> tuple[int, ...] | None:
    first = next((m for m in network.modules() if isinstance(m, nn.Linear)), None)
    return None if first is None else (first.in_features,)
