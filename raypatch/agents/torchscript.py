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
from raypatch.agents.script_code import AROUND, LAYER_OPERATORS, checked_script
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
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 3, TRIALS)[:, None]
    observations = sizes * torch.randn(TRIALS, first.in_features, generator=generator)
    try:
        with torch.no_grad():
            expected = script(observations)
            difference = (network(observations) - expected).abs()
            relative = float((difference / expected.abs().clamp(min=1)).max())
    except Exception as error:  # layers that do not chain, or a script that takes something else
        raise _refusal(file, f"its layers do not follow one another: {one_line(error)}") from None
    if not relative <= TOLERANCE:
        raise _refusal(
            file, f"its layers in a row give other outputs than the script, by {relative:.1e}"
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
    if kind in LAYER_OPERATORS:
        strange = _operators(script.inlined_graph) - LAYER_OPERATORS[kind] - AROUND
        if strange:
            raise _refusal(file, f"{path or 'the module'}, a {kind}, uses {min(strange)}")
    if kind == "Linear":
        for name, tensor in script.named_parameters():
            finite(tensor, f"{file}: {path}.{name}")
        return linear_from(script.weight, getattr(script, "bias", None))
    if kind in WITHOUT_WEIGHTS:
        return WITHOUT_WEIGHTS[kind]()
    names = _called_in_a_row(script.graph)
    if not names:
        raise _refusal(
            file,
            f"{path or 'the module'}, a {kind}, is no layer known here and does not only call its "
            "layers one after another",
        )  # fmt: skip
    return Chain(
        {
            name: _rebuilt(getattr(script, name), f"{path}.{name}".lstrip("."), file)
            for name in names
        }
    )


def _operators(graph: Any) -> set[str]:
    """Names of the operators a graph uses, at any depth, in place or not."""
    found = set()
    for node in graph.nodes():
        if node.kind().startswith("aten::"):
            found.add(node.kind().removeprefix("aten::").removesuffix("_"))
        for block in node.blocks():
            found |= _operators(block)
    return found


def _to_floats(node: Any) -> bool:
    """Whether a conversion is to float32 or float64, which observations are already."""
    kinds = [value.toIValue() for value in node.inputs()]
    return kinds[1] in (6, 7)


def _called_in_a_row(graph: Any) -> list[str]:
    """Submodules a forward calls, each once and on what the one before gave; none where it
    does anything else."""
    own, *inputs = graph.inputs()
    if len(inputs) != 1:
        return []
    at, submodules, called = inputs[0].debugName(), {}, []
    for node in graph.nodes():
        if node.kind() == "prim::GetAttr" and node.input().debugName() == own.debugName():
            submodules[node.output().debugName()] = node.s("name")
            continue
        given = [value.debugName() for value in node.inputs()]
        if node.kind() == "prim::Constant":
            continue
        if node.kind() == "aten::to" and given[0] == at and _to_floats(node):
            at = node.output().debugName()
            continue
        if (
            node.kind() != "prim::CallMethod"
            or node.s("name") != "forward"
            or len(given) != 2
            or given[0] not in submodules
            or given[1] != at
        ):
            return []
        called.append(submodules[given[0]])
        at = node.output().debugName()
    returned = [value.debugName() for value in graph.outputs()]
    return called if returned == [at] and len(set(called)) == len(called) else []
