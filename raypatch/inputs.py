"""Pairs of clean and corrupted inputs, matched by id and checked (design 4).

A file is JSON (``{id: {"input": [...]}}`` or ``{id: [...]}``), ``.npz`` (``ids`` and
``inputs``, or ``inputs.<key>`` for observations of several parts), ``.npy`` (the rows, with
their numbers as ids), or Arrow or Parquet (columns ``input_id`` and ``input``).
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypatch.errors import InputError, few

ALIGNMENT = 64  # bytes
SIDES = ("clean", "corrupted")
# Where inputs lie beside an agent.
INPUTS_FOLDER = "activation_inputs"
SUFFIXES = (".json", ".npz", ".npy", ".arrow", ".parquet")
UNREADABLE = (
    ValueError, OSError, KeyError, EOFError, RecursionError, AttributeError, MemoryError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class ObservationShape:
    """What one observation looks like to the agent.

    ``parts`` gives the shape of each key where an observation has several; it is then
    packed into one row, key after key, and ``shape`` is that row's.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Inputs:
    """Inputs by side, in one order of ids: each array float32 ``[inputs, *observation]``.

    A side is missing only where the source of patches is not a pair.
    """

    ids: tuple[str, ...]
    sides: dict[str, np.ndarray]
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.ids)


def find_inputs(folder: Path, side: str) -> Path:
    """The inputs of a side in a folder, whichever format they have; JSON where there are none."""
    found = [folder / f"{side}_inputs{suffix}" for suffix in SUFFIXES]
    return next((path for path in found if path.is_file()), found[0])


def read_inputs(
    paths: dict[str, Path],
    observation: ObservationShape,
    *,
    input_ids: Sequence[str] | None = None,
) -> Inputs:
    """Read the sides named in ``paths``, match their ids and check every value.

    Raises InputError naming the id at fault: on one side only, wrong shape, not a number,
    NaN or infinity. Order is that of the first file.
    """
    raw = {side: read_observations(path) for side, path in paths.items()}
    first = next(iter(raw))
    for side, other in ((first, s) for s in list(raw)[1:]):
        for one, two in ((side, other), (other, side)):
            lonely = next((key for key in raw[one] if key not in raw[two]), None)
            if lonely is not None:
                raise InputError(
                    f"{paths[one]}: input {lonely!r} has no partner in {paths[two]}; "
                    "every id must be in both files"
                )
    ids = tuple(raw[first])
    for key in ids:
        if not key.isprintable():
            raise InputError(f"{paths[first]}: input id {key!r} holds unprintable characters")
    if input_ids is not None:
        for wanted in input_ids:
            if wanted not in raw[first]:
                raise InputError(
                    f"--input_ids: {wanted!r} is not in {paths[first]}; it holds {few(ids, 5)}"
                )
        if len(set(input_ids)) != len(input_ids):
            raise InputError(f"--input_ids: an id is given twice in {','.join(input_ids)}")
        ids = tuple(input_ids)
    sides = {
        side: _stacked(
            [
                check_observation(values[key], observation, f"{paths[side]}: input {key!r}")
                for key in ids
            ]
        )
        for side, values in raw.items()
    }
    return Inputs(ids, sides, tuple(paths.values()))


