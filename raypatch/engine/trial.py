"""Which way to evaluate a network: the fastest that agrees with plain hooks in a trial."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raypatch.definitions import OUTPUT_LOGITS, Experiment, Experiments
from raypatch.engine.arguments import (
    chosen_inputs,
    count_inputs,
    described,
    first_unlike,
    in_parts,
    inputs_between,
    together,
)
from raypatch.engine.capture import capture
from raypatch.engine.capture_export import capture_export
from raypatch.engine.copies import copied, left_as_it_was
from raypatch.engine.decisions import decided_by_values, refuse_mixing
from raypatch.engine.graph import CaptureError, Graph, InputsMeetError
from raypatch.engine.guards import distributions_unchecked
from raypatch.engine.incremental import Incremental
from raypatch.engine.layers import (
    Args,
    Layer,
    find_layers,
    forward,
    map_tensors,
    tensors_in,
)
from raypatch.engine.patch_run import Engine, Limits, PatchRun
from raypatch.engine.plan import Plan, plan_experiments
from raypatch.engine.reference import cast
from raypatch.engine.sources import Fill, noise_fill
from raypatch.engine.stacked import Stacked
from raypatch.engine.structure import Savings
from raypatch.errors import InputError, gpu_failed, is_not_of_network, one_line

# How far apart two evaluations of a network may be, as a share of an output, before it is not the
# same network.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
# The same as a share of what patches change at most.
EFFECT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
# Outputs beyond are no scale for others: masks put such there.
NO_SCALE = 1e6
# How many times as large inputs a captured graph is also compared on.
FAR = (-30.0, 30.0, 1000.0)
# Forwards of a network that draws random numbers, before it is believed that its outputs do not
# depend on them, as where it samples an action beside its logits.
DRAWS = 100
# A trial is small: nothing of it is cut to fit.
TRIAL_BYTES = 1 << 40
WAYS = ("torch.fx", "torch.export", "stacked")  # the fastest first


def choose_engine(
    network: nn.Module,
    probe: Args,
    dtype: torch.dtype,
    savings: Savings,
    *,
    not_captured: str | None = None,
) -> tuple[Engine, str]:
    """The engine for a network, and how it evaluates and why; ``probe`` are :func:`trial_inputs`.

    ``not_captured`` is a reason, found elsewhere, why no captured graph will do.
    """
    check_outputs(network, probe, dtype)
    layers = find_layers(network, probe)
    # A way that cannot be taken for what the network is says why, whatever a trial shows.
    unfit: dict[str, str] = {}
    decided = decided_by_values(network, probe)
    if decided.of_python is None:
        unfit["stacked"] = "whether its Python decides by values cannot be seen"
    elif decided.of_python:
        # Tracing by symbols notices by itself, and goes on where only an assertion asks.
        unfit = dict.fromkeys(WAYS[1:], "its Python decides by values")
    if decided.of_meetings:
        unfit = dict.fromkeys(WAYS, "inputs that it chooses by values meet")
    own = _Trial(network, layers, probe, dtype, savings, decided.of_python)
    wide = _in_float64(own)
    reasons: list[str] = [not_captured] if not_captured else []
    for how in WAYS[-1:] if not_captured else WAYS:
        try:
            if how in unfit:
                raise CaptureError(unfit[how])
            if how == "stacked":
                refuse_mixing(network, list(layers), probe)
            engine = _passed(how, wide, own)
            break
        except CaptureError as reason:
            reasons = list(dict.fromkeys([*reasons, str(reason)]))
            if isinstance(reason, InputsMeetError):
                unfit["stacked"] = str(reason)
    else:
        single = Stacked(network, layers, limit=1, routes=decided.of_sizes)
        return single, f"single ({'; '.join(reasons)})"
    del wide  # its copy of the network makes room
    try:
        engine = engine or own.build(how)
    except CaptureError as reason:
        return Stacked(network, layers, limit=1), f"single ({'; '.join([*reasons, str(reason)])})"
    if isinstance(engine, Incremental):
        because = f"; {reasons[0]}" if reasons else ""
        return engine, f"incremental ({how}{because})"
    engine.routes = decided.of_sizes
    return engine, f"stacked (not captured: {'; '.join(reasons)})"


def _passed(how: str, wide: _Trial | None, own: _Trial) -> Engine | None:
    """CaptureError where an engine does not give what plain hooks do; the engine itself where only
    the trial of the network as it is tells."""
    if wide is not None:
        try:
            wide.passed(how)
        except _DiffersError:
            raise
        except CaptureError:  # in float64 it is not captured, or has no room: as it is, it may be
            return own.passed(how)
        return None
    return own.passed(how)


def check_outputs(network: nn.Module, probe: Args, dtype: torch.dtype) -> None:
    """Raises InputError where a network's outputs are not what can be patched."""
    output = network_output(network, probe)
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the network gives {shape}; patching needs one tensor [inputs, outputs]")
    if not output.is_floating_point():
        raise InputError(f"the network gives {output.dtype}; patching needs logits, float numbers")
    before, drawn = _state(network), _random_state(output.device)
    again = network_output(network, probe)
    is_kept = _state(network) == before or torch.equal(again, output)
    is_same = again.shape == output.shape and is_kept and _compared(again, output, dtype)[1]
    if is_same and _random_state(output.device) != drawn:  # what is rare may not have shown
        more = (network_output(network, probe) for _ in range(DRAWS))
        is_same = all(x.shape == output.shape and _compared(x, output, dtype)[1] for x in more)
    if not is_same:
        raise InputError(
            "the network gives other outputs for the same inputs when it is called again: it draws "
            "random numbers or updates its own state; patching needs a forward that does neither"
        )


