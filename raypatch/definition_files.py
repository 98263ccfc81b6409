"""Definition files: JSON, JSON lines, Arrow and Parquet, read and written in bounded memory.

JSON is what people write and is held as a whole; tables are for many millions of experiments:
they are checked batch by batch, and what is large lies in an unnamed temporary file that is
mapped, not read.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from raypatch.checking import (
    Checker,
    Pairs,
    bad_experiments,
    check_experiments,
    parse_json,
    read_text,
)
from raypatch.definitions import CHUNK, Experiment, Experiments
from raypatch.errors import InputError, few, first_line
from raypatch.whole_files import whole_file

# More neurons than any layer has.
NO_NEURON = np.iinfo(np.int32).max


def read_definition(path: str | Path, layers: Mapping[str, int]) -> Experiments:
    """Read and check a definition file against an agent's layers (design 5).

    ``layers`` maps layer names to neuron counts and includes ``output_logits``. The suffix
    says the format: ``.jsonl``, ``.arrow``, ``.parquet``, anything else JSON. Raises
    InputError with up to ten problems, one a line, and their total count.
    """
    if "://" in str(path):
        with _fetched(str(path)) as local:
            return read_definition(local, layers)
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: this is a directory; give a definition file in it")
    if not path.is_file():
        raise InputError(f"{path}: no such definition file; make one with `raypatch generate`")
    if path.suffix in (".arrow", ".parquet"):
        return _check_table(path, layers)
    if path.suffix == ".jsonl":
        lines = read_text(path).splitlines()
        raw = [
            parse_json(line, f"{path}: line {number}", keep_pairs=True)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        raw = parse_json(read_text(path), str(path), keep_pairs=True)
    return check_experiments(raw, layers, str(path))


@contextmanager
def _fetched(uri: str) -> Iterator[Path]:
    """A file of any file system pyarrow reaches, as a local one for a while."""
    import pyarrow as pa
    import pyarrow.fs

    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / uri.partition("?")[0].rpartition("/")[2]
        try:
            system, path = pyarrow.fs.FileSystem.from_uri(uri)
            with system.open_input_stream(path, compression=None) as source, local.open("wb") as f:
                shutil.copyfileobj(source, f)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{uri}: cannot be read: {first_line(error)}") from None
        try:
            yield local
        except InputError as error:
            raise InputError(str(error).replace(str(local), uri)) from None


def _table_batches(path: Path) -> Iterator[Any]:
    """Record batches of a table with the columns ``layers`` and ``neurons``, types as agreed."""
    import pyarrow as pa
    import pyarrow.parquet

    wanted = {"layers": pa.list_(pa.string()), "neurons": pa.list_(pa.list_(pa.int64()))}
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            found, batches = file.schema_arrow, file.iter_batches(CHUNK)
        else:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            found = reader.schema
            batches = map(reader.get_batch, range(reader.num_record_batches))
        once = all(found.names.count(name) == 1 for name in wanted)
        layer, neuron = (
            _inside(found.field(name).type, depth) if once else None
            for name, depth in (("layers", 1), ("neurons", 2))
        )
        if layer is None or neuron is None or pa.types.is_nested(layer):
            columns = few(f"{field.name}: {field.type}" for field in found)
            raise InputError(
                f"{path}: a definition has the columns layers: list<string> and "
                f"neurons: list<list<int32>>; this one has {columns}"
            )
        if not pa.types.is_integer(neuron) and not pa.types.is_null(neuron):
            raise InputError(f"{path}: neurons are of type {neuron}; they are whole numbers, int32")
        for batch in batches:
            yield pa.record_batch({name: batch[name].cast(kind) for name, kind in wanted.items()})
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable {path.suffix[1:]} file: {error}") from None


def _inside(kind: Any, depth: int) -> Any:
    """What lists of so many levels hold; None where a type is none."""
    import pyarrow as pa

    for _ in range(depth):
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(is_one(kind) for is_one in lists):
            return kind if pa.types.is_null(kind) else None
        kind = kind.value_type
    return kind


def _check_table(path: Path, layers: Mapping[str, int]) -> Experiments:
    """Check a table batch by batch; rows are looked at one by one only where one is bad."""
    checker, spool, first = Checker(layers), Spool(tuple(layers)), 0
    for batch in filter(len, _table_batches(path)):
        spool.add(_packed_batch(batch, checker, first, str(path)))
        first += len(batch)
    if checker.count:
        raise InputError(checker.report(str(path)))
    if not first:
        return check_experiments([], layers, str(path))
    return spool.experiments()


def _packed_batch(batch: Any, checker: Checker, first: int, origin: str) -> Experiments:
    """One batch as packed experiments; its problems go to the checker."""
    names, cells = batch["layers"], batch["neurons"]
    offsets = names.offsets.to_numpy().astype(np.int64)
    inside = (names.flatten(), cells.flatten(), cells.flatten().flatten())
    whole = not any(array.null_count for array in (names, cells, *inside))
    if not whole or not np.array_equal(np.diff(offsets), np.diff(cells.offsets.to_numpy())):
        rows = enumerate(zip(names.to_pylist(), cells.to_pylist()), first)
        at = next((i for i, row in rows if not _is_even(*row)), first)
        raise InputError(
            f"{origin}: experiment {at}: columns layers and neurons must be lists of equal length, "
            "without nulls"
        )
    words, lists = names.flatten().dictionary_encode(), cells.flatten()
    index = {name: i for i, name in enumerate(checker.layers)}
    known = [checker.resolve("", word, quiet=True) for word in words.dictionary.to_pylist()]
    numbers = np.array([-1 if name is None else index[name] for name in known], np.int32)
    # Arrow may leave out the one offset of no lists at all.
    starts = lists.offsets.to_numpy().astype(np.int64) if len(lists) else np.zeros(1, np.int64)
    packed = Experiments(
        tuple(checker.layers),
        offsets - offsets[0],
        numbers[words.indices.to_numpy()],
        starts - starts[0],
        # What no int32 holds is no neuron either; the words for that have the number itself.
        lists.flatten().to_numpy().clip(-1, NO_NEURON).astype(np.int32),
    )
    # The words for what is wrong come from the one place that has them.
    for row in bad_experiments(packed, checker.layers).tolist():
        chosen = zip(names[row].as_py(), cells[row].as_py())
        checker.checked(first + row, Pairs((name, neurons or "all") for name, neurons in chosen))
    return packed


def _is_even(names: Any, cells: Any) -> bool:
    if names is None or cells is None or len(names) != len(cells) or None in [*names, *cells]:
        return False
    return all(None not in neurons for neurons in cells)


class Spool:
    """Packed experiments that come in parts, kept in unnamed temporary files."""

    OFFSETS = ("entry_offsets", "neuron_offsets")

    def __init__(self, layer_names: tuple[str, ...]) -> None:
        self._layer_names = layer_names
        names = ("entry_offsets", "layers", "neuron_offsets", "neurons")
        self._files = {name: tempfile.TemporaryFile() for name in names}  # noqa: SIM115
        self._ends = dict.fromkeys(self.OFFSETS, 0)
        for name in self.OFFSETS:
            self._files[name].write(np.zeros(1, np.int64).data)

    def add(self, part: Experiments) -> None:
        """Append a part, whose offsets start at 0."""
        for name, file in self._files.items():
            column = getattr(part, name)
            if name in self._ends:
                column = column[1:] + self._ends[name]
                self._ends[name] = int(column[-1]) if len(column) else self._ends[name]
            file.write(np.ascontiguousarray(column).data)

    def experiments(self) -> Experiments:
        """All of them, mapped; the space is given back when they are gone."""
        return Experiments(self._layer_names, *map(self._mapped, self._files))

    def _mapped(self, name: str) -> np.ndarray:
        file, dtype = self._files[name], np.int64 if name in self._ends else np.int32
        file.flush()
        return np.memmap(file, dtype, "r") if file.tell() else np.empty(0, dtype)


# ------------------------------------------------------------------------------ writing


def write_definition(
    experiments: Iterable[Experiment] | Iterable[Experiments], path: str | Path
) -> int:
    """Write a definition in the format its suffix names and return how many experiments.

    Takes experiments one by one or packed in parts. The file appears whole or not at all.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"--output {path}: is a directory; name a file in it")
    with whole_file(path) as partial:
        return _WRITERS.get(path.suffix, _write_json)(_in_parts(experiments), partial)