# ------------------------------------------------------------------------------ formats


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """``[inputs, ...]`` float32, in memory that begins as torch's does, which takes it as it is."""
    shape = (len(rows), *rows[0].shape)
    memory = np.empty(4 * math.prod(shape) + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    whole = memory[start : start + 4 * math.prod(shape)].view(np.float32).reshape(shape)
    return np.stack(rows, out=whole)


def read_observations(path: Path) -> Mapping[str, Any]:
    """Observations by id as the file holds them, not checked yet."""
    if path.is_dir():
        raise InputError(f"{path}: this is a directory; name a file of inputs in it")
    if not path.is_file():
        raise InputError(
            f"{path}: no such input file; name one with --clean_inputs and --corrupted_inputs, or "
            "make some with raypatch collect"
        )
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: inputs are files of the kinds {', '.join(SUFFIXES)}")
    reader = _READERS[path.suffix]
    try:
        found = reader(path)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(
            f"{path}: not readable inputs: {' '.join(str(error).split())[:300]}"
        ) from None
    if not found:
        raise InputError(f"{path}: holds no inputs")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: inputs are a non-empty object: {{"id": {{"input": [...]}}}}')
    return {key: _unwrapped(value, f"{path}: input {key!r}") for key, value in content.items()}


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return found


def _unwrapped(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        return value
    if "input" not in value:
        raise InputError(f'{where} has no "input"')
    return value["input"]


@contextmanager
def _archive(path: Path) -> Iterator[Any]:
    """The arrays of an ``.npz``; ValueError for a file that is none, or one of pickled objects."""
    if not zipfile.is_zipfile(path):
        start = path.read_bytes()[:6]
        if start.startswith(b"PK"):
            raise ValueError("its end is missing: it was cut short; copy or write it again")
        kinds = {b"\x93NUMPY": "one array (.npy)", b"": "empty"}
        kind = kinds.get(start, "something else")
        raise ValueError(f"this is {kind}, not an archive of several arrays; see np.savez")
    content = np.load(path, allow_pickle=False)
    with content:
        yield content


def _read_npz(path: Path) -> dict[str, Any]:
    with _archive(path) as content:
        names = [name for name in content.files if name == "inputs" or name.startswith("inputs.")]
        if "ids" not in content.files or not names:
            raise InputError(
                f"{path}: an .npz of inputs holds 'ids' and 'inputs', as np.savez(file, ids=..., "
                f"inputs=...) writes them; this one has {', '.join(content.files)[:200]}"
            )
        given = content["ids"]
        if given.ndim != 1:
            raise InputError(f"{path}: 'ids' has shape {list(given.shape)}; it is one row of ids")
        ids = [key.decode() if isinstance(key, bytes) else str(key) for key in given]
        arrays = {name.removeprefix("inputs").lstrip("."): content[name] for name in names}
    short = next((name for name, array in arrays.items() if array.shape[:1] != (len(ids),)), None)
    if short is not None:
        raise InputError(f"{path}: 'ids' must hold one id for each row of 'inputs'")
    _refuse_repeated(ids, path)
    if "" in arrays:
        return dict(zip(ids, arrays[""]))
    return {key: {part: a[i] for part, a in arrays.items()} for i, key in enumerate(ids)}


def _read_npy(path: Path) -> dict[str, Any]:
    rows = np.load(path, allow_pickle=False)
    if not isinstance(rows, np.ndarray):
        raise ValueError("this is an archive of several arrays; name it .npz")
    if rows.ndim < 2:
        raise InputError(f"{path}: shape {list(rows.shape)}; inputs are one row each")
    return {str(i): row for i, row in enumerate(rows)}


def _read_table(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a readable {path.suffix[1:]} file: {error}") from None
    if not {"input_id", "input"} <= set(table.column_names):
        raise InputError(
            f"{path}: a table of inputs has the columns input_id and input; this one has "
            f"{', '.join(table.column_names)[:200]}"
        )
    if table["input_id"].null_count:
        raise InputError(f"{path}: an input_id is missing (null)")
    ids = [str(key) for key in table["input_id"].to_pylist()]
    _refuse_repeated(ids, path)
    return dict(zip(ids, table["input"].to_pylist()))


def _refuse_repeated(ids: Sequence[str], path: Path) -> None:
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"{path}: input id {twice!r} appears twice")


_READERS = {
    ".json": _read_json, ".npz": _read_npz, ".npy": _read_npy, ".arrow": _read_table,
    ".parquet": _read_table,
}  # fmt: skip


# ------------------------------------------------------------------------------ checking


def check_observation(value: Any, observation: ObservationShape, where: str) -> np.ndarray:
    """One observation as float32 in the agent's shape; InputError names what does not fit."""
    parts = observation.parts
    if parts is None or not isinstance(value, Mapping):
        return _array(value, observation.shape, where)
    missing = next((key for key in parts if key not in value), None)
    unknown = next((key for key in value if key not in parts), None)
    if missing is not None or unknown is not None:
        fault = f"has no {missing!r}" if missing is not None else f"has an unknown {unknown!r}"
        raise InputError(f"{where}: {fault}; the agent takes {', '.join(parts)}")
    return np.concatenate(
        [_array(value[key], shape, f"{where}: {key!r}").ravel() for key, shape in parts.items()]
    )


def _array(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    if isinstance(value, Mapping):
        raise InputError(f"{where}: holds several parts; the agent takes one array")
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError
        array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{where}: holds something that is not a number, or ragged lists"
        ) from None
    if len(shape) == 3 and array.shape == (*shape[1:], shape[0]) and array.shape != shape:
        array = array.transpose(2, 0, 1)  # images with their channels last
    flat = array.ndim <= 1 and array.size == math.prod(shape)
    if array.shape != shape and not flat:
        raise InputError(f"{where}: shape {list(array.shape)}, but the agent takes {list(shape)}")
    with np.errstate(over="ignore"):
        single = array.reshape(shape).astype(np.float32)
    if not np.isfinite(single).all():
        at = int(np.flatnonzero(~np.isfinite(single))[0])
        raise InputError(
            f"{where}: value {at} is {array.ravel()[at]}; every value must be finite, in float32"
        )
    return single


# -------------------------------------------------------------------- cached activations


def read_activations(
    path: Path, ids: Sequence[str], layers: Mapping[str, tuple[int, ...]], resolve: Any
) -> dict[str, np.ndarray]:
    """Source values from a file in the original's layout: keys ``<id>_<layer>``.

    ``layers`` maps what is needed to the shape of one activation; ``resolve`` turns a name
    in the file into the agent's own, or None. Returns float32 ``[inputs, *shape]`` a layer.
    Raises InputError naming the key that is missing or of another shape.
    """
    if not path.is_file():
        raise InputError(f"--source_activations {path}: no such file")
    try:
        with _archive(path) as content:
            by_place = {}
            for key in content.files:
                # An id may begin as another does with its layer: the longest that leaves a layer.
                owners = sorted((i for i in ids if key.startswith(f"{i}_")), key=len)
                places = ((resolve(key[len(i) + 1 :]), i) for i in reversed(owners))
                place = next((place for place in places if place[0] in layers), None)
                if place is not None:
                    by_place[place] = key
            found = {}
            for layer, shape in layers.items():
                rows = []
                for name in ids:
                    if (layer, name) not in by_place:
                        raise InputError(
                            f"--source_activations {path}: no '{name}_{layer}', which the "
                            "definition needs"
                        )
                    key = by_place[layer, name]
                    value = content[key]
                    if value.shape == (1, *shape):
                        value = value[0]
                    rows.append(_array(value, shape, f"--source_activations {path}: {key!r}"))
                found[layer] = _stacked(rows)
    except UNREADABLE as error:
        raise InputError(f"--source_activations {path}: not readable: {error}") from None
    return found
