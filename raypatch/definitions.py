"""Experiment definitions: what to patch, read, checked, generated and named.

An *experiment* says which neurons of which layers are patched together::

    {"q_net.0": [3, 7], "q_net.2": "all"}

A *definition* is an ordered list of experiments; the position is the experiment's id.
In memory a definition is column-wise (:class:`Experiments`), 24 bytes for a
single-neuron experiment, so that millions of them are no burden.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np

from raypatch.errors import InputError

OUTPUT_LOGITS = "output_logits"
KINDS = ("single_neuron", "layer", "neuron_groups", "custom")
DEFAULT_GROUP_SIZE = 5
NAME_LIMIT = 100
# Experiments handled at a time wherever there may be many millions.
CHUNK = 65536
# Of a layer: what fits the columns' int32.
MAX_NEURONS = (1 << 31) - 1
PROBLEMS_SHOWN = 10

# What the original tool assumes of an agent it cannot read.
FALLBACK_LAYERS = {
    "features_extractor.mlp.0": 64,
    "q_net.0": 64,
    "q_net.2": 64,
    "q_net.4": 5,
}
# Parts of a policy's path that may stand before the action network's own layer names.
POLICY_PREFIXES = frozenset({"policy", "q_net", "actor", "quantile_net", "module"})

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


def check_layer_structure(structure: Any, origin: str) -> dict[str, int]:
    """A ``{layer: neurons}`` object as the user gave it; raises InputError naming the fault."""
    if not isinstance(structure, dict) or not structure:
        raise InputError(
            f"{origin}: a layer structure is a non-empty object of layer names and sizes, "
            f'like {{"q_net.0": 64}}; got {_brief(structure)}'
        )
    for layer, size in structure.items():
        if not _is_index(size) or not 0 < size <= MAX_NEURONS:
            raise InputError(
                f"{origin}: layer {layer!r}: size {_brief(size)} is not a whole number from 1 to "
                f"{MAX_NEURONS}"
            )
    return structure


# ------------------------------------------------------------------------------ reading


class Pairs(list):
    """A JSON object kept as pairs, so that a layer given twice is seen and not dropped."""


def json_argument(text: str, option: str, *, keep_pairs: bool = False) -> tuple[Any, str]:
    """The value of an option that takes JSON or the path of a JSON file, and its origin.

    A text that starts like JSON is JSON; anything else is a path.
    """
    if text.lstrip()[:1] in ("{", "["):
        return parse_json(text, option, keep_pairs), option
    if not Path(text).exists():
        raise InputError(f"{option}: {_brief(text)} is neither JSON nor an existing file")
    return parse_json(read_text(Path(text)), text, keep_pairs), text


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: str, origin: str, keep_pairs: bool) -> Any:
    try:
        return json.loads(text, object_pairs_hook=Pairs if keep_pairs else None)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{origin}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(
            f"{origin}: not usable JSON: {str(error) or 'nested too deeply'}"
        ) from None


def bad_experiments(packed: Experiments, layers: Mapping[str, int]) -> np.ndarray:
    """Indices of experiments with an empty list, an unknown layer or a bad neuron."""
    n_entries = np.diff(packed.entry_offsets)
    experiment = np.repeat(np.arange(len(packed)), n_entries)
    entry = np.repeat(np.arange(len(packed.layers)), np.diff(packed.neuron_offsets))
    sizes = np.array([*layers.values(), 0])[packed.layers]
    outside = (packed.neurons < 0) | (packed.neurons >= sizes[entry])
    found = [
        np.flatnonzero(n_entries == 0),
        experiment[packed.layers < 0],
        experiment[_repeated(experiment, packed.layers)],
        experiment[entry[outside]],
        experiment[entry[_repeated(entry, packed.neurons)]],
    ]
    return np.unique(np.concatenate(found))


def _repeated(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Places whose value occurs twice in their group; groups are ascending."""
    if len(group) < 2 or (group[1:] != group[:-1]).all():
        return np.empty(0, np.int64)
    order = np.lexsort((value, group))
    twice = (group[order][1:] == group[order][:-1]) & (value[order][1:] == value[order][:-1])
    return order[1:][twice]


def check_experiments(raw: Any, layers: Mapping[str, int], origin: str) -> Experiments:
    """Check raw experiments against the layers and pack them; see :func:`read_definition`."""
    if not isinstance(raw, list) or isinstance(raw, Pairs):
        raise InputError(
            f"{origin}: a definition is a list of experiments, like "
            f'[{{"q_net.0": [3]}}]; got {_brief(raw)}'
        )
    if not raw:
        raise InputError(f"{origin}: the definition is empty; it needs at least one experiment")
    checker = Checker(layers)
    packed = Experiments.from_list(
        (checker.checked(index, experiment) for index, experiment in enumerate(raw)),
        tuple(layers),
    )
    if checker.count:
        raise InputError(checker.report(origin))
    return packed


