"""Forwards of torch's transformer modules that can be traced: the same steps, without what torch
decides from its inputs' values and types on the way (a fused kernel, nested tensors, whether a mask
is causal), none of which changes the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from raypatch.engine.layers import is_altered


def _encoder(
    self: nn.TransformerEncoder,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: Any = None,
) -> Any:
    for layer in self.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if self.norm is None else self.norm(src)


def _encoder_layer(
    self: nn.TransformerEncoderLayer,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    def attended(x: Any) -> Any:
        return self._sa_block(x, src_mask, src_key_padding_mask)

    if self.norm_first:
        src = src + attended(self.norm1(src))
        return src + self._ff_block(self.norm2(src))
    src = self.norm1(src + attended(src))
    return self.norm2(src + self._ff_block(src))


def _decoder(
    self: nn.TransformerDecoder,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: bool = False,
) -> Any:
    for layer in self.layers:
        tgt = layer(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        )
    return tgt if self.norm is None else self.norm(tgt)


FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoder: _encoder,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerDecoder: _decoder,
    nn.TransformerDecoderLayer: nn.TransformerDecoderLayer.forward,
}


def steps_of(module: nn.Module) -> Callable[..., Any] | None:
    """What to trace in the place of its forward; None for that itself."""
    return None if is_altered(module) else FORWARDS.get(type(module))


@contextmanager
def by_steps(network: nn.Module) -> Iterator[None]:
    """Within, the network runs by the same steps as it is traced by."""
    changed = [(module, steps) for module in network.modules() if (steps := steps_of(module))]
    for module, steps in changed:
        vars(module)["forward"] = partial(steps, module)
    try:
        yield
    finally:
        for module, _ in changed:
            del vars(module)["forward"]
