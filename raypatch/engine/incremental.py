"""Exact incremental evaluation of patched forwards on a captured graph (design 6).

:class:`Incremental` belongs to a graph, :class:`Prepared` to a pair of source and target
inputs: it holds both unpatched runs and, for every layer that is patched, the *chain* of
nodes that stay sparse. A batch of experiments then costs a low-rank update where its chain
ends, and dense operations on the rows that really change from there to the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine import dense_ops
from raypatch.engine.capture import CaptureError, Graph, Node
from raypatch.engine.layers import Args, Layer, first_tensor
from raypatch.engine.local_rules import LOCAL_RULES
from raypatch.engine.plan import Group
from raypatch.engine.sources import Fill
from raypatch.engine.spread_rules import SPREAD_RULES
from raypatch.engine.values import Batch, Sparse

# Rows are compacted when fewer than this share of them change and what follows costs at
# least this many multiplications a row; else copying them costs more than it saves.
COMPACT_SHARE = 0.9
COMPACT_WORK = 2048


@dataclass(frozen=True)
class Savings:
    """Each saving of the engine, to be switched off in tests and benchmarks."""

    low_rank: bool = True  # the first linear or convolution after a patch from its columns
    skip_unchanged: bool = True  # rows whose sparse difference is exactly zero
    sparse_output: bool = True  # patches that stay sparse up to the output cost their columns
    source_values: bool = True  # a whole layer on a cut takes the source run's own values
    deduplicate: bool = True  # one computation for experiments that are the same


BASE, SOURCE, SPARSE, DENSE = "base", "source", "sparse", "dense"


@dataclass(frozen=True)
class Kind:
    """What a node's value is for one signature; ``entry`` is the patched node of a chain."""

    name: str
    entry: int = -1


_BASE, _SOURCE, _DENSE = Kind(BASE), Kind(SOURCE), Kind(DENSE)


@dataclass(frozen=True)
class Program:
    """What to compute for a signature: the dense nodes in order, and every node's kind."""

    kinds: dict[int, Kind]
    steps: tuple[Node, ...]
    patched: dict[int, str]  # patched node to its layer
    row_bytes: int  # of all dense values of one row
    work_after: int  # multiplications a row after the first dense step


class Incremental:
    """The engine on one captured graph. Not thread-safe: scratch memory is shared."""

    def __init__(self, graph: Graph, layers: dict[str, Layer], savings: Savings) -> None:
        self.nodes = graph.nodes
        self.layers = layers
        self.savings = savings
        self.output = len(graph.nodes) - 1
        self.calls: dict[str, list[int]] = {}
        for node in graph.nodes:
            if node.path in layers:
                self.calls.setdefault(node.path, []).append(node.index)
        missing = [name for name in layers if name not in self.calls]
        if missing:
            raise CaptureError(f"layer {missing[0]!r} is not a node of the captured graph")
        # The pseudo-layer is patched after the last node.
        self.virtual = len(graph.nodes)
        self.calls[OUTPUT_LOGITS] = [self.virtual]
        self.depends = _depends_on_input(graph)
        self._buffers: dict[int, Tensor] = {}
        self._columns: dict[int, Tensor] = {}

    def prepare(self, source: Args | None, target: Args, fill: Fill | None) -> Prepared:
        """Run both sides once, unpatched, and keep every node's value.

        Patched values are the source run's, or where ``source`` is None those of ``fill``.
        """
        return Prepared(self, source, target, fill)

    def to(self, device: torch.device) -> None:
        """Move weights and constants; scratch memory is made anew."""
        for node in self.nodes:
            if node.op == "module":
                node.target.to(device)
            elif node.op == "constant" and isinstance(node.target, Tensor):
                node.target = node.target.to(device)
        self._buffers, self._columns = {}, {}

    def layer_values(self, args: Args) -> dict[str, list[Tensor]]:
        """Outputs of every layer, one a call, in an unpatched run."""
        values = _run(self.nodes, args)
        return {
            name: [first_tensor(values[min(i, self.output)]) for i in calls]
            for name, calls in self.calls.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}, "_columns": {}}

    def buffer(self, node: Node, *shape: int, like: Tensor) -> Tensor:
        """Scratch memory of this shape for a node's output, reused by the next batch."""
        size = 1
        for n in shape:
            size *= n
        held = self._buffers.get(node.index)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[node.index] = held
        return held[:size].view(shape)

    def columns(self, node: Node) -> Tensor:
        """Weight of a linear or convolution node, input features first, contiguous."""
        held = self._columns.get(node.index)
        if held is None:
            held = self._columns[node.index] = (
                node.target.weight.detach().transpose(0, 1).contiguous()
            )
        return held


