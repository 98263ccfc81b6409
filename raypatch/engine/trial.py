"""Which way to evaluate a network: the fastest that agrees with plain hooks in a trial."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from raypatch.definitions import OUTPUT_LOGITS, Experiment, Experiments
from raypatch.engine.arguments import (
    count_inputs,
    described,
    first_unlike,
    in_parts,
    inputs_between,
    together,
)
from raypatch.engine.capture import capture, first_line
from raypatch.engine.capture_export import capture_export
from raypatch.engine.decisions import decides_by_values
from raypatch.engine.graph import CaptureError
from raypatch.engine.incremental import Incremental
from raypatch.engine.layers import (
    Args,
    Layer,
    find_layers,
    forward,
    map_tensors,
    tensors_in,
    without_nested_tensors,
)
from raypatch.engine.patch_run import Engine, Limits, PatchRun, is_out_of_memory
from raypatch.engine.plan import plan_experiments
from raypatch.engine.sources import noise_fill
from raypatch.engine.stacked import Stacked
from raypatch.engine.structure import Savings
from raypatch.errors import InputError, RaypatchError, gpu_failed, one_line

# How far two float32 evaluations of a network may differ before it is not the same network.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
# A trial is small: nothing of it is cut to fit.
TRIAL_BYTES = 1 << 40


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
    output = network_output(network, probe)
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the network gives {shape}; patching needs one tensor [inputs, outputs]")
    if not output.is_floating_point():
        raise InputError(f"the network gives {output.dtype}; patching needs logits, float numbers")
    layers = find_layers(network, probe)
    single = Stacked(network, layers, limit=1)
    reasons: list[str] = [not_captured] if not_captured else []
    for how in ("stacked",) if not_captured else ("torch.fx", "torch.export", "stacked"):
        try:
            if how == "stacked" and decides_by_values(network, probe):
                raise CaptureError("its Python decides by values")
            engine = _build(how, network, layers, probe, dtype, savings)
            _check(engine, single, layers, probe, dtype)
        except CaptureError as reason:
            reasons = list(dict.fromkeys([*reasons, str(reason)]))
            continue
        if isinstance(engine, Incremental):
            because = f"; {reasons[0]}" if reasons else ""
            return engine, f"incremental ({how}{because})"
        return engine, f"stacked (not captured: {'; '.join(reasons)})"
    return single, f"single ({'; '.join(reasons)})"


def network_output(network: nn.Module, args: Args) -> Any:
    """The network's output; InputError where it fails on such inputs."""
    try:
        with torch.no_grad():
            return forward(network, args)
    except Exception as error:  # anything a network's own code may raise
        if isinstance(error, RaypatchError) or gpu_failed(error) or is_out_of_memory(error):
            raise
        raise InputError(
            f"the network fails on inputs of {described(args)}: {one_line(error)}"
        ) from error


def _build(
    how: str,
    network: nn.Module,
    layers: dict[str, Layer],
    probe: Args,
    dtype: torch.dtype,
    savings: Savings,
) -> Engine:
    if how == "stacked":
        return Stacked(network, layers, limit=None)
    try:
        with torch.no_grad():
            graph = capture(network, probe) if how == "torch.fx" else capture_export(network, probe)
            if (device := tensors_in(probe)[0].device).type != "cpu":
                for node in graph.nodes:
                    node.move(device)
            if dtype is torch.float64:
                graph.widen(probe)
            return Incremental(graph, layers, savings, probe)
    except CaptureError:
        raise
    except Exception as error:  # anything a strange network may do when it is taken apart
        raise CaptureError(first_line(error)) from None


def _check(
    engine: Engine, single: Stacked, layers: dict[str, Layer], target: Args, dtype: torch.dtype
) -> None:
    """Compare with one experiment on one input at a time; CaptureError if they differ."""
    limits = Limits(torch.device("cpu"), TRIAL_BYTES)
    plan = plan_experiments(_experiments(layers))
    n_inputs = count_inputs(target)
    source = map_tensors(lambda x: x.roll(1, 0) if x.dim() else x, target)
    # Inputs may be equal or the layers' values zero: noise makes every patch change something.
    for trial_source, fill in ((source, None), (None, noise_fill)):
        try:
            found = PatchRun(engine, limits, trial_source, target, fill)(plan)
            alone = [
                PatchRun(
                    single,
                    limits,
                    None if trial_source is None else inputs_between(trial_source, i, i + 1),
                    inputs_between(target, i, i + 1),
                    fill,
                )(plan)
                for i in range(n_inputs)
            ]
        except CaptureError:
            raise
        except Exception as error:  # anything a strange network may do
            raise CaptureError(first_line(error)) from None
        for i, expected in enumerate(alone):
            difference, is_small = _compared(found[:, i : i + 1], expected, dtype)
            if not is_small:
                raise CaptureError(f"differs from plain hooks by {difference:.1e} in a trial")


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


def _compared(found: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[float, bool]:
    """The largest difference, and whether it is one of rounding alone."""
    tolerance = TOLERANCE.get(dtype, 1e-1)
    difference = float((found - expected).abs().max())
    if difference <= tolerance:  # as a rule
        return difference, True
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = float((found - expected).abs().masked_fill(same, 0).max())
    largest = max(1.0, float(expected.abs().max()))
    return difference, difference <= tolerance * largest


def _experiments(layers: dict[str, Layer]) -> Experiments:
    names = list(layers)
    chosen = names if len(names) <= 12 else [*names[:6], *names[-6:]]
    trials: list[Experiment] = []
    for name in names[6:-6]:
        trials += [{name: [0]}, {name: [layers[name].neurons // 2]}]
    for name in chosen:
        size = layers[name].neurons
        # At least two of a signature, so that really something is stacked.
        trials += [{name: [0]}, {name: [size // 2]}, {name: [size - 1]}, {name: "all"}]
        trials.append({name: sorted({0, size // 3, size - 1})})
    if len(chosen) > 1:
        trials.append({chosen[0]: [0], chosen[-1]: [0]})
    trials.append({OUTPUT_LOGITS: [0]})
    return Experiments.from_list(trials)


def trial_inputs(args: Args, telling: Args | None = None) -> Args:
    """Two or three inputs for a trial, the second unlike the first where one of ``args`` is; a
    single one is joined by its half. ``telling`` are inputs that come first."""
    if telling is not None:
        return together(telling, inputs_between(args, 0, 2))
    n_inputs = count_inputs(args)
    if n_inputs == 1:
        return together(args, map_tensors(lambda x: (x / 2).to(x.dtype), args))
    order = list(dict.fromkeys([0, first_unlike(args) or 1, *range(n_inputs)][:5]))[:3]
    chosen: Args = map_tensors(lambda x: x[order] if x.dim() else x, args)
    return chosen


def own_copy(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy for good, in which parametrised weights are what they are now."""
    if isinstance(network, torch.jit.ScriptModule):
        raise InputError("the network is a ScriptModule; give the nn.Module that it was made from")
    if any(is_lazy(p) for p in network.parameters()):
        raise InputError("the network has lazy layers of unknown size; run it once before")
    try:
        own = copy.deepcopy(network)
    except Exception as error:
        raise InputError(f"the network cannot be copied: {first_line(error)}") from None
    own = without_nested_tensors(own.to(device, dtype).eval())
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
