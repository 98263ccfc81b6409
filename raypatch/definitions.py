"""Experiment definitions: what to patch, generated and named.

An *experiment* says which neurons of which layers are patched together::

    {"q_net.0": [3, 7], "q_net.2": "all"}

A *definition* is an ordered list of experiments; the position is the experiment's id.
In memory a definition is column-wise (:class:`Experiments`), 24 bytes for a
single-neuron experiment, so that millions of them are no burden.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import numpy as np

OUTPUT_LOGITS = "output_logits"
KINDS = ("single_neuron", "layer", "neuron_groups", "custom")
DEFAULT_GROUP_SIZE = 5
NAME_LIMIT = 100
# Experiments handled at a time wherever there may be many millions.
CHUNK = 65536

# What the original tool assumes of an agent it cannot read.
FALLBACK_LAYERS = {
    "features_extractor.mlp.0": 64,
    "q_net.0": 64,
    "q_net.2": 64,
    "q_net.4": 5,
}

Neurons = Union[list[int], Literal["all"]]
Experiment = Mapping[str, Neurons]


@dataclass(frozen=True)
class Experiments:
    """A run of experiments, column-wise.

    Experiment ``i`` patches the entries ``entry_offsets[i]:entry_offsets[i + 1]``. Entry
    ``j`` patches layer ``layer_names[layers[j]]`` at the neurons
    ``neurons[neuron_offsets[j]:neuron_offsets[j + 1]]``; none there means all of them.
    Dtypes: offsets int64, ``layers`` and ``neurons`` int32.
    """

    layer_names: tuple[str, ...]
    entry_offsets: np.ndarray
    layers: np.ndarray
    neuron_offsets: np.ndarray
    neurons: np.ndarray

    @classmethod
    def from_list(
        cls, experiments: Iterable[Experiment], layer_names: Sequence[str] = ()
    ) -> Experiments:
        """Pack experiments that are already checked; layers unknown so far are appended."""
        index = {name: i for i, name in enumerate(layer_names)}
        entry_offsets, layers, neuron_offsets, neurons = [0], [], [0], []
        for experiment in experiments:
            for layer, selected in experiment.items():
                layers.append(index.setdefault(layer, len(index)))
                if not isinstance(selected, str):
                    neurons.extend(selected)
                neuron_offsets.append(len(neurons))
            entry_offsets.append(len(layers))
        return cls(
            tuple(index),
            np.asarray(entry_offsets, np.int64),
            np.asarray(layers, np.int32),
            np.asarray(neuron_offsets, np.int64),
            np.asarray(neurons, np.int32),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled in as few bytes as its numbers need: it travels to an actor with every item."""
        own = self.slice(0, len(self))
        n_entries = _once(np.diff(own.entry_offsets), 1)
        # As a rule a run patches the same layers, and as many neurons, in every experiment.
        period = int(n_entries[0]) if len(n_entries) == 1 else len(own.layers)
        n_neurons = np.diff(own.neuron_offsets)
        columns = n_entries, _once(own.layers, period), _once(n_neurons, period), own.neurons
        return _from_columns, (self.layer_names, len(self), *map(_narrowed, columns))

    def __len__(self) -> int:
        return len(self.entry_offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Neurons]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        experiment: dict[str, Neurons] = {}
        for entry in range(self.entry_offsets[index], self.entry_offsets[index + 1]):
            selected = self.neurons[self.neuron_offsets[entry] : self.neuron_offsets[entry + 1]]
            name = self.layer_names[self.layers[entry]]
            experiment[name] = selected.tolist() if len(selected) else "all"
        return experiment

    def __iter__(self) -> Iterator[dict[str, Neurons]]:
        return (self[i] for i in range(len(self)))

    def slice(self, first: int, last: int) -> Experiments:
        """Experiments ``first`` to ``last`` (exclusive), as copies of just their columns."""
        entries = self.entry_offsets[first : last + 1]
        cells = self.neuron_offsets[entries[0] : entries[-1] + 1]
        return Experiments(
            self.layer_names,
            entries - entries[0],
            self.layers[entries[0] : entries[-1]].copy(),
            cells - cells[0],
            self.neurons[cells[0] : cells[-1]].copy(),
        )

    def chunks(self) -> Iterator[Experiments]:
        """All of them, ``CHUNK`` at a time."""
        return (self.slice(i, min(i + CHUNK, len(self))) for i in range(0, len(self), CHUNK))

    def used_layers(self) -> list[str]:
        """Layers that any experiment patches, in the order of ``layer_names``."""
        seen = np.zeros(len(self.layer_names), bool)
        for first in range(0, len(self.layers), CHUNK):
            seen[self.layers[first : first + CHUNK]] = True
        return [self.layer_names[i] for i in np.flatnonzero(seen)]

    def take(self, indices: np.ndarray) -> Experiments:
        """These experiments, in this order, as a run of their own."""
        return Experiments.from_list((self[int(i)] for i in indices), self.layer_names)


