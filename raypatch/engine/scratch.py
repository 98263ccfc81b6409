"""What an engine keeps between batches: memory to compute in, and what follows from its weights."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from raypatch.engine.cancelling import absolute
from raypatch.engine.dense_ops import Weights
from raypatch.engine.graph import Node


class Scratch:
    """Memory and derived values of one graph, by node; empty in copies that travel."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._views: dict[int, Tensor] = {}
        self._made: dict[int, Any] = {}
        self._absolute: dict[int, Node] = {}

    def apart(self) -> Scratch:
        """Memory of its own, and the same derived values."""
        other = Scratch()
        other._made, other._absolute = self._made, self._absolute
        return other

    def buffer(self, key: int, *shape: int, like: Tensor) -> Tensor:
        """Scratch memory of this shape, reused by the next batch that asks with the key.

        Memory from the allocator would be handed back to the system and cleared anew for
        every batch, which costs more than most operations.
        """
        last = self._views.get(key)
        if last is not None and last.shape == shape and last.dtype == like.dtype:
            return last
        size = prod(shape)
        held = self._buffers.get(key)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[key] = held
        self._views[key] = view = held[:size].view(shape)
        return view

    def forget_buffers(self) -> None:
        """Give the memory back."""
        self._buffers, self._views = {}, {}

    def once(self, node: Node, make: Callable[[], Any]) -> Any:
        """What follows from a node alone, made when it is first asked for."""
        if node.index not in self._made:
            self._made[node.index] = make()
        return self._made[node.index]

    def absolute(self, node: Node) -> Node:
        """A linear node with the absolute values of its weights."""
        if node.index not in self._absolute:
            self._absolute[node.index] = absolute(node)
        return self._absolute[node.index]

    def weights(self, node: Node) -> Weights:
        """Those of a linear or convolution node."""
        made: Weights = self.once(node, lambda: Weights.of(node.target))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: {} for name in vars(self)}
