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
TABLE_BATCH_ROWS = 65536
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

    def used_layers(self) -> list[str]:
        """Layers that any experiment patches, in the order of ``layer_names``."""
        return [self.layer_names[i] for i in np.unique(self.layers)]

    def take(self, indices: np.ndarray) -> Experiments:
        """These experiments, in this order, as a run of their own."""
        return Experiments.from_list((self[int(i)] for i in indices), self.layer_names)


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
    sizes = dict(layers)
    if include_output_logits and OUTPUT_LOGITS not in sizes:
        sizes[OUTPUT_LOGITS] = output_size or list(sizes.values())[-1]
    step = {"single_neuron": 1, "layer": 0, "neuron_groups": group_size}[kind]
    for layer, size in sizes.items():
        if not step:
            yield {layer: "all"}
            continue
        for start in range(0, size, step):
            yield {layer: list(range(start, min(start + step, size)))}


def check_layer_structure(structure: Any, origin: str) -> dict[str, int]:
    """A ``{layer: neurons}`` object as the user gave it; raises InputError naming the fault."""
    if not isinstance(structure, dict) or not structure:
        raise InputError(
            f"{origin}: a layer structure is a non-empty object of layer names and sizes, "
            f'like {{"q_net.0": 64}}; got {_brief(structure)}'
        )
    for layer, size in structure.items():
        if not _is_index(size) or size < 1:
            raise InputError(
                f"{origin}: layer {layer!r}: size {_brief(size)} is not a whole number above 0"
            )
    return structure


# ------------------------------------------------------------------------------ reading


class _Pairs(list):
    """A JSON object kept as pairs, so that a layer given twice is seen and not dropped."""


def json_argument(text: str, option: str, *, keep_pairs: bool = False) -> tuple[Any, str]:
    """The value of an option that takes JSON or the path of a JSON file, and its origin.

    A text that starts like JSON is JSON; anything else is a path.
    """
    if text.lstrip()[:1] in ("{", "["):
        return _parse_json(text, option, keep_pairs), option
    if not Path(text).exists():
        raise InputError(f"{option}: {_brief(text)} is neither JSON nor an existing file")
    return _parse_json(_read_text(Path(text)), text, keep_pairs), text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_json(text: str, origin: str, keep_pairs: bool) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs if keep_pairs else None)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{origin}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(
            f"{origin}: not usable JSON: {str(error) or 'nested too deeply'}"
        ) from None