def _once(numbers: np.ndarray, period: int) -> np.ndarray:
    """One period of numbers that repeat with it, else all of them."""
    first = numbers[:period]
    return first if (numbers.reshape(-1, max(1, period)) == first).all() else numbers


def _narrowed(numbers: np.ndarray) -> np.ndarray:
    """The same numbers, none below 0, in the smallest type that holds them."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))


def _from_columns(
    layer_names: tuple[str, ...],
    n_experiments: int,
    n_entries: np.ndarray,
    layers: np.ndarray,
    n_neurons: np.ndarray,
    neurons: np.ndarray,
) -> Experiments:
    """Experiments from numbers of entries each, and of neurons an entry; those before
    ``neurons`` may be one period of numbers that repeat."""

    def offsets(counts: np.ndarray, n: int) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(_filling(counts, n), dtype=np.int64)])

    entry_offsets = offsets(n_entries, n_experiments)
    total = int(entry_offsets[-1])
    return Experiments(
        layer_names,
        entry_offsets,
        _filling(layers, total).astype(np.int32),
        offsets(n_neurons, total),
        neurons.astype(np.int32),
    )


def _filling(numbers: np.ndarray, length: int) -> np.ndarray:
    """Numbers repeated up to a length; see :func:`_once`."""
    return np.tile(numbers, length // max(1, len(numbers)))


def experiment_name(index: int, experiment: Experiment) -> str:
    """The original tool's name of an experiment, for example ``q_net.0_neuron_5``.

    Up to five neurons of one layer (three where several layers are patched) are spelled
    out, more are counted; past 100 characters the name is ``exp_<index>_<layers>``.
    """
    if len(experiment) == 1:
        layer, neurons = next(iter(experiment.items()))
        if isinstance(neurons, str):
            name = f"{layer}_all"
        elif len(neurons) == 1:
            name = f"{layer}_neuron_{neurons[0]}"
        elif len(neurons) <= 5:
            name = f"{layer}_neurons_{_joined(neurons)}"
        else:
            name = f"{layer}_group_{len(neurons)}"
    else:
        name = "_".join(_layer_part(layer, neurons) for layer, neurons in experiment.items())
    if len(name) > NAME_LIMIT:
        return f"exp_{index}_{'_'.join(experiment)}"
    return name


def _layer_part(layer: str, neurons: Neurons) -> str:
    if isinstance(neurons, str):
        return f"{layer}_all"
    return f"{layer}_{_joined(neurons)}" if len(neurons) <= 3 else f"{layer}_{len(neurons)}n"


def _joined(neurons: Iterable[int]) -> str:
    return "_".join(map(str, sorted(neurons)))


# ---------------------------------------------------------------------------- generating


def generate(
    kind: str,
    layers: Mapping[str, int],
    *,
    output_size: int | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    include_output_logits: bool = True,
) -> Iterator[Experiment]:
    """Experiments of one kind in layer order, neuron order, then ``output_logits``.

    ``layers`` maps each layer to its number of neurons; ``output_size`` is the number of
    logits (by default the last layer's). A layer called ``output_logits`` stands for itself
    and is not repeated.
    """
    for chunk in generate_chunks(
        kind, layers, output_size=output_size, group_size=group_size,
        include_output_logits=include_output_logits,
    ):  # fmt: skip
        yield from chunk


def generate_chunks(
    kind: str,
    layers: Mapping[str, int],
    *,
    output_size: int | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    include_output_logits: bool = True,
) -> Iterator[Experiments]:
    """The same, packed, at most ``CHUNK`` experiments at a time, for definitions of any size."""
    sizes = dict(layers)
    if include_output_logits and OUTPUT_LOGITS not in sizes:
        sizes[OUTPUT_LOGITS] = output_size or list(sizes.values())[-1]
    step = {"single_neuron": 1, "layer": 0, "neuron_groups": group_size}[kind]
    names = tuple(sizes)
    for number, size in enumerate(sizes.values()):
        count = -(-size // step) if step else 1
        for first in range(0, count, CHUNK):
            last = min(first + CHUNK, count)
            bounds = np.minimum(np.arange(first, last + 1, dtype=np.int64) * step, size)
            yield Experiments(
                names,
                np.arange(last - first + 1, dtype=np.int64),
                np.full(last - first, number, np.int32),
                bounds - bounds[0],
                np.arange(bounds[0], bounds[-1], dtype=np.int32),
            )
