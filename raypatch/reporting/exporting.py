"""``raypatch export``: a run's results in other formats, part by part, memory flat.

Parquet and CSV hold rows and summary, and what their numbers of experiments and inputs stand for:
experiments and baselines. JSON comes in the original tool's two layouts, so that
scripts written for it keep working: one file an experiment, or one file an input, in a folder
a direction, and ``patching_summary_<direction>.json`` beside them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from raypatch.errors import InputError
from raypatch.results.analysis import Moments
from raypatch.results.reader import Results
from raypatch.results.schema import TARGET_SIDE
from raypatch.whole_files import whole_folder

# Leaves room for a number and a suffix.
MAX_NAME_BYTES = 200


def export(results: Results, form: str, by: str, output: str) -> Path:
    """Write a run's results below ``output``, a new directory that appears whole.

    Raises InputError where the run did not keep what the format needs, or the directory
    exists.
    """
    target = Path(output)
    if form != "json" and by != "experiment":
        raise InputError(f"--by {by}: is for --format json only; {form} has one file for all")
    if target.exists():
        raise InputError(f"--output {output}: exists; choose a new directory")
    results.require_rows()
    if form == "json" and results.sweep["identity"]["save"] != "full":
        raise InputError(
            f"{results.path}: was run with --save {results.sweep['identity']['save']}; the json "
            "layouts hold the patched outputs, so they need --save full"
        )
    with whole_folder(target) as folder:
        if form == "json":
            writer = _by_experiment if by == "experiment" else _by_input
            for direction in results.directions:
                (folder / direction).mkdir()
            writer(results, folder)
            for direction in results.directions:
                _write_summary_json(results, direction, folder)
        else:
            write = _write_parquet if form == "parquet" else _write_csv
            batches = results.experiment_batches()
            write(folder, "experiments", map(_table, batches), results.experiment_schema())
            write(folder, "baselines", iter([results.baselines]), results.baselines.schema)
            write(folder, "summary", results.summary_parts(None), results.summary_schema())
            if results.has_rows:
                write(folder, "rows", results.row_parts(None), results.row_schema())
    return target


def _write_parquet(folder: Path, name: str, parts: Iterator[pa.Table], schema: pa.Schema) -> None:
    with pyarrow.parquet.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
        for part in parts:
            writer.write_table(part)


def _write_csv(folder: Path, name: str, parts: Iterator[pa.Table], schema: pa.Schema) -> None:
    flat = _flattened(schema.empty_table())
    with pyarrow.csv.CSVWriter(folder / f"{name}.csv", flat.schema) as writer:
        for part in parts:
            writer.write_table(_flattened(part))


def _table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])


def _flattened(table: pa.Table) -> pa.Table:
    """Outputs as one column a logit, other lists as JSON text: CSV has no lists."""
    for name in table.column_names:
        place, kind = table.column_names.index(name), table.schema.field(name).type
        if pa.types.is_fixed_size_list(kind):
            values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            values = values.reshape(-1, kind.list_size)
            table = table.remove_column(place)
            for number in range(kind.list_size):
                column = pa.array(np.ascontiguousarray(values[:, number]))
                table = table.add_column(place + number, f"{name}_{number}", column)
        elif pa.types.is_list(kind):
            texts = pa.array(map(json.dumps, table[name].to_pylist()), pa.string())
            table = table.set_column(place, name, texts)
    return table


# --------------------------------------------------------------------- original layouts


def _by_experiment(results: Results, folder: Path) -> None:
    """``<direction>/<name>.json``: input id to what the patch did to it."""
    names = _Names(of_files=True)
    for index, name, spec, rows in _experiments(results):
        unique = names.unique(_file_name(name), index)
        for direction, by_input in rows.items():
            content = {
                key: {
                    **entry["results"],
                    "patch_configuration": spec,
                    "patch_analysis": entry["patch_analysis"],
                }
                for key, entry in by_input.items()
            }
            (folder / direction / f"{unique}.json").write_text(json.dumps(content, indent=2))


def _by_input(results: Results, folder: Path) -> None:
    """``<direction>/<input>.json``: experiment name to configuration, results and analysis."""
    names, files = _Names(), _Names(of_files=True)
    ids = results.sweep["input_ids"]
    safe = {
        key: files.unique(_file_name(key.replace(".", "_")), number)
        for number, key in enumerate(ids)
    }
    opened: set[Path] = set()
    for index, name, spec, rows in _experiments(results):
        unique = json.dumps(names.unique(name, index))
        for direction, by_input in rows.items():
            for key, entry in by_input.items():
                path = folder / direction / f"{safe[key]}.json"
                content = json.dumps({"patch_configuration": spec, **entry}, indent=2)
                # One file at a time: there may be more inputs than files a process may hold.
                with path.open("a") as file:
                    file.write(f"{',' if path in opened else '{'}\n{unique}: {content}")
                opened.add(path)
    for path in opened:
        with path.open("a") as file:
            file.write("\n}\n")


class _Names:
    """Names made unique by the experiment's index where one comes twice; those of files also where
    a disk that takes ``A`` for ``a`` would have one come twice."""

    def __init__(self, *, of_files: bool = False) -> None:
        self._of_files = of_files
        self._seen: set[str] = set()

    def unique(self, name: str, index: int) -> str:
        found, more = name, itertools.count(index)
        while self._key(found) in self._seen:
            found = f"{name}_{next(more)}"
        self._seen.add(self._key(found))
        return found

    def _key(self, name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold() if self._of_files else name


def _file_name(name: str) -> str:
    """A name as a file's: no folders, not hidden, not too long for any file system."""
    safe = "".join(c if c.isalnum() or c in "._-+" else "_" for c in name)
    if safe.startswith("."):
        safe = f"_{safe[1:]}"
    if len(safe.encode()) <= MAX_NAME_BYTES:
        return safe
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    start = safe.encode()[: MAX_NAME_BYTES - 17].decode(errors="ignore")
    return f"{start}_{digest}"


