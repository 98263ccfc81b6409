"""Which modules of a network are layers, and what their neurons are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from raypatch.definitions import OUTPUT_LOGITS

Args = tuple[Any, ...]
WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
# Called with the number of the layer's call within one forward and the layer's output;
# what it returns, if anything, replaces that output.
Hook = Callable[[int, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Layer:
    """A module with weights. Its neurons lie along ``axis`` of its first call's output."""

    name: str
    neurons: int
    axis: int
    kind: str
    output_shape: tuple[int, ...]  # of one input, without the batch dimension

    def axis_of(self, output: Tensor) -> int:
        """Along which axis of what one call of it gives its neurons lie: a linear layer may be
        called with values of more axes than the first time."""
        return output.dim() - 1 if self.axis == len(self.output_shape) else self.axis


def owns_weights(module: nn.Module) -> bool:
    """Whether the module itself holds a parameter of more than one dimension, be it one that a
    parametrisation (as spectral norm is) makes of others."""
    if isinstance(module, ParametrizationList):
        return False
    held = [p for p in module._parameters.values() if p is not None]
    if is_parametrized(module):
        held += [getattr(module, name) for name in module.parametrizations]  # type: ignore[union-attr]
    return any(isinstance(p, Tensor) and p.dim() > 1 for p in held)


def is_altered(module: nn.Module) -> bool:
    """Whether calling it does something else than its class says: it has hooks, or a forward of its
    own. Torch's older ways to normalise weights (spectral norm) are hooks, but change none of what
    it gives."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    own = not all(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks)
    return own or "forward" in vars(module) or _is_patched(type(module))


def _is_patched(kind: type[nn.Module]) -> bool:
    """Whether somebody has given a class of torch's another forward."""
    of_torch, code = kind.__module__.startswith("torch."), kind.forward
    return of_torch and not str(getattr(code, "__module__", "torch.")).startswith("torch.")


class _Widened(TorchFunctionMode):
    """Where a forward asks for float32, it gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **kwargs)


def _wide(argument: Any) -> Any:
    return WIDER.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def widened(arguments: Any) -> Any:
    """Arguments with float64 in the place of float32."""
    return tree_map(_wide, arguments)


def forward(network: nn.Module, args: Args) -> Any:
    """The network's outputs; it gets inputs of its own, which it may overwrite. A forward that
    squeezes a lone input's axis away gets it back."""
    fresh = map_tensors(Tensor.clone, args)
    with as_in_forward(network, fresh):
        output = network(*fresh)
    if isinstance(output, Tensor) and output.dim() == 1:
        is_lone = all(len(x) == 1 for x in tensors_in(args) if x.dim())
        return output.unsqueeze(0) if is_lone else output
    return output


@contextmanager
def as_in_forward(network: nn.Module, args: Args) -> Iterator[None]:
    """Within, what a forward makes lies where its inputs do; and what it makes or casts as float32
    is float64, where the network or what it gets is."""
    given = tensors_in(args)
    held = [*given, *islice(network.parameters(), 1)]
    with ExitStack() as stack:
        if held and held[0].device.type != "cpu":
            stack.enter_context(held[0].device)
        if any(x.dtype is torch.float64 for x in given) or _is_float64(network):
            stack.enter_context(float64_is_default())
            stack.enter_context(_Widened())
        yield


def _is_float64(network: nn.Module) -> bool:
    """Whether all its floating parameters are, and there are any."""
    floating = (p for p in network.parameters() if p.is_floating_point())
    first = next(floating, None)
    if first is None or first.dtype is not torch.float64:
        return False
    return all(p.dtype is torch.float64 for p in floating)


_in_float64 = 0
_before_float64 = torch.float32
_default_lock = threading.Lock()


@contextmanager
def float64_is_default() -> Iterator[None]:
    """What a forward makes without a type is float64. The default is the whole process's: the last
    of several threads puts it back."""
    global _in_float64, _before_float64
    with _default_lock:
        if _in_float64 == 0:
            _before_float64 = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
        _in_float64 += 1
    try:
        yield
    finally:
        with _default_lock:
            _in_float64 -= 1
            if _in_float64 == 0:
                torch.set_default_dtype(_before_float64)