def _random_state(device: torch.device) -> list[Any]:
    """What tells whether random numbers have been drawn."""
    of_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    _, keys, *place = np.random.get_state()
    of_torch = [state.numpy().tobytes() for state in (torch.get_rng_state(), *of_gpu)]
    return [*of_torch, np.asarray(keys).tobytes(), place, random.getstate()]


def _state(network: nn.Module) -> list[tuple[int, int]]:
    """What tells whether a forward has written into the tensors of its modules, or replaced any."""
    held = [tensor for module in network.modules() for tensor in tensors_in(vars(module))]
    return [(id(tensor), tensor._version) for tensor in held]


def network_output(network: nn.Module, args: Args) -> Any:
    """The network's output; InputError where it fails on such inputs."""
    try:
        with torch.no_grad():
            return forward(network, args)
    except Exception as error:  # anything a network's own code may raise
        if is_not_of_network(error):
            raise
        raise InputError(
            f"the network fails on inputs of {described(args)}: {one_line(error)}"
        ) from error


class _DiffersError(CaptureError):
    """An engine gives something else than plain hooks do."""


@dataclass(frozen=True)
class _Trial:
    """Compares engines with one experiment on one input at a time."""

    network: nn.Module
    layers: dict[str, Layer]
    probe: Args
    dtype: torch.dtype
    savings: Savings
    decides: bool | None  # whether Python does by values; None where that cannot be seen

    def build(self, how: str) -> Engine:
        """An engine; CaptureError where the network cannot be evaluated so."""
        if how == "stacked":
            return Stacked(self.network, self.layers, limit=None)
        capturing = capture if how == "torch.fx" else capture_export
        network, probe = self.network, self.probe
        try:
            with torch.no_grad(), left_as_it_was(network), distributions_unchecked():
                graph = capturing(network, probe)
                if graph.holds_networks_code:
                    self._check_networks_code()
                if (device := tensors_in(probe)[0].device).type != "cpu":
                    for node in graph.nodes:
                        node.move(device)
                if self.dtype is torch.float64:
                    graph.widen(probe)
                return Incremental(graph, self.layers, self.savings, probe)
        except CaptureError:
            raise
        except Exception as error:  # anything a strange network may do when it is taken apart
            raise CaptureError(one_line(error)) from None

    def _check_networks_code(self) -> None:
        """Raises CaptureError where code of the network's own, which is one node, does something
        else for the rows of a batch together."""
        if self.decides is not False:
            raise CaptureError("a module or function of its own decides by values")
        refuse_mixing(self.network, list(self.layers), self.probe)

    def passed(self, how: str) -> Engine:
        """An engine that does what plain hooks do; CaptureError where it does not."""
        engine = self.build(how)
        if how == "torch.export" and self.dtype is torch.float64:
            self._check_far(engine.graph)  # type: ignore[union-attr]
        for source, fill, plan, expected in self._expected:
            try:
                found = PatchRun(engine, self._limits, source, self.probe, fill)(plan)
            except CaptureError:
                raise
            except Exception as error:  # anything a strange network may do
                raise CaptureError(one_line(error)) from None
            for i, (right, unpatched) in enumerate(expected):
                effect = (right - unpatched).abs().nan_to_num(0, 0, 0).amax(0)
                difference, is_small = _compared(found[:, i : i + 1], right, self.dtype, effect)
                if not is_small:
                    raise _DiffersError(f"differs from plain hooks by {difference:.1e} in a trial")
        return engine

    def _check_far(self, graph: Graph) -> None:
        """An exporter's stand-ins are tensors, but of classes of their own, which Python may ask
        for: what it does for real ones may show on other numbers only."""
        for scale in FAR:
            far = map_tensors(partial(_scaled, by=scale), self.probe)
            try:
                expected = network_output(self.network, far)
            except InputError:
                continue
            difference, is_small = _compared(graph.run(far)[-1], expected, self.dtype)
            if not is_small:
                raise _DiffersError(f"differs from the network by {difference:.1e} on large inputs")

    @property
    def _limits(self) -> Limits:
        return Limits(torch.device("cpu"), TRIAL_BYTES)

    @cached_property
    def _expected(self) -> list[_Way]:
        """What plain hooks give."""
        n_inputs = count_inputs(self.probe)
        source = chosen_inputs(self.probe, [i - 1 for i in range(n_inputs)])
        single = Stacked(self.network, self.layers, limit=1)

        def way(source: Args | None, fill: Fill | None, trials: list[Experiment]) -> _Way:
            plan, expected = plan_experiments(Experiments.from_list(trials)), []
            for i in range(n_inputs):
                own = None if source is None else inputs_between(source, i, i + 1)
                target = inputs_between(self.probe, i, i + 1)
                run = PatchRun(single, self._limits, own, target, fill)
                expected.append((run(plan), run.baseline))
            return _Way(source, fill, plan, expected)

        of_few, of_all = _trials(self.layers)
        try:
            # Inputs may be equal or values zero: with noise every patch changes something.
            return [way(source, None, of_few), way(None, noise_fill, of_all)]
        except Exception as error:  # anything a strange network may do
            raise CaptureError(one_line(error)) from None