def _depends_on_input(graph: Graph) -> list[bool]:
    depends: list[bool] = []
    for node in graph.nodes:
        depends.append(node.op == "input" or any(depends[i] for i in node.inputs))
    return depends


class Prepared:
    """Both unpatched runs, and what can be said of every patch in advance.

    ``baseline`` is ``[inputs, outputs]``.
    """

    def __init__(
        self, engine: Incremental, source: Args | None, target: Args, fill: Fill | None
    ) -> None:
        self.engine = engine
        self.fill = fill
        self.base_values = _run(engine.nodes, target)
        self.baseline: Tensor = self.base_values[-1]
        self.n_inputs = len(self.baseline)
        self._check_batch_axes()
        self.source_values = None if source is None else _run(engine.nodes, source)
        self.source_baseline: Tensor | None = None
        if self.source_values is not None:
            self.source_baseline = self.source_values[-1]
        self._chains: dict[int, dict[int, Sparse | None]] = {}
        self._active: dict[int, Tensor] = {}
        self._programs: dict[Any, Program] = {}
        self._sizes: dict[int, dict[int, Any]] = {}

    def _check_batch_axes(self) -> None:
        """Inputs must run along axis 0 of every value; else rows cannot be told apart."""
        for node, value in zip(self.engine.nodes, self.base_values):
            if not self.engine.depends[node.index]:
                continue
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor) and (
                    tensor.dim() == 0 or tensor.shape[0] != self.n_inputs
                ):
                    raise CaptureError(
                        f"{node.path or node.target}: its output {list(tensor.shape)} does not "
                        "keep the inputs along its first axis"
                    )

    # ------------------------------------------------------------- what rules may ask

    def base(self, node: int) -> Any:
        return self.base_values[node]

    def buffer(self, node: Node, *shape: int) -> Tensor:
        return self.engine.buffer(node, *shape, like=self.baseline)

    def weight_columns(self, node: Node) -> Tensor:
        return self.engine.columns(node)

    # ------------------------------------------------------------------------ chains

    def chain(self, entry: int) -> dict[int, Sparse | None]:
        """Nodes that stay sparse after a patch at ``entry`` alone; None for tuples."""
        if entry not in self._chains:
            self._chains[entry] = self._build_chain(entry)
        return self._chains[entry]

    def patch_of(self, entry: int) -> Sparse:
        """The patched node itself: every neuron with the value to patch in."""
        patch = self.chain(entry)[entry]
        assert patch is not None
        return patch

    def _build_chain(self, entry: int) -> dict[int, Sparse | None]:
        node = min(entry, self.engine.output)
        base = self.base_values[node]
        if not isinstance(base, Tensor):
            raise CaptureError(f"{self.engine.nodes[node].path}: a layer with several outputs")
        if self.source_values is not None:
            full = self.source_values[node]
        else:
            assert self.fill is not None
            layer = self.engine.nodes[entry].path if entry < self.engine.virtual else OUTPUT_LOGITS
            full = self.fill(layer or "", self.engine.calls[layer or ""].index(entry), base)
        neurons, owner = self._layer_owners(entry, base)
        first = Sparse(base, full, owner, neurons)
        chain: dict[int, Sparse | None] = {entry: first}
        if entry == self.engine.virtual:
            return chain
        tracker = _ChainTracker(self, entry, first)
        for later in self.engine.nodes[entry + 1 :]:
            tracker.visit(later)
        return tracker.chain

    def _layer_owners(self, entry: int, base: Tensor) -> tuple[int, Tensor]:
        axis = base.dim() - 1
        if entry != self.engine.virtual:
            axis = self.engine.layers[self.engine.nodes[entry].path or ""].axis
        view = [1] * (base.dim() - 1)
        view[axis - 1] = base.shape[axis]
        neurons = torch.arange(base.shape[axis]).view(view)
        return base.shape[axis], neurons.expand(base.shape[1:]).to(base.device)

    def active(self, entry: int) -> Tensor:
        """``[J, N]`` bool: whether patching the neuron alone changes anything downstream
        of where its chain ends."""
        if entry not in self._active:
            chain = self.chain(entry)
            readers: dict[int, list[int]] = {}
            for node in self.engine.nodes:
                for used in node.inputs:
                    readers.setdefault(used, []).append(node.index)
            ends = [
                sparse
                for index, sparse in chain.items()
                if index >= self.engine.output or any(r not in chain for r in readers[index])
            ]
            active = torch.zeros(
                self.patch_of(entry).neurons, self.n_inputs, dtype=torch.bool,
                device=self.baseline.device,
            )  # fmt: skip
            for end in ends:
                active |= end.active if end is not None else True
            self._active[entry] = active
        return self._active[entry]

    # --------------------------------------------------------------------- programs

    def program(self, group: Group) -> Program:
        """The steps for a signature, planned once."""
        if group.signature not in self._programs:
            self._programs[group.signature] = self._plan(group)
        return self._programs[group.signature]

    def _plan(self, group: Group) -> Program:
        engine, savings = self.engine, self.engine.savings
        patched = {entry: layer for layer in group.layers for entry in engine.calls[layer]}
        kinds: dict[int, Kind] = {}
        incoming: dict[int, Kind] = {}
        for index in range(len(engine.nodes) + 1):
            node = engine.nodes[index] if index < engine.virtual else None
            before = self._kind(node, kinds) if node else kinds[engine.output]
            kind = incoming[index] = before
            if index in patched:
                whole = group.index[patched[index]] is None
                if self.source_values is not None and (
                    before == _SOURCE or (whole and savings.source_values)
                ):
                    kind = _SOURCE
                else:
                    kind = Kind(SPARSE, index) if before == _BASE else _DENSE
            kinds[index] = kind
        if not savings.sparse_output and kinds[engine.virtual].name == SPARSE:
            kinds[engine.virtual] = _DENSE
        steps = self._needed_steps(kinds, incoming)
        row_bytes = (
            sum(_numel(self.base_values[s.index]) * self.baseline.element_size() for s in steps)
            + self.baseline[0].numel() * self.baseline.element_size()
        )
        return Program(kinds, steps, patched, row_bytes, sum(map(self._work, steps[1:])))

    def _kind(self, node: Node, kinds: dict[int, Kind]) -> Kind:
        used = [kinds[i] for i in node.inputs if self.engine.depends[i]]
        if all(kind == _BASE for kind in used):
            return _BASE
        if all(kind == _SOURCE for kind in used):
            return _SOURCE
        entries = {kind.entry for kind in used if kind.name == SPARSE}
        if len(entries) == 1 and all(kind.name in (BASE, SPARSE) for kind in used):
            (entry,) = entries
            if node.index in self.chain(entry):
                return Kind(SPARSE, entry)
        return _DENSE

    def _needed_steps(self, kinds: dict[int, Kind], incoming: dict[int, Kind]) -> tuple[Node, ...]:
        engine = self.engine
        wanted = {engine.output} if incoming[engine.virtual] == _DENSE else set()
        if kinds[engine.virtual] != _DENSE:
            wanted = set()
        for node in reversed(engine.nodes):
            if node.index in wanted:
                wanted.update(i for i in node.inputs if kinds[i] == _DENSE)
        return tuple(node for node in engine.nodes if node.index in wanted)

    def _work(self, node: Node) -> int:
        """Multiplications of a node's operation on one row, from its weights."""
        weight = getattr(node.target, "weight", None) if node.op == "module" else None
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            return 0
        places = _numel(self.base_values[node.index]) // weight.shape[0]
        return weight.numel() * max(1, places)

    # -------------------------------------------------------------------- evaluation

    def evaluate(self, group: Group, out: Tensor, batch_rows: int) -> int:
        """Fill ``out[group.experiments]`` (``[E, N, outputs]``) and return the rows computed."""
        program = self.program(group)
        if program.kinds[self.engine.virtual] == _BASE:
            out[group.experiments] = self.baseline
            return 0
        if program.kinds[self.engine.virtual] == _SOURCE:
            out[group.experiments] = self.source_baseline  # type: ignore[assignment]
            return 0
        index = self._indices(group, program)
        active = self._active_rows(program, index, len(group.experiments))
        experiments, computed = group.experiments, 0
        if active is not None:
            changing = active.any(1)
            n_changing = int(changing.sum())
            if n_changing < len(experiments):
                out[experiments[~changing]] = self.baseline
                experiments, active = experiments[changing], active[changing]
                index = {layer: neurons[changing] for layer, neurons in index.items()}
            share = float(active.sum()) / max(1, active.numel())
            if share > COMPACT_SHARE or program.work_after < COMPACT_WORK:
                active = None
        step = max(1, batch_rows // self.n_inputs)
        for start in range(0, len(experiments), step):
            part = slice(start, start + step)
            ids = experiments[part]
            rows = None if active is None else active[part].flatten().nonzero().flatten()
            batch = Batch(
                len(ids), self.n_inputs, {layer: i[part] for layer, i in index.items()}, rows
            )
            self._write(self._output(program, batch), batch, ids, out)
            computed += batch.n_rows
        return computed

    def _indices(self, group: Group, program: Program) -> dict[str, Tensor]:
        """Neurons ``[E, k]`` of every layer of the group; whole layers spelled out."""
        device, found = self.baseline.device, {}
        for layer in set(program.patched.values()):
            neurons = group.index[layer]
            if neurons is None:
                size = self.patch_of(self.engine.calls[layer][0]).neurons
                neurons = torch.arange(size).expand(len(group.experiments), -1)
            found[layer] = neurons.to(device)
        return found

    def _active_rows(
        self, program: Program, index: dict[str, Tensor], n_experiments: int
    ) -> Tensor | None:
        """``[E, N]`` bool, rows that can differ from the baseline; None for all."""
        if not self.engine.savings.skip_unchanged or SOURCE in (
            program.kinds[entry].name for entry in program.patched
        ):
            return None
        total = torch.zeros(
            n_experiments, self.n_inputs, dtype=torch.bool, device=self.baseline.device
        )
        for entry, layer in program.patched.items():
            neurons = index[layer]
            active = self.active(entry).index_select(0, neurons.flatten())
            total |= active.view(*neurons.shape, -1).any(1)
        return total

    def _output(self, program: Program, batch: Batch) -> Tensor:
        """Output rows ``[R, outputs]`` of one batch."""
        dense: dict[int, Any] = {}
        for node in program.steps:
            value = self._step(node, program, batch, dense)
            layer = program.patched.get(node.index)
            if layer is not None:
                value = batch.write_patch(value, self.patch_of(node.index), batch.index[layer])
            dense[node.index] = value
        output, virtual = self.engine.output, self.engine.virtual
        value = self._rows(output, program, batch, dense)
        if virtual in program.patched:
            patch = self.patch_of(virtual)
            value = batch.write_patch(value, patch, batch.index[OUTPUT_LOGITS])
        return value

    def _step(self, node: Node, program: Program, batch: Batch, dense: dict[int, Any]) -> Any:
        sparse_inputs = [i for i in node.inputs if program.kinds[i].name == SPARSE]
        if len(sparse_inputs) == 1 and self.engine.savings.low_rank:
            others = (program.kinds[i] for i in node.inputs if i != sparse_inputs[0])
            rule = SPREAD_RULES.get(node.key)
            entry = program.kinds[sparse_inputs[0]].entry
            sparse = self.chain(entry)[sparse_inputs[0]]
            if rule is not None and sparse is not None and all(k == _BASE for k in others):
                index = batch.index[program.patched[entry]]
                structured = rule(self, node, sparse, index, batch)
                if structured is not None:
                    return batch.keep(structured)
        values = {i: self._rows(i, program, batch, dense) for i in node.inputs}
        if node.op == "module":
            x = values[node.inputs[0]]
            if type(node.target) is nn.Linear and x.dim() == 2:
                return dense_ops.linear(
                    x,
                    self.engine.columns(node),
                    node.target.bias,
                    lambda *shape: self.buffer(node, *shape),
                )
            in_place = dense_ops.IN_PLACE.get(type(node.target))
            private = program.kinds[node.inputs[0]] == _DENSE
            if in_place is not None and private and self.engine.nodes[node.inputs[0]].users == 1:
                return in_place(x, node.target)
        return node.call(values.__getitem__)

    def _rows(self, index: int, program: Program, batch: Batch, dense: dict[int, Any]) -> Any:
        """A node's value as rows of the batch, whatever its kind."""
        if index in dense:
            return dense[index]
        kind = program.kinds[index]
        if kind.name == SPARSE:
            sparse = self.chain(kind.entry)[index]
            if sparse is not None:
                return batch.densify(sparse, batch.index[program.patched[kind.entry]])
            raise CaptureError("a tuple of sparse values is read as a whole")
        values = self.source_values if kind == _SOURCE else self.base_values
        value = values[index]  # type: ignore[index]
        if not self.engine.depends[index]:
            return value
        if isinstance(value, Tensor):
            return batch.spread(value)
        if isinstance(value, (tuple, list, dict)) and _tensors(value):
            return torch.utils._pytree.tree_map(
                lambda v: batch.spread(v) if isinstance(v, Tensor) else v, value
            )
        return self.sizes(batch.n_rows)[index]

    def _write(self, rows: Tensor, batch: Batch, ids: Tensor, out: Tensor) -> None:
        if batch.rows is None:
            values = rows.reshape(batch.n_experiments, batch.n_inputs, -1)
        else:
            values = self.baseline.repeat(batch.n_experiments, 1)
            values.index_copy_(0, batch.rows, rows.reshape(batch.n_rows, -1))
            values = values.view(batch.n_experiments, batch.n_inputs, -1)
        first, last = int(ids[0]), int(ids[-1])
        if last - first == len(ids) - 1:
            out[first : last + 1] = values
        else:
            out.index_copy_(0, ids.to(out.device), values)

    # ------------------------------------------------------------------------- sizes

    def sizes(self, n_rows: int) -> dict[int, Any]:
        """Values of the nodes that are no tensors (sizes, shapes) for a batch of ``n_rows``."""
        if n_rows not in self._sizes:
            if len(self._sizes) > 64:
                self._sizes.clear()
            self._sizes[n_rows] = self._trace_sizes(n_rows)
        return self._sizes[n_rows]

    def _trace_sizes(self, n_rows: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for node in self.engine.nodes:
            value = self.base_values[node.index]
            if _tensors(value) or not self.engine.depends[node.index]:
                continue

            def shaped(i: int) -> Any:
                if i in found:
                    return found[i]
                value = self.base_values[i]
                if isinstance(value, Tensor) and self.engine.depends[i]:
                    return torch.empty(n_rows, *value.shape[1:], device="meta", dtype=value.dtype)
                return value

            found[node.index] = node.call(shaped)
        return found


class _ChainTracker:
    """Follows one layer's patch through local operations; also what local rules may ask."""

    def __init__(self, prepared: Prepared, entry: int, first: Sparse) -> None:
        self.prepared = prepared
        self.chain: dict[int, Sparse | None] = {entry: first}
        self.fulls: dict[int, Any] = {entry: first.full}
        self.owners: dict[int, Any] = {entry: first.owner.cpu()[None]}
        self.lost: set[int] = set()
        self.neurons = first.neurons

    def of(self, node: int) -> Tensor | None:
        return self.owners.get(node)

    def argument(self, node: int) -> Any:
        if node in self.owners:
            return self.owners[node]
        value = self.prepared.base_values[node]
        if not self.prepared.engine.depends[node]:
            if isinstance(value, Tensor) and value.is_floating_point():
                return torch.full(value.shape, -1)
            return value.cpu() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            return torch.full((1, *value.shape[1:]), -1)
        return self.prepared.sizes(1).get(node)

    def visit(self, node: Node) -> None:
        if any(i in self.lost for i in node.inputs):
            self.lost.add(node.index)
            return
        if not any(i in self.owners for i in node.inputs):
            return
        base = self.prepared.base_values[node.index]
        if not _tensors(base):
            return  # a size: no patch changes it
        owners = self._owners(node, base)
        if owners is None:
            self.lost.add(node.index)
            return
        full = node.call(lambda i: self.fulls.get(i, self.prepared.base_values[i]))
        self.owners[node.index], self.fulls[node.index] = owners, full
        self.chain[node.index] = None
        if isinstance(base, Tensor):
            owner = owners[0].to(base.device)
            self.chain[node.index] = Sparse(base, full, owner, self.neurons)

    def _owners(self, node: Node, base: Any) -> Any:
        rule: Callable[..., Any] | None = LOCAL_RULES.get(node.key)
        if rule is None:
            return None
        shape = tuple(base.shape[1:]) if isinstance(base, Tensor) else ()
        try:
            owners = rule(node, self, shape)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # an unusual form of the operation: dense is always right
        if isinstance(base, Tensor):
            good = isinstance(owners, Tensor) and owners.shape == (1, *shape)
            return owners.clone() if good and owners.dtype == torch.int64 else None
        same = isinstance(owners, (tuple, list)) and len(owners) == len(base)
        if same and all(o.shape == (1, *b.shape[1:]) for o, b in zip(owners, base)):
            return tuple(owners)
        return None


def _run(nodes: list[Node], args: Args) -> list[Any]:
    values: list[Any] = []
    for node in nodes:
        argument = args[node.target] if node.op == "input" else None
        values.append(node.call(values.__getitem__, argument))
    return values


def _tensors(value: Any) -> bool:
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return any(isinstance(leaf, Tensor) for leaf in leaves)


def _numel(value: Any) -> int:
    """Elements of one row."""
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return sum(v[0].numel() for v in leaves if isinstance(v, Tensor) and v.dim())
