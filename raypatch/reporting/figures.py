"""``raypatch plot``: static figures for papers, colour-blind safe, with units on the axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raypatch.errors import InputError, missing_package
from raypatch.reporting.gather import Gathered, gather, ordered_layers
from raypatch.results.analysis import LIKENESS, SIGNED
from raypatch.results.reader import Results
from raypatch.whole_files import whole_file

COLOURS = "cividis"
BOTH_WAYS = "PuOr"


def write_figures(results: Results, metric: str, output: str, form: str) -> list[Path]:
    """Heat maps by direction, distributions by layer, denoising against noising.

    Raises InputError without matplotlib, or for a metric that was not computed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise InputError(missing_package("raypatch plot", "matplotlib", "report")) from None
    results.require_metric(metric)
    results.require_rows()
    found = gather(results)
    at = 1 + found.metrics.index(metric) * len(found.directions)
    if np.isnan(found.scatter[:, at : at + len(found.directions)]).all():
        raise InputError(f"--metric: {metric!r} is undefined for every experiment of this run")
    drawn: dict[str, Any] = {"distributions": _distributions(found, metric)}
    for direction in found.directions:
        figure = _heat_map(found, metric, direction)
        if figure is not None:
            drawn[f"heatmap_{direction}"] = figure
    if len(found.directions) == 2:
        drawn["scatter"] = _scatter(found, metric)
    written = []
    for name, figure in drawn.items():
        path = Path(output) / f"{metric}_{name}.{form}"
        # No date in the file: the same results give the same bytes.
        metadata = {"Date": None} if form == "svg" else {}
        with whole_file(path) as file:
            figure.savefig(file, dpi=200, bbox_inches="tight", metadata=metadata)
        written.append(path)
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")
    return written


def _label(found: Gathered, metric: str) -> str:
    unit = found.units.get(metric, "1")
    name = metric.replace("_", " ") + (f" ({unit})" if unit != "1" else "")
    return f"1 - {name}" if metric in LIKENESS else name


def _drawn(metric: str, values: np.ndarray) -> np.ndarray:
    """By how far they are from no effect, as :func:`_label` says: of similarities that is 1."""
    return 1 - values if metric in LIKENESS else values


def _root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


# Few neurons move the outputs much, most hardly: on even axes those would all be one dot.
ROOTS = (_root, _square)


def _root_ticks(low: float, high: float) -> list[float]:
    """Ticks at about even distances on a square-root scale, as short numbers."""
    most = float(np.sqrt(max(-low, high)))
    even = _square(np.linspace(-most, most, 9) if low < 0 else np.linspace(0, most, 5))
    return sorted({float(f"{tick:.1g}") for tick in even if low <= float(f"{tick:.1g}") <= high})


def _on_root_scale(axes: Any, axis: str, values: np.ndarray, label: str) -> None:
    """Let the ``axis`` ``x`` or ``y`` of some values have such a scale, and say so."""
    known = values[~np.isnan(values)]
    low, high = min(0.0, known.min(initial=0.0)), known.max(initial=0.0) or 1.0
    ends = _root(np.array([low, high]))
    ticks = _root_ticks(low, high)
    getattr(axes, f"set_{axis}scale")("function", functions=ROOTS)
    getattr(axes, f"set_{axis}lim")(*_square(ends + np.array([-0.04, 0.04]) * (ends[1] - ends[0])))
    getattr(axes, f"set_{axis}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(axes, f"set_{axis}label")(f"{label}, root scale")


def _heat_map(found: Gathered, metric: str, direction: str) -> Any:
    from matplotlib import pyplot
    from matplotlib.colors import FuncNorm

    by_layer = found.heat[metric][direction]
    layers = [n for n in ordered_layers(by_layer) if not np.isnan(by_layer[n]).all()]
    if not layers:
        return None
    width = max(len(by_layer[layer]) for layer in layers)
    grid = np.full((len(layers), width), np.nan)
    for row, layer in enumerate(layers):
        grid[row, : len(by_layer[layer])] = by_layer[layer]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(layers)))
    both_ways = metric in SIGNED
    grid = _drawn(metric, grid)
    most = float(np.nanmax(np.abs(grid))) or 1.0
    least = -most if both_ways else min(0.0, float(np.nanmin(grid)))
    image = axes.imshow(
        grid, aspect="auto", cmap=BOTH_WAYS if both_ways else COLOURS, interpolation="nearest",
        norm=FuncNorm(ROOTS, least, most),
    )  # fmt: skip
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("neuron")
    axes.set_title(direction)
    bar = figure.colorbar(image, ax=axes, label=f"{_label(found, metric)}, root scale")
    bar.set_ticks(ticks := _root_ticks(least, most), labels=[f"{tick:g}" for tick in ticks])
    return figure


def _distributions(found: Gathered, metric: str) -> Any:
    from matplotlib import pyplot

    layers = ordered_layers(found.effects)
    m, n_directions = found.metrics.index(metric), len(found.directions)
    figure, every = pyplot.subplots(
        1, n_directions, figsize=(4.5 * n_directions, 1 + 0.5 * len(layers)), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for d, (axes, direction) in enumerate(zip(every[0], found.directions)):
        at = m * n_directions + d
        columns = [_drawn(metric, found.effects[layer][:, at]) for layer in layers]
        axes.boxplot(
            [column[~np.isnan(column)] for column in columns], orientation="horizontal",
            flierprops={"markersize": 2, "markeredgecolor": "#00527c"},
            medianprops={"color": "#00527c"},
        )  # fmt: skip
        axes.set_yticks(range(1, len(layers) + 1), layers)
        _on_root_scale(axes, "x", np.concatenate(columns), _label(found, metric))
        axes.set_title(direction)
    every[0][0].invert_yaxis()  # shared: the first layer on top in all
    return figure


def _scatter(found: Gathered, metric: str) -> Any:
    from matplotlib import pyplot

    first = 1 + found.metrics.index(metric) * 2
    figure, axes = pyplot.subplots(figsize=(5, 5))
    both = _drawn(metric, found.scatter[:, first : first + 2])
    axes.scatter(both[:, 0], both[:, 1], s=9, alpha=0.5, c="#00527c")
    for axis, column, direction in zip("xy", both.T, found.directions):
        _on_root_scale(axes, axis, column, f"{direction}: {_label(found, metric)}")
    return figure