class _Way(NamedTuple):
    """A way of filling in values: for each input the outputs ``[experiments, 1, outputs]`` that are
    right, and ``[1, outputs]`` without a patch."""

    source: Args | None
    fill: Fill | None
    plan: Plan
    expected: list[tuple[Tensor, Tensor]]


def _in_float64(trial: _Trial) -> _Trial | None:
    """The trial in float64, where what rounds is far below what a wrong capture changes; None where
    the network is so anyway, or cannot be."""
    if trial.dtype is torch.float64:
        return None
    device = tensors_in(trial.probe)[0].device
    try:
        wide = copied(trial.network, device, torch.float64)
        probe = cast(trial.probe, torch.float64, device)
        network_output(wide, probe)
    except Exception as error:  # anything a network's own code may raise
        if gpu_failed(error):
            raise
        return None
    return replace(trial, network=wide, probe=probe, dtype=torch.float64)


def check_unpatched(network: nn.Module, run: PatchRun, source: Args | None, target: Args) -> None:
    """Compare a captured graph's unpatched outputs with the network's own, of all inputs: what a
    capture has fixed may hold for those of the trial only. CaptureError if they differ."""
    for args, found in ((source, run.source_baseline), (target, run.baseline)):
        if args is None or found is None:
            continue
        first = 0
        for part in in_parts(args, run.n_inputs, run.inputs_at_a_time):
            expected = network_output(network, part)
            last = first + len(expected)
            difference, is_small = _compared(found[first:last], expected, found.dtype)
            if not is_small:
                raise CaptureError(f"differs from the network by {difference:.1e} on some input")
            first = last


def _compared(
    found: Tensor, expected: Tensor, dtype: torch.dtype, effect: Tensor | None = None
) -> tuple[float, bool]:
    """The largest difference, and whether all are of rounding alone: each is measured by its own
    output and by what patches change there, or where nothing is known of that, by what outputs
    usually are."""
    tolerance = TOLERANCE.get(dtype, 1e-1)
    same = (found == expected) | (found.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0, True
    difference = (found - expected).abs().masked_fill(same, 0)
    size = expected.abs()
    if effect is None:
        usual = size[size < NO_SCALE]
        allowed = tolerance * (size.clamp(min=float(usual.median())) if usual.numel() else size)
    else:
        allowed = tolerance / 100 * size + EFFECT_TOLERANCE.get(dtype, 1e-1) * effect
    # Nothing that is infinite or none is near anything else.
    allowed += 16 * torch.finfo(dtype).eps
    is_small = (difference <= allowed) & expected.isfinite() | same
    return float(difference.max()), bool(is_small.all())


def _scaled(x: Tensor, by: float) -> Tensor:
    return x * by if x.is_floating_point() else x


def _trials(layers: dict[str, Layer]) -> tuple[list[Experiment], list[Experiment]]:
    """Experiments on the first and the last layers, and with them some on every other."""
    names = list(layers)
    chosen = names if len(names) <= 12 else [*names[:6], *names[-6:]]
    trials: list[Experiment] = []
    for name in chosen:
        size = layers[name].neurons
        # At least two of a signature, so that really something is stacked.
        trials += [{name: [0]}, {name: [size // 2]}, {name: [size - 1]}, {name: "all"}]
        trials.append({name: sorted({0, size // 3, size - 1})})
    if len(chosen) > 1:
        trials.append({chosen[0]: [0], chosen[-1]: [0]})
    trials.append({OUTPUT_LOGITS: [0]})
    others = [name for name in names if name not in chosen]
    more = [{name: [neuron]} for name in others for neuron in (0, layers[name].neurons // 2)]
    return trials, [*trials, *more]


def trial_inputs(args: Args, telling: Args | None = None) -> Args:
    """Two or three inputs for a trial, the second unlike the first where one of ``args`` is; a
    single one is joined by its half. ``telling`` are inputs that come first."""
    if telling is not None:
        return together(telling, inputs_between(args, 0, 2))
    n_inputs = count_inputs(args)
    if n_inputs == 1:
        return together(args, map_tensors(lambda x: (x / 2).to(x.dtype), args))
    order = list(dict.fromkeys([0, first_unlike(args) or 1, *range(n_inputs)][:5]))[:3]
    return chosen_inputs(args, order)
