"""Pairs of clean and corrupted inputs, matched by id and checked (design 4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypatch.errors import InputError

SIDES = ("clean", "corrupted")


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


def read_inputs(
    paths: dict[str, Path],
    observation_shape: Sequence[int],
    *,
    input_ids: Sequence[str] | None = None,
) -> Inputs:
    """Read the sides named in ``paths``, match their ids and check every value.

    Raises InputError naming the id at fault: on one side only, wrong shape, not a number,
    NaN or infinity. Order is that of the first file.
    """
    raw = {side: _read_json(path) for side, path in paths.items()}
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
    if input_ids is not None:
        for wanted in input_ids:
            if wanted not in raw[first]:
                raise InputError(
                    f"--input_ids: {wanted!r} is not in {paths[first]}; it holds {_some(ids)}"
                )
        if len(set(input_ids)) != len(input_ids):
            raise InputError(f"--input_ids: an id is given twice in {','.join(input_ids)}")
        ids = tuple(input_ids)
    shape = tuple(observation_shape)
    sides = {
        side: np.stack([_observation(values[key], shape, key, paths[side]) for key in ids])
        for side, values in raw.items()
    }
    return Inputs(ids, sides, tuple(paths.values()))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such input file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: inputs are a non-empty object: {{"id": {{"input": [...]}}}}')
    return content


def _observation(value: Any, shape: tuple[int, ...], key: str, path: Path) -> np.ndarray:
    if isinstance(value, dict):
        if "input" not in value:
            raise InputError(f'{path}: input {key!r} has no "input"')
        value = value["input"]
    where = f"{path}: input {key!r}"
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: holds something that is not a number, or ragged lists"
        ) from None
    if array.shape != shape and not (array.ndim == 1 and array.size == np.prod(shape)):
        raise InputError(f"{where}: shape {list(array.shape)}, but the agent takes {list(shape)}")
    with np.errstate(over="ignore"):
        array = array.reshape(shape).astype(np.float32)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(f"{where}: value {at} is {array.ravel()[at]}; every value must be finite")
    return array


def _some(ids: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more
