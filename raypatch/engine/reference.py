"""The brute-force reference: plain hooks, one experiment at a time, float64.

Slow on purpose and as simple as can be: this is what every fast path is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from raypatch.definitions import OUTPUT_LOGITS, Experiment
from raypatch.engine.arguments import chosen_inputs, inputs_between
from raypatch.engine.copies import copied
from raypatch.engine.layers import (
    Args,
    Layer,
    as_args,
    find_layers,
    forward,
    hooked,
    map_tensors,
    record_activations,
)
from raypatch.engine.sources import resample_order


def cast(args: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Move every tensor to the device and every floating one to ``dtype``."""

    def one(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return map_tensors(one, args)


def reference_outputs(
    network: nn.Module,
    experiments: Iterable[Experiment],
    source: Any,
    target: Any,
    *,
    kind: str = "pair",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Patched outputs ``[experiments, inputs, outputs]``, one forward an experiment.

    ``source`` is not used for the kinds ``zero``, ``mean`` and ``resample``; for ``given`` it
    maps layers to activations.
    """
    network = copied(network, "cpu", dtype)
    target = cast(as_args(target), dtype)
    layers = find_layers(network, target)
    names = [*layers, OUTPUT_LOGITS]
    own = record_activations(network, target, names)
    if kind == "pair":
        values = record_activations(network, cast(as_args(source), dtype), names)
    elif kind == "resample":
        order = resample_order(len(own[OUTPUT_LOGITS][0]), seed)
        values = record_activations(network, chosen_inputs(target, order), names)
    elif kind == "given" and any(
        source[name].numel() != calls[0].numel() for name, calls in own.items() if name in source
    ):
        # Of layers that see no input: each input is patched by itself.
        n_inputs, given = len(own[OUTPUT_LOGITS][0]), list(experiments)
        return torch.cat(
            [
                reference_outputs(
                    network, given, _of_one(source, n_inputs, i), inputs_between(target, i, i + 1),
                    kind="given", dtype=dtype,
                )
                for i in range(n_inputs)
            ],
            1,
        )  # fmt: skip
    elif kind == "given":
        values = {
            name: [source[name].to(dtype).reshape(calls[0].shape) if name in source else calls[0]]
            for name, calls in own.items()
        }
    elif kind == "mean":
        alone = [inputs_between(target, i, i + 1) for i in range(len(own[OUTPUT_LOGITS][0]))]
        means = _means(network, alone, names)
        if not _expand(means, own):
            # Inputs share an axis with something else: each is patched by itself.
            given = list(experiments)
            patched = [
                torch.stack([_one_experiment(network, layers, e, means, one) for e in given])
                for one in alone
            ]
            return torch.cat(patched, 1)
        values = {
            name: [mean.expand_as(call) for mean, call in zip(means[name], calls)]
            for name, calls in own.items()
        }
    else:
        values = {name: [torch.zeros_like(call) for call in calls] for name, calls in own.items()}
    return torch.stack(
        [_one_experiment(network, layers, experiment, values, target) for experiment in experiments]
    )


def _of_one(source: dict[str, Tensor], n_inputs: int, i: int) -> dict[str, Tensor]:
    return {name: v[i : i + 1] if len(v) == n_inputs else v for name, v in source.items()}


def _means(network: nn.Module, alone: list[Args], names: list[str]) -> dict[str, list[Tensor]]:
    """Every layer's mean over the inputs, run one by one, in the shape for one input."""
    runs = [record_activations(network, one, names) for one in alone]
    return {
        name: [torch.stack(calls).mean(0) for calls in zip(*(run[name] for run in runs))]
        for name in names
    }


def _expand(means: dict[str, list[Tensor]], own: dict[str, list[Tensor]]) -> bool:
    """Whether every mean is of its layer's activation but for axes of one."""
    return all(
        mean.dim() == call.dim() and all(a in (1, b) for a, b in zip(mean.shape, call.shape))
        for name, calls in own.items()
        for mean, call in zip(means[name], calls)
    )


def _one_experiment(
    network: nn.Module,
    layers: dict[str, Layer],
    experiment: Experiment,
    values: dict[str, list[Tensor]],
    target: Args,
) -> Tensor:
    def patcher(name: str) -> Callable[[int, Tensor], Tensor]:
        def patch(call: int, output: Tensor) -> Tensor:
            neurons = experiment[name]
            new = values[name][call]
            if isinstance(neurons, str):
                return new.clone()
            axis = layers[name].axis_of(output) if name in layers else output.dim() - 1
            at = torch.tensor(neurons)
            return output.clone().index_copy_(axis, at, new.index_select(axis, at))

        return patch

    with (
        torch.no_grad(),
        hooked(network, {name: patcher(name) for name in experiment if name != OUTPUT_LOGITS}),
    ):
        output = forward(network, target)
    return patcher(OUTPUT_LOGITS)(0, output) if OUTPUT_LOGITS in experiment else output.clone()