def read_definition(path: str | Path, layers: Mapping[str, int]) -> Experiments:
    """Read and check a definition file against an agent's layers (design 5).

    ``layers`` maps layer names to neuron counts and includes ``output_logits``. The suffix
    says the format: ``.jsonl``, ``.arrow``, ``.parquet``, anything else JSON. Raises
    InputError with up to ten problems, one a line, and their total count.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such definition file; make one with `raypatch generate`")
    if path.suffix in (".arrow", ".parquet"):
        return _check_table(path, layers)
    if path.suffix == ".jsonl":
        lines = _read_text(path).splitlines()
        raw = [
            _parse_json(line, f"{path}: line {number}", keep_pairs=True)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        raw = _parse_json(_read_text(path), str(path), keep_pairs=True)
    return check_experiments(raw, layers, str(path))


def _table_batches(path: Path) -> Iterator[Any]:
    """Record batches of a table with the columns ``layers`` and ``neurons``, types as agreed."""
    import pyarrow as pa
    import pyarrow.parquet

    wanted = {"layers": pa.list_(pa.string()), "neurons": pa.list_(pa.list_(pa.int32()))}
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            found, batches = file.schema_arrow, file.iter_batches(TABLE_BATCH_ROWS)
        else:
            reader = pa.ipc.open_file(pa.OSFile(str(path)))
            found = reader.schema
            batches = map(reader.get_batch, range(reader.num_record_batches))
        if not set(wanted) <= set(found.names):
            raise InputError(
                f"{path}: a definition has the columns layers: list<string> and "
                f"neurons: list<list<int32>>; this one has {_few(map(str, found))}"
            )
        for batch in batches:
            yield pa.record_batch({name: batch[name].cast(kind) for name, kind in wanted.items()})
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable {path.suffix[1:]} file: {error}") from None


def _check_table(path: Path, layers: Mapping[str, int]) -> Experiments:
    """Check a table batch by batch; rows are looked at one by one only where one is bad."""
    checker = _Checker(layers)
    parts: list[Experiments] = []
    first = 0
    for batch in _table_batches(path):
        parts.append(_packed_batch(batch, checker, first, str(path)))
        first += len(batch)
    if checker.count:
        raise InputError(checker.report(str(path)))
    if not first:
        return check_experiments([], layers, str(path))
    return _joined_experiments(parts)


def _packed_batch(batch: Any, checker: _Checker, first: int, origin: str) -> Experiments:
    """One batch as packed experiments; its problems go to the checker."""
    names, cells = batch["layers"], batch["neurons"]
    offsets = names.offsets.to_numpy().astype(np.int64)
    whole = not any(a.null_count for a in (names, cells, names.flatten(), cells.flatten()))
    if not whole or not np.array_equal(np.diff(offsets), np.diff(cells.offsets.to_numpy())):
        raise InputError(
            f"{origin}: columns layers and neurons must be lists of equal length in every row, "
            "without nulls"
        )
    words, lists = names.flatten().dictionary_encode(), cells.flatten()
    index = {name: i for i, name in enumerate(checker.layers)}
    known = [checker.resolve("", word, quiet=True) for word in words.dictionary.to_pylist()]
    numbers = np.array([-1 if name is None else index[name] for name in known], np.int32)
    starts = lists.offsets.to_numpy().astype(np.int64)
    packed = Experiments(
        tuple(checker.layers),
        offsets - offsets[0],
        numbers[words.indices.to_numpy()],
        starts - starts[0],
        lists.flatten().to_numpy().astype(np.int32),
    )
    # The words for what is wrong come from the one place that has them.
    for row in _bad_experiments(packed, checker.layers).tolist():
        chosen = zip(names[row].as_py(), cells[row].as_py())
        checker.checked(first + row, _Pairs((name, neurons or "all") for name, neurons in chosen))
    return packed


def _joined_experiments(parts: list[Experiments]) -> Experiments:
    """Parts one after another."""

    def offsets(name: str) -> np.ndarray:
        columns = [getattr(part, name) for part in parts]
        ends = np.cumsum([0, *(column[-1] for column in columns[:-1])])
        return np.concatenate([[0], *(c[1:] + end for c, end in zip(columns, ends))]).astype(
            np.int64
        )

    return Experiments(
        parts[0].layer_names,
        offsets("entry_offsets"),
        np.concatenate([part.layers for part in parts]),
        offsets("neuron_offsets"),
        np.concatenate([part.neurons for part in parts]),
    )


def _bad_experiments(packed: Experiments, layers: Mapping[str, int]) -> np.ndarray:
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
    if not isinstance(raw, list) or isinstance(raw, _Pairs):
        raise InputError(
            f"{origin}: a definition is a list of experiments, like "
            f'[{{"q_net.0": [3]}}]; got {_brief(raw)}'
        )
    if not raw:
        raise InputError(f"{origin}: the definition is empty; it needs at least one experiment")
    checker = _Checker(layers)
    packed = Experiments.from_list(
        (checker.checked(index, experiment) for index, experiment in enumerate(raw)),
        tuple(layers),
    )
    if checker.count:
        raise InputError(checker.report(origin))
    return packed


def layer_resolver(layers: Mapping[str, int]) -> Callable[[str], str | None]:
    """Maps a name, perhaps with the policy's prefix, to the agent's own; None for no layer."""
    checker = _Checker(layers)
    return lambda name: checker.resolve("", name, quiet=True)


class _Checker:
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
            experiment = _Pairs(experiment.items())
        where = f"experiment {index}"
        if not isinstance(experiment, _Pairs):
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
        offer = f"did you mean {' or '.join(near)}?" if near else f"valid: {_few(self.layers)}"
        return f"unknown layer {_brief(name)}; {offer}"

    def neurons_are_good(self, where: str, layer: str, neurons: Any) -> bool:
        size = self.layers[layer]
        valid = f'valid: 0 to {size - 1}, or "all"'
        if isinstance(neurons, str) and neurons == "all":
            return True
        if not isinstance(neurons, list) or isinstance(neurons, _Pairs):
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
    if isinstance(value, _Pairs):
        value = dict(value)
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _few(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ------------------------------------------------------------------------------ writing


def write_definition(experiments: Iterable[Experiment], path: str | Path) -> int:
    """Write a definition in the format its suffix names and return how many experiments.

    The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        count = _WRITERS.get(path.suffix, _write_json)(experiments, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_json(experiments: Iterable[Experiment], path: Path) -> int:
    rows = list(experiments)
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return len(rows)


def _write_jsonl(experiments: Iterable[Experiment], path: Path) -> int:
    with path.open("w", encoding="utf-8") as file:
        return sum(file.write(json.dumps(experiment) + "\n") > 0 for experiment in experiments)


def _write_table(experiments: Iterable[Experiment], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet

    packed = Experiments.from_list(experiments)
    table = pa.table(experiment_columns(packed))
    if ".parquet" in path.suffixes:
        pyarrow.parquet.write_table(table, path)
    else:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_file(sink, table.schema, options=options) as writer,
        ):
            writer.write_table(table, max_chunksize=65536)
    return len(packed)


_WRITERS = {".jsonl": _write_jsonl, ".arrow": _write_table, ".parquet": _write_table}


def experiment_columns(experiments: Experiments) -> dict[str, Any]:
    """The Arrow columns ``layers: list<string>`` and ``neurons: list<list<int32>>``."""
    import pyarrow as pa

    offsets = pa.array(experiments.entry_offsets.astype(np.int32))
    names = pa.DictionaryArray.from_arrays(
        pa.array(experiments.layers), pa.array(list(experiments.layer_names), pa.string())
    ).cast(pa.string())
    cells = pa.ListArray.from_arrays(
        pa.array(experiments.neuron_offsets.astype(np.int32)), pa.array(experiments.neurons)
    )
    return {
        "layers": pa.ListArray.from_arrays(offsets, names),
        "neurons": pa.ListArray.from_arrays(offsets, cells),
    }
