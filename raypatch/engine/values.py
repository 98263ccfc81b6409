"""What a value in a patched batch can be.

Shapes: E experiments of a batch, N inputs, J neurons of a patched layer, m features of one
neuron, R rows (one row is one experiment on one input). Where inputs share axis 0 with frames or
the like, a value has A entries for each input there and for each row; else A is 1.

* *base*: the same as in the unpatched target run; never recomputed, only looked up.
* *source*: the same as in the unpatched source run; likewise.
* *sparse* (:class:`Sparse`): base but for the features that the patched neurons own.
* *dense*: a tensor of R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raypatch.engine.input_axes import Axis, inputs_at, inputs_first
from raypatch.engine.plan import Selection

BITS = {
    torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32,
    torch.float64: torch.int64,
}  # fmt: skip


@dataclass
class Ownership:
    """Which neuron of a patched layer each feature of a node belongs to.

    Depends on shapes only, so it is found once and serves all inputs.
    """

    owner: Tensor  # [*shape] int64: neuron of the patched layer, -1 where none
    neurons: int  # J
    per_input: int = 1  # A; all entries of an input have the same owners

    @cached_property
    def positions(self) -> Tensor:
        """Features of each neuron, ``[J, m]`` into the flattened shape; -1 fills up."""
        owner = self.owner.flatten()
        order = torch.argsort(owner, stable=True)
        order = order[owner[order] >= 0]
        counts = torch.bincount(owner[order], minlength=self.neurons)
        width = int(counts.max()) if len(counts) else 0
        positions = torch.full((self.neurons, width), -1, device=owner.device)
        starts = torch.cumsum(counts, 0) - counts
        slot = torch.arange(len(order), device=owner.device) - starts[owner[order]]
        positions[owner[order], slot] = order
        return positions

    @cached_property
    def is_padded(self) -> bool:
        """Whether some neuron owns fewer features than others."""
        return bool((self.positions < 0).any())

    @cached_property
    def is_plain(self) -> bool:
        """Whether neuron j's features are the j-th run of the flattened shape."""
        whole = self.positions.numel() == self.owner.numel()
        ascending = torch.arange(self.owner.numel(), device=self.owner.device)
        return whole and torch.equal(self.positions.flatten(), ascending)

    @cached_property
    def channel_axis(self) -> int | None:
        """The axis (batch is 0) along which index j is neuron j, if there is one."""
        for axis, size in enumerate(self.owner.shape):
            if size == self.neurons:
                view = [1] * self.owner.dim()
                view[axis] = size
                channels = torch.arange(size, device=self.owner.device).view(view)
                if torch.equal(self.owner, channels.expand_as(self.owner)):
                    return axis + 1
        return None

    def table(self, tensor: Tensor) -> Tensor:
        """``[N * A, *shape]`` to ``[J, N * A, m]``, each neuron's features together."""
        positions = self.positions
        flat = tensor.reshape(len(tensor), -1)
        if self.is_plain:
            return flat.view(len(flat), *positions.shape).transpose(0, 1).contiguous()
        taken = flat.index_select(1, positions.clamp(min=0).flatten())
        taken = taken.view(len(flat), *positions.shape).transpose(0, 1).contiguous()
        return taken.masked_fill(positions[:, None, :] < 0, 0) if self.is_padded else taken


@dataclass
class Sparse:
    """A node that differs from base only where patched neurons own its features.

    Every neuron of the patched layer is described at once: ``full`` is the node's value if
    *all* of them were patched. Because each feature depends on its own neuron only, neuron
    j's features in ``full`` are what they are when j alone is patched.
    """

    base: Tensor  # [N * A, *shape]
    full: Tensor  # [N * A, *shape]
    of: Ownership

    @cached_property
    def values(self) -> Tensor:
        """``[J, N * A, m]``: what each neuron's features become."""
        return self.of.table(self.full)

    @cached_property
    def delta(self) -> Tensor:
        """``[J, N * A, m]``: by how much they change; exactly zero where nothing does."""
        is_mask = self.full.dtype == torch.bool
        return self.of.table(self.full ^ self.base if is_mask else self.full - self.base)

    def active(self, signs: bool) -> Tensor:
        """``[J, N]`` bool: whether patching the neuron changes this node at all; with ``signs`` be
        it the sign of a zero."""
        differs = self.of.table(_differs(self.full, self.base)) if signs else self.delta != 0
        changed = differs[:, :, 0] if differs.shape[2] == 1 else differs.any(-1)
        entries = self.of.per_input
        return changed if entries == 1 else changed.view(len(changed), -1, entries).any(-1)


