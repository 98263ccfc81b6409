"""How long a patch stays sparse: the *chain* of nodes after a layer whose every feature belongs to
one of its neurons, by shapes alone."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from raypatch.engine.graph import Node
from raypatch.engine.input_axes import Following, entries_first, per_input, place_of
from raypatch.engine.layers import tensors_in
from raypatch.engine.local_rules import LOCAL_RULES
from raypatch.engine.values import Ownership

# By node in order, which neuron owns each feature; None for a tuple of tensors.
Chain = dict[int, "Ownership | None"]


class Chains:
    """The chains of a graph's nodes, each found when it is first asked for.

    ``sample`` holds every node's value in a run on one input, ``readers`` which nodes read it, and
    ``neuron_axes`` along which axis of a layer's value its neurons are. The output logits are
    a layer of their own, patched after the last node.
    """

    def __init__(
        self,
        nodes: list[Node],
        sample: list[Any],
        readers: dict[int, list[int]],
        following: Following,
        neuron_axes: dict[int, int],
    ) -> None:
        self.nodes = nodes
        self.sample = sample
        self.depends, self.axes = following.depends, following.axes
        self.neuron_axes = neuron_axes
        self._readers = readers
        self._found: dict[int, Chain] = {}
        # Of every node and the output logits, the bits of those that it depends on.
        self._before: list[int] = []
        for node in nodes:
            self._before.append(reduce(or_, (self._with(i) for i in node.inputs), 0))
        self._before.append(self._with(len(nodes) - 1))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found on demand."""
        return {**self.__dict__, "_found": {}}

    def after(self, entry: int) -> Chain:
        """Nodes that stay sparse after a patch at ``entry`` alone."""
        if entry not in self._found:
            self._found[entry] = self._build(entry)
        return self._found[entry]

    def ends(self, entry: int, patched: Collection[int]) -> tuple[int, ...]:
        """Nodes of the chain that something outside it reads, or that are the output.

        Where others of ``patched`` meet the chain it ends before: two patches that change nothing
        alone may do so together, as where a sum of both goes through a ReLU.
        """
        others = [other for other in patched if not self._is_before(other, entry)]
        others.remove(entry)
        own = {
            node
            for node in self.after(entry)
            if not any(node == other or self._is_before(other, node) for other in others)
        }
        last = len(self.nodes) - 1
        return tuple(
            node
            for node in sorted(own)
            if node >= last or any(reader not in own for reader in self._readers[node])
        )

    def _with(self, node: int) -> int:
        return self._before[node] | 1 << node

    def _is_before(self, node: int, later: int) -> bool:
        """Whether what ``later`` gives depends on ``node``; all nodes are before the logits."""
        return bool(self._before[later] >> node & 1)

    def widest(self, entry: int) -> int:
        """How many features of one input a neuron has where it has most, while it is sparse."""
        found = [of for of in self.after(entry).values() if of is not None]
        return max(of.per_input * of.owner.numel() // of.neurons for of in found)

    def _build(self, entry: int) -> Chain:
        node, axis = min(entry, len(self.nodes) - 1), self.neuron_axes[entry]
        inputs = self.axes[node]
        value, entries = entries_first(self.sample[node], inputs), per_input(inputs)
        axis = place_of(axis, inputs) if entries is None else axis
        view = [1] * value.dim()
        view[axis] = size = value.shape[axis]
        owner = torch.arange(size).view(view).expand(value.shape)
        first = Ownership(owner[0].to(value.device), size, entries or 1)
        chain: Chain = {entry: first}
        if entry == node and entries is not None:
            tracker = _Tracker(self, entry, owner, first)
            for later in self.nodes[entry + 1 :]:
                tracker.visit(later)
            chain.update(tracker.chain)
        return chain


class _Tracker:
    """Follows one layer's patch through local operations; also what local rules may ask."""

    def __init__(self, chains: Chains, entry: int, owner: Tensor, first: Ownership) -> None:
        self.chains = chains
        self.chain: Chain = {}
        self.owners: dict[int, Any] = {entry: owner}
        self.lost: set[int] = set()
        self.neurons, self.n_first = first.neurons, first.owner.numel()

    def of(self, node: int) -> Tensor | None:
        return self.owners.get(node)

    def varies(self, node: int) -> bool:
        return self.chains.depends[node] and isinstance(self.chains.sample[node], Tensor)

    def argument(self, node: int) -> Any:
        if node in self.owners:
            return self.owners[node]
        value = self.chains.sample[node]
        if isinstance(value, Tensor) and (self.varies(node) or value.is_floating_point()):
            return torch.full(value.shape, -1)
        return value.cpu() if isinstance(value, Tensor) else value

    def visit(self, node: Node) -> None:
        """Add a node to the chain if the patch reaches it and stays sparse."""
        if not self.chains.depends[node.index]:
            return
        if any(i in self.lost for i in node.inputs):
            self.lost.add(node.index)
            return
        value = self.chains.sample[node.index]
        if not any(i in self.owners for i in node.inputs) or not tensors_in(value):
            return  # base, or a size, which no patch changes
        axes, values = (tree_flatten(x)[0] for x in (self.chains.axes[node.index], value))
        # Results that an operation does not need, as statistics, are empty.
        counts = {per_input(a) for a, v in zip(axes, values) if not _is_empty(v)}
        entries = counts.pop() if len(counts) == 1 else None
        owners = None if entries is None else self._owners(node, value)
        if entries is None or owners is None:
            self.lost.add(node.index)
            return
        if isinstance(value, Tensor) and self._is_lopsided(owners[0]):
            self.lost.add(node.index)
            return
        self.owners[node.index] = owners
        self.chain[node.index] = None
        if isinstance(value, Tensor):
            of = Ownership(owners[0].to(value.device), self.neurons, entries)
            self.chain[node.index] = of

    def _is_lopsided(self, owner: Tensor) -> bool:
        """Whether few neurons own so much that a table of all, each with as many features, would
        be far larger than the value."""
        counts = torch.bincount(owner[owner >= 0], minlength=self.neurons)
        return self.neurons * int(counts.max()) > 2 * max(owner.numel(), self.n_first)

    def _owners(self, node: Node, value: Any) -> Any:
        rule = LOCAL_RULES.get(node.key)
        if rule is None:
            return None
        first = value if isinstance(value, Tensor) else tree_flatten(value)[0][0]
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        try:
            owners = rule(node, self, shape)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # an unusual form of the operation: dense is always right
        if isinstance(value, Tensor):
            good = isinstance(owners, Tensor) and owners.shape == shape
            good = good and owners.dtype == torch.int64 and bool((owners == owners[:1]).all())
            return owners.clone() if good else None
        same = isinstance(owners, (tuple, list)) and len(owners) == len(value)
        if same and all(o.shape == v.shape for o, v in zip(owners, value)):
            return tuple(owners)
        return None


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.numel()
