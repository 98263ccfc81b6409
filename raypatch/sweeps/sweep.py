"""A sweep's plan: what it is (identity), how it is cut (items), what is still to do."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypatch.definitions import Experiments
from raypatch.errors import InputError

# Items aim at this many seconds on a slow core, by a count of the network's operations, and
# at no more rows than suit one Arrow file (more for a GPU, which would else wait for the disk),
# nor logits than suit an actor's memory; a small sweep is still cut for several actors.
ITEM_SECONDS = 1.0
ITEM_ROWS = {"cpu": 1 << 19, "cuda": 1 << 22, "cuda+cpu": 1 << 19}
ITEM_LOGITS = 1 << 24
MIN_ITEM_ROWS = 1024
MIN_ITEMS = 16
# Where GPUs and cores work together, any item may go to the slower one.
OPERATIONS_PER_SECOND = {"cpu": 2e10, "cuda": 2e13, "cuda+cpu": 2e10}


@dataclass(frozen=True)
class Range:
    """Experiments ``first`` to ``last`` (exclusive)."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def item_length(
    *, n_experiments: int, passes_each: int, operations: int, n_outputs: int, device_class: str
) -> int:
    """Experiments in an item; depends on agent, inputs, definition and device class only.

    ``passes_each`` are the rows of an experiment, ``operations`` those of a forward.
    """
    seconds_each = max(operations * passes_each / OPERATIONS_PER_SECOND[device_class], 1e-12)
    most_rows = min(ITEM_ROWS[device_class], ITEM_LOGITS / n_outputs)
    length = min(ITEM_SECONDS / seconds_each, most_rows / passes_each)
    length = min(length, max(n_experiments / MIN_ITEMS, MIN_ITEM_ROWS / passes_each))
    return max(1, math.ceil(length))


def remaining(wanted: Range, committed: list[Range]) -> list[Range]:
    """What of ``wanted`` no committed range covers, in order."""
    left, at = [], wanted.first
    for done in sorted(committed, key=lambda r: r.first):
        if done.last <= at or done.first >= wanted.last:
            continue
        if done.first > at:
            left.append(Range(at, done.first))
        at = max(at, done.last)
    if at < wanted.last:
        left.append(Range(at, wanted.last))
    return left


def cut(ranges: list[Range], length: int) -> Iterator[tuple[int, int, int]]:
    """Items (number, first, last): ranges cut at multiples of ``length``."""
    for part in ranges:
        for number in range(part.first // length, -(-part.last // length)):
            yield (
                number,
                max(part.first, number * length),
                min(part.last, (number + 1) * length),
            )


def count_items(ranges: list[Range], length: int) -> int:
    """How many items :func:`cut` gives."""
    return sum(-(-r.last // length) - r.first // length for r in ranges)


# ----------------------------------------------------------------------------- identity


def sha256_of(*parts: bytes | memoryview | np.ndarray) -> str:
    """Digest of arrays and bytes in a row, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if not isinstance(part, np.ndarray) else np.ascontiguousarray(part).data
        view = memoryview(content).cast("B")
        digest.update(view.nbytes.to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()


def definition_digest(experiments: Experiments) -> str:
    """The same for the same experiments, however the file spells them."""
    digest = hashlib.sha256(json.dumps(experiments.layer_names).encode())
    for chunk in experiments.chunks():
        part = sha256_of(chunk.entry_offsets, chunk.layers, chunk.neuron_offsets, chunk.neurons)
        digest.update(part.encode())
    return digest.hexdigest()


def files_digest(files: tuple[Path, ...]) -> str:
    return sha256_of(*(file.read_bytes() for file in files))


def check_identity(
    held: Mapping[str, Any], identity: Mapping[str, Any], location: str, what: str
) -> None:
    """Raises InputError where a directory holds another ``what``, naming the fields that differ."""
    different = [key for key in identity if held.get(key) != identity[key]]
    if different:
        raise InputError(
            f"--output_dir {location}: holds another {what}; different: {', '.join(different)}; "
            "choose a new directory, or --overwrite to replace it"
        )


def unreadable_records(location: str, error: Exception) -> InputError:
    """What to say of a directory whose records are damaged."""
    return InputError(
        f"--output_dir {location}: its records cannot be read ({error}); choose a new directory, "
        "or --overwrite"
    )


def fingerprint(identity: dict[str, Any]) -> str:
    """Digest of everything that decides a sweep's numbers and files."""
    return sha256_of(json.dumps(identity, sort_keys=True).encode())
