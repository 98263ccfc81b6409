"""What a network computes, as a digest: two networks that differ are never taken for one.

Files alone do not tell: an activation may come from an option, a whole module from a factory.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from raypatch.engine.apart import OneByOne
from raypatch.engine.graph import Graph, Node, Ref

ADDRESS = re.compile(" at 0x[0-9a-f]+")
OF_ALL_MODULES = vars(nn.Module()).keys()  # weights, submodules and hooks among them


def network_digest(network: nn.Module, graph: Graph | None) -> str:
    """sha256 of the modules, the weights, the code of the user's own classes and, where
    captured, every operation between them."""
    lines = [line for name, module in network.named_modules() for line in _module(name, module)]
    lines += [f"{name} {_text(value)}" for name, value in network.state_dict().items()]
    lines += _operations(graph) if graph is not None else []
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _operations(graph: Graph) -> list[str]:
    return [_operation(node) for node in graph.nodes]


def _operation(node: Node) -> str:
    target = node.path or _text(node.target)
    if isinstance(node.target, OneByOne):  # of a layer more than its path
        target = _text(node.target)
    return f"{node.op} {target} {tree_map(_text, (node.args, node.kwargs))}"


def _module(name: str, module: nn.Module) -> list[str]:
    """A module's kind; the code and attributes of a class that is the user's own."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "raypatch.")):
        return [f"{name} {kind.__qualname__} {ADDRESS.sub('', module.extra_repr())}"]
    own = {k: v for k, v in vars(module).items() if k not in OF_ALL_MODULES}
    return [f"{name} {kind.__qualname__} {_text(own)}", _source(module)]


def _source(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module))
    except (OSError, TypeError):  # made at run time
        code = getattr(getattr(type(module).forward, "__code__", None), "co_code", b"")
        return f"{getattr(module, 'code', '')} {code.hex()}"


def _text(value: Any) -> str:
    """The same for the same value in every process: no address of an object."""
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(held.data).hexdigest()}"
    if isinstance(value, Ref):
        return f"%{value.node}"
    if isinstance(value, np.ndarray):
        numbers = np.ascontiguousarray(value).tobytes()
        return f"{value.dtype} {value.shape} {hashlib.sha256(numbers).hexdigest()}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_text(k)}: {_text(v)}' for k, v in value.items()))}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, partial):
        return f"partial {_text([value.func, value.args, value.keywords])}"
    if inspect.isfunction(value) and not (value.__module__ or "").startswith("torch."):
        code = value.__code__
        constants = [c for c in code.co_consts if isinstance(c, (bool, int, float, str))]
        return f"{value.__qualname__} {code.co_code.hex()} {code.co_names} {constants}"
    if isinstance(value, (bool, int, float, complex, str, slice, type(None), torch.dtype)):
        return repr(value)
    if isinstance(value, nn.Module):
        weights = [_text(parameter) for parameter in value.parameters()]
        return f"{type(value).__qualname__} {value.extra_repr()} {weights}"
    if isinstance(value, OneByOne):
        return f"one by one {_operation(value.node)} {value.places} {value.result}"
    name = getattr(value, "__qualname__", None)
    overload = (getattr(value, "name", ""), getattr(value, "overload", ""))
    return str(name or f"{type(value).__qualname__} {overload}")
