"""Copies of a network: for good, in another precision, and one that tracing leaves as it was."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from raypatch.engine.layers import tensors_in, without_nested_tensors
from raypatch.errors import InputError, one_line

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def own_copy(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy for good, in which parametrised weights are what they are now.

    Raises InputError where the network cannot be copied.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"its module {name!r}" if name else "the network"
            raise InputError(
                f"{which} is a ScriptModule; give the nn.Module that it was made from (with "
                "PYTORCH_JIT=0 in the environment torch.jit.script leaves modules as they are)"
            )
    if any(is_lazy(p) for p in network.parameters()):
        raise InputError("the network has lazy layers of unknown size; run it once before")
    try:
        own = copied(network, device, dtype)
    except Exception as error:  # anything that a network may hold
        raise InputError(f"the network cannot be copied: {one_line(error)}") from None
    for module in list(own.modules()):
        if is_parametrized(module):
            _settle(module)
    return own.requires_grad_(False)


def copied(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode and not compiled, with floating numbers of ``dtype``, complex ones
    of its size; what is float64 in a network that is not, as the statistics of its inputs, stays
    so."""
    # What an earlier forward with gradients left behind cannot be copied as it is.
    held = [t for module in network.modules() for t in tensors_in(vars(module)) if not t.is_leaf]
    copies: dict[int, Any] = {id(t): t.detach().clone() for t in held}
    own = copy.deepcopy(network, copies)

    kinds = {p.dtype for p in network.parameters() if p.is_floating_point()}
    kept = {torch.float64, torch.complex128} if kinds != {torch.float64} else set()

    def converted(x: Tensor) -> Tensor:
        if x.dtype in kept:
            return x.to(device)
        if x.is_meta:  # of a module that only says what form others have
            return x
        if x.is_complex():
            return x.to(device, COMPLEX.get(dtype, x.dtype))
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    _undo_compiling(own, copies)
    for module in own.modules():  # tensors that are neither parameters nor buffers
        held_apart = {n: converted(t) for n, t in vars(module).items() if isinstance(t, Tensor)}
        vars(module).update(held_apart)
    own._apply(converted)  # type: ignore[no-untyped-call]
    return without_nested_tensors(own.eval())


def _undo_compiling(own: nn.Module, copies: dict[int, Any]) -> None:
    """Let what torch.compile wraps be run as it is: hooks of layers in it would not be called, and
    a method would be the original's. ``copies`` are by the id of what they are of."""
    for module in list(own.modules()):
        for name, child in module._modules.items():
            module._modules[name] = getattr(child, "_orig_mod", child)
    for module in own.modules():
        kind = type(module)
        for name, value in [one for base in kind.__mro__ for one in vars(base).items()]:
            method = _compiled(value)
            if method is not None and getattr(kind, name) is value:
                vars(module)[name] = MethodType(method, module)
        for name, value in list(vars(module).items()):
            if (method := _compiled(value)) is not None:
                vars(module)[name] = copy.deepcopy(method, copies)


def _compiled(value: Any) -> Any:
    """The function that a compiled one is of; None of anything else."""
    return getattr(value, "_torchdynamo_orig_callable", None) if inspect.isfunction(value) else None


def _settle(module: nn.Module) -> None:
    """Make what a parametrisation computes a plain parameter.

    ``remove_parametrizations`` would change the class, which copies share with their original.
    """
    computed = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in computed.items():
        module.register_parameter(name, nn.Parameter(value))


@contextmanager
def left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Tracing leaves stand-ins where a forward keeps values in its modules: what these were before
    comes back. What is inside of lists stays."""
    before = [
        (module, dict(vars(module)), dict(module._buffers), dict(module._parameters))
        for module in network.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, parameters in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._parameters.clear()
            module._parameters.update(parameters)
