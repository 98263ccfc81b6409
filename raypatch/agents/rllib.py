"""Checkpoints of RLlib's new API stack (``RLModule``), loaded by RLlib itself with consent.

The format is a pickle, so there is no way to read it without running what it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raypatch.agents.agent import Agent, AgentOptions, make_agent
from raypatch.agents.factories import importable
from raypatch.errors import AgentError

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
    """Encoder and policy head of an ``RLModule``, under the names they have in it."""

    def __init__(self, encoder: tuple[str, nn.Module], head: tuple[str, nn.Module], n: int) -> None:
        super().__init__()
        self.path = (encoder[0], head[0])
        self.n_outputs = n
        for name, module in (encoder, head):
            self.add_module(name, module)

    def forward(self, obs: Tensor) -> Tensor:
        encoder, head = (getattr(self, name) for name in self.path)
        latent = encoder({"obs": obs})["encoder_out"]
        if isinstance(latent, dict):
            latent = latent["actor"]
        # Gaussian policies give means and then log standard deviations.
        return head(latent)[:, : self.n_outputs]


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
        raise AgentError(
            f"{folder}: an RLlib checkpoint needs RLlib: pip install 'raypatch[rllib]'"
        ) from None
    with importable(folder, Path.cwd()):
        try:
            module: Any = RLModule.from_checkpoint(str(folder.resolve()))
        except Exception as error:  # whatever is pickled there
            raise AgentError(
                f"{folder}: RLlib could not load it: {type(error).__name__}: {error}"
            ) from None
    encoder = next((n for n in ("pi_encoder", "encoder") if hasattr(module, n)), None)
    head = next((n for n in ("pi", "af") if hasattr(module, n)), None)
    if encoder is None or head is None or getattr(module, "is_stateful", lambda: False)():
        raise AgentError(
            f"{folder}: {type(module).__name__} has no plain encoder and policy head; give its "
            "network with --agent_factory"
        )
    space = module.action_space
    discrete = hasattr(space, "n")
    n_outputs = int(space.n) if discrete else int(torch.tensor(space.shape).prod())
    network = RLModuleNetwork(
        (encoder, getattr(module, encoder)), (head, getattr(module, head)), n_outputs
    )
    kind = "Q-values" if head == "af" else "logits" if discrete else "mean"
    return make_agent(
        network,
        torch.zeros(1, *module.observation_space.shape),
        output_kind=kind,
        discrete=discrete,
        loaded_as=f"RLlib {type(module).__name__}, {folder.name}, with the checkpoint's code",
        files=tuple(sorted(folder / name for name in (CLASS, STATE) if (folder / name).is_file())),
    )
