"""What every format gives back: the action network and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from raypatch.definitions import OUTPUT_LOGITS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raypatch.engine.layers import Layer


@dataclass(frozen=True)
class AgentOptions:
    """How the user wants an agent read; the fields are the command's options."""

    agent_file: str | None = None
    agent_factory: str | None = None
    agent_output: str | None = None
    activation: str | None = None
    trust_agent_code: bool = False


@dataclass(frozen=True)
class Agent:
    """A trained agent's action network, in evaluation mode on the CPU.

    ``network`` maps a batch of observations ``[inputs, *observation_shape]`` to output
    logits ``[inputs, output_size]``.
    """

    network: nn.Module
    observation_shape: tuple[int, ...]
    output_size: int
    # "Q-values", "logits" or "mean": what the outputs are.
    output_kind: str
    # Actions are the argmax of the outputs; False for continuous actions.
    discrete: bool
    # In the order of the forward pass; without output_logits.
    layers: dict[str, Layer]
    # One line for people: format, algorithm, file.
    loaded_as: str
    files: tuple[Path, ...]
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def neuron_counts(self) -> dict[str, int]:
        """Every name a definition may use and its number of neurons, ``output_logits`` last."""
        counts = {name: layer.neurons for name, layer in self.layers.items()}
        return {**counts, OUTPUT_LOGITS: self.output_size}


def make_agent(
    network: nn.Module,
    observation: torch.Tensor,
    *,
    output_kind: str,
    loaded_as: str,
    files: tuple[Path, ...],
    discrete: bool = True,
) -> Agent:
    """Probe a freshly built network with one observation and describe what it showed."""
    import torch

    from raypatch.engine.layers import find_layers

    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        output = network(observation)
    return Agent(
        network=network,
        observation_shape=tuple(observation.shape[1:]),
        output_size=output.shape[-1],
        output_kind=output_kind,
        discrete=discrete,
        layers=find_layers(network, (observation,)),
        loaded_as=loaded_as,
        files=files,
        parameters={name: p.numel() for name, p in network.named_parameters()},
    )
