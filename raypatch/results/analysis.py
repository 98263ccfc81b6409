"""Ranking: which experiments move the outputs most, and how sure that is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypatch.arrow_arrays import as_numpy, word
from raypatch.definitions import OUTPUT_LOGITS
from raypatch.errors import InputError, offer
from raypatch.results.reader import Results
from raypatch.results.schema import STATISTICS

BOTH = "both"
COMBINATIONS = ("average", "maximum")
RESAMPLES, CONFIDENCE = 2000, 0.95
# From fewer inputs, resampled ones lie far closer together than others would.
LEAST_INPUTS = 5
DRAWS_AT_A_TIME = 1 << 20
# Metrics that go up or down from 0, and those that are 1 where nothing changes; of all others
# the largest is the strongest effect.
SIGNED = {
    "output_logit_delta", "action_probability_delta", "top_action_probability_gap",
    "confidence_margin_change", "logit_proportion_change", "directed_saturating_chebyshev",
}  # fmt: skip
LIKENESS = {"cosine_similarity", "pearson_correlation"}


def strength(metric: str, values: np.ndarray, statistic: str = "mean") -> np.ndarray:
    """How strong an effect values of a metric tell of: larger is stronger."""
    if statistic == "std":
        return values
    if metric in SIGNED:
        return np.abs(values)
    return 1 - values if metric in LIKENESS else values


def usual_combination(metric: str) -> str:
    """How both directions become one number: where one goes up as the other goes down, as the
    stronger of the two, or they would cancel."""
    return "maximum" if metric in SIGNED else "average"


@dataclass
class Moments:
    """Mean and spread of values that come in parts, and the range of their extremes.

    ``low`` and ``high`` are the smallest minimum and the largest maximum over inputs, the
    bounds of the original summary's min-max normalisation.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    def add(self, values: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> None:
        """Chan's parallel update of mean and sum of squared deviations."""
        values = values[~np.isnan(values)]
        if not len(values):
            return
        n, mean = len(values), float(values.mean())
        shift, total = mean - self.mean, self.count + n
        self.squares += float(((values - mean) ** 2).sum()) + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total
        self.low = min(self.low, float(np.nanmin(lows)))
        self.high = max(self.high, float(np.nanmax(highs)))

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    def standardised(self, value: float) -> float:
        """Z-score among all experiments; the plain difference where they are all equal."""
        return (value - self.mean) / (self.std or 1.0)

    def normalised(self, value: float) -> float:
        """0 at the smallest value of any input, 1 at the largest; 0.5 where they are equal."""
        if self.high == self.low:
            return 0.5
        return (value - self.low) / (self.high - self.low)


def rank(
    results: Results,
    metric: str,
    *,
    statistic: str = "mean",
    direction: str = BOTH,
    combine: str | None = None,
    top: int | None = 10,
    bottom: bool = False,
    layer: str | None = None,
    internal_only: bool = False,
    bootstrap: bool = False,
) -> list[dict[str, Any]]:
    """Experiments by a statistic of a metric over the inputs, the strongest effect first: the
    largest number, of signed metrics the farthest from 0, of similarities the smallest.

    ``direction`` "both" combines the two by ``combine``, "average" or "maximum" (of the two the
    stronger effect), None for :func:`usual_combination`. ``bottom`` gives the weakest first.
    ``layer`` keeps experiments that patch it; ``internal_only`` leaves out those that patch
    ``output_logits``. Each row holds rank, experiment_index, name, patches (layers and neurons as
    text), ``<metric>_<statistic>``, z_score and normalised (among all experiments that are ranked),
    action_changed_rate (None for continuous actions) and, with ``bootstrap``, ci_low and ci_high:
    the 95 % percentile interval over resampled inputs, None where a run kept no rows, where fewer
    than five inputs are defined, and of the statistics min and max, which resampling cannot exceed.
    Experiments for which the metric is undefined are left out. Reads part by part, in bounded
    memory for any ``top`` that is not None.
    """
    combine = combine or usual_combination(metric)
    _check(results, metric, statistic, combine)
    chosen = _directions(results, direction)
    layers = results.sweep["identity"]["layers"]
    if layer is not None and layer not in layers and layer != OUTPUT_LOGITS:
        names = list(dict.fromkeys([*layers, OUTPUT_LOGITS]))
        raise InputError(f"--layer: unknown layer {layer!r}; {offer(layer, names)}")
    wanted = _layer_filter(results, layer, internal_only)
    best, moments = np.empty((0, 3)), Moments()
    sign = 1.0 if bottom else -1.0
    for part in _parts(results, metric, statistic, chosen, combine):
        kept = slice(None) if wanted is None else np.isin(part.ids, wanted)
        moments.add(part.values[kept], part.lows[kept], part.highs[kept])
        rows = np.column_stack([part.ids, part.values, part.rates])[kept]
        best = np.concatenate([best, rows[~np.isnan(rows[:, 1])]])
        order = sign * strength(metric, best[:, 1], statistic)
        best = best[np.lexsort((best[:, 0], order))][:top]
    indices = [int(i) for i in best[:, 0]]
    described = results.describe(indices)
    names = described["name"].to_pylist()
    patches = map(patched, described["layers"].to_pylist(), described["neurons"].to_pylist())
    intervals = {}
    if bootstrap and results.has_rows and statistic in ("mean", "std"):
        intervals = _intervals(results, metric, statistic, chosen, combine, indices)
    return [
        {
            "rank": place,
            "experiment_index": index,
            "name": name,
            "patches": patch,
            f"{metric}_{statistic}": float(value),
            "z_score": moments.standardised(float(value)),
            "normalised": moments.normalised(float(value)),
            "action_changed_rate": None if np.isnan(rate) else float(rate),
            **(
                dict(zip(("ci_low", "ci_high"), intervals.get(index, (None, None))))
                if bootstrap
                else {}
            ),
        }
        for place, (index, name, patch, (_, value, rate)) in enumerate(
            zip(indices, names, patches, best), 1
        )
    ]


