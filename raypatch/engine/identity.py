"""What a network computes, as a digest: two networks that differ are never taken for one.

Files alone do not tell: an activation may come from an option, a whole module from a factory.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from raypatch.engine.capture import Graph, Ref

ADDRESS = re.compile(" at 0x[0-9a-f]+")


def network_digest(network: nn.Module, graph: Graph | None) -> str:
    """sha256 of the modules, the weights and, where captured, every operation between them.

    Where there is no graph, the source of the forwards stands for the operations.
    """
    digest = hashlib.sha256(ADDRESS.sub("", repr(network)).encode())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        digest.update(f"\n{name} {_text(tensor)}".encode())
    lines = _operations(graph) if graph is not None else _sources(network)
    digest.update("\n".join(lines).encode())
    return digest.hexdigest()


def _operations(graph: Graph) -> list[str]:
    return [
        f"{node.op} {node.path or _text(node.target)} {tree_map(_text, (node.args, node.kwargs))}"
        for node in graph.nodes
    ]


def _sources(network: nn.Module) -> list[str]:
    """Forwards of the user's own classes; torch's go by their name and options."""
    own = {
        type(module)
        for module in network.modules()
        if not type(module).__module__.startswith("torch.nn.")
    }
    return sorted(f"{kind.__qualname__} {_source(kind.forward)}" for kind in own)


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # made at run time
        return ""


def _text(value: Any) -> str:
    """The same for the same value in every process: no address of an object."""
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(held.data).hexdigest()}"
    if isinstance(value, Ref):
        return f"%{value.node}"
    if isinstance(value, (bool, int, float, complex, str, slice, type(None), torch.dtype)):
        return repr(value)
    name = getattr(value, "__qualname__", None)
    overload = (getattr(value, "name", ""), getattr(value, "overload", ""))
    return str(name or f"{type(value).__qualname__} {overload}")
