"""Networks whose experiments cannot be stacked: one would decide for others, or reach them.

``if h.max() > 20`` is one decision for the whole batch, ``h / h.amax()`` one number: one
experiment's values would make it for all that are stacked with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine.chosen import let_meet
from raypatch.engine.graph import CaptureError
from raypatch.engine.guards import distributions_unchecked, truth_that_goes_on
from raypatch.engine.layers import (
    Args,
    Hook,
    forward,
    hooked,
    map_tensors,
    record_activations,
    tensors_in,
)
from raypatch.errors import one_line

Poison = Callable[[Tensor], Tensor]
READS_VALUES = {
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.is_nonzero),
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.equal, Tensor.allclose),
    *(torch.is_nonzero, torch.equal, torch.allclose, Tensor.__contains__, Tensor.__dlpack__),
}
# How long what these give is, depends on values; so does what is computed from that.
SIZED_BY_VALUES = {
    *("nonzero", "argwhere", "masked_select", "bincount", "unique", "unique_consecutive"),
}
# That write into their first argument as ``h += 1`` does.
OPERATORS = {"add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or", "xor"}
READS_SIZES = {Tensor.__len__, Tensor.size, Tensor.numel, torch.numel, Tensor.shape.__get__}  # type: ignore[attr-defined]


# What inputs become: what arithmetic passes on, and what comparisons do.
POISONS = (lambda x: torch.full_like(x, float("nan")), lambda x: x + 1000, lambda x: x - 1000)


def refuse_mixing(network: nn.Module, layers: list[str], args: Args) -> None:
    """Raises CaptureError where the experiments of a batch would not each be by itself."""
    reasons = []
    for poison in POISONS:
        try:
            mixes = _mixes_inputs(network, layers, args, poison)
        except Exception as error:  # a network's own code, which may refuse such numbers
            reasons.append(f"whether it mixes inputs is not known: {one_line(error)}")
            continue
        if mixes:
            raise CaptureError("what it gives for one input depends on others")
    if len(reasons) == len(POISONS):
        raise CaptureError(reasons[-1])


def _mixes_inputs(network: nn.Module, layers: list[str], args: Args, poison: Poison) -> bool:
    """Whether, in a forward on ``args`` twice over, anything of one half reaches the outputs of the
    other, where its inputs and what every layer makes of it are poisoned."""
    alone = record_activations(network, args, [*layers, OUTPUT_LOGITS])
    expected = alone[OUTPUT_LOGITS][0]
    twice = map_tensors(lambda x: torch.cat([x, x]) if x.dim() else x, args)
    for half in (0, 1):
        poisoned = partial(_poisoned, half=half, poison=poison)
        hooks = {name: _where_stacked(alone[name], poisoned) for name in layers}
        with torch.no_grad(), distributions_unchecked(), hooked(network, hooks):
            other = forward(network, map_tensors(poisoned, twice)).chunk(2)[1 - half]
        if not torch.allclose(other, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
            return True
    return False


def _where_stacked(alone: list[Tensor], poisoned: Poison) -> Hook:
    """A hook for a layer that gives ``alone`` where nothing is stacked: it may see no input."""
    return lambda call, output: poisoned(output) if len(output) == 2 * len(alone[call]) else None


def _poisoned(x: Tensor, half: int, poison: Poison) -> Tensor:
    """A copy, of which the first or second half is poisoned."""
    if not x.dim() or not x.is_floating_point():
        return x
    halves = list(x.chunk(2))
    halves[half] = poison(halves[half])
    return torch.cat(halves)


class Decisions(NamedTuple):
    """What values decide in a forward: what Python does, as it reads them (None where it cannot be
    watched); how large something is; and which inputs meet in one number."""

    of_python: bool | None
    of_sizes: bool
    of_meetings: bool


def decided_by_values(network: nn.Module, args: Args) -> Decisions:
    """What the values of ``args``, and of what follows from them, decide."""
    watch = _Watch()

    def start(_: nn.Module, given: Any) -> None:
        watch.follow(given)

    handle = network.register_forward_pre_hook(start)
    try:
        with torch.no_grad(), distributions_unchecked(), watch:
            output = forward(network, args)
        watch.end(output)
    except Exception:  # torch.cond and the like go no further under a mode
        return Decisions(True if watch.found else None, True, watch.meet)
    finally:
        handle.remove()
    return Decisions(watch.found, watch.has_sized, watch.meet)


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = self.has_sized = self.meet = False
        self._following: dict[int, Tensor] = {}  # held, so that no other gets the same id
        self._sized: set[int] = set()  # of those, whose sizes depend on values
        self._met: set[int] = set()  # of those, in which inputs so chosen have met

    def follow(self, value: Any) -> None:
        self._following.update({id(tensor): tensor for tensor in tensors_in(value)})

    def end(self, output: Any) -> None:
        """What it all came to."""
        self.meet |= not self._met.isdisjoint(map(id, tensors_in(output)))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(leaf) for leaf in tree_flatten((args, kwargs))[0]}
        if not given.isdisjoint(self._following):
            is_sized = not given.isdisjoint(self._sized)
            self.found |= func in READS_VALUES and not _only_guards(func)
            self.found |= func in READS_SIZES and is_sized
            self.follow(result)
            if self._inputs_meet(func, args, kwargs, result, given):
                self._met.update(map(id, tensors_in(result)))
                # What else lies in the memory that is written into, is not followed.
                self.meet |= _writes(str(getattr(func, "__name__", "")), kwargs)
            if is_sized or self._sizes_by_values(func, args):
                self.has_sized = True
                self._sized.update(map(id, tensors_in(result)))
        return result

    def _inputs_meet(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any, given: set[int]
    ) -> bool:
        if not given.isdisjoint(self._met):
            return True
        if getattr(func, "__name__", "").strip("_") == "masked_scatter":
            return any(id(x) in self._following for x in [*args[1:2], kwargs.get("mask")])
        if given.isdisjoint(self._sized):
            return False

        def is_sized(value: Any) -> bool:
            return not self._sized.isdisjoint(map(id, tensors_in(value)))

        return let_meet(func, args, kwargs, result, is_sized)

    def _sizes_by_values(self, func: Any, args: tuple[Any, ...]) -> bool:
        name = getattr(func, "__name__", "")
        choosing: Any = []
        if name == "where":
            choosing = args if len(args) == 1 else []
        elif name == "repeat_interleave":
            choosing = args[1:2]
        elif func is Tensor.__getitem__:
            choosing = [index for index in tensors_in(args[1:]) if index.dtype is torch.bool]
        elif name in SIZED_BY_VALUES:
            return True
        return any(id(one) in self._following for one in choosing)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch's of this name writes into an argument."""
    if name.endswith("__"):
        name = name.strip("_")
        return name == "setitem" or (name[:1] == "i" and name[1:] in OPERATORS)
    return name.endswith("_") or kwargs.get("out") is not None


def _only_guards(func: Any) -> bool:
    if func is not Tensor.__bool__:
        return False
    asking = sys._getframe(1)
    while asking.f_back is not None and asking.f_code.co_name == "__torch_function__":
        asking = asking.f_back  # past the modes' own functions
    return truth_that_goes_on(asking, forward.__code__) is not None
