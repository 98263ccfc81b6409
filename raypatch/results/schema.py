"""The Arrow schemas of an output directory, described once (design 8)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

DIRECTIONS = ("denoising", "noising")
# Which side of a pair is patched in each direction, and which one gives the values.
TARGET_SIDE = {"denoising": "corrupted", "noising": "clean"}
SOURCE_SIDE = {"denoising": "clean", "noising": "corrupted"}
SAVE_MODES = ("full", "metrics", "summary")
COMPRESSIONS = ("none", "lz4", "zstd")
STATISTICS = ("mean", "std", "min", "max")
BATCH_ROWS = 65536

EXPERIMENTS = pa.schema(
    [
        ("experiment_index", pa.int64()),
        ("name", pa.string()),
        ("layers", pa.list_(pa.string())),
        ("neurons", pa.list_(pa.list_(pa.int32()))),
    ]
)


@dataclass(frozen=True)
class Columns:
    """What decides the columns of rows and summaries."""

    n_outputs: int
    metrics: tuple[str, ...]
    save: str


def baseline_schema(n_outputs: int) -> pa.Schema:
    """One row a side and input: what the agent does unpatched."""
    return pa.schema(
        [
            ("side", pa.string()),
            ("input_index", pa.int32()),
            ("input_id", pa.string()),
            ("output", pa.list_(pa.float32(), n_outputs)),
            ("action", pa.int32()),
        ]
    )


def row_schema(columns: Columns, metadata: Mapping[str, Any]) -> pa.Schema:
    """One row an experiment, direction and input, in that order."""
    fields: list[tuple[str, pa.DataType]] = [
        ("experiment_index", pa.int64()),
        ("direction", pa.string()),
        ("input_index", pa.int32()),
    ]
    if columns.save == "full":
        fields.append(("patched_output", pa.list_(pa.float32(), columns.n_outputs)))
    fields += [("patched_action", pa.int32()), ("action_changed", pa.bool_())]
    fields += [(name, pa.float32()) for name in columns.metrics]
    return pa.schema(fields, encode_metadata(metadata))


def summary_schema(metrics: Sequence[str], metadata: Mapping[str, Any]) -> pa.Schema:
    """One row an experiment and direction: statistics over the inputs."""
    fields: list[tuple[str, pa.DataType]] = [
        ("experiment_index", pa.int64()),
        ("direction", pa.string()),
        ("n_inputs", pa.int32()),
        ("action_changed_rate", pa.float32()),
    ]
    fields += [(f"{name}_{stat}", pa.float32()) for name in metrics for stat in STATISTICS]
    return pa.schema(fields, encode_metadata(metadata))


def encode_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Schema metadata as texts; what is no text becomes JSON."""
    return {
        f"raypatch.{key}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in metadata.items()
    }
