"""The engine's face: a network captured once, called with any experiments and inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_map

from raypatch.definitions import OUTPUT_LOGITS, Experiment, Experiments, check_experiments
from raypatch.engine.capture import CaptureError, Graph, capture, first_line
from raypatch.engine.capture_export import capture_export
from raypatch.engine.incremental import Incremental, Prepared
from raypatch.engine.layers import Args, Layer, as_args, find_layers, forward
from raypatch.engine.plan import Plan, plan_experiments
from raypatch.engine.reference import cast
from raypatch.engine.sources import (
    SOURCE_KINDS,
    Fill,
    GivenFill,
    MeanFill,
    SourceKind,
    noise_fill,
    resample_order,
    zero_fill,
)
from raypatch.engine.stacked import Stacked, StackedPrepared
from raypatch.engine.structure import Savings
from raypatch.errors import InputError, RunError

# Dense values of one batch on a CPU: a part of what the last level of cache holds.
CPU_BATCH_BYTES = 8 << 20
MIN_BATCH_ROWS = 256
GPU_BATCH_SHARE = 0.25
DEFAULT_MEMORY_BYTES = 4 << 30
# How far two float32 evaluations of a network may differ before it is not the same network.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
Definition = Union[Experiments, Plan, Sequence[Experiment]]


class Patcher:
    """Patched outputs of one network, captured once and called many times.

    The network is copied: later changes to it do not reach the patcher, and the patcher
    leaves no hook, weight or training flag changed in it.

    ``path`` tells how patches are evaluated and why: ``incremental`` where the network could
    be captured as a graph, else ``stacked`` (hooks on stacked batches), else ``single``
    (one experiment at a time, for networks that mix the inputs of a batch).

    ``batch_rows`` (experiments x inputs in one batch) defaults to what suits the cache or the
    GPU's free memory; ``memory_bytes`` bounds what the patcher keeps and computes at a time.
    Not thread-safe.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batch_rows: int | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        savings: Savings | None = None,
    ) -> None:
        parameter = next(network.parameters(), None)
        self.dtype = dtype or (parameter.dtype if parameter is not None else torch.float32)
        self.device = torch.device(device or (parameter.device if parameter is not None else "cpu"))
        self.savings = savings or Savings()
        self.batch_rows = batch_rows
        self.memory_bytes = memory_bytes
        self.path = "not used yet"
        self.layers: dict[str, Layer] = {}
        self._network: nn.Module | None = _own_copy(network, self.device, self.dtype)
        self._engine: Incremental | Stacked | None = None
        self._one_input: Args = ()

    def __call__(
        self,
        experiments: Definition,
        source: Any = None,
        target: Any = None,
        *,
        kind: SourceKind = "pair",
        seed: int = 0,
    ) -> Tensor:
        """Patched outputs ``[experiments, inputs, outputs]``; see :func:`patch`."""
        return self.prepare(source, target, kind=kind, seed=seed)(experiments)

    def prepare(
        self, source: Any = None, target: Any = None, *, kind: SourceKind = "pair", seed: int = 0
    ) -> PatchRun:
        """Run both sides once; what comes back patches any experiments on these inputs."""
        if kind not in SOURCE_KINDS:
            raise InputError(f"source kind {kind!r}: valid: {', '.join(SOURCE_KINDS)}")
        if target is None or (kind in ("pair", "given") and source is None):
            raise InputError("patching needs target inputs, and source inputs for kind 'pair'")
        target_args = cast(as_args(target), self.dtype, self.device)
        n_inputs = _count(target_args)
        source_args = None
        if kind == "pair":
            source_args = cast(as_args(source), self.dtype, self.device)
            if _shapes(source_args) != _shapes(target_args):
                raise InputError(
                    f"source shapes {_shapes(source_args)} differ from the target's "
                    f"{_shapes(target_args)}"
                )
        elif kind == "resample":
            order = resample_order(n_inputs, seed).to(self.device)
            source_args = tree_map(lambda x: x[order] if isinstance(x, Tensor) else x, target_args)
        with exact_math():
            engine = self._engine or self._choose(target_args)
            fill: Fill | None = {"zero": zero_fill, "mean": None}.get(kind)
            if kind == "mean":
                fill = self._means(target_args, n_inputs)
            if kind == "given":
                fill = GivenFill(source)
            return PatchRun(self, engine, source_args, target_args, fill)

    def to(self, device: torch.device | str) -> Patcher:
        """Move the weights to a device; runs prepared before stay where they were."""
        self.device = torch.device(device)
        if isinstance(self._engine, Incremental):
            self._one_input = cast(self._one_input, self.dtype, self.device)
            with torch.no_grad():
                self._engine.to(self.device, self._one_input)
        elif self._engine is not None:
            self._engine.network.to(self.device)
        if self._network is not None:
            self._network.to(self.device)
        return self

    @property
    def graph(self) -> Graph | None:
        """The captured network; None before inputs were seen, and where it goes by hooks."""
        return self._engine.graph if isinstance(self._engine, Incremental) else None

    @property
    def neuron_counts(self) -> dict[str, int]:
        """Layers and their neurons as experiments name them; known once inputs were seen."""
        return {name: layer.neurons for name, layer in self.layers.items()}

    # ------------------------------------------------------------------- choosing a path

    def _choose(self, target: Args) -> Incremental | Stacked:
        """The fastest path that agrees with plain hooks on a few random experiments."""
        network = self._network
        assert network is not None
        probe = _probe_inputs(target)
        with torch.no_grad():
            output = forward(network, probe)
        if not isinstance(output, Tensor) or output.dim() != 2:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"the network gives {shape}; patching needs one tensor [inputs, outputs]"
            )
        self.layers = find_layers(network, probe)
        single = Stacked(network, self.layers, limit=1)
        reasons: list[str] = []
        for how in ("torch.fx", "torch.export", "stacked"):
            try:
                engine = self._build(how, network, probe)
                self._check(engine, single, probe)
            except CaptureError as reason:
                reasons.append(str(reason))
                continue
            if isinstance(engine, Incremental):
                because = f"; {reasons[0]}" if reasons else ""
                self.path = f"incremental ({how}{because})"
                self._network = None  # the graph holds the weights
            else:
                self.path = f"stacked (not captured: {'; '.join(reasons)})"
            self._one_input = _some_inputs(probe, 1)
            self._engine = engine
            return engine
        self.path = f"single ({'; '.join(reasons)})"
        self._engine = single
        return single

    def _build(self, how: str, network: nn.Module, probe: Args) -> Incremental | Stacked:
        if how == "stacked":
            return Stacked(network, self.layers, limit=None)
        try:
            with torch.no_grad():
                graph = capture(network) if how == "torch.fx" else capture_export(network, probe)
                if self.dtype is torch.float64:
                    graph.widen()
                return Incremental(graph, self.layers, self.savings, _some_inputs(probe, 1))
        except CaptureError:
            raise
        except Exception as error:  # anything a strange network may do when it is taken apart
            raise CaptureError(first_line(error)) from None

    def _check(self, engine: Incremental | Stacked, single: Stacked, target: Args) -> None:
        """Compare with one experiment on one input at a time; CaptureError if they differ."""
        plan = plan_experiments(self._probe_experiments())
        n_inputs = _count(target)
        source = tree_map(
            lambda x: x.roll(1, 0) if isinstance(x, Tensor) and x.dim() else x, target
        )
        # Inputs may be equal or the layers' values zero: noise makes every patch change something.
        for trial_source, fill in ((source, None), (None, noise_fill)):
            try:
                found = PatchRun(self, engine, trial_source, target, fill)(plan)
                expected = torch.cat(
                    [
                        PatchRun(
                            self, single,
                            None if trial_source is None else _slice(trial_source, i, i + 1),
                            _slice(target, i, i + 1), fill,
                        )(plan)
                        for i in range(n_inputs)
                    ],
                    1,
                )  # fmt: skip
            except CaptureError:
                raise
            except Exception as error:  # anything a strange network may do
                raise CaptureError(first_line(error)) from None
            for i in range(n_inputs):
                difference = float((found[:, i] - expected[:, i]).abs().max())
                largest = max(1.0, float(expected[:, i].abs().max()))
                if not difference <= CHECK_TOLERANCE.get(self.dtype, 1e-1) * largest:
                    raise CaptureError(f"differs from plain hooks by {difference:.1e} in a trial")

    def _probe_experiments(self) -> Experiments:
        names = list(self.layers)
        chosen = names if len(names) <= 12 else [*names[:6], *names[-6:]]
        trials: list[Experiment] = []
        for name in chosen:
            size = self.layers[name].neurons
            # At least two of a signature, so that really something is stacked.
            trials += [{name: [0]}, {name: [size // 2]}, {name: [size - 1]}, {name: "all"}]
            trials.append({name: sorted({0, size // 3, size - 1})})
        if len(chosen) > 1:
            trials.append({chosen[0]: [0], chosen[-1]: [0]})
        trials.append({OUTPUT_LOGITS: [0]})
        return Experiments.from_list(trials)

    def _means(self, target: Args, n_inputs: int) -> MeanFill:
        assert self._engine is not None
        sums: dict[str, list[Tensor]] = {}
        captured = isinstance(self._engine, Incremental)
        # Only a captured graph is known to keep the inputs along the first axis.
        size = self._inputs_at_a_time(target, n_inputs) if captured else 1
        for part in _parts(target, n_inputs, size):
            for name, calls in self._engine.layer_values(part).items():
                totals = [call.sum(0, keepdim=True) for call in calls] if captured else calls
                held = sums.get(name)
                sums[name] = totals if held is None else [a + b for a, b in zip(held, totals)]
        return MeanFill({name: [t / n_inputs for t in totals] for name, totals in sums.items()})

    # ------------------------------------------------------------------------- memory

    def _inputs_at_a_time(self, target: Args, n_inputs: int) -> int:
        """How many inputs' unpatched runs fit in half of the memory allowed."""
        assert self._engine is not None
        # Both runs, every layer's chain (values, differences), each about a run's size.
        one = 6 * max(1, self._engine.run_bytes(_some_inputs(target, 1)))
        return max(1, min(n_inputs, self.memory_bytes // 2 // one))

    def rows_for(self, row_bytes: int) -> int:
        """Rows of a batch whose dense values take ``row_bytes`` each."""
        if self.batch_rows is not None:
            return self.batch_rows
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            budget = int(min(free * GPU_BATCH_SHARE, self.memory_bytes / 4))
            return max(1, budget // (3 * row_bytes))
        rows = max(MIN_BATCH_ROWS, CPU_BATCH_BYTES // row_bytes)
        return max(1, min(rows, self.memory_bytes // 4 // (3 * row_bytes)))


class PatchRun:
    """A patcher on one set of inputs.

    ``baseline`` ``[inputs, outputs]`` holds the unpatched outputs on the targets, and
    ``source_baseline`` those on the sources, None where patched values are no run's own.
    """

    def __init__(
        self,
        patcher: Patcher,
        engine: Incremental | Stacked,
        source: Args | None,
        target: Args,
        fill: Fill | None,
    ) -> None:
        self.patcher = patcher
        self.rows_computed = 0
        self.n_inputs = _count(target)
        self._engine = engine
        self._halvings = 0
        size = self.n_inputs
        mixes = isinstance(engine, Stacked) and engine.limit == 1
        if patcher._engine is not None and size > 1 and not mixes:
            size = patcher._inputs_at_a_time(target, size)
        sources: Iterable[Args | None] = [None] * self.n_inputs
        if source is not None:
            sources = _parts(source, self.n_inputs, size)
        self._parts = list(zip(sources, _parts(target, self.n_inputs, size)))
        self._fill = fill
        self._kept: Prepared | StackedPrepared | None = None
        if len(self._parts) == 1:
            self._kept = self._prepare(0)
        baselines, source_baselines = [], []
        for i in range(len(self._parts)):
            held = self._prepare(i)
            baselines.append(held.baseline)
            source_baselines.append(held.source_baseline)
        self.baseline = torch.cat(baselines)
        self.source_baseline = (
            None if source is None else torch.cat([b for b in source_baselines if b is not None])
        )

    def __call__(self, experiments: Definition) -> Tensor:
        """Patched outputs ``[experiments, inputs, outputs]`` in the definition's order."""
        plan = self.plan(experiments)
        with exact_math(), torch.no_grad():
            out = self.baseline.new_empty(plan.n_experiments, *self.baseline.shape)
            first = 0
            for i in range(len(self._parts)):
                prepared = self._prepare(i)
                part = out[:, first : first + prepared.n_inputs]
                first += prepared.n_inputs
                for group in plan.groups:
                    self._evaluate(prepared, group, part)
            for copies, originals in plan.copies:
                out[copies] = out[originals]
        return out

    def plan(self, experiments: Definition) -> Plan:
        """Check and group experiments; a plan can be used for several runs."""
        if isinstance(experiments, Plan):
            return experiments
        if not isinstance(experiments, Experiments):
            counts = {**self.patcher.neuron_counts, OUTPUT_LOGITS: self.baseline.shape[1]}
            experiments = check_experiments(list(experiments), counts, "experiments")
        return plan_experiments(experiments, deduplicate=self.patcher.savings.deduplicate)

    def _prepare(self, part: int) -> Prepared | StackedPrepared:
        if self._kept is not None:
            return self._kept
        source, target = self._parts[part]
        fill = self._fill
        if isinstance(fill, GivenFill):
            first = sum(_count(earlier) for _, earlier in self._parts[:part])
            fill = fill.part(first, first + _count(target))
        with torch.no_grad():
            return self._engine.prepare(source, target, fill)

    def _evaluate(self, prepared: Prepared | StackedPrepared, group: Any, out: Tensor) -> None:
        """One group, with smaller batches after running out of memory; the size is kept."""
        while True:
            rows = self.patcher.rows_for(prepared.row_bytes(group)) >> self._halvings
            try:
                self.rows_computed += prepared.evaluate(group, out, max(1, rows))
                return
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if rows <= self.n_inputs:
                    raise RunError(
                        f"out of memory with one experiment in a batch ({self.n_inputs} inputs); "
                        "lower --memory_per_actor so that inputs are taken in parts"
                    ) from error
                self._halvings += 1


def patch(
    network: nn.Module,
    experiments: Definition,
    source: Any = None,
    target: Any = None,
    *,
    kind: SourceKind = "pair",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Activation patching of any module: what if these neurons had their source values?

    Each experiment maps layer names (paths of modules with weights, as in
    ``network.named_modules()``) to neurons or ``"all"``; ``output_logits`` is the output
    itself. For each experiment and input the network runs on the *target*, except that the
    listed neurons of a layer's output (before the activation that follows) take the values
    they have in the unpatched run on the *source*.

    ``source`` and ``target`` are ``[inputs, ...]`` tensors, or tuples of them for a forward
    with several arguments. ``kind`` "zero" and "mean" patch in zeros or the neuron's mean
    over the targets; "resample" takes another target as the source (seeded). Those need no
    ``source``. With "given" the source is no input: it maps layers to recorded activations
    ``[inputs, ...]``.

    Returns ``[experiments, inputs, outputs]``, equal to plain forward hooks up to floating
    point reassociation. Raises InputError for experiments or inputs that do not fit.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> clean, corrupted = torch.randn(5, 4), torch.randn(5, 4)
    >>> patch(net, [{"0": [3]}, {"0": "all"}], source=clean, target=corrupted).shape
    torch.Size([2, 5, 2])
    """
    patcher = Patcher(network, dtype=dtype, device=device)
    return patcher(experiments, source, target, kind=kind, seed=seed)


@contextmanager
def exact_math() -> Iterator[None]:
    """TF32 off, so that float32 means float32 on a GPU too; restored afterwards."""
    held = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = held


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _leaves(args: Args) -> list[Tensor]:
    leaves, _ = tree_flatten(args)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]


def _shapes(args: Args) -> list[list[int]]:
    return [list(leaf.shape) for leaf in _leaves(args)]


def _count(args: Args) -> int:
    """Number of inputs, the same in every tensor."""
    sizes = {len(leaf) for leaf in _leaves(args)}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            f"inputs of shapes {_shapes(args)} do not share one number of inputs above 0"
        )
    return sizes.pop()


def _slice(args: Args, first: int, last: int) -> Args:
    sliced: Args = tree_map(
        lambda x: x[first:last] if isinstance(x, Tensor) and x.dim() else x, args
    )
    return sliced


def _some_inputs(args: Args, n: int) -> Args:
    return _slice(args, 0, n)


def _own_copy(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy for good, in which parametrised weights are what they are now."""
    try:
        own = copy.deepcopy(network)
    except Exception as error:
        raise InputError(f"the network cannot be copied: {first_line(error)}") from None
    own = own.to(device, dtype).eval()
    for module in list(own.modules()):
        if is_parametrized(module):
            _settle(module)
    return own.requires_grad_(False)


def _settle(module: nn.Module) -> None:
    """Make what a parametrisation computes a plain parameter.

    ``remove_parametrizations`` would change the class, which copies share with their original.
    """
    computed = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in computed.items():
        module.register_parameter(name, nn.Parameter(value))


def _probe_inputs(args: Args) -> Args:
    """Two or three inputs for a trial; a single one is joined by its half."""
    if _count(args) > 1:
        return _some_inputs(args, 3)
    return tree_map(
        lambda x: torch.cat([x, (x / 2).to(x.dtype)]) if isinstance(x, Tensor) and x.dim() else x,
        args,
    )


def _parts(args: Args, n_inputs: int, size: int) -> list[Args]:
    return [_slice(args, i, i + size) for i in range(0, n_inputs, size)]