def _in_parts(experiments: Iterable[Any]) -> Iterator[Experiments]:
    iterator = iter(experiments)
    for first in iterator:
        if isinstance(first, Experiments):
            yield first
        else:
            yield Experiments.from_list([first, *itertools.islice(iterator, CHUNK - 1)])


def _write_json(parts: Iterator[Experiments], path: Path) -> int:
    """The original's format, an experiment at a time."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for part in parts:
            for experiment in part:
                # The one element of an indented list, without the list around it.
                text = json.dumps([experiment], indent=2)[2:-2]
                file.write(f"{',' if count else '['}\n{text}")
                count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def _write_jsonl(parts: Iterator[Experiments], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for part in parts:
            file.writelines(f"{json.dumps(experiment)}\n" for experiment in part)
            count += len(part)
    return count


def _write_arrow(parts: Iterator[Experiments], path: Path) -> int:
    import pyarrow as pa

    options, count = pa.ipc.IpcWriteOptions(compression="lz4"), 0
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, _schema(), options=options) as writer,
    ):
        for part in parts:
            writer.write_table(pa.table(experiment_columns(part), schema=_schema()))
            count += len(part)
    return count


def _write_parquet(parts: Iterator[Experiments], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet

    count = 0
    with pyarrow.parquet.ParquetWriter(path, _schema()) as writer:
        for part in parts:
            writer.write_table(pa.table(experiment_columns(part), schema=_schema()))
            count += len(part)
    return count


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [("layers", pa.list_(pa.string())), ("neurons", pa.list_(pa.list_(pa.int32())))]
    )


_WRITERS = {".jsonl": _write_jsonl, ".arrow": _write_arrow, ".parquet": _write_parquet}


def experiment_columns(experiments: Experiments) -> dict[str, Any]:
    """The Arrow columns ``layers: list<string>`` and ``neurons: list<list<int32>>``."""
    import pyarrow as pa

    from raypatch.arrow_arrays import numbers, words

    offsets = numbers(experiments.entry_offsets.astype(np.int32))
    names = pa.DictionaryArray.from_arrays(
        numbers(experiments.layers), words(experiments.layer_names)
    ).cast(pa.string())
    cells = pa.ListArray.from_arrays(
        numbers(experiments.neuron_offsets.astype(np.int32)), numbers(experiments.neurons)
    )
    return {
        "layers": pa.ListArray.from_arrays(offsets, names),
        "neurons": pa.ListArray.from_arrays(offsets, cells),
    }
