"""In-place operations of a traced forward: what each really overwrites, and its form without.

A graph has one value a node, so that in-place operations are captured out of place, and whoever
reads the overwritten value later reads the new one. That is right only where no other value lies
in the same memory (a view, or what it is a view of) and is read later. Tracing sees no memory:
the trace is run once as it is, on real inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from raypatch.engine.layers import as_in_forward, tensors_in

# The operators that Python writes with "=", by their function, and the same without.
OPERATORS: dict[Any, Callable[..., Any]] = {
    getattr(operator, "i" + name.rstrip("_")): getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and_", "or_", "xor", "lshift", "rshift"),
    )
}


class OverwritingError(Exception):
    """An in-place operation has no equal form out of place; the text says why."""


class Proxy(fx.Proxy):
    """Traces ``x += y`` as what it is: for torch's own proxies it is ``x = x + y``. Who asks it for
    a number is refused, and the tracer knows."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise OverwritingError(f"sets the attribute {name!r} of a value")
        super().__setattr__(name, value)


def _no_number(self: Proxy) -> Any:
    self.tracer.refused = "the network asks a value for its number"  # type: ignore[attr-defined]
    raise TypeError("a traced value has no number")


for _name in ("__int__", "__float__"):  # torch itself asks for "__index__", and goes on
    setattr(Proxy, _name, _no_number)


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in OPERATORS:
    setattr(Proxy, f"__{_function.__name__}__", _traced(_function))


def out_of_place(target: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """The operation without its side effect, and whether it says that it has one; takes
    ``inplace`` out of ``kwargs``."""
    if kwargs.pop("inplace", False):
        return target, True
    if target in OPERATORS:
        return OPERATORS[target], True
    if getattr(operator, getattr(target, "__name__", ""), None) is target:
        return target, False  # "and_" is "&"
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not name.endswith("_") or name.startswith("_") or name.endswith("__"):
        return target, False
    if isinstance(target, str):
        if hasattr(torch.Tensor, name[:-1]):
            return name[:-1], True
    else:
        for home in (torch, nn.functional):
            if hasattr(home, name[:-1]):
                return getattr(home, name[:-1]), True
    raise OverwritingError(f"in-place operation {name!r} has no out-of-place form")


def overwritten(traced: fx.Graph, network: nn.Module, args: tuple[Any, ...]) -> dict[fx.Node, Any]:
    """The nodes that overwrite an argument, and the argument's node.

    Raises OverwritingError where what is overwritten shares its memory with what is read later.
    """
    watch = _Changes(fx.GraphModule(network, traced), garbage_collect_values=False)
    with as_in_forward(network, args):
        watch.run(*args)
    place = {node: i for i, node in enumerate(traced.nodes)}
    found: dict[fx.Node, Any] = {}
    for node, changed in watch.changed.items():
        if changed != [node.args[0] if node.args else None]:
            raise OverwritingError(f"{node} overwrites several of its arguments")
        memory = memory_of(watch.env[changed[0]])
        for other, value in watch.env.items():
            if other is changed[0] or place[other] >= place[node] or not memory & memory_of(value):
                continue
            last = max((place[user] for user in other.users), default=-1)
            if last > place[node] or other.op == "get_attr":
                raise OverwritingError(f"{node} overwrites a value that is read in another form")
        found[node] = changed[0]
    return found


class _Changes(fx.Interpreter):
    """Runs a trace and notes which nodes change the tensors that they are given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changed: dict[fx.Node, list[fx.Node]] = {}

    def run_node(self, n: fx.Node) -> Any:
        given = [
            (used, tensor, tensor._version)
            for used in n.all_input_nodes
            for tensor in tensors_in(self.env[used])
        ]
        result = super().run_node(n)
        changed = {used: None for used, tensor, version in given if tensor._version != version}
        if changed:
            self.changed[n] = list(changed)
        return result


def memory_of(value: Any) -> set[int]:
    """Where the numbers of a value lie, as what shares memory with it has in common."""
    strided = (x for x in tensors_in(value) if x.layout is torch.strided and x.numel())
    return {storage_of(tensor) for tensor in strided}


def storage_of(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    return tensor.untyped_storage().data_ptr()
