"""Programs saved by ``torch.export`` (``.pt2``): they run as they are.

The program's linear and convolution operations become modules again, under the names their
weights have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from raypatch.agents.agent import Agent, make_agent
from raypatch.agents.program import read_program
from raypatch.agents.state_dict import add_submodule, add_tensor
from raypatch.engine.capture_export import exported_graph_module
from raypatch.errors import AgentError, one_line

CONVOLUTIONS: dict[str, type[Any]] = {
    "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d,
}  # fmt: skip


def load_exported(file: Path) -> Agent:
    """The agent in a ``.pt2`` archive, no code run."""
    program, shape = read_program(file)
    batch = torch.zeros(2, *shape)
    free = ({0: torch.export.Dim.DYNAMIC},)
    try:
        traced = exported_graph_module(torch.export.export(program, (batch,), dynamic_shapes=free))
    except Exception as error:  # torch raises many kinds where operations do not fit together
        raise AgentError(
            f"{file}: its operations do not run on a batch of observations: {one_line(error)}"
        ) from None
    network = with_layers(traced)
    return make_agent(
        network, batch, output_kind="logits", files=(file,),
        loaded_as=f"exported program {file.name}, run as it is",
    )  # fmt: skip


def with_layers(traced: fx.GraphModule) -> nn.Module:
    """The same program, its linear and convolution operations as modules of their own."""
    root, graph = nn.Module(), fx.Graph()
    layers = {node: made for node in traced.graph.nodes if (made := _layer(traced, node))}
    for path, layer in layers.values():
        add_submodule(root, path, layer)
    copied: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            continue  # guards on the shape of the example input
        if node in layers:
            copied[node] = graph.call_module(layers[node][0], (copied[node.args[0]],))
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


def _layer(traced: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module] | None:
    """Path and module of a linear or convolution operation on weights of the program."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    weight = node.args[1] if len(node.args) > 1 else None
    if name not in ("linear", *CONVOLUTIONS) or not isinstance(weight, fx.Node):
        return None
    target = str(weight.target)
    if weight.op != "get_attr" or not target.endswith(".weight"):
        return None
    w = _attribute(traced, target)
    bias_node = node.args[2] if len(node.args) > 2 else None
    bias = _attribute(traced, str(bias_node.target)) if isinstance(bias_node, fx.Node) else None
    if name == "linear":
        module: nn.Module = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None, device="meta")
    else:
        defaults = (1, 0, 1, 1)
        given: tuple[Any, ...] = node.args[3:]
        stride, padding, dilation, groups = given + defaults[len(given) :]
        module = CONVOLUTIONS[name](
            w.shape[1] * groups, w.shape[0], tuple(w.shape[2:]), _many(stride), _many(padding),
            _many(dilation), groups, bias=bias is not None, device="meta",
        )  # fmt: skip
    module.weight = nn.Parameter(w.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return target.removesuffix(".weight"), module


def _many(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _copy_attribute(source: nn.Module, root: nn.Module, path: str) -> None:
    """Keep a tensor of the program where the operations that use it look for it."""
    if path not in dict(root.named_buffers()):
        add_tensor(root, path, _attribute(source, path).detach())
