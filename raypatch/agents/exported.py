"""Programs saved by ``torch.export`` (``.pt2``): they run as they are.

The program's linear and convolution operations become modules again, under the names their
weights have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from raypatch.agents.agent import Agent, make_agent
from raypatch.agents.program import read_program
from raypatch.agents.spaces import MAX_VALUES
from raypatch.agents.state_dict import add_submodule, add_tensor
from raypatch.engine.capture_export import exported_graph_module
from raypatch.engine.from_weights import convolution_of, linear_of
from raypatch.engine.graph import attribute
from raypatch.engine.written_out import plain_option
from raypatch.errors import AgentError, few, one_line

DIMENSIONS = {"linear": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5}
TOLERANCE = 1e-5


def load_exported(file: Path) -> Agent:
    """The agent in a ``.pt2`` archive, no code run."""
    program, shape = read_program(file)
    if math.prod(shape) > MAX_VALUES or min(shape, default=1) < 1:
        raise AgentError(f"{file}: takes observations of shape {list(shape)}; refused")
    batch = torch.zeros(2, *shape)
    free = ({0: torch.export.Dim.DYNAMIC},)
    try:
        traced = exported_graph_module(torch.export.export(program, (batch,), dynamic_shapes=free))
    except Exception as error:  # torch raises many kinds where operations do not fit together
        raise AgentError(
            f"{file}: its operations do not run on a batch of observations: {one_line(error)}"
        ) from None
    network = with_layers(traced)
    some = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.allclose(network(some), traced(some), rtol=TOLERANCE, atol=TOLERANCE):
            raise AgentError(f"{file}: taken apart into layers it gives other outputs; refused")
    return make_agent(
        network, batch, output_kind="logits", files=(file,),
        loaded_as=f"exported program {file.name}, run as it is", notes=_unpatchable(network),
    )  # fmt: skip


def _unpatchable(network: fx.GraphModule) -> tuple[str, ...]:
    """Names the weights of operations that are no layers, as a recurrent one's are."""
    names = [str(node.target) for node in network.graph.nodes if node.op == "get_attr"]
    names = [n for n in names if "weight" in n and attribute(network, n).dim() > 1]
    if not names:
        return ()
    return (f"only linear and convolution operations are layers here, not those of {few(names)}",)


def with_layers(traced: fx.GraphModule) -> fx.GraphModule:
    """The same program, its linear and convolution operations as modules of their own."""
    root, graph = nn.Module(), fx.Graph()
    layers: dict[fx.Node, str] = {}
    made: dict[str, _Layer] = {}
    for node in traced.graph.nodes:
        found = _layer_of(traced, node)
        # A weight that is used in another way again, with another bias, stays an operation.
        if found is not None and made.setdefault(found.path, found) == found:
            layers[node] = found.path
    for path, layer in made.items():
        add_submodule(root, path, layer.module(traced))
    copied: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            continue  # guards on the shape of the example input
        if node in layers:
            copied[node] = graph.call_module(layers[node], (copied[node.args[0]],))
            continue
        if node.op == "get_attr":
            if all(user in layers for user in node.users):
                continue
            _copy_attribute(traced, root, str(node.target))
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = {}
        outputs: Any = copied[node].args[0] if node.op == "output" else None
        if isinstance(outputs, (tuple, list)):
            copied[node].args = (outputs[0],)
    return fx.GraphModule(root, graph)


@dataclass(frozen=True)
class _Layer:
    """A linear or convolution operation on weights of the program."""

    path: str
    name: str
    weight: str
    bias: str | None
    options: tuple[Any, ...]

    def module(self, traced: fx.GraphModule) -> nn.Module:
        w = attribute(traced, self.weight)
        bias = None if self.bias is None else attribute(traced, self.bias)
        if self.name == "linear":
            return linear_of(w, bias)
        options = dict(zip(("stride", "padding", "dilation", "groups"), self.options))
        return convolution_of(w, bias, **options)


def _layer_of(traced: fx.GraphModule, node: fx.Node) -> _Layer | None:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    if name not in DIMENSIONS or node.kwargs or len(node.args) < 2:
        return None
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return None
    target = str(weight.target)
    if not target.endswith(".weight") or attribute(traced, target).dim() != DIMENSIONS[name]:
        return None
    return _Layer(
        target.removesuffix(".weight"), name, target, None if bias is None else str(bias.target),
        tuple(map(plain_option, node.args[3:])),
    )  # fmt: skip


def _copy_attribute(source: nn.Module, root: nn.Module, path: str) -> None:
    """Keep a tensor of the program where the operations that use it look for it."""
    if path not in {name for name, _ in (*root.named_buffers(), *root.named_parameters())}:
        add_tensor(root, path, attribute(source, path))