def layer_resolver(layers: Mapping[str, int]) -> Callable[[str], str | None]:
    """Maps a name, perhaps with the policy's prefix, to the agent's own; None for no layer."""
    checker = Checker(layers)
    return lambda name: checker.resolve("", name, quiet=True)


class Checker:
    """Collects the problems of a definition, the first ten in words."""

    def __init__(self, layers: Mapping[str, int]) -> None:
        self.layers = layers
        self.problems: list[str] = []
        self.count = 0
        self.resolved: dict[str, str] = {}

    def add(self, problem: str) -> None:
        self.count += 1
        if len(self.problems) < PROBLEMS_SHOWN:
            self.problems.append(problem)

    def report(self, origin: str) -> str:
        """The first problems, one a line, and how many there are."""
        lines = [f"{origin}: {problem}" for problem in self.problems]
        if self.count > len(lines):
            lines.append(f"{origin}: and {self.count - len(lines)} more problems")
        if self.count > 1:
            lines.append(f"{origin}: {self.count} problems in all; nothing was run")
        return "\n".join(lines)

    def checked(self, index: int, experiment: Any) -> Experiment:
        """The experiment with resolved layer names; problems are added, not raised."""
        if isinstance(experiment, Mapping):
            experiment = Pairs(experiment.items())
        where = f"experiment {index}"
        if not isinstance(experiment, Pairs):
            self.add(
                f"{where}: {_brief(experiment)} is not an object of layers and neurons, "
                'like {"q_net.0": [3]}'
            )
            return {}
        if not experiment:
            self.add(f"{where}: patches nothing; name at least one layer")
        good: dict[str, Neurons] = {}
        for name, neurons in experiment:
            layer = self.resolve(where, name)
            if layer is None:
                continue
            if layer in good:
                self.add(f"{where}: layer {layer!r} is given twice; give each layer once")
            elif self.neurons_are_good(f"{where}: layer {_brief(name)}", layer, neurons):
                good[layer] = neurons
        return good

    def resolve(self, where: str, name: Any, *, quiet: bool = False) -> str | None:
        """The agent's own name of a layer; what it is not is a problem, unless ``quiet``."""
        if name in self.layers:
            return str(name)
        if name not in self.resolved:
            found = [
                layer
                for layer in self.layers
                if str(name).endswith(f".{layer}")
                and POLICY_PREFIXES.issuperset(str(name)[: -len(layer) - 1].split("."))
            ]
            if len(found) != 1:
                if not quiet:
                    self.add(f"{where}: {self.unknown(str(name), found)}")
                return None
            self.resolved[name] = found[0]
        return self.resolved[name]

    def unknown(self, name: str, found: list[str]) -> str:
        if found:
            return f"layer {_brief(name)} could be any of {', '.join(found)}; write one of them"
        near = difflib.get_close_matches(name, self.layers, n=3, cutoff=0.5)
        offer = f"did you mean {' or '.join(near)}?" if near else f"valid: {few(self.layers)}"
        return f"unknown layer {_brief(name)}; {offer}"

    def neurons_are_good(self, where: str, layer: str, neurons: Any) -> bool:
        size = self.layers[layer]
        valid = f'valid: 0 to {size - 1}, or "all"'
        if isinstance(neurons, str) and neurons == "all":
            return True
        if not isinstance(neurons, list) or isinstance(neurons, Pairs):
            self.add(f"{where}: {_brief(neurons)} is not a list of neurons; {valid}")
            return False
        if not neurons:
            self.add(f"{where}: the list of neurons is empty; {valid}")
            return False
        before = self.count
        seen = set()
        for neuron in neurons:
            if not _is_index(neuron):
                self.add(f"{where}: neuron {_brief(neuron)} is not a whole number; {valid}")
            elif neuron < 0:
                self.add(f"{where}: neuron {neuron} is negative; {valid}")
            elif neuron >= size:
                self.add(f"{where}: neuron {neuron} is out of range; {valid}")
            elif neuron in seen:
                self.add(f"{where}: neuron {neuron} is given twice; give each neuron once")
            else:
                seen.add(neuron)
        return self.count == before


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _brief(value: Any, limit: int = 60) -> str:
    if isinstance(value, Pairs):
        value = dict(value)
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def few(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
