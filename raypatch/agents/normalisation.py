"""Running statistics of observations that rl-zoo keeps beside an agent.

``vecnormalize.pkl`` is a pickle and is never read. The same statistics are taken from
``vecnormalize.npz`` (``mean``, ``var``, and optionally ``epsilon`` and ``clip_obs``), and are
then part of the network: inputs stay raw observations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from raypatch.agents.archives import DAMAGE
from raypatch.agents.preprocessing import Normalise
from raypatch.agents.sb3_networks import ActionNetwork
from raypatch.agents.spaces import Space
from raypatch.errors import AgentError

PICKLE, SAFE = "vecnormalize.pkl", "vecnormalize.npz"
EXPORT = (
    "v = VecNormalize.load('vecnormalize.pkl', env); numpy.savez('vecnormalize.npz', "
    "mean=v.obs_rms.mean, var=v.obs_rms.var, epsilon=v.epsilon, clip_obs=v.clip_obs)"
)


def normalised(
    network: ActionNetwork, directory: Path, space: Space
) -> tuple[ActionNetwork, tuple[str, ...]]:
    """The network with the statistics beside it, and what to tell the user."""
    if not (directory / SAFE).is_file():
        found = next((p for p in sorted(directory.rglob(PICKLE))), None)
        if found is None:
            return network, ()
        return network, (
            f"{found} says that observations were normalised: give inputs normalised the same "
            f"way, or write its statistics once to {directory / SAFE}: {EXPORT}",
        )
    path = directory / SAFE
    try:
        with np.load(path, allow_pickle=False) as content:
            mean, var = (torch.from_numpy(np.asarray(content[k], float)) for k in ("mean", "var"))
            epsilon = float(content["epsilon"]) if "epsilon" in content else 1e-8
            clip = float(content["clip_obs"]) if "clip_obs" in content else 10.0
    except (*DAMAGE, KeyError, TypeError) as error:
        raise AgentError(
            f"{path}: unreadable statistics ({error}); write it so: {EXPORT}"
        ) from None
    shape = space.shape or (space.size,)
    if tuple(mean.shape) != shape or mean.shape != var.shape:
        raise AgentError(
            f"{path}: mean has shape {list(mean.shape)}, var {list(var.shape)}; the agent's "
            f"observations {list(shape)}"
        )
    if not bool(torch.isfinite(mean).all() and (var >= 0).all() and torch.isfinite(var).all()):
        raise AgentError(f"{path}: mean or var holds NaN, infinity or a negative variance")
    # In front of what the network does to observations, so that layers keep their names.
    network.observation = nn.Sequential(Normalise(mean, var, epsilon, clip), network.observation)
    return network, (f"observations are normalised with {path}",)
