"""What every format gives back: the action network and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.errors import AgentError, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raypatch.engine.layers import Layer


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How the user wants an agent read; the fields are options of every command that reads one.

    ``actions``, "discrete" or "continuous", is what some files do not tell.
    """

    agent_file: str | None = None
    agent_factory: str | None = None
    agent_output: str | None = None
    activation: str | None = None
    trust_agent_code: bool = False
    actions: str | None = None


@dataclass(frozen=True, kw_only=True)
class AgentOptions(LoadingOptions):
    """The same, and ``inputs``, a file whose observations are of the shape that the agent takes;
    None for one beside the agent."""

    inputs: str | None = None


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
    # Actions are the argmax of the outputs; False for continuous ones and for several at once.
    discrete: bool
    # Continuous actions are the tanh of the outputs, stretched over the action space.
    squashed: bool
    # In the order of the forward pass; without output_logits.
    layers: dict[str, Layer]
    # One line for people: format, algorithm, file.
    loaded_as: str
    files: tuple[Path, ...]
    parameters: dict[str, int] = field(default_factory=dict)
    # Shapes by key where an observation has several parts: they are packed into one row.
    observation_parts: Mapping[str, tuple[int, ...]] | None = None
    # What the user should know of how the agent was loaded.
    notes: tuple[str, ...] = ()

    @property
    def actions(self) -> str:
        """What outputs stand for, in a word."""
        if self.discrete:
            return "discrete"
        return "several" if self.output_kind == "logits" else "continuous"

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
    squashed: bool = False,
    observation_parts: Mapping[str, tuple[int, ...]] | None = None,
    notes: tuple[str, ...] = (),
) -> Agent:
    """Probe a freshly built network with one observation and describe what it showed."""
    import torch

    from raypatch.engine.layers import find_layers, forward

    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    origin = files[0] if files else loaded_as
    try:
        with torch.no_grad():
            output = forward(network, (observation,))
        layers = find_layers(network, (observation,))
    except Exception as error:  # layers that do not fit together, in the user's module or file
        raise AgentError(
            f"{origin}: the network does not take an observation of shape "
            f"{list(observation.shape[1:])}: {one_line(error)}"
        ) from None
    if OUTPUT_LOGITS in layers:
        raise AgentError(
            f"{origin}: a layer is named {OUTPUT_LOGITS!r}, which stands for the network's own "
            "outputs; rename it"
        )
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or not output.shape[1]:
        shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise AgentError(
            f"{origin}: the network gives {shape}, not one row of outputs per input; name the "
            "action network with --agent_output, or write an --agent_factory whose module gives "
            "the logits alone"
        )
    return Agent(
        network=network,
        observation_shape=tuple(observation.shape[1:]),
        output_size=output.shape[-1],
        output_kind=output_kind,
        discrete=discrete,
        squashed=squashed,
        layers=layers,
        loaded_as=loaded_as,
        files=files,
        parameters={name: p.numel() for name, p in network.named_parameters()},
        observation_parts=observation_parts,
        notes=notes,
    )
