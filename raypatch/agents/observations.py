"""What one observation of an agent looks like, where its file does not say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raypatch.errors import AgentError, few
from raypatch.inputs import INPUTS_FOLDER, find_inputs, read_observations


def trial_observation(network: nn.Module, directory: Path, inputs: str | None) -> torch.Tensor:
    """A batch of one observation that the network takes, all zero.

    Tried in turn: the shape of the first observation in the file ``inputs``, or of the first
    clean input beside the agent, and the width of the first linear layer. Raises AgentError where
    the network takes neither, InputError for a file of inputs that cannot be read.
    """
    file = Path(inputs) if inputs else find_inputs(directory / INPUTS_FOLDER, "clean")
    held = _input_shape(file) if inputs or file.is_file() else None
    shapes = [shape for shape in (held, _first_width(network)) if shape]
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


def _input_shape(file: Path) -> tuple[int, ...] | None:
    first = next(iter(read_observations(file).values()))
    if isinstance(first, Mapping):
        raise AgentError(
            f"{file}: observations of several parts ({few(first)}) are for Stable-Baselines3 "
            "agents; raypatch.patch takes tuples of tensors for any network"
        )
    try:
        return tuple(np.asarray(first, np.float32).shape)
    except (TypeError, ValueError):
        return None  # reading the inputs will say which of them are no numbers


def _first_width(network: nn.Module) -> tuple[int, ...] | None:
    first = next((m for m in network.modules() if isinstance(m, nn.Linear)), None)
    return None if first is None else (first.in_features,)
