"""Two unpatched runs of a graph, and groups of experiments evaluated from them.

:class:`Prepared` holds every node's value of both runs and, for every layer that is patched, the
*chain* of nodes that stay sparse. A batch of experiments then costs a low-rank update where its
chain ends, and dense operations on the rows that really change from there to the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine import dense_ops
from raypatch.engine.cancelling import LARGE, Magnitudes
from raypatch.engine.graph import CaptureError, Graph, InputsMeetError, Node
from raypatch.engine.input_axes import (
    entries_at,
    entries_first,
    inputs_at,
    inputs_first,
    per_input,
    shape_of,
)
from raypatch.engine.layers import Args, tensors_in
from raypatch.engine.plan import Group, Selection
from raypatch.engine.scratch import Scratch
from raypatch.engine.sources import Fill
from raypatch.engine.structure import BASE, SOURCE, SPARSE, Program, Step, Structure
from raypatch.engine.values import Batch, Sparse

# Elements of rows that are computed whole at a time, where an update would leave rounding errors.
WHOLE_ELEMENTS = 1 << 22
# Rows are compacted when fewer than this share of them change and what follows costs at
# least this many multiplications a row; else copying them costs more than it saves.
COMPACT_SHARE = 0.9
COMPACT_WORK = 2048
# Experiments that change nothing are left out of the batches when so many dense elements are
# saved; else finding the others costs more.
LEAVE_OUT_ELEMENTS = 1 << 18


def _true_places(mask: Tensor) -> Tensor:
    """Flat indices of what is true; NumPy finds them several times faster on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().flatten()


class Unassumed(Exception):
    """What cannot be told without looking at numbers, and may not be taken to be as usual."""


class Changes(NamedTuple):
    """What patching each neuron of a layer alone changes."""

    active: Tensor  # [J, N] bool: whether anything at all
    n_active: Tensor | None  # [J]: for how many inputs; on the CPU, None where nothing is looked at
    is_finite: bool  # all differences are numbers: infinity minus infinity is none