def _differs(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors of one type are not the same bit for bit."""
    if x.is_complex():
        return _differs(torch.view_as_real(x), torch.view_as_real(y)).any(-1)
    bits = BITS.get(x.dtype)
    return x != y if bits is None else x.view(bits) != y.view(bits)


@dataclass
class Batch:
    """Experiments of one signature: the same layers, the same number of neurons in each."""

    n_experiments: int
    n_inputs: int
    index: dict[str, Selection]
    rows: Tensor | None = None  # flat e * N + n of the rows that are computed; None = all
    unchanged_are_exact: bool = False  # computed rows that do not change equal base bit for bit

    @property
    def n_rows(self) -> int:
        return self.n_experiments * self.n_inputs if self.rows is None else self.rows.shape[0]

    @cached_property
    def row_input(self) -> Tensor:
        assert self.rows is not None
        return self.rows % self.n_inputs

    def keep(self, structured: Tensor, entries: int = 1, out: Tensor | None = None) -> Tensor:
        """``[E, N * A, ...]`` to rows ``[R * A, ...]``; ``entries`` is A."""
        flat = structured.flatten(0, 1)
        if self.rows is None:
            return flat
        if entries == 1:
            return torch.index_select(flat, 0, self.rows, out=out)
        flat = flat.view(-1, entries, *flat.shape[1:])
        out = None if out is None else out.view(-1, *flat.shape[1:])
        return torch.index_select(flat, 0, self.rows, out=out).flatten(0, 1)

    def repeated(self, per_input: Tensor, axis: Axis = 0) -> Tensor:
        """``[N, ...]``, the same for every experiment, to rows ``[R, ...]``; a copy. Inputs and
        rows lie along ``axis``."""
        if axis:
            return inputs_at(axis, self.repeated(inputs_first(per_input, axis)))
        if self.rows is None:
            copies = per_input.expand(self.n_experiments, *per_input.shape)
            return copies.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        return per_input.index_select(0, self.row_input)

    def gather(self, table: Tensor, index: Selection) -> Tensor:
        """A neuron table ``[J, N * A, m]`` at neurons ``[E, k]`` to ``[E, N * A, k * m]``."""
        n_experiments, k = index.shape
        _, n_entries, m = table.shape
        taken = index.take(table).view(n_experiments, k, n_entries, m)
        if k == 1:
            return taken.view(n_experiments, n_entries, m)
        return taken.transpose(1, 2).reshape(n_experiments, n_entries, k * m)

    def write_patch(self, rows: Tensor, patch: Sparse, index: Selection) -> Tensor:
        """Put the patched neurons' values into dense rows ``[R * A, *shape]``; changes ``rows``."""
        values = self.gather(patch.values, index)
        positions = index.take(patch.of.positions).reshape(len(values), 1, -1)
        positions = positions.expand(-1, values.shape[1], -1)
        values, positions = (
            self.keep(part, patch.of.per_input).reshape(len(rows), -1)
            for part in (values, positions)
        )
        rows = rows if all(rows.stride()) else rows.contiguous()  # expanded, one for several
        flat = rows.reshape(len(rows), -1)
        if patch.of.is_padded and index.shape[1] == 1:
            # For missing features the neuron's first is written again, or what is there.
            first = positions[:, :1]
            there = torch.where(first < 0, flat[:, :1], values[:, :1])
            values = torch.where(positions < 0, there, values)
            positions = torch.where(positions < 0, first.clamp(min=0), positions)
        elif patch.of.is_padded:
            # Missing features are written to a column past the end and dropped with it.
            flat = torch.cat([flat, flat.new_empty(len(rows), 1)], 1)
            positions = torch.where(positions < 0, flat.shape[1] - 1, positions)
            return flat.scatter_(1, positions, values)[:, :-1].reshape(rows.shape)
        return flat.scatter_(1, positions, values).view(rows.shape)

    def densify(self, sparse: Sparse, index: Selection) -> Tensor:
        """Dense rows ``[R * A, *shape]`` of a sparse node."""
        entries = sparse.of.per_input
        rows = self.repeated(sparse.base.view(-1, entries, *sparse.base.shape[1:])).flatten(0, 1)
        return self.write_patch(rows, sparse, index)
