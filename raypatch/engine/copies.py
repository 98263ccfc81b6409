"""Copies of a network: for good, in another precision, and one that tracing leaves as it was."""

from __future__ import annotations

import copy
import inspect
import threading
from collections import deque
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from raypatch.engine.layers import without_nested_tensors
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
    """Raises CallsOriginalError where this thread calls one of these modules and it is one that
    behaves otherwise in training, before it runs: a copy does where its code finds the original
    by a global name."""
    thread = threading.get_ident()

    def refuse(module: nn.Module, _: Any) -> None:
        is_told = module.training and isinstance(module, (_NormBase, _DropoutNd))
        if is_told and threading.get_ident() == thread and module in originals:
            raise CallsOriginalError(
                f"the network's code calls a {type(module).__name__} of the network itself, in "
                "training mode, where a copy of it cannot follow (by a global name, a class, a "
                "cache): call network.eval() first, or reach it through self"
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
    copies: dict[int, Any] = {id(t): t.detach().clone() for t in _with_gradients(network)}
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
    _Rebinding(copies).look_into(own)
    for module in own.modules():  # tensors that are neither parameters nor buffers
        held_apart = {n: converted(t) for n, t in vars(module).items() if isinstance(t, Tensor)}
        vars(module).update(held_apart)
    own._apply(converted)  # type: ignore[no-untyped-call]
    return without_nested_tensors(own.eval())


def _with_gradients(network: nn.Module) -> Iterator[Tensor]:
    """Tensors that a forward with gradients has left in the network's modules and objects."""
    held: list[Any] = [network]
    seen: set[int] = set()
    while held:
        value = held.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, dict):
            held += dict.values(value)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            held += value
        elif isinstance(value, partial):
            held += [*value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            held.append(value.__self__)
        elif isinstance(getattr(value, "__dict__", None), dict):
            held.append(vars(value))


class _Rebinding:
    """Lets functions in a copy hold on to copies where theirs were the originals, as that of
    ``self.head = lambda x: self.out(x)`` does: copying leaves functions as they are.

    ``copies`` are by the id of what they are of. What holds functions is changed in place, so that
    what is shared stays shared; and so are the variables that functions share.
    """

    def __init__(self, copies: dict[int, Any]) -> None:
        self._copies = copies
        self._own = {id(value) for key, value in copies.items() if key != id(copies)}
        self._cells: dict[int, CellType] = {}
        self._seen: set[int] = set()

    def look_into(self, value: Any) -> Any:
        """What takes the value's place: another for a function or a tuple with one in it that
        reaches the original, else the value itself."""
        if isinstance(value, FunctionType):
            return self._of_copy(value)
        if isinstance(value, partial):
            return self._of_copy(value) if self._reaches(value.func, set()) else value
        if type(value) is tuple:
            items = tuple(map(self.look_into, value))
            return value if all(a is b for a, b in zip(items, value)) else items
        if id(value) not in self._own or id(value) in self._seen:
            return value
        self._seen.add(id(value))
        if isinstance(value, list):
            value[:] = [self.look_into(item) for item in value]
        elif isinstance(value, dict):
            for key, item in list(value.items()):
                if (other := self.look_into(item)) is not item:
                    value[key] = other
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
            for key, item in list(vars(value).items()):
                if (other := self.look_into(item)) is not item:
                    vars(value)[key] = other
        return value

    def _held_by(self, value: Any) -> list[Any]:
        """What a function, or something that it may hold, holds."""
        if isinstance(value, FunctionType):
            given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            return [*map(_content, value.__closure__ or ()), *given, *vars(value).values()]
        if isinstance(value, MethodType):
            return [value.__self__]
        if isinstance(value, partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, dict):
            return list(value.values())
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            return list(value)
        is_plain = type(value).__module__.split(".")[0] not in ("torch", "builtins", "numpy")
        return list(vars(value).values()) if is_plain and hasattr(value, "__dict__") else []

    def _reaches(self, value: Any, looked_at: set[int]) -> bool:
        """Whether it leads to something of the original that there is a copy of."""
        if self._copies.get(id(value), value) is not value:
            return True
        if id(value) in looked_at or isinstance(value, (type, ModuleType)):
            return False
        looked_at.add(id(value))
        return any(self._reaches(held, looked_at) for held in self._held_by(value))

    def _of_copy(self, value: Any) -> Any:
        """The same for the copy, where it reaches the original."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if not self._reaches(value, set()):
            return value
        if isinstance(value, FunctionType):
            return self._rebound(value)
        if isinstance(value, partial):
            other = partial(
                self._of_copy(value.func),
                *map(self._of_copy, value.args),
                **{name: self._of_copy(item) for name, item in value.keywords.items()},
            )
            vars(other).update(vars(value))
            return other
        try:
            made = copy.deepcopy(value, self._copies)
        except Exception:  # what cannot be copied stays the original's
            return value
        self._own.add(id(made))
        return self.look_into(made)

    def _rebound(self, function: FunctionType) -> FunctionType:
        closure, fill = [], []
        for cell in function.__closure__ or ():
            if id(cell) in self._cells:
                closure.append(self._cells[id(cell)])
            elif self._reaches(_content(cell), set()):
                closure.append(self._cells.setdefault(id(cell), CellType()))
                fill.append(cell)
            else:
                closure.append(cell)
        code, context = function.__code__, function.__globals__
        other = FunctionType(code, context, function.__name__, None, tuple(closure) or None)
        self._copies[id(function)] = other  # before what it holds, which may be itself
        for cell in fill:
            self._cells[id(cell)].cell_contents = self._of_copy(_content(cell))
        other.__defaults__ = tuple(map(self._of_copy, function.__defaults__ or ())) or None
        named = function.__kwdefaults__ or {}
        other.__kwdefaults__ = {k: self._of_copy(v) for k, v in named.items()} or None
        vars(other).update({k: self._of_copy(v) for k, v in vars(function).items()})
        return other


def _content(cell: CellType) -> Any:
    """What a variable of a function holds, None where nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


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
