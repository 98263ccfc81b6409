"""``raypatch report``: one self-contained HTML page; nothing is loaded from anywhere."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from raypatch.errors import InputError, missing_package
from raypatch.reporting.gather import MAX_STRIP_INPUTS, Gathered, gather, ordered_layers
from raypatch.results.analysis import LIKENESS, SIGNED, strength
from raypatch.results.reader import DEFAULT_METRIC, Results
from raypatch.sweeps.progress import counted, duration, short_number
from raypatch.whole_files import whole_file

MAX_CELLS = 256
MAX_LAYERS = 80
SIGNIFICANT = 4


def write_report(results: Results, output: str, screen: str | None = None) -> Path:
    """Write the page; raises InputError without plotly or without committed results."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError(missing_package("raypatch report", "plotly", "report")) from None
    target = Path(output)
    if target.is_dir():
        raise InputError(f"--output {output}: is a directory; name a file in it")
    results.require_rows()
    found = gather(results)
    data = _data(results, found)
    if screen is not None:
        from raypatch.searches.screening import compared

        data["screen"] = compared(results, screen)
    template = resources.files("raypatch.reporting").joinpath("template.html").read_text("utf-8")
    parts = {
        "title": html.escape(Path(results.path).name or results.path),
        "facts": _facts(results),
        # No text of the user's can end the script it stands in, or begin another.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
    }
    # In one pass: a name of the user's may look like one of these marks.
    content = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)
    with whole_file(target) as file:
        file.write_text(content, encoding="utf-8")
    return target


def _data(results: Results, found: Gathered) -> dict[str, Any]:
    columns = [f"{m}|{d}" for m in found.metrics for d in found.directions]
    layers = ordered_layers(next(iter(next(iter(found.heat.values())).values())))
    return {
        # The page opens on the first.
        "metrics": sorted(found.metrics, key=lambda name: name != DEFAULT_METRIC),
        "signed": sorted(SIGNED.intersection(found.metrics)),
        "likeness": sorted(LIKENESS.intersection(found.metrics)),
        "directions": list(found.directions),
        "units": found.units,
        "layers": layers[:MAX_LAYERS],
        "heat": {
            m: {d: _heat(m, found.heat[m][d], layers[:MAX_LAYERS]) for d in found.directions}
            for m in found.metrics
        },
        "effects": {
            layer: {c: _listed(rows[:, i]) for i, c in enumerate(columns)}
            for layer, rows in found.effects.items()
        },
        "scatter": {
            "names": found.scatter_names,
            "columns": {c: _listed(found.scatter[:, 1 + i]) for i, c in enumerate(columns)},
        },
        "top": found.top,
        "strips": {
            m: {index: _listed(values) for index, values in strips.items()}
            for m, strips in found.strips.items()
        },
        "input_ids": results.sweep["input_ids"][:MAX_STRIP_INPUTS],
        "flips": {d: counts.tolist() for d, counts in found.flips.items()},
        "n_experiments": found.n_experiments,
        "sampled": sorted(found.sampled),
    }


def _heat(metric: str, by_layer: dict[str, np.ndarray], layers: list[str]) -> dict[str, Any]:
    """Values and neurons by layer and cell; wide layers show the strongest neuron of each cell."""
    z, neurons, ranks = [], [], []
    joined = np.concatenate([by_layer[layer] for layer in layers])
    order = np.full(len(joined), -1)
    defined = np.flatnonzero(~np.isnan(joined))
    strongest = np.argsort(-strength(metric, joined[defined]), kind="stable")
    order[defined[strongest]] = np.arange(len(defined))
    start = 0
    for layer in layers:
        values = by_layer[layer]
        places = np.arange(len(values))
        if len(values) > MAX_CELLS:
            cells = np.array_split(places, MAX_CELLS)
            strengths = np.where(np.isnan(values), -np.inf, strength(metric, values))
            places = np.array([cell[np.argmax(strengths[cell])] for cell in cells])
        z.append(_listed(values[places]))
        neurons.append(places.tolist())
        ranks.append([int(r) + 1 for r in order[start + places]])
        start += len(values)
    return {"z": z, "neurons": neurons, "ranks": ranks}


def _listed(values: Any) -> list[float | None]:
    """Numbers of a few digits: a page is read, not computed with."""
    return [
        None if not np.isfinite(v) else float(f"{v:.{SIGNIFICANT}g}")
        for v in np.asarray(values, np.float64)
    ]


def _facts(results: Results) -> str:
    record, runs = results.sweep, results.sweep["runs"]
    facts = {
        "agent": record["agent"]["loaded_as"],
        "network": f"{record['agent']['engine']}; outputs: {record['n_outputs']}",
        "experiments": f"{results.n_tried:,} of {record['identity']['n_experiments']:,} "
        f"committed, of {Path(record['definition_file']).name}",
        "pairs": f"{len(record['input_ids']):,}, {' and '.join(results.directions)}, "
        f"source: {record['identity']['source']}",
        "state": "complete" if results.complete else "not complete yet",
        "rows": f"{results.n_rows:,}",
        "precision": f"{record['precision']} on {record['device']}",
    }
    if runs:
        last = max(runs, key=lambda run: run["passes"])
        facts["speed"] = (
            f"{last['passes']:,} passes in {duration(last['seconds'])}, "
            f"{short_number(last['passes_per_second'])} passes/s, "
            f"{counted(last['actors'], 'actor')}"
        )
        checked = sum(run["verification"]["checked"] for run in runs)
        largest = max(run["verification"]["largest_difference"] for run in runs)
        facts["verified"] = (
            f"{checked} experiments against the float64 reference, largest difference {largest:.1e}"
        )
    facts["quarantined"] = str(len(results.failures))
    for failure in results.failures[:5]:
        facts[failure.name] = failure.error
    return "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>"
        for key, value in facts.items()
    )
