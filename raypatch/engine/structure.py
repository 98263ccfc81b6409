"""What can be said of patches on a graph before any input is seen twice: kinds and programs.

For each signature (see :mod:`raypatch.engine.plan`) a *program* says what every node's value
is and which nodes are computed, in what way. It depends on shapes only, so it is made once
and serves every batch and every set of inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine.arguments import inputs_between
from raypatch.engine.cancelling import DIVISIONS, divides_by, gain_of
from raypatch.engine.chains import Chains
from raypatch.engine.decisions import SIZED_BY_VALUES
from raypatch.engine.faster import faster
from raypatch.engine.graph import CaptureError, Graph, Node
from raypatch.engine.in_place import Memory, writes_into
from raypatch.engine.input_axes import follow_inputs, per_input, shape_of
from raypatch.engine.layers import Args, Layer, tensors_in
from raypatch.engine.local_rules import LOCAL_RULES, pointwise
from raypatch.engine.narrowing import Values
from raypatch.engine.plan import ALL, Signature
from raypatch.engine.spread_rules import SPREAD_RULES, SpreadRule

# Operations whose results are of a size that values decide where they take masks.
SIZED_BY_MASKS = {"getitem", "item_between", "index"}
MASKS = (torch.bool, torch.uint8)
# What these make of 0.0 and of -0.0 differs by more than that.
READS_SIGNS = set(
    "angle arctan2 atan2 copysign floatpower fmod reciprocal remainder rsqrt signbit".split()
)


@dataclass(frozen=True)
class Savings:
    """Each saving of the engine, to be switched off in tests and benchmarks."""

    reuse_upstream: bool = True  # nothing before the first patched layer is computed again
    low_rank: bool = True  # the first linear or convolution after a patch from its columns
    skip_unchanged: bool = True  # rows whose sparse difference is exactly zero
    sparse_output: bool = True  # patches that stay sparse up to the output cost their columns
    source_values: bool = True  # a whole layer on a cut takes the source run's own values
    deduplicate: bool = True  # one computation for experiments that are the same
    needed_places: bool = True  # of a sequence no places that the output does not depend on
    replay: bool = True  # on a GPU a small call that comes again is launched in one piece


@dataclass(frozen=True)
class Kind:
    """What a node's value is: base, source, sparse (of the patch at ``entry``) or dense."""

    name: str
    entry: int = -1


BASE, SOURCE, DENSE = Kind("base"), Kind("source"), Kind("dense")
SPARSE = "sparse"


@dataclass(frozen=True)
class Spread:
    """How a step turns one sparse input into dense rows."""

    rule: SpreadRule
    node: int
    entry: int


@dataclass(frozen=True)
class Step:
    """One node computed as dense rows, and the fastest exact way to do it.

    ``operation`` is the node's own, or the same writing into an argument. What a patch is written
    into is copied before where ``is_shared``.
    """

    node: Node
    spread: Spread | None
    operation: Node
    is_linear: bool
    patched_layer: str | None
    is_shared: bool


@dataclass(frozen=True)
class Program:
    """What to compute for a signature, and every node's kind."""

    kinds: dict[int, Kind]
    output: Kind
    steps: tuple[Step, ...]
    patched: dict[int, str]  # patched node to its layer
    ends: dict[int, tuple[int, ...]]  # patched node to where its patch alone is no longer all
    row_elements: int  # of all dense values of one row
    work_after: int  # multiplications a row after the first dense step
    gain: float  # by how much dense operations may enlarge errors; infinite where not known