def patched(layers: Sequence[str], neurons: Sequence[Sequence[int]]) -> str:
    """What an experiment patches, as ``layer: 0-15, 20`` or ``layer: all``."""

    def spelled(numbers: Sequence[int]) -> str:
        if not numbers:
            return "all"
        ordered = sorted(numbers)
        starts = [i for i, n in enumerate(ordered) if i == 0 or n != ordered[i - 1] + 1]
        runs = zip(starts, [*(i - 1 for i in starts[1:]), len(ordered) - 1])
        return ", ".join(
            str(ordered[a]) if a == b else f"{ordered[a]}-{ordered[b]}" for a, b in runs
        )

    return "; ".join(f"{layer}: {spelled(some)}" for layer, some in zip(layers, neurons))


def _check(results: Results, metric: str, statistic: str, combine: str) -> None:
    results.require_metric(metric)
    if statistic not in STATISTICS:
        raise InputError(f"--statistic: {statistic!r} is not one of {', '.join(STATISTICS)}")
    if combine not in COMBINATIONS:
        raise InputError(f"--combine: {combine!r} is not one of {', '.join(COMBINATIONS)}")


@dataclass(frozen=True)
class _Part:
    """One part's experiments: index, combined statistic, extremes, share of flips."""

    ids: np.ndarray
    values: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    rates: np.ndarray


def _parts(
    results: Results, metric: str, statistic: str, chosen: Sequence[str], combine: str
) -> Iterator[_Part]:
    columns = list(dict.fromkeys(f"{metric}_{s}" for s in (statistic, "min", "max")))
    n_directions = len(results.directions)
    keep = [results.directions.index(d) for d in chosen]
    for part in results.summary_parts(["experiment_index", "action_changed_rate", *columns]):
        by_name = {
            name: as_numpy(part[name]).astype(np.float64).reshape(-1, n_directions)[:, keep]
            for name in ("action_changed_rate", *columns)
        }
        values = combined(by_name[f"{metric}_{statistic}"], combine, metric, statistic)
        lowest, highest = by_name[f"{metric}_min"], by_name[f"{metric}_max"]
        if statistic == "std":  # no value of an input
            lowest = highest = values[:, None]
        yield _Part(
            as_numpy(part["experiment_index"])[::n_directions],
            values,
            np.fmin.reduce(lowest, axis=1),
            np.fmax.reduce(highest, axis=1),
            combined(by_name["action_changed_rate"], "average"),
        )


