"""Copies of a network: for good, in another precision, and one that tracing leaves as it was."""

from __future__ import annotations

import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten

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


@contextmanager
def none_called(originals: Container[nn.Module]) -> Iterator[None]:
    """Raises CallsOriginalError where this thread calls one of these modules, before it runs: a
    copy does where its code finds the original by a global name."""
    thread = threading.get_ident()

    def refuse(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread and module in originals:
            raise CallsOriginalError(
                f"the network's code calls a {type(module).__name__} of the network itself by a "
                "global name or through a class, not through self; a copy of it cannot be patched"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class CallsOriginalError(InputError):
    """A copy of a network calls the original."""


def copied(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode and not compiled, with floating numbers of ``dtype``, complex ones
    of its size; what is float64 in a network that is not, as the statistics of its inputs, stays
    so."""
    # What an earlier forward with gradients left behind cannot be copied as it is.
    held = [t for module in network.modules() for t in tensors_in(vars(module)) if not t.is_leaf]
    copies: dict[int, Any] = {id(t): t.detach().clone() for t in held}
    own = copy.deepcopy(network, copies)
    for module in own.modules():
        vars(module).update({n: _rebound(value, copies) for n, value in vars(module).items()})

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


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A value of a copy, with functions that hold on to copies where theirs were the originals, as
    that of ``self.head = lambda x: self.out(x)`` does: copying leaves functions as they are.

    ``copies`` are by the id of what they are of.
    """
    if isinstance(value, FunctionType):
        return _rebound_function(value, copies)
    if isinstance(value, partial) and isinstance(value.func, FunctionType):
        function = _rebound_function(value.func, copies)
        return partial(function, *value.args, **value.keywords)
    if type(value) in (list, tuple):
        return type(value)(_rebound(item, copies) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _rebound(item, copies)) for key, item in value.items())
    return value


def _rebound_function(function: FunctionType, copies: dict[int, Any]) -> FunctionType:
    if id(function) in copies:
        return copies[id(function)]
    copies[id(function)] = function

    def of_copy(held: Any) -> Any:
        if id(held) in copies:
            return copies[id(held)]
        leaves = tree_flatten(held)[0] if type(held) in (list, tuple, dict) else []
        if any(id(leaf) in copies for leaf in leaves):
            return copy.deepcopy(held, copies)
        return _rebound_function(held, copies) if isinstance(held, FunctionType) else held

    try:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a name that nothing has been given yet
        return function
    given, named = function.__defaults__ or (), function.__kwdefaults__ or {}
    own = [of_copy(value) for value in held]
    own_given = tuple(map(of_copy, given))
    own_named = {name: of_copy(value) for name, value in named.items()}
    before = [*held, *given, *named.values()]
    if all(a is b for a, b in zip(before, [*own, *own_given, *own_named.values()])):
        return function
    code, context = function.__code__, function.__globals__
    closure = tuple(map(CellType, own)) or None
    rebound = FunctionType(code, context, function.__name__, own_given or None, closure)
    rebound.__kwdefaults__ = own_named or None
    rebound.__dict__.update(function.__dict__)
    copies[id(function)] = rebound
    return rebound


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