def _experiments(
    results: Results,
) -> Iterator[tuple[int, str, dict[str, Any], dict[str, dict[str, dict[str, Any]]]]]:
    """Index, name, spec, and by direction and input id what the original stores."""
    baselines = _baselines(results)
    ids, directions = results.sweep["input_ids"], results.directions
    each = len(ids) * len(directions)
    described = _described(results)
    for part in results.row_parts(None):
        outputs = part["patched_output"].combine_chunks().flatten().to_numpy()
        outputs = outputs.reshape(len(part), -1).astype(float)
        metrics = {name: part[name].to_pylist() for name in results.metrics}
        actions = part["patched_action"].to_pylist()
        changed = part["action_changed"].to_pylist()
        indices = part["experiment_index"].to_numpy()
        for start in range(0, len(part), each):
            index = int(indices[start])
            name, spec = described(index)
            found: dict[str, dict[str, dict[str, Any]]] = {}
            for d, direction in enumerate(directions):
                first = start + d * len(ids)
                found[direction] = {
                    key: {
                        "results": {
                            **baselines[TARGET_SIDE[direction]][i],
                            # The original keeps the batch of one around outputs.
                            "patched_output": [outputs[first + i].tolist()],
                            "patched_action": actions[first + i],
                            "patched_layers": list(spec),
                            "action_changed": changed[first + i],
                        },
                        "patch_analysis": {m: metrics[m][first + i] for m in metrics},
                    }
                    for i, key in enumerate(ids)
                }
            yield index, name, spec, found


def _baselines(results: Results) -> dict[str, list[dict[str, Any]]]:
    table = results.baselines
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["side"], []).append(
            {"baseline_output": [row["output"]], "baseline_action": row["action"]}
        )
    return found


def _described(results: Results) -> Any:
    """A function from an experiment's index to its name and spec, reading batches in order."""
    batches = results.experiment_batches()
    held: dict[str, Any] = {"first": 0, "rows": []}

    def described(index: int) -> tuple[str, dict[str, Any]]:
        while index >= held["first"] + len(held["rows"]):
            held["first"] += len(held["rows"])
            held["rows"] = next(batches).to_pylist()
        row = held["rows"][index - held["first"]]
        return row["name"], {
            layer: neurons or "all" for layer, neurons in zip(row["layers"], row["neurons"])
        }

    return described


def _write_summary_json(results: Results, direction: str, folder: Path) -> None:
    """``patching_summary_<direction>.json`` as the original's summary script writes it."""
    n_directions, at = len(results.directions), results.directions.index(direction)
    moments = {metric: Moments() for metric in results.metrics}
    for part in results.summary_parts(None):
        for metric, found in moments.items():
            mean, low, high = (
                part[f"{metric}_{s}"].to_numpy().astype(float)[at::n_directions]
                for s in ("mean", "min", "max")
            )
            found.add(mean, low, high)
    described, names = _described(results), _Names()
    each = (-1, n_directions, len(results.sweep["input_ids"]))
    with (folder / f"patching_summary_{direction}.json").open("w") as file:
        separator = "{"
        row_parts = results.row_parts(list(results.metrics))
        for part, rows in zip(results.summary_parts(None), row_parts):
            counts = {  # [experiments]: for how many inputs a metric is defined
                metric: rows[metric].is_valid().to_numpy().reshape(each)[:, at].sum(1).tolist()
                for metric in moments
            }
            for number, row in enumerate(part.slice(at).to_pylist()[::n_directions]):
                name = names.unique(described(row["experiment_index"])[0], row["experiment_index"])
                metrics = {
                    metric: _metric_summary(row, metric, found, counts[metric][number])
                    for metric, found in moments.items()
                    if row[f"{metric}_mean"] is not None
                }
                entry = {"metrics": metrics, "input_count": row["n_inputs"]}
                file.write(f"{separator}\n{json.dumps(name)}: {json.dumps(entry, indent=2)}")
                separator = ","
        file.write("\n}\n")


def _metric_summary(
    row: dict[str, Any], metric: str, moments: Moments, n_defined: int
) -> dict[str, Any]:
    mean = row[f"{metric}_mean"]
    return {
        "mean": mean,
        "std_dev": row[f"{metric}_std"],
        "min": row[f"{metric}_min"],
        "max": row[f"{metric}_max"],
        "count": n_defined,
        "standardized_value": moments.standardised(mean),
        "normalized_value": moments.normalised(mean),
        "global_mean": moments.mean,
        "global_std_dev": moments.std,
        "global_min": moments.low,
        "global_max": moments.high,
    }