def without_nested_tensors(network: nn.Module) -> nn.Module:
    """The network, its transformer encoders computing padded places like all others.

    Torch packs them away only where no gradient is asked for, and with them what hooks would see;
    with gradients, as in training, it computes them too.
    """
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = False
            module.use_nested_tensor = False
    return network


def as_args(inputs: Any) -> Args:
    """Positional arguments of ``forward``: a tuple or list of several, anything else alone, as a
    named tuple is."""
    several = isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields")
    return tuple(inputs) if several else (inputs,)


def map_tensors(function: Callable[[Tensor], Tensor], args: Any) -> Any:
    """Arguments with the function of every tensor in place of it."""
    if type(args) is tuple and all(type(x) is Tensor for x in args):
        return tuple(map(function, args))  # as a rule; a tree takes many times as long
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, args)


def tensors_in(value: Any) -> list[Tensor]:
    """A value that is a tensor, or those that it has in it."""
    if type(value) is tuple and all(type(x) is Tensor for x in value):
        return list(value)  # as a rule; a tree takes many times as long
    leaves = [value] if isinstance(value, Tensor) else tree_flatten(value)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def first_tensor(output: Any) -> Tensor | None:
    """What a layer's neurons are read from: its output, or the first of several outputs; None where
    that is no tensor, or one of several at once (of torch.vmap) which cannot be kept."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor) or not first.dim():
        return None
    return None if torch._C._functorch.is_functorch_wrapped_tensor(first) else first


@contextmanager
def hooked(network: nn.Module, hooks: dict[str, Hook]) -> Iterator[None]:
    """Forward hooks by layer name for the time of a ``with``; none is left behind."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            calls = iter(range(1 << 62))

            def forward_hook(
                _: nn.Module, __: Any, output: Any, hook: Hook = hook, calls: Any = calls
            ) -> Any:
                first = first_tensor(output)
                replaced = None if first is None else hook(next(calls), first)
                if replaced is None or isinstance(output, Tensor):
                    return replaced
                return _of_kind(output, (replaced, *output[1:]))

            handle = network.get_submodule(name).register_forward_hook(forward_hook)
            stack.callback(handle.remove)
        yield


def _of_kind(several: Any, values: tuple[Any, ...]) -> Any:
    """The values as a list, tuple or named tuple, as ``several`` is."""
    kind = type(several)
    return kind(*values) if hasattr(several, "_fields") else kind(values)


def find_layers(network: nn.Module, args: Args) -> dict[str, Layer]:
    """Layers that a forward on ``args`` really calls, in the order of their first call.

    Neurons are units of a linear layer, output channels of a convolution, and the last
    axis of anything else.
    """
    found: dict[str, Layer] = {}

    def recorder(name: str, module: nn.Module) -> Hook:
        def record(_: int, output: Tensor) -> None:
            axis = 1 if isinstance(module, _ConvNd) else output.dim() - 1
            found.setdefault(
                name,
                Layer(
                    name, output.shape[axis], axis, type(module).__name__, tuple(output.shape[1:])
                ),
            )

        return record

    hooks = {
        name: recorder(name, module)
        for name, module in network.named_modules()
        if name and owns_weights(module)
    }
    with torch.no_grad(), hooked(network, hooks):
        forward(network, args)
    return found


def record_activations(network: nn.Module, args: Args, names: list[str]) -> dict[str, list[Tensor]]:
    """Outputs of the named layers, one a call, in an unpatched forward; copies.

    The key ``output_logits`` holds the network's own output.
    """
    taken: dict[str, list[Tensor]] = {name: [] for name in names}

    def recorder(name: str) -> Hook:
        # An in-place activation after the layer would change what is kept, hence the copy.
        return lambda _, output: taken[name].append(output.clone())

    with torch.no_grad(), hooked(network, {n: recorder(n) for n in names if n != OUTPUT_LOGITS}):
        taken[OUTPUT_LOGITS] = [forward(network, args)]
    return taken
