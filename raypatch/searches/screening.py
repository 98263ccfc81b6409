"""``raypatch screen``: attribution patching, a guess of every neuron's effect at once.

Two forwards and one backward a direction (Nanda 2023, "Attribution patching"): the change
of the baseline action's logit when a neuron takes its source value is, to first order,
``(source - target) * d logit / d activation``. It is a guess: what it ranks high is written
as a definition to verify by real patches, and the report shows where it fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raypatch.definition_files import write_definition
from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine.layers import Layer, forward, hooked
from raypatch.errors import InputError
from raypatch.results.reader import Results
from raypatch.results.schema import SOURCE_SIDE, TARGET_SIDE
from raypatch.searches.inprocess import Bench
from raypatch.whole_files import whole_file

LEAST_NEURONS = 5  # of a layer, that a correlation tells anything
METRIC = "top_logit_delta_magnitude"


def screen(
    agent_path: str, output: str, estimates: str, top: int, **bench_options: Any
) -> dict[str, list[float]]:
    """Write the ``top`` neurons by estimated effect as a definition, all estimates as JSON.

    The estimate is the mean over inputs and directions of the absolute first-order change of
    the baseline action's logit. Raises InputError for continuous actions.
    """
    if top < 1:
        raise InputError(f"--top: {top} is below 1")
    for name, place in (("output", output), ("estimates", estimates)):
        if Path(place).is_dir():
            raise InputError(f"--{name} {place}: is a directory; name a file in it")
    bench = Bench(agent_path, **bench_options)
    if not bench.agent.discrete:
        raise InputError(
            f"raypatch screen needs one discrete action; this agent's are {bench.agent.actions}"
        )
    found: dict[str, list[np.ndarray]] = {}
    for direction in bench.directions:
        source, target = (bench.sides[side[direction]] for side in (SOURCE_SIDE, TARGET_SIDE))
        estimates_of = attribute(bench.agent.network, bench.agent.layers, source, target)
        for layer, values in estimates_of.items():
            found.setdefault(layer, []).append(np.abs(values).mean(0))
    means = {layer: np.mean(values, axis=0) for layer, values in found.items()}
    neurons = [(layer, i) for layer, values in means.items() for i in range(len(values))]
    order = np.argsort(-np.concatenate(list(means.values())), kind="stable")[:top]
    write_definition([{neurons[i][0]: [neurons[i][1]]} for i in order], output)
    record = {layer: values.tolist() for layer, values in means.items()}
    with whole_file(Path(estimates)) as file:
        file.write_text(json.dumps({"metric": METRIC, "estimates": record}), encoding="utf-8")
    return record


def attribute(
    network: nn.Module, layers: dict[str, Layer], source: Tensor, target: Tensor
) -> dict[str, np.ndarray]:
    """First-order changes of the baseline action's logit, float64 ``[inputs, neurons]`` a layer.

    Positions of a feature map or sequence are added up, as a patch replaces them together, and
    so are the calls of a layer that is called several times.
    """
    if _hold_inputs_first(network, layers, target[:2]):
        return _attributed(network, layers, source, target)
    each = [
        _attributed(network, layers, source[i : i + 1], target[i : i + 1])
        for i in range(len(target))
    ]
    return {name: np.concatenate([one[name] for one in each]) for name in layers}


def _hold_inputs_first(network: nn.Module, layers: dict[str, Layer], two: Tensor) -> bool:
    """Whether every layer's output has the inputs along axis 0, and nothing else there."""
    with torch.no_grad():
        of_one, of_two = (_activations(network, layers, part) for part in (two[:1], two))
    return all(
        len(a) == 1 and len(b) == len(two) and a.shape[1:] == b.shape[1:]
        for name in layers
        for a, b in zip(of_one[name], of_two[name])
    )


def _attributed(
    network: nn.Module, layers: dict[str, Layer], source: Tensor, target: Tensor
) -> dict[str, np.ndarray]:
    """:func:`attribute` for outputs that hold inputs along axis 0, or for one input."""
    with torch.no_grad():
        from_source = _activations(network, layers, source)
    with torch.enable_grad():
        on_target = _activations(network, layers, target.clone().requires_grad_(True))
        (output,) = on_target.pop(OUTPUT_LOGITS)
        top = output.gather(1, output.argmax(1, keepdim=True))
        # A layer may be called several times, or hang on nothing that has a gradient.
        calls = [a for taken in on_target.values() for a in taken if a.requires_grad]
        gradients = iter(torch.autograd.grad(top.sum(), calls, allow_unused=True) if calls else ())
    found = {}
    for name, taken in on_target.items():
        total = np.zeros((len(target), layers[name].neurons))
        for before, activation in zip(from_source[name], taken):
            gradient = next(gradients) if activation.requires_grad else None
            if gradient is None:  # not on the path to the outputs
                continue
            change = ((before - activation) * gradient).detach().double()
            axis = layers[name].axis_of(change)
            by_neuron = (
                change.movedim(axis, 0)[None] if len(target) == 1 else change.movedim(axis, 1)
            )
            total += by_neuron.reshape(*total.shape, -1).sum(2).numpy()
        found[name] = total
    return found


def _activations(
    network: nn.Module, layers: dict[str, Layer], obs: Tensor
) -> dict[str, list[Tensor]]:
    """Outputs of the layers, one a call, and of the network; in the graph where gradients are
    on."""
    taken: dict[str, list[Tensor]] = {name: [] for name in layers}

    def recorder(name: str) -> Any:
        def record(_: int, output: Tensor) -> Tensor:
            # A copy goes on, so that no in-place activation changes what was taken.
            taken[name].append(output)
            return output.clone()

        return record

    with hooked(network, {name: recorder(name) for name in layers}):
        taken[OUTPUT_LOGITS] = [forward(network, (obs,))]
    return taken


def compared(results: Results, path: str) -> dict[str, Any]:
    """Estimates beside the effects of real patches, with Spearman's correlation by layer."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        estimates = {layer: np.array(v, float) for layer, v in record["estimates"].items()}
    except OSError as error:
        raise InputError(f"--screen {path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"--screen {path}: not estimates of raypatch screen; give the file that --estimates of "
            "that command named"
        ) from None
    truth = results.effect_matrix(METRIC)
    layers = []
    for layer, guesses in estimates.items():
        if layer not in truth or truth[layer].shape != guesses.shape:
            raise InputError(f"--screen {path}: layer {layer!r} is not the run's")
        known = np.flatnonzero(~np.isnan(truth[layer]))
        if len(known):
            a, b = truth[layer][known], guesses[known]
            layers.append(
                {
                    "layer": layer,
                    "names": [f"{layer}_neuron_{i}" for i in known],
                    "truth": a.tolist(),
                    "estimate": b.tolist(),
                    "correlation": rank_correlation(a, b) if len(known) >= LEAST_NEURONS else None,
                }
            )
    if not layers:
        raise InputError(f"--screen {path}: the run patches none of its neurons alone")
    return {"metric": METRIC, "layers": layers}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rho, ties sharing their mean rank; None where one side does not vary."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / scale) if scale else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]
