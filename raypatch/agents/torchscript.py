"""TorchScript files: rebuilt from their submodules, because a loaded script takes no hooks.

A traced script keeps its layers' weights and classes but not its Python, so the layers are
chained in the order they were declared, and the chain is believed only where it gives the
script's own outputs on random observations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from raypatch.agents.activations import ACTIVATIONS
from raypatch.agents.agent import Agent, AgentOptions, make_agent
from raypatch.agents.script_code import checked_script
from raypatch.agents.state_dict import finite, linear_from
from raypatch.errors import AgentError, one_line

WITHOUT_WEIGHTS: dict[str, type[nn.Module]] = {
    **{kind.__name__: kind for kind in ACTIVATIONS.values()},
    "Flatten": nn.Flatten,
    "Dropout": nn.Identity,
}
EXPORT = "torch.export.save(torch.export.export(module, (obs,), dynamic_shapes=...), 'agent.pt2')"
TRIALS, TOLERANCE = 64, 1e-5


class Chain(nn.Module):
    """Modules one after another, under the names they have in the script."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.order = tuple(modules)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def load_script(file: Path, options: AgentOptions) -> Agent:
    """The agent in a TorchScript file whose layers follow one another."""
    archive = checked_script(file)
    try:
        script: Any = torch.jit.load(archive, map_location="cpu")  # type: ignore[no-untyped-call]
        script.eval()
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise AgentError(f"{file}: not a readable TorchScript: {one_line(error)}") from None
    if options.agent_output is not None:
        try:
            script = script.get_submodule(options.agent_output)
        except AttributeError:
            names = ", ".join(name for name, _ in script.named_modules() if name)
            raise AgentError(
                f"{file}: --agent_output {options.agent_output!r} is no submodule; there are: "
                f"{names[:300]}"
            ) from None
    network = _rebuilt(script, "", file)
    first = next((m for m in network.modules() if isinstance(m, nn.Linear)), None)
    if first is None:
        raise _refusal(file, "it has no linear layer")
    observations = torch.randn(
        TRIALS, first.in_features, generator=torch.Generator().manual_seed(0)
    )
    try:
        with torch.no_grad():
            difference = float((network(observations) - script(observations)).abs().max())
    except Exception as error:  # layers that do not chain, or a script that takes something else
        raise _refusal(file, f"its layers do not follow one another: {one_line(error)}") from None
    if not difference <= TOLERANCE:
        raise _refusal(
            file, f"its layers in a row give other outputs than the script, by {difference:.1e}"
        )
    return make_agent(
        network, observations[:1], output_kind="logits", files=(file,),
        loaded_as=f"TorchScript {file.name}, rebuilt from its layers",
    )  # fmt: skip


def _refusal(file: Path, reason: str) -> AgentError:
    return AgentError(
        f"{file}: a TorchScript takes no hooks, and it cannot be rebuilt: {reason}; export the "
        f"module instead: {EXPORT}"
    )


def _rebuilt(script: Any, path: str, file: Path) -> nn.Module:
    kind = script.original_name
    children = list(script.named_children())
    if kind == "Linear":
        for name, tensor in script.named_parameters():
            finite(tensor, f"{file}: {path}.{name}")
        return linear_from(script.weight, getattr(script, "bias", None))
    if kind in WITHOUT_WEIGHTS:
        return WITHOUT_WEIGHTS[kind]()
    if not children or any(True for _ in script.parameters(recurse=False)):
        raise _refusal(file, f"{path or 'the module'} is a {kind}, not a layer known here")
    return Chain(
        {name: _rebuilt(child, f"{path}.{name}".lstrip("."), file) for name, child in children}
    )