class Prepared:
    """Both unpatched runs and the chains of the layers patched so far.

    ``baseline`` is ``[inputs, outputs]``; ``source_baseline`` too, None where the patched
    values are no run's own.

    With ``assumed``, a list, no number is looked at on the CPU: all rows are computed, what is so
    as a rule is taken to be so, and tensors that are true where it is are put into the list.
    """

    def __init__(
        self,
        graph: Graph,
        structure: Structure,
        scratch: Scratch,
        source: Args | None,
        target: Args,
        fill: Fill | None,
        assumed: list[Tensor] | None = None,
    ) -> None:
        self.assumed = assumed
        self.structure = structure
        self.scratch = scratch
        self.fill = fill
        self.base_values = graph.run(target)
        self.baseline: Tensor = self.base_values[-1]
        self.n_inputs = len(self.baseline)
        self._check_inputs_lie_apart()
        structure.following.check(target, self.base_values, structure.sample)
        self.source_values = None if source is None else graph.run(source)
        self.source_baseline: Tensor | None = None
        if source is not None and self.source_values is not None:
            structure.following.check(source, self.source_values, structure.sample)
            self.source_baseline = self.source_values[-1]
        self._chains: dict[int, dict[int, Sparse]] = {}
        self._changes: dict[tuple[int, tuple[int, ...]], Changes] = {}
        self._magnitudes: dict[int, Magnitudes] = {}

    def _check_inputs_lie_apart(self) -> None:
        """Inputs must run along one axis of every value; else rows cannot be told apart."""
        structure = self.structure
        for node, value in zip(structure.nodes, self.base_values):
            if not structure.depends[node.index] or not isinstance(value, Tensor):
                continue
            if node.index in structure.following.numbered:
                continue
            axis = structure.axes[node.index]
            shape = shape_of(structure.sample[node.index], axis, self.n_inputs)
            if axis is None or list(value.shape) != shape:
                kind = InputsMeetError if axis is None else CaptureError
                raise kind(
                    f"{node.path or node.target}: its output {list(value.shape)} does not keep "
                    f"{self.n_inputs} inputs along one axis"
                )

    # ------------------------------------------------------- what spread rules may ask

    def base(self, node: int) -> Any:
        return self.base_values[node]

    def buffer(self, node: Node, *shape: int) -> Tensor:
        return self.scratch.buffer(node.index, *shape, like=self.base_values[node.index])

    def once(self, node: Node, make: Callable[[], Any]) -> Any:
        return self.scratch.once(node, make)

    def weight_columns(self, node: Node) -> Tensor:
        return self.scratch.weights(node).columns

    # ------------------------------------------------------------------------ chains

    def chain(self, entry: int) -> dict[int, Sparse]:
        """The sparse values after a patch at ``entry`` alone; tuples are left out."""
        if entry not in self._chains:
            self._chains[entry] = self._build_chain(entry)
        return self._chains[entry]

    def _build_chain(self, entry: int) -> dict[int, Sparse]:
        """Run the chain once with every neuron patched."""
        node = min(entry, self.structure.output)
        axis = self.structure.axes[node]
        if self.source_values is not None:
            patch = entries_first(self.source_values[node], axis)
        else:
            assert self.fill is not None
            own = inputs_first(self.base_values[node], axis)
            patch = self.fill(*self.structure.layer_at(entry), own)
            patch = patch if per_input(axis) is None else inputs_at(axis, patch)
        fulls: dict[int, Any] = {entry: patch}
        chain: dict[int, Sparse] = {}
        for index, ownership in self.structure.chains.after(entry).items():
            if index != entry:
                fulls[index] = self.structure.nodes[index].call(
                    lambda i: fulls[i] if i in fulls else self.base_values[i]
                )
            if ownership is not None:
                at = min(index, self.structure.output)
                base = entries_first(self.base_values[at], self.structure.axes[at])
                chain[index] = Sparse(base, fulls[index], ownership)
        return chain

    def changes(self, entry: int, program: Program) -> Changes:
        """What patches at ``entry`` change where a program ends their chain."""
        key = (entry, program.ends[entry])
        if key not in self._changes:
            self._changes[key] = self._find_changes(*key)
        return self._changes[key]

    def _find_changes(self, entry: int, ends: tuple[int, ...]) -> Changes:
        chain = self.chain(entry)
        known = [chain[end] for end in ends if end in chain]
        if len(known) < len(ends):  # there is a tuple, which is not looked into
            neurons = chain[entry].of.neurons
            rows = self.baseline.new_ones(neurons, self.n_inputs, dtype=torch.bool)
        else:
            rows = reduce(
                torch.logical_or, (end.active(self.structure.reads_signs) for end in known)
            )
        deltas = [end.delta for end in known if end.delta.is_floating_point()]
        finite = [delta.sum().isfinite().view(1) for delta in deltas]
        if self.assumed is not None:
            self.assumed += finite
            return Changes(rows, None, is_finite=True)
        # One copy off the device for all.
        found = torch.cat([rows.sum(1), *finite]).cpu()
        return Changes(rows, found[: len(rows)], bool(found[len(rows) :].all()))

    # -------------------------------------------------------------------- evaluation

    def program(self, group: Group) -> Program:
        """The steps for a group's signature."""
        return self.structure.program(group.signature, source_runs=self.source_values is not None)

    def row_bytes(self, group: Group) -> int:
        """Bytes of all dense values of one row, and of what low-rank updates gather for it."""
        program, gathered = self.program(group), 0
        for entry, layer in program.patched.items():
            if (chosen := group.index[layer]) is not None:
                gathered += chosen.shape[1] * self.structure.chains.widest(entry)
        return (program.row_elements + 2 * gathered) * self.baseline.element_size()

    def evaluate(self, group: Group, out: Tensor, batch_rows: int) -> int:
        """Fill ``out[group.experiments]`` (``[E, N, outputs]``) and return the rows computed."""
        program = self.program(group)
        if program.output in (BASE, SOURCE):
            out[group.experiments] = (
                self.baseline if program.output == BASE else self.source_values[-1]  # type: ignore[index]
            )
            return 0
        index = self._indices(group, program)
        (active, n_active), compact, computed = self._changing(program, group, index), False, 0
        if active is not None and n_active is not None:
            n_still = len(n_active) - np.count_nonzero(n_active)
            if n_still * self.n_inputs * program.row_elements >= LEAVE_OUT_ELEMENTS:
                some = torch.from_numpy(n_active > 0)
                out[group.experiments[~some]] = self.baseline
                group, active = group.where(some), active[some.to(active.device)]
                index = self._indices(group, program)
            share = int(n_active.sum()) / max(1, active.numel())
            compact = share < COMPACT_SHARE and program.work_after >= COMPACT_WORK
            active = None if share == 1 else active
        n_experiments = group.experiments.shape[0]
        step = max(1, batch_rows // self.n_inputs)
        for start in range(0, n_experiments, step):
            end = min(start + step, n_experiments)
            mask = None if active is None else active[start:end]
            rows = _true_places(mask) if mask is not None and compact else None
            neurons = {name: chosen.part(start, end) for name, chosen in index.items()}
            batch = Batch(end - start, self.n_inputs, neurons, rows)
            places = group.places(start, end)
            if batch.n_rows:
                self._write(self._output(program, batch), batch, mask, places, out)
            else:
                out[places] = self.baseline
            computed += batch.n_rows
        return computed

    def _indices(self, group: Group, program: Program) -> dict[str, Selection]:
        """The neurons of every layer of the group; whole layers spelled out."""
        found = {}
        for entry, layer in program.patched.items():
            chosen = group.index[layer]
            if chosen is None:
                every = torch.arange(
                    self.chain(entry)[entry].of.neurons, device=self.baseline.device
                )
                chosen = Selection(every.expand(group.experiments.shape[0], -1))
            found[layer] = chosen.to(self.baseline.device)
        return found

    def _changing(
        self, program: Program, group: Group, index: dict[str, Selection]
    ) -> tuple[Tensor | None, np.ndarray | None]:
        """Rows that can differ from the baseline, ``[E, N]`` bool, None for all; and how many of
        each experiment, ``[E]``, unless nothing may be looked at."""
        entries = program.patched.items()
        whole = any(program.kinds[entry] == SOURCE for entry, _ in entries)
        if whole or not self.structure.savings.skip_unchanged or not program.steps:
            return None, None
        total: Tensor | None = None
        for entry, layer in entries:
            chosen, (active, n_active, _) = index[layer], self.changes(entry, program)
            if chosen.shape[1] == 1 and len(entries) == 1 and n_active is not None:
                # The counts are here, and so are the group's own numbers.
                here = group.index[layer] or chosen
                return chosen.take(active), here.take(n_active).numpy()
            taken = chosen.take(active).view(*chosen.shape, -1).any(1)
            total = taken if total is None else total | taken
        if total is None or self.assumed is not None:
            return total, None
        return total, total.sum(1).numpy(force=True)

    def _output(self, program: Program, batch: Batch) -> Tensor:
        """Output rows ``[R, outputs]`` of one batch."""
        dense: dict[int, Any] = {}
        for step in program.steps:
            value, number = self._compute(step, program, batch, dense), step.node.index
            if step.patched_layer is not None:
                axis, patch = self.structure.axes[number], self.chain(number)[number]
                index = batch.index[step.patched_layer]
                value = value.clone() if step.is_shared else value
                rows = batch.write_patch(entries_first(value, axis), patch, index)
                value = entries_at(axis, rows)
            dense[number] = value
        virtual = self.structure.virtual
        if virtual not in program.patched:
            return self._rows(self.structure.output, program, batch, dense)
        index = batch.index[OUTPUT_LOGITS]
        patch = self.chain(virtual)[virtual]
        if program.output.name == SPARSE:
            return batch.densify(patch, index)
        value = self._rows(self.structure.output, program, batch, dense)
        return batch.write_patch(value, patch, index)

    def _compute(self, step: Step, program: Program, batch: Batch, dense: dict[int, Any]) -> Any:
        node = step.node
        if step.spread is not None and self.changes(step.spread.entry, program).is_finite:
            sparse = self.chain(step.spread.entry)[step.spread.node]
            index = batch.index[program.patched[step.spread.entry]]
            emptied = self._emptied(step, program, sparse, index, batch)
            structured = step.spread.rule(self, node, sparse, index, batch)
            if structured is not None:
                if emptied is not None:
                    self._compute_whole(step, program, batch, emptied, structured)
                # A lone update has added exactly zero to unchanged rows.
                batch.unchanged_are_exact = len(program.steps) == 1 and emptied is None
                if batch.rows is None:
                    return structured.flatten(0, 1)
                entries = sparse.of.per_input
                kept = self.scratch.buffer(
                    ~node.index, batch.n_rows * entries, *structured.shape[2:], like=structured
                )
                return batch.keep(structured, entries, out=kept)
        values = {i: self._rows(i, program, batch, dense) for i in node.inputs}
        if step.is_linear:
            return dense_ops.linear(
                values[node.inputs[0]],
                self.scratch.weights(node),
                lambda *shape: self.buffer(node, *shape),
            )
        return step.operation.call(values.__getitem__)

    def _emptied(
        self, step: Step, program: Program, sparse: Sparse, index: Selection, batch: Batch
    ) -> Tensor | None:
        """Flat indices e * N + n of the rows for which an update is not exact enough; None where
        there are none."""
        assert step.spread is not None
        node = step.node
        if node.index not in self._magnitudes:
            self._magnitudes[node.index] = Magnitudes(self, self.scratch.absolute(node))
        magnitudes = self._magnitudes[node.index]
        if self.assumed is not None:
            if not program.gain < torch.inf:
                raise Unassumed("rows to be computed whole are looked for")
            self.assumed.append(magnitudes.most * program.gain < LARGE)
            return None
        if magnitudes.largest * program.gain < LARGE:
            return None
        emptied = magnitudes.emptied(step.spread.rule, node, sparse, index, batch)
        rows = None if emptied is None else _true_places(emptied)
        return None if rows is None or not len(rows) else rows

    def _compute_whole(
        self, step: Step, program: Program, batch: Batch, rows: Tensor, structured: Tensor
    ) -> None:
        """Write these rows into the node's output ``[E, N * A, ...]``, each from all its inputs."""
        into = structured.view(batch.n_experiments * batch.n_inputs, -1, *structured.shape[2:])
        inputs = tensors_in([self.structure.sample[i] for i in step.node.inputs])
        at_a_time = max(1, WHOLE_ELEMENTS // max(1, sum(value.numel() for value in inputs)))
        for start in range(0, len(rows), at_a_time):
            some = rows[start : start + at_a_time]
            part = Batch(batch.n_experiments, batch.n_inputs, batch.index, some)
            values = {i: self._rows(i, program, part, {}) for i in step.node.inputs}
            found = step.node.call(values.__getitem__)
            into.index_copy_(0, some, found.reshape(len(some), *into.shape[1:]))

    def _rows(self, index: int, program: Program, batch: Batch, dense: dict[int, Any]) -> Any:
        """A node's value as rows of the batch, whatever its kind."""
        if index in dense:
            return dense[index]
        kind = program.kinds[index]
        if kind.name == SPARSE:
            sparse = self.chain(kind.entry).get(index)
            if sparse is None:  # a tuple
                node = self.structure.nodes[index]
                return node.call(lambda i: self._rows(i, program, batch, dense))
            rows = batch.densify(sparse, batch.index[program.patched[kind.entry]])
            return entries_at(self.structure.axes[index], rows)
        held = self.source_values if kind == SOURCE else self.base_values
        value = held[index]  # type: ignore[index]
        if not self.structure.depends[index]:
            return value
        if index in self.structure.following.numbered:  # made anew for as many rows as there are
            node = self.structure.nodes[index]
            dense[index] = node.call(lambda i: self._rows(i, program, batch, dense))
            return dense[index]
        if isinstance(value, Tensor):
            return batch.repeated(value, self.structure.axes[index])
        sizes = self.structure.sizes(batch.n_rows)
        if index in sizes:
            return sizes[index]
        return tree_map(
            lambda v, axis: v if axis is None else batch.repeated(v, axis),
            value,
            self.structure.axes[index],
        )

    def _write(
        self, rows: Tensor, batch: Batch, mask: Tensor | None, places: Tensor | slice, out: Tensor
    ) -> None:
        """Put a batch's output rows into their experiments' places.

        Rows that ``mask`` ``[E, N]`` says are unchanged become the baseline, bit for bit,
        also where leaving them out would have cost more than computing them along.
        """
        into = out[places] if isinstance(places, slice) else None
        apart = into is None or into.stride(0) != into.stride(1) * self.n_inputs
        if apart:
            into = out.new_empty(batch.n_experiments, *out.shape[1:])
        assert into is not None
        if batch.rows is None:
            into.copy_(rows.reshape(into.shape))
            exact = mask is None or batch.unchanged_are_exact
            if mask is not None and not exact and mask.device.type != "cpu":
                torch.where(mask[..., None], into, self.baseline, out=into)
            elif mask is not None and not exact:
                still = _true_places(~mask)
                kept = self.baseline.index_select(0, still % self.n_inputs)
                into.flatten(0, 1).index_copy_(0, still, kept)
        else:
            into.copy_(self.baseline.expand_as(into))
            into.flatten(0, 1).index_copy_(0, batch.rows, rows)
        if apart:
            out[places] = into