class Structure:
    """A graph's nodes with what follows from their shapes.

    ``sample`` holds every node's value in a run on one input.
    """

    def __init__(
        self, graph: Graph, layers: dict[str, Layer], savings: Savings, inputs: Args
    ) -> None:
        self.nodes = graph.nodes
        self.layers = layers
        self.savings = savings
        self.sample = sample = graph.run(inputs_between(inputs, 0, 1))
        self.sample_bytes = sum(v.numel() * v.element_size() for v in tensors_in(sample))
        self.output = len(graph.nodes) - 1
        # The pseudo-layer output_logits is patched after the last node.
        self.virtual = len(graph.nodes)
        self.calls: dict[str, list[int]] = {OUTPUT_LOGITS: [self.virtual]}
        following = follow_inputs(graph, inputs, sample)
        self.following = following
        self.depends, self.axes = following.depends, following.axes
        self.readers: dict[int, list[int]] = {i: [] for i in range(len(graph.nodes))}
        for node in graph.nodes:
            for used in node.inputs:
                self.readers[used].append(node.index)
        for node in graph.nodes:
            if node.path in layers:
                self.calls.setdefault(node.path, []).extend(self._first_outputs(node))
        self.layer_of = {entry: name for name, calls in self.calls.items() for entry in calls}
        # Layers that see no input.
        self.apart = {
            call for call in self.layer_of if call != self.virtual and not self.depends[call]
        }
        for name in graph.unread & layers.keys():
            self.calls.setdefault(name, [])  # patches of it change nothing
        missing = [name for name in layers if name not in self.calls]
        if missing:
            raise CaptureError(f"layer {missing[0]!r} is not a node of the captured graph")
        self._refuse_selections_by_values()
        neurons = {entry: self._neuron_axis(entry) for entry in self.layer_of}
        self.reads_signs = any(_reads_signs(node, self.depends) for node in graph.nodes)
        self.chains = Chains(graph.nodes, sample, self.readers, following, neurons)
        self.memory = Memory(graph.nodes, sample, self.readers)
        self._operations = [self._on_rows(node) for node in graph.nodes]
        self._programs: dict[tuple[Signature, bool], Program] = {}
        self._gains: dict[int, float] = {}  # of modules, by their nodes
        self._sizes: dict[int, dict[int, Any]] = {}
        self._overwritings: dict[int, list[tuple[set[int], Node]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is planned on demand."""
        planned = ("_programs", "_sizes", "_overwritings")
        return {**self.__dict__, **{name: {} for name in planned}}

    def _refuse_selections_by_values(self) -> None:
        """Raises CaptureError for what takes as many places as values tell: rows could have more
        or fewer than the trial's."""
        for node in filter(lambda node: self.depends[node.index], self.nodes):
            picks = [self.sample[i] for i in node.inputs[1:] if self.depends[i]]
            masks = [p for p in picks if isinstance(p, Tensor) and p.dtype in MASKS]
            if node.name in SIZED_BY_VALUES or (node.name in SIZED_BY_MASKS and masks):
                raise CaptureError(f"{node.name}: how many places it takes depends on values")

    def layer_at(self, entry: int) -> tuple[str, int]:
        """A patched node's layer and which call of it this is."""
        name = self.layer_of[entry]
        return name, self.calls[name].index(entry)

    def _first_outputs(self, node: Node) -> list[int]:
        """The node that holds a layer's neurons: itself, or what takes the first of several
        outputs, as a recurrent layer has; none where nothing reads that."""
        if isinstance(self.sample[node.index], Tensor):
            return [node.index]
        readers = [self.nodes[i] for i in self.readers[node.index]]
        if any(reader.target is not operator.getitem for reader in readers):
            raise CaptureError(f"{node.path}: its outputs are read together")
        takers = [reader.index for reader in readers if reader.args[1] == 0]
        if len(takers) > 1:
            raise CaptureError(f"{node.path}: its first output is taken more than once")
        return takers

    def _neuron_axis(self, entry: int) -> int:
        """Along which axis of a layer's value its neurons are."""
        layer, value = self.layers.get(self.layer_of[entry]), self.sample[min(entry, self.output)]
        return int(value.dim()) - 1 if layer is None else layer.axis_of(value)

    def for_narrowing(self) -> Values:
        """What :func:`raypatch.engine.narrowing.narrowed` asks of a graph's values."""
        neurons = {e: axis for e, axis in self.chains.neuron_axes.items() if e != self.virtual}
        return Values(self.nodes, self.sample, self.axes, neurons)

    # --------------------------------------------------------------------- programs

    def program(self, signature: Signature, *, source_runs: bool) -> Program:
        """The program of a signature; ``source_runs`` tells whether patched values are those
        of one run, so that a value all of whose inputs are patched is that run's own."""
        key = (signature, source_runs)
        if key not in self._programs:
            self._programs[key] = self._plan(signature, source_runs)
        return self._programs[key]

    def _plan(self, signature: Signature, source_runs: bool) -> Program:
        patched = {entry: layer for layer, _ in signature for entry in self.calls[layer]}
        whole = {layer for layer, k in signature if k == ALL}
        kinds: dict[int, Kind] = {}
        before = BASE
        for index in range(len(self.nodes) + 1):
            before = kinds[index - 1] if index == self.virtual else self._kind(index, kinds)
            kind = before
            if index in patched:
                is_source = before == SOURCE or (
                    patched[index] in whole and self.savings.source_values
                )
                if source_runs and is_source:
                    kind = SOURCE
                else:
                    kind = Kind(SPARSE, index) if before == BASE else DENSE
            kinds[index] = kind
        output = kinds[self.virtual]
        if output.name == SPARSE and not self.savings.sparse_output:
            output = DENSE
        needed = self._needed(kinds) if output == DENSE else []
        steps = tuple(self._step(node, kinds, patched) for node in needed)
        return Program(
            kinds=kinds,
            output=output,
            steps=steps,
            patched=patched,
            ends={entry: self.chains.ends(entry, patched) for entry in patched},
            row_elements=sum(_numel(self.sample[s.node.index]) for s in steps)
            + _numel(self.sample[self.output]),
            work_after=sum(self._work(step.node) for step in steps[1:]),
            # What an update is made of has no errors yet.
            gain=gain_of(
                [step.node for step in steps if step.spread is None],
                lambda i: kinds[i] not in (BASE, SOURCE),
                self.sample.__getitem__,
                self._gains,
            ),
        )

    def _kind(self, index: int, kinds: dict[int, Kind]) -> Kind:
        if not self.depends[index]:
            return BASE
        used = [kinds[i] for i in self.nodes[index].inputs if self.depends[i]]
        if all(kind == BASE for kind in used):
            fixed = self.nodes[index].op == "input" or not tensors_in(self.sample[index])
            return BASE if fixed or self.savings.reuse_upstream else DENSE
        if all(kind == SOURCE for kind in used):
            return SOURCE
        entries = {kind.entry for kind in used if kind.name == SPARSE}
        if len(entries) == 1 and all(kind.name in ("base", SPARSE) for kind in used):
            (entry,) = entries
            if index in self.chains.after(entry):
                return Kind(SPARSE, entry)
        return DENSE

    def _needed(self, kinds: dict[int, Kind]) -> list[Node]:
        """Dense nodes that the output depends on, in order."""
        wanted = {self.output} if kinds[self.output] == DENSE else set()
        for node in reversed(self.nodes):
            if node.index in wanted:
                wanted.update(i for i in node.inputs if kinds[i] == DENSE)
        return [node for node in self.nodes if node.index in wanted]

    def _step(self, node: Node, kinds: dict[int, Kind], patched: dict[int, str]) -> Step:
        spread = None
        sparse = [i for i in node.inputs if kinds[i].name == SPARSE]
        rule = SPREAD_RULES.get(node.key)
        if rule is not None and len(sparse) == 1 and self.savings.low_rank:
            entry = kinds[sparse[0]].entry
            others = all(kinds[i] == BASE for i in node.inputs if i != sparse[0])
            entries = per_input(self.axes[sparse[0]])
            same = entries is not None and entries == per_input(self.axes[node.index])
            if others and same and self.chains.after(entry)[sparse[0]] is not None:
                spread = Spread(rule, sparse[0], entry)
        value = self.sample[node.inputs[0]] if node.inputs else None
        is_linear = node.key is nn.Linear and value is not None and value.dim() > 1
        operation = self._operations[node.index]
        for together, overwriting in self._overwriting(node):
            if all(kinds[i] == DENSE for i in together):
                operation = overwriting
                break
        layer = patched.get(node.index)
        is_shared = layer is not None and self.memory.is_shared(node.index)
        return Step(node, spread, operation, is_linear, layer, is_shared)

    def _on_rows(self, node: Node) -> Node:
        """How dense rows go through a node where they do not overwrite an argument."""
        readers = (self.nodes[i] for i in self.readers[node.index])
        return faster(node, readers, self.sample[node.index])

    def _overwriting(self, node: Node) -> list[tuple[set[int], Node]]:
        """The operation writing its result into an argument, for each where that is exact if what
        lies in the argument's memory is dense; and the nodes that do."""
        if node.index not in self._overwritings:
            result, found = self.sample[node.index], []
            is_pointwise = LOCAL_RULES.get(node.key) is pointwise and isinstance(result, Tensor)
            for used in dict.fromkeys(node.inputs) if is_pointwise else ():
                value = self.sample[used]
                if (
                    isinstance(value, Tensor)
                    and (value.shape, value.dtype) == (result.shape, result.dtype)
                    and self.axes[used] == self.axes[node.index]
                    and value.is_contiguous()
                    and self.memory.is_free(used, node.index)
                    and (operation := writes_into(node, used)) is not None
                ):
                    found.append((self.memory.together(used), operation))
            self._overwritings[node.index] = found
        return self._overwritings[node.index]

    def _work(self, node: Node) -> int:
        """Multiplications of a node's operation on one row, from its weights."""
        weight = getattr(node.target, "weight", None) if node.op == "module" else None
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            return 0
        return weight.numel() * max(1, _numel(self.sample[node.index]) // weight.shape[0])

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

        def shaped(i: int) -> Any:
            value = self.sample[i]
            if i in found or not (isinstance(value, Tensor) and self.depends[i]):
                return found.get(i, value)
            shape = shape_of(value, self.axes[i], n_rows)
            return torch.empty(shape, device="meta", dtype=value.dtype)

        for node in self.nodes:
            if self.depends[node.index] and not tensors_in(self.sample[node.index]):
                found[node.index] = node.call(shaped)
        return found


def _numel(value: Any) -> int:
    """Elements of one row, by a value for one input."""
    return sum(v.numel() for v in tensors_in(value))


def _reads_signs(node: Node, depends: Sequence[bool]) -> bool:
    """Whether an operation on values that depend on inputs may tell 0.0 from -0.0."""
    name = node.name.replace("_", "").lower()
    if name == "pow":
        exponent = node.option(1, "exponent")
        return not (isinstance(exponent, (int, float)) and exponent >= 0)
    if name in DIVISIONS:
        return divides_by(node, depends.__getitem__)
    return node.is_networks or name in READS_SIGNS
