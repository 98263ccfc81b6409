"""Whether a trace does what the network does: the same operations.

Tracing runs a forward on stand-ins. Where its Python looks at them, ``isinstance(x, Tensor)``,
``hasattr(x, ...)``, or asks whether it is being traced, it may take another way than on tensors;
and what is done around a forward (hooks of the root, a ``__call__``) is not traced. Values tell
little of that, as a ``clamp`` may change none of those at hand. So both are run on real inputs, and
every operation on what follows from these is written down.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from raypatch.engine.graph import CaptureError
from raypatch.engine.layers import Args, as_in_forward, map_tensors, tensors_in
from raypatch.engine.overwriting import memory_of, overwritten
from raypatch.engine.transformers import by_steps
from raypatch.errors import few

# Its name, plain arguments, and the shapes of what it gives.
Operation = tuple[str, str, tuple[tuple[int, ...], ...]]
# How Python reads a value: what it does with it is none of the network's operations.
READING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


def checked_overwrites(traced: fx.Graph, network: nn.Module, args: Args) -> dict[fx.Node, fx.Node]:
    """:func:`~raypatch.engine.overwriting.overwritten` of a trace; raises CaptureError where it
    does something else than the network."""
    given = map_tensors(Tensor.clone, args)
    with _Record(given) as of_trace:
        overwrites = overwritten(traced, network, given)
    given = map_tensors(Tensor.clone, args)
    with as_in_forward(network, given), by_steps(network), _Record(given) as of_network:
        network(*given)
    # Not in their order: a trace reads an attribute, as x.T, where it is used.
    counts = Counter(of_trace.operations), Counter(of_network.operations)
    if counts[0] != counts[1]:
        more, less = (sorted({name for name, *_ in a - b}) for a, b in (counts, counts[::-1]))
        raise CaptureError(
            f"torch.fx: the trace does {few(more) or 'nothing'} where the network does "
            f"{few(less) or 'nothing'}"
        )
    return overwrites


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is done with ``args`` and with what follows from them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # by which torch would import all of its compiler, for more than a second

    def __init__(self, args: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._following: set[int] = set()  # memory, which a view has in common with what it is of
        self._held: list[Any] = []  # so that no other value gets the same
        self._follow(args)

    def _follow(self, values: Any) -> None:
        self._held.append(values)
        self._following |= memory_of(values)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        follows = not self._following.isdisjoint(memory_of((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        if follows:
            self._follow(result)
            self.operations += _as_operations(func._schema.name, (args, kwargs), result)
        return result


def _as_operations(name: str, given: Any, result: Any) -> list[Operation]:
    plain = [x for x in tree_flatten(given)[0] if not isinstance(x, Tensor)]
    shapes = tuple(tuple(x.shape) for x in tensors_in(result))
    if name == "aten::unbind":  # where Python unpacks a value; a trace takes one part after another
        axis = plain[0] if plain else 0
        return [("aten::select", repr([axis, i]), (shape,)) for i, shape in enumerate(shapes)]
    return [] if name in READING else [(name, repr(plain), shapes)]
