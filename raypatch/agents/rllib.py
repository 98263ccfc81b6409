"""Checkpoints of RLlib's new API stack (``RLModule``), loaded by RLlib itself with consent.

The format is a pickle, so there is no way to read it without running what it says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raypatch.agents.agent import Agent, AgentOptions, make_agent
from raypatch.agents.factories import importable
from raypatch.errors import AgentError, missing_package, one_line

TOLERANCE = 1e-5
STATE, CLASS = "module_state.pkl", "class_and_ctor_args.pkl"
# Where an algorithm's checkpoint keeps the module of its only policy.
INSIDE = Path("learner_group") / "learner" / "rl_module" / "default_policy"


def find_rl_module(directory: Path) -> Path | None:
    """The folder of an ``RLModule`` in a checkpoint, None where the directory is none."""
    for folder in (directory, directory / INSIDE):
        if (folder / CLASS).is_file():
            return folder
    return None


class RLModuleNetwork(nn.Module):
    """Encoder and head of an ``RLModule``, under the names they have in it.

    With a value head beside an advantage head these are added as dueling networks do: Q is the
    value plus the advantage less its mean over the actions (Wang et al. 2016).
    """

    def __init__(self, parts: dict[str, nn.Module], n_outputs: int) -> None:
        super().__init__()
        self.path = tuple(parts)
        self.n_outputs = n_outputs
        for name, module in parts.items():
            self.add_module(name, module)

    def forward(self, obs: Tensor) -> Tensor:
        encoder, head, *value = (getattr(self, name) for name in self.path)
        latent = encoder({"obs": obs})["encoder_out"]
        if isinstance(latent, dict):
            latent = latent["actor"]
        # Gaussian policies give means and then log standard deviations.
        output = head(latent)[:, : self.n_outputs]
        if not value:
            return output
        return output - output.mean(1, keepdim=True) + value[0](latent)


def load_rl_module(folder: Path, options: AgentOptions) -> Agent:
    """The action network of an ``RLModule`` with an encoder and a policy or Q head."""
    if not options.trust_agent_code:
        raise AgentError(
            f"{folder}: an RLlib checkpoint is a pickle, and loading it can run code; allow it "
            "with --trust_agent_code, or save the module's state dict"
        )
    try:
        from ray.rllib.core.rl_module.rl_module import RLModule
    except ImportError:
        what = f"{folder}: an RLlib checkpoint"
        raise AgentError(missing_package(what, "'ray[rllib]'", "rllib")) from None
    with importable(folder, Path.cwd()):
        try:
            module: Any = RLModule.from_checkpoint(str(folder.resolve()))
        except Exception as error:  # whatever is pickled there
            raise AgentError(
                f"{folder}: RLlib could not load it: {type(error).__name__}: {error}"
            ) from None
    space = module.action_space
    if (kind := type(space).__name__) not in ("Discrete", "Box"):
        raise AgentError(
            f"{folder}: its action space is {kind}, not Discrete or Box; give its network with "
            "--agent_factory"
        )
    discrete = hasattr(space, "n")
    n_outputs = int(space.n) if discrete else math.prod(space.shape)
    parts = _parts(module, folder)
    network = RLModuleNetwork(parts, n_outputs)
    head = list(parts)[1]
    observation = torch.randn(
        3, *module.observation_space.shape, generator=torch.Generator().manual_seed(0)
    )
    _believe(network, module, observation, folder)
    kind = "Q-values" if head == "af" else "logits" if discrete else "mean"
    return make_agent(
        network,
        observation[:1],
        output_kind=kind,
        discrete=discrete,
        loaded_as=f"RLlib {type(module).__name__}, {folder.name}, with the checkpoint's code",
        files=tuple(sorted(folder / name for name in (CLASS, STATE) if (folder / name).is_file())),
    )


def _parts(module: Any, folder: Path) -> dict[str, nn.Module]:
    """Encoder, head, and where the Q-values are dueling the value head, by their names."""
    encoder = next((n for n in ("pi_encoder", "encoder") if hasattr(module, n)), None)
    head = next((n for n in ("pi", "af") if hasattr(module, n)), None)
    stateful = getattr(module, "is_stateful", lambda: False)()
    if encoder is None or head is None or stateful or getattr(module, "num_atoms", 1) > 1:
        raise AgentError(
            f"{folder}: {type(module).__name__} has no plain encoder and head (recurrent and "
            "distributional ones have not); give its network with --agent_factory"
        )
    names = [encoder, head]
    if head == "af" and getattr(module, "uses_dueling", False):
        names.append("vf")
    return {name: getattr(module, name) for name in names}


def _believe(network: RLModuleNetwork, module: Any, observation: Tensor, folder: Path) -> None:
    """Raises AgentError where the network gives other outputs than the module itself."""
    with torch.no_grad():
        try:
            found = network(observation)
            if "af" in network.path:
                own = module.compute_q_values({"obs": observation})["qf_preds"]
            else:
                own = module.forward_inference({"obs": observation})["action_dist_inputs"]
        except Exception as error:  # a module of the user's own may be built in any way
            raise AgentError(
                f"{folder}: its encoder and head do not follow one another: {one_line(error)}"
            ) from None
    difference = float((found - own[:, : found.shape[1]]).abs().max())
    if not difference <= TOLERANCE:
        raise AgentError(
            f"{folder}: its encoder and head give other outputs than the module, by "
            f"{difference:.1e}; give its network with --agent_factory"
        )
