"""The engine's face: a network captured once, called with any experiments and inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from raypatch.engine.arguments import (
    count_inputs,
    described,
    first_unlike,
    form_of,
    in_parts,
    inputs_between,
)
from raypatch.engine.copies import CallsOriginalError, none_called, own_copy
from raypatch.engine.graph import CaptureError, Graph
from raypatch.engine.incremental import Incremental
from raypatch.engine.input_axes import AxisUnsettled
from raypatch.engine.layers import (
    Args,
    Layer,
    find_layers,
    owns_weights,
)
from raypatch.engine.patch_run import Definition, Engine, Limits, PatchRun
from raypatch.engine.plan import Plan
from raypatch.engine.precision import exact_math
from raypatch.engine.reference import cast
from raypatch.engine.replaying import Replays, key_of
from raypatch.engine.sources import Fill, GivenFill, SourceKind, mean_fill, zero_fill
from raypatch.engine.stacked import Stacked
from raypatch.engine.structure import Savings
from raypatch.engine.trial import (
    check_outputs,
    check_unpatched,
    choose_engine,
    network_output,
    trial_inputs,
)
from raypatch.engine.two_sides import TwoSides, two_sides
from raypatch.errors import InputError, RaypatchError, is_not_of_network, one_line

# How often a graph is captured anew for inputs that tell more.
RECAPTURES = 4
# Preparing traces networks, by which torch changes how modules are called in the whole process.
_one_prepares = RLock()


class Patcher:
    """Patched outputs of one network, captured once and called many times.

    The network is copied: later changes to it do not reach the patcher, and the patcher
    leaves no hook, weight or training flag changed in it. It is captured for the form of inputs
    (all but their number) that it gets, and anew where that changes.

    ``path`` tells how patches are evaluated and why: ``incremental`` where the network could
    be captured as a graph, else ``stacked`` (hooks on stacked batches), else ``single``
    (one experiment at a time, for networks that mix the inputs of a batch).

    ``batch_rows`` (experiments x inputs in one batch) defaults to what suits the cache or the
    GPU; ``memory_bytes`` bounds what the patcher keeps and computes at a time, and defaults to
    2 GiB, on a GPU to half of what is free there, or ``gpu_share`` of that for one of several
    patchers on it.
    Not thread-safe. Several threads may each prepare a patcher of their own, one after the other;
    while one does, no other thread may run a network: torch's tracing changes how modules are
    called in the whole process. On a GPU the same goes for a second call with the same experiments,
    which may be recorded, to be replayed on further inputs.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batch_rows: int | None = None,
        memory_bytes: int | None = None,
        gpu_share: float = 1.0,
        savings: Savings | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise InputError(f"a network is a torch.nn.Module, not {type(network).__name__}")
        floating = (p for p in network.parameters() if p.is_floating_point())
        parameter = next(floating, None)
        self.dtype = dtype or (parameter.dtype if parameter is not None else torch.float32)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise InputError(f"dtype {self.dtype!r}: valid are torch.float32 and torch.float64")
        if batch_rows is not None and (not isinstance(batch_rows, int) or batch_rows < 1):
            raise InputError(f"batch_rows {batch_rows!r}: a whole number above 0")
        self.device = _usable(device or (parameter.device if parameter is not None else "cpu"))
        self.savings = savings or Savings()
        self._limits = Limits(self.device, memory_bytes, batch_rows, gpu_share)
        self.path = "not used yet"
        self.layers: dict[str, Layer] = {}
        network = getattr(network, "_orig_mod", network)  # what torch.compile wraps
        with torch.inference_mode(False):
            own = own_copy(network, self.device, self.dtype)
        self._network: nn.Module | None = own
        self._originals: Any = WeakSet({*network.modules()} - {*own.modules()})
        self._modules = {name: _why_no_layer(module) for name, module in own.named_modules()}
        self._engine: Engine | None = None
        self._replays: Replays | None = None
        self._probe: Args = ()
        self._told = False

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers, " if self.layers else ""
        return f"<raypatch.Patcher: {layers}{self.path}, {self.dtype} on {self.device}>"

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
        sides = self._sides(source, target, kind, seed)
        key = key_of(self.device, experiments, sides)
        if key is not None and self._replays is not None:
            replayed = self._replays.outputs(key, sides)
            if replayed is not None:
                return replayed
        run = self._prepared(sides)
        try:
            plan = run.plan(experiments)
            with torch.inference_mode(False):
                outputs = run(plan).contiguous()
        except Exception as error:  # anything that an operation or a network's own code may raise
            if is_not_of_network(error):
                raise
            reason = f"the network fails on patched values: {one_line(error)}"
            if self._captured is None or self._network is None:
                raise InputError(reason) from error
        else:
            if key is not None:
                self._count(key, plan, sides, outputs)
            return outputs
        # The network may go on where an operation of it fails, which is in no graph.
        with _one_prepares, exact_math():
            self._settle_engine(run.target, not_captured=reason)
        return self(experiments, source, target, kind=kind, seed=seed)

    def prepare(
        self, source: Any = None, target: Any = None, *, kind: SourceKind = "pair", seed: int = 0
    ) -> PatchRun:
        """Run both sides once; what comes back patches any experiments on these inputs, which must
        not be written over meanwhile: a run refuses to go on with what it was not prepared for."""
        return self._prepared(self._sides(source, target, kind, seed))

    def _sides(self, source: Any, target: Any, kind: SourceKind, seed: int) -> TwoSides:
        return two_sides(source, target, kind, seed, self.dtype, self.device)

    def _prepared(self, sides: TwoSides) -> PatchRun:
        try:
            with _one_prepares, exact_math():
                return self._checked_run(partial(self._run, sides), sides.source, sides.target)
        except Exception as error:
            # A network may take the inputs of a trial and fail on others.
            if self._network is not None and not isinstance(error, RaypatchError):
                for args in filter(None, (sides.target, sides.source)):
                    network_output(self._network, args)
            raise

    def _checked_run(
        self, make: Callable[[], PatchRun], source_args: Args | None, target_args: Args
    ) -> PatchRun:
        """What ``make`` gives with the fastest engine that fits these inputs."""
        telling = None
        if source_args is not None and first_unlike(target_args) is None:
            telling = inputs_between(source_args, 0, 1)  # targets are all the same
        is_new, reason = self._settle_engine(target_args, telling=telling), ""
        for _ in range(RECAPTURES):
            try:
                run = make()
                if self._network is not None and self._needs_check(is_new):
                    check_unpatched(self._network, run, source_args, target_args)
                return run
            except AxisUnsettled as unsettled:
                reason = str(unsettled)
                if self._network is None:
                    break
                is_new = self._settle_engine(target_args, telling=unsettled.inputs, anew=True)
            except CaptureError as error:
                reason = str(error)
                break
        self._settle_engine(target_args, not_captured=reason)
        return make()

    def _run(self, sides: TwoSides) -> PatchRun:
        assert self._engine is not None
        n_inputs = count_inputs(sides.target)
        fill: Fill | None = None
        if sides.kind == "zero":
            fill = zero_fill
        elif sides.kind == "mean":
            # Only a captured graph is known to keep the inputs along the first axis.
            engine, captured = self._engine, self._captured is not None
            size = self._limits.inputs_at_a_time(engine, sides.target, n_inputs) if captured else 1
            parts = in_parts(sides.target, n_inputs, size)
            fill = mean_fill(engine.layer_values, parts, n_inputs, captured=captured)
        elif sides.kind == "given":
            fill = GivenFill(sides.given, n_inputs)
        return PatchRun(
            self._engine, replace(self._limits), sides.source, sides.target, fill,
            deduplicate=self.savings.deduplicate, modules=self._modules,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Patcher:
        """Move the weights to a device; runs prepared before stay where they were."""
        self._replays = None
        self.device = torch.device(device)
        self._limits = replace(self._limits, device=self.device)
        if self._captured is not None:
            self._probe = cast(self._probe, self.dtype, self.device)
            with torch.no_grad():
                self._captured.to(self.device, self._probe)
        elif isinstance(self._engine, Stacked):
            self._engine.network.to(self.device)
        if self._network is not None:
            self._network.to(self.device)
        return self

    def _count(self, key: Hashable, plan: Plan, sides: TwoSides, outputs: Tensor) -> None:
        """Of the engine that there is now."""
        if self._replays is None and self._told:
            self._replays = Replays.of(self._engine, replace(self._limits))
        if self._replays is not None:
            self._replays.count(key, plan, sides, outputs)

    @property
    def graph(self) -> Graph | None:
        """The captured network; None before inputs were seen, and where it goes by hooks."""
        return self._captured.graph if self._captured else None

    @property
    def _captured(self) -> Incremental | None:
        return self._engine if isinstance(self._engine, Incremental) else None

    @property
    def neuron_counts(self) -> dict[str, int]:
        """Layers and their neurons as experiments name them; known once inputs were seen."""
        return {name: layer.neurons for name, layer in self.layers.items()}

    def _needs_check(self, is_new: bool) -> bool:
        """Whether a captured graph might not be the network on these inputs: symbolic tracing sees
        no values, so that one look is enough; an export has run on some, and the network may refuse
        others."""
        graph = self.graph
        return graph is not None and (is_new or graph.guarded or graph.how == "torch.export")

    def _settle_engine(
        self,
        target: Args,
        *,
        telling: Args | None = None,
        anew: bool = False,
        not_captured: str | None = None,
    ) -> bool:
        """Choose the engine for inputs of this form when they first come, ``anew`` where others
        tell more, and where it turns out that a captured graph is not the network on all of them;
        whether it is a new one. ``telling`` are inputs that must be looked at."""
        fits = self._engine is not None and form_of(target) == form_of(self._probe)
        # Inputs that are all the same tell little: of others it may be captured after all.
        fits = fits and (
            self._told
            or self._network is None
            or (telling is None and first_unlike(target) is None)
        )
        if fits and not anew and not_captured is None:
            return False
        if self._network is None:
            reason = f"; {not_captured}" if not_captured else ""
            raise InputError(
                f"this pickled copy takes inputs of {described(self._probe)} only, not of "
                f"{described(target)}; make a new Patcher of the network{reason}"
            )
        probe = trial_inputs(target, telling)
        engine: Engine
        with none_called(self._originals):
            runs = _runs_on(self._network, probe)
        if not runs and _runs_on(self._network, target):
            probe = target
            check_outputs(self._network, probe, self.dtype)
            engine = Stacked(self._network, find_layers(self._network, target), 1, routes=True)
            self.path = f"single (it does not run on other than {count_inputs(target)} inputs)"
        else:
            engine, self.path = choose_engine(
                self._network, probe, self.dtype, self.savings, not_captured=not_captured
            )
        self.layers = engine.layers
        self._probe, self._told = probe, first_unlike(probe) is not None
        self._engine = engine
        self._replays = None
        return True

    def __getstate__(self) -> dict[str, Any]:
        """A copy needs no code of the user's where the graph holds the network."""
        network = {"_network": None} if self._captured else {}
        # What is free is another's memory there.
        own = {"_originals": (), "_replays": None, "_limits": replace(self._limits)}
        return {**self.__dict__, **network, **own}


def _runs_on(network: nn.Module, args: Args) -> bool:
    try:
        network_output(network, args)
    except CallsOriginalError:
        raise
    except InputError:
        return False
    return True


def _why_no_layer(module: nn.Module) -> str:
    """Said of a module that no experiment can patch."""
    if owns_weights(module):
        return (
            "is not called by the forward on the first inputs, or gives no tensor (another "
            "module may use its weights)"
        )
    kind = type(module).__name__
    return f"is a {kind}: only modules with a matrix or kernel as a parameter can be patched"


def _usable(device: torch.device | str) -> torch.device:
    """The device; InputError where it holds no numbers, as one that is not there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {one_line(error)}") from None
    return torch.device(device)


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

    Each experiment maps layer names to neurons or ``"all"``. A layer is a module with a weight
    matrix or kernel (linear, convolution, recurrent; not a normalisation or an activation
    function), by its path in ``network.named_modules()``; ``output_logits`` is the output
    itself. For each experiment and input the network runs on the *target*, except that the
    listed neurons of a layer's output (before the activation that follows) take the values they
    have in the unpatched run on the *source*. It runs in evaluation mode, whatever mode it is in.

    ``source`` and ``target`` are ``[inputs, ...]`` tensors, or tuples or lists of them for a
    forward with several arguments. ``kind`` "zero" and "mean" patch in zeros or the neuron's
    mean over the targets; "resample" takes another target as the source (seeded). Those need no
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
