"""Definitions and layer structures from outside: read as JSON, and every problem named.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raypatch.definitions import Experiment, Experiments, Neurons
from raypatch.errors import InputError, offer

# Of a layer: what fits the columns' int32.
MAX_NEURONS = (1 << 31) - 1
PROBLEMS_SHOWN = 10
# Parts of a policy's path that may stand before the action network's own layer names.
POLICY_PREFIXES = frozenset({"policy", "q_net", "actor", "quantile_net", "module"})


def check_layer_structure(structure: Any, origin: str) -> dict[str, int]:
    """A ``{layer: neurons}`` object as the user gave it; raises InputError naming the fault."""
    if isinstance(structure, Pairs):
        names = [name for name, _ in structure]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{origin}: layer {twice!r} is given twice")
        structure = dict(structure)
    if not isinstance(structure, dict) or not structure:
        raise InputError(
            f"{origin}: a layer structure is a non-empty object of layer names and sizes, "
            f'like {{"q_net.0": 64}}; got {_brief(structure)}'
        )
    for layer, size in structure.items():
        if not layer:
            raise InputError(f"{origin}: a layer has no name")
        if not _is_index(size) or not 0 < size <= MAX_NEURONS:
            raise InputError(
                f"{origin}: layer {layer!r}: size {_brief(size)} is not a whole number from 1 to "
                f"{MAX_NEURONS}"
            )
    return structure


class Pairs(list):
    """A JSON object kept as pairs, so that a layer given twice is seen and not dropped."""


def json_argument(text: str, option: str, *, keep_pairs: bool = False) -> tuple[Any, str]:
    """The value of an option that takes JSON or the path of a JSON file, and its origin.

    A text that starts like JSON is JSON; anything else is a path.
    """
    if text.lstrip()[:1] in ("{", "["):
        return parse_json(text, option, keep_pairs), option
    if not Path(text).is_file():
        raise InputError(f"{option}: {_brief(text)} is neither JSON nor an existing file")
    return parse_json(read_text(Path(text)), text, keep_pairs), text


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: str, origin: str, keep_pairs: bool) -> Any:
    try:
        return json.loads(text, object_pairs_hook=Pairs if keep_pairs else None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""  # an only line needs no number
        raise InputError(f"{origin}: not JSON at {line}column {error.colno}: {error.msg}") from None
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
            lines.append(f"{origin}: {self.count} problems in all; nothing was done")
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
        return f"unknown layer {_brief(name)}; {offer(name, list(self.layers))}"

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
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _as_dicts(value: Any) -> Any:
    if isinstance(value, Pairs):
        return {name: _as_dicts(inner) for name, inner in value}
    return [_as_dicts(inner) for inner in value] if isinstance(value, list) else value


def _brief(value: Any, limit: int = 60) -> str:
    text = repr(_as_dicts(value))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
