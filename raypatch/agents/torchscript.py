"""TorchScript files: rebuilt from their submodules, because a loaded script takes no hooks.

A script keeps its layers' weights and classes but not its Python. Its graphs are read, and it
is believed only where it calls one layer after another and each is what its class says. A
stranger's script is never run: its code may believe things of its objects that are not so.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raypatch.agents.activations import ACTIVATIONS
from raypatch.agents.agent import Agent, AgentOptions, make_agent
from raypatch.agents.script_code import AROUND, LAYERS, checked_script
from raypatch.agents.state_dict import finite, linear_from
from raypatch.errors import AgentError, InputError, few, one_line

WITHOUT_WEIGHTS: dict[str, type[nn.Module]] = {
    **{kind.__name__: kind for kind in ACTIVATIONS.values()},
    "Flatten": nn.Flatten,
    "Dropout": nn.Identity,
}
EXPORT = "torch.export.save(torch.export.export(module, (obs,), dynamic_shapes=...), 'agent.pt2')"


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")
            script: Any = torch.jit.load(archive, map_location="cpu")  # type: ignore[no-untyped-call]
        script.eval()
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise AgentError(f"{file}: not a readable TorchScript: {one_line(error)}") from None
    if options.agent_output is not None:
        parts = {name: module for name, module in script.named_modules() if name}
        if options.agent_output not in parts:
            raise InputError(
                f"{file}: --agent_output {options.agent_output!r} is no submodule; there are: "
                f"{few(parts, 12)}"
            )
        script = parts[options.agent_output]
    network = _rebuilt(script, "", file)
    first = next((m for m in network.modules() if isinstance(m, nn.Linear)), None)
    if first is None:
        raise _refusal(file, "it has no linear layer")
    return make_agent(
        network, torch.zeros(1, first.in_features), output_kind="logits", files=(file,),
        loaded_as=f"TorchScript {file.name}, rebuilt from its layers",
    )  # fmt: skip


def _refusal(file: Path, reason: str) -> AgentError:
    return AgentError(
        f"{file}: a TorchScript takes no hooks, and it cannot be rebuilt: {reason}; export the "
        f"module instead: {EXPORT}"
    )


def _rebuilt(script: Any, path: str, file: Path) -> nn.Module:
    kind = script.original_name
    if kind in LAYERS and (fault := _fault(kind, script.inlined_graph)) is not None:
        raise _refusal(file, f"{path or 'the module'}, a {kind}, {fault}")
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


def _fault(kind: str, graph: Any) -> str | None:
    """Why a layer's forward is not that of torch's class of this name, None where it is."""
    _, observation, *more = [value.debugName() for value in graph.inputs()]
    steps = [node for node in graph.nodes() if _computing(node)]
    found = [inner for node in steps for inner in _computing(node)]
    strange = next((n for n in found if _operator(n) not in LAYERS[kind]), None)
    if strange is not None:
        return f"uses {_operator(strange)}"
    returned = [value.debugName() for value in graph.outputs()]
    ends = [value.debugName() for node in steps for value in node.outputs()] or [observation]
    if more or len(steps) > 1 or returned != ends:
        return "does more than one thing"
    for node in found:
        first, *rest = list(node.inputs())
        if first.debugName() != observation:
            return "does not compute on its input"
        if kind == "Linear":
            taken = [_attribute_of(value) for value in rest]
            if taken not in (["weight", "bias"], ["weight", None]):
                return "does not use its own weight and bias"
        elif kind == "Dropout":
            if rest[-1].toIValue() is True:
                return "drops values at random"
        elif (given := tuple(value.toIValue() for value in rest)) not in (
            LAYERS[kind][_operator(node)], (),
        ):  # fmt: skip
            return f"has options of its own: {given}"
    return None


def _computing(node: Any) -> list[Any]:
    """The operators in a node, at any depth, that make numbers of numbers."""
    own = [node] if node.kind().startswith("aten::") and _operator(node) not in AROUND else []
    return own + [
        n for block in node.blocks() for inner in block.nodes() for n in _computing(inner)
    ]


def _operator(node: Any) -> str:
    return str(node.kind()).removeprefix("aten::").removesuffix("_")


def _attribute_of(value: Any) -> str | None:
    """Name of the attribute that a value is, None for a constant."""
    node = value.node()
    return str(node.s("name")) if node.kind() == "prim::GetAttr" else None


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
        if node.kind() == "prim::CallMethod" and len(given) == 1:
            continue  # a traced identity takes nothing and gives nothing
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