def combined(values: np.ndarray, how: str, metric: str = "", statistic: str = "mean") -> np.ndarray:
    """``[experiments, directions]`` to one value each, leaving out NaN: their "average", or as
    "maximum" the one of the stronger effect."""
    defined = ~np.isnan(values)
    count = defined.sum(1)
    if how == "maximum":
        strengths = np.where(defined, strength(metric, values, statistic), -np.inf)
        return np.take_along_axis(values, strengths.argmax(1)[:, None], 1)[:, 0]
    total = np.where(defined, values, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _intervals(
    results: Results, metric: str, statistic: str, chosen: Sequence[str], combine: str,
    indices: Sequence[int],
) -> dict[int, tuple[float, float]]:  # fmt: skip
    """Percentile bootstrap (Efron 1979) over inputs, the same draws for every experiment."""
    n_inputs = len(results.sweep["input_ids"])
    columns: list[np.ndarray] = []
    owners: list[int] = []
    few: set[int] = set()
    for index, rows in results.rows_of(indices, [metric]).items():
        values = as_numpy(rows[metric]).astype(np.float64)
        by_direction = values.reshape(len(results.directions), n_inputs)
        for name in chosen:
            one = by_direction[results.directions.index(name)]
            if not np.isnan(one).all():
                columns.append(one)
                owners.append(index)
                if np.count_nonzero(~np.isnan(one)) < LEAST_INPUTS:
                    few.add(index)
    if not columns:
        return {}
    resampled = _resampled(np.stack(columns, 1), statistic)
    found = {}
    tail = 100 * (1 - CONFIDENCE) / 2
    for index in dict.fromkeys(owner for owner in owners if owner not in few):
        both = combined(resampled[:, np.array(owners) == index], combine, metric, statistic)
        low, high = np.nanpercentile(both, [tail, 100 - tail])
        found[index] = (float(low), float(high))
    return found


def _resampled(values: np.ndarray, statistic: str) -> np.ndarray:
    """The statistic of ``values`` ``[inputs, columns]`` over redrawn inputs, NaN left out:
    ``[RESAMPLES, columns]``."""
    n_inputs, n_columns = values.shape
    found = np.empty((RESAMPLES, n_columns))
    known = ~np.isnan(values)
    # For a mean it is enough to know how often each input was drawn.
    weighted = np.concatenate([np.where(known, values, 0.0), known], 1)
    generator = np.random.default_rng(0)
    step = max(1, DRAWS_AT_A_TIME // n_inputs)
    for first in range(0, RESAMPLES, step):
        draws = generator.integers(n_inputs, size=(min(step, RESAMPLES - first), n_inputs))
        part = found[first : first + len(draws)]
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            # A draw of nothing but undefined inputs is undefined itself.
            warnings.simplefilter("ignore", RuntimeWarning)
            if statistic == "mean":
                draws += n_inputs * np.arange(len(draws))[:, None]
                times = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
                sums = times.astype(np.float64) @ weighted
                part[:] = sums[:, :n_columns] / sums[:, n_columns:]
            else:
                for column in range(n_columns):
                    part[:, column] = np.nanstd(values[draws, column], axis=1)
    return found


def _directions(results: Results, direction: str) -> tuple[str, ...]:
    if direction == BOTH:
        return results.directions
    if direction not in results.directions:
        raise InputError(
            f"--direction: {direction!r} was not run; valid: "
            f"{', '.join(dict.fromkeys([BOTH, *results.directions]))}"
        )
    return (direction,)


def _layer_filter(results: Results, layer: str | None, internal_only: bool) -> np.ndarray | None:
    """Indices of the experiments that pass, None for all."""
    import pyarrow.compute as pc

    if layer is None and not internal_only:
        return None
    names = results.experiments["layers"].combine_chunks()
    patched = pc.equal(pc.list_flatten(names), word(layer or OUTPUT_LOGITS))
    hits = as_numpy(pc.unique(pc.filter(pc.list_parent_indices(names), patched)))
    return hits if layer is not None else np.setdiff1d(np.arange(len(names)), hits)


def single_neurons(batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a batch of ``experiments.arrow``: the experiments that patch one neuron of one layer.

    Gives their indices (int64), layer names (object) and neurons (int64).
    """
    import pyarrow.compute as pc

    layers, neurons = batch["layers"], batch["neurons"]
    ids = batch["experiment_index"].to_numpy()
    one = np.asarray(pc.list_value_length(layers)) == 1
    rows = np.flatnonzero(one)
    lists = pc.list_flatten(pc.take(neurons, rows))
    alone = np.asarray(pc.list_value_length(lists)) == 1
    rows = rows[alone]
    numbers = pc.list_flatten(pc.filter(lists, alone))
    names = pc.list_flatten(pc.take(layers, rows))
    return ids[rows], names.to_numpy(zero_copy_only=False), numbers.to_numpy().astype(np.int64)


def single_neuron_effects(
    results: Results, metric: str, direction: str, statistic: str
) -> dict[str, np.ndarray]:
    """See :meth:`raypatch.results.reader.Results.effect_matrix`."""
    combine = usual_combination(metric)
    _check(results, metric, statistic, combine)
    chosen = _directions(results, direction)
    sizes = results.sweep["identity"]["layers"]
    found = {layer: np.full(size, np.nan) for layer, size in sizes.items()}
    values = {
        int(index): value
        for part in _parts(results, metric, statistic, chosen, combine)
        for index, value in zip(part.ids, part.values)
    }
    for batch in results.experiment_batches():
        for index, layer, neuron in zip(*single_neurons(batch)):
            if int(index) in values:  # the same neuron may come twice, once committed
                found[layer][neuron] = values[int(index)]
    return found
