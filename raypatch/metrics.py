"""Effect of a patch on the outputs: one table of formulas, in float64.

Symbols (design 9): b and p are baseline and patched logits, P_b and P_p their softmax, a the
argmax of b, s its runner-up. Every formula works on columns ``[outputs, rows]``.

Formulas are written in the differences d = p - b, so that tiny effects keep their digits: in
float64 they are exact for float32 logits whose sizes are not more than 2^29 apart. With
m = sum P_b d and e = d - m,

    S              = 1 + sum P_b (expm1(e) - e)                    because sum P_b e = 0
    P_p - P_b      = P_b (expm1(e) - (S - 1)) / S                  because P_p = P_b exp(e) / S
    KL(P_b || P_p) = log S
    KL(P_p || P_b) = (sum P_b expm1(e) e) / S - log S
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from raypatch.errors import InputError

SMALL = 1e-10  # keeps the saturating ratios defined, as in the original
WILD = 500  # beyond this exp comes near the end of float64's range

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Baselines:
    """Unpatched outputs ``[inputs, outputs]`` of one direction.

    ``source`` is None where patched values are no run's own (zero, mean).
    """

    target: Tensor
    source: Tensor | None


class Fixed:
    """What depends on the baselines only, for a block of rows; computed once a block size.

    ``[outputs, rows]``, or ``[rows]`` where there is one number a row.
    """

    def __init__(self, baselines: Baselines, repeats: int) -> None:
        def columns(outputs: Tensor) -> Array:
            return np.tile(outputs.double().numpy().T, (1, repeats))

        self.b = columns(baselines.target)
        self.b_source = None if baselines.source is None else columns(baselines.source)
        self._row = np.arange(self.b.shape[1])

    def places(self, which: Array) -> Array:
        """Output numbers ``[rows]`` as places in the flattened columns, for :func:`pick`."""
        return which * self.b.shape[1] + self._row

    @cached_property
    def at_a(self) -> Array:
        """Places of the actions."""
        return self.places(self.a)

    @cached_property
    def at_s(self) -> Array:
        return self.places(self.s)

    @cached_property
    def a(self) -> Array:
        return self.b.argmax(0)

    @cached_property
    def s(self) -> Array:
        """Runner-up; the action itself where there is only one."""
        if len(self.b) == 1:
            return self.a
        others = self.b.copy()
        others[self.a, self._row] = -np.inf
        return others.argmax(0)

    @cached_property
    def prob(self) -> Array:
        return softmax(self.b)

    @cached_property
    def prob_a(self) -> Array:
        return pick(self.prob, self.at_a)

    @cached_property
    def prob_s(self) -> Array:
        return pick(self.prob, self.at_s)

    @cached_property
    def sqrt_prob(self) -> Array:
        return np.sqrt(self.prob)

    @cached_property
    def share(self) -> Array:
        return np.abs(pick(self.b, self.at_a)) / np.abs(self.b).sum(0)

    @cached_property
    def centred_unit(self) -> Array:
        return _unit(self.b - self.b.mean(0))

    @cached_property
    def unit(self) -> Array:
        return _unit(self.b.copy())

    @cached_property
    def recovery(self) -> tuple[Array, Array, Array] | None:
        """Places of the source's action, LD_b, and LD_src - LD_b (NaN where the actions agree)."""
        if self.b_source is None:
            return None
        a_source = self.b_source.argmax(0)
        at_source = self.places(a_source)
        base = pick(self.b, at_source) - pick(self.b, self.at_a)
        span = pick(self.b_source, at_source) - pick(self.b_source, self.at_a) - base
        return at_source, base, np.where((a_source == self.a) | (span == 0), np.nan, span)


def pick(columns: Array, places: Array) -> Array:
    """One element of each column, ``[rows]``."""
    return columns.reshape(-1).take(places)


def dot(x: Array, y: Array) -> Array:
    """Sum of products down the columns, ``[rows]``, without the products in between."""
    found: Array = np.einsum("or,or->r", x, y)
    return found


def softmax(columns: Array) -> Array:
    powers = np.exp(columns - columns.max(0))
    powers /= powers.sum(0)
    return powers


def log_sum_exp(columns: Array) -> Array:
    top = columns.max(0)
    found: Array = np.log(np.exp(columns - top).sum(0)) + top
    return found


def first_argmax(columns: Array) -> Array:
    """Row of each column's largest element, the first of several, int32 ``[rows]``.

    NumPy's own over a short first axis is several times slower than comparing rows.
    """
    if len(columns) > 32:
        return columns.argmax(0).astype(np.int32)
    best, place = columns[0].copy(), np.zeros(columns.shape[1], np.int32)
    for number in range(1, len(columns)):
        np.putmask(place, columns[number] > best, number)
        np.maximum(best, columns[number], out=best)
    return place


def _length(x: Array) -> Array:
    """L2 norm of each column. Squares of float32 logits stay far inside float64's range."""
    found: Array = np.sqrt(dot(x, x))
    return found


def _unit(x: Array) -> Array:
    """Columns over their length, in place; NaN for a zero column."""
    x /= _length(x)
    return x


class Rows:
    """One block: patched logits ``p`` ``[outputs, rows]`` and the terms formulas share."""

    def __init__(self, p: Array, fixed: Fixed) -> None:
        self.p = p
        self.fixed = fixed
        self.d = p - fixed.b

    @cached_property
    def p_a(self) -> Array:
        return pick(self.p, self.fixed.at_a)

    @cached_property
    def d_a(self) -> Array:
        return pick(self.d, self.fixed.at_a)

    @cached_property
    def mean_d(self) -> Array:
        """m."""
        return dot(self.fixed.prob, self.d)

    @cached_property
    def e(self) -> Array:
        return self.d - self.mean_d

    @cached_property
    def x(self) -> Array:
        """expm1(e)."""
        return np.expm1(self.e)

    @cached_property
    def excess(self) -> Array:
        """S - 1."""
        return dot(self.fixed.prob, self.x - self.e)

    @cached_property
    def sum(self) -> Array:
        """S."""
        return 1 + self.excess

    @cached_property
    def wild(self) -> Array | None:
        """Rows whose probabilities change by more than float64's range; None if there are none."""
        return np.any(self.e > WILD, 0) if self.e.max() > WILD else None

    @cached_property
    def log_s(self) -> Array:
        log_s = np.log1p(self.excess)
        if self.wild is not None:
            exact = log_sum_exp(self.p) - log_sum_exp(self.fixed.b) - self.mean_d
            log_s = np.where(self.wild, exact, log_s)
        return log_s

    @cached_property
    def prob_change(self) -> Array:
        """P_p - P_b."""
        change = self.x - self.excess
        change *= self.fixed.prob
        change /= self.sum
        if self.wild is not None:
            change = np.where(self.wild, softmax(self.p) - self.fixed.prob, change)
        return change

    @cached_property
    def prob_change_a(self) -> Array:
        """P_p(a) - P_b(a)."""
        return self._prob_change(self.fixed.at_a, self.fixed.prob_a)

    @cached_property
    def margin_change(self) -> Array:
        return self.prob_change_a - self._prob_change(self.fixed.at_s, self.fixed.prob_s)

    def _prob_change(self, places: Array, prob: Array) -> Array:
        if self.wild is not None:
            return pick(self.prob_change, places)
        return (pick(self.x, places) - self.excess) * prob / self.sum

    @cached_property
    def chebyshev(self) -> Array:
        """max |p - b| over the outputs but the action."""
        size = np.abs(self.d)
        size.reshape(-1)[self.fixed.at_a] = 0.0
        largest: Array = size.max(0)
        return largest

    @cached_property
    def directed(self) -> Array:
        """Saturating ratio; the chebyshev distance is the scale."""
        return self.d_a / self.scale

    @cached_property
    def scale(self) -> Array:
        return self.chebyshev + np.abs(self.d_a) + SMALL

    @cached_property
    def pearson_distance(self) -> Array:
        """1 - r as half the squared distance of the centred unit vectors."""
        mine = _unit(self.p - self.p.mean(0))
        mine -= self.fixed.centred_unit
        return dot(mine, mine) / 2


def _reverse_kl(r: Rows) -> Array:
    kl = dot(r.fixed.prob * r.x, r.e) / r.sum - r.log_s
    if r.wild is not None:
        ratio = r.p - log_sum_exp(r.p) - (r.fixed.b - log_sum_exp(r.fixed.b))
        kl = np.where(r.wild, dot(softmax(r.p), ratio), kl)
    return np.maximum(kl, 0)


def _hellinger(r: Rows) -> Array:
    change = np.expm1((r.e - r.log_s) / 2)
    change *= r.fixed.sqrt_prob
    if r.wild is not None:
        change = np.where(r.wild, np.sqrt(softmax(r.p)) - r.fixed.sqrt_prob, change)
    return _length(change) / 2**0.5


def _probability_gap(r: Rows) -> Array:
    gap: Array = (r.fixed.prob + r.prob_change).max(0) - r.fixed.prob.max(0)
    return gap


def _recovered(r: Rows) -> Array:
    if r.fixed.recovery is None:
        return np.full_like(r.p_a, np.nan)
    at_source, base, span = r.fixed.recovery
    return (pick(r.p, at_source) - r.p_a - base) / span


def _proportion_change(r: Rows) -> Array:
    share: Array = np.abs(r.p_a) / np.abs(r.p).sum(0)
    return share - r.fixed.share


def _cosine_similarity(r: Rows) -> Array:
    apart = _unit(r.p.copy())
    apart -= r.fixed.unit
    return 1 - dot(apart, apart) / 2


@dataclass(frozen=True)
class Metric:
    """A formula and what to say of it. ``discrete``: needs an action or probabilities."""

    formula: Callable[[Rows], Array]
    unit: str
    discrete: bool = True


METRICS: dict[str, Metric] = {
    "output_logit_delta": Metric(lambda r: r.d_a, "logits"),
    "top_logit_delta_magnitude": Metric(lambda r: np.abs(r.d_a), "logits"),
    "logit_difference_norm": Metric(lambda r: _length(r.d), "logits", discrete=False),
    "action_probability_delta": Metric(lambda r: r.prob_change_a, "probability"),
    "top_action_probability_gap": Metric(_probability_gap, "probability"),
    "kl_divergence": Metric(lambda r: np.maximum(r.log_s, 0), "nats"),
    "reverse_kl_divergence": Metric(_reverse_kl, "nats"),
    "hellinger_distance": Metric(_hellinger, "1"),
    "confidence_margin_change": Metric(lambda r: r.margin_change, "probability"),
    "confidence_margin_magnitude": Metric(lambda r: np.abs(r.margin_change), "probability"),
    "logit_proportion_change": Metric(_proportion_change, "1"),
    "chebyshev_distance_excluding_top": Metric(lambda r: r.chebyshev, "logits"),
    "directed_saturating_chebyshev": Metric(lambda r: r.directed, "1"),
    "undirected_saturating_chebyshev": Metric(lambda r: np.abs(r.directed), "1"),
    "reversed_undirected_saturating_chebyshev": Metric(lambda r: r.chebyshev / r.scale, "1"),
    "cosine_similarity": Metric(_cosine_similarity, "1", discrete=False),
    "pearson_correlation": Metric(lambda r: 1 - r.pearson_distance, "1", discrete=False),
    "reversed_pearson_correlation": Metric(lambda r: r.pearson_distance, "1", discrete=False),
    "logit_diff_recovered": Metric(_recovered, "1"),
}
DEFAULT_METRICS = (
    "kl_divergence",
    "reverse_kl_divergence",
    "logit_difference_norm",
    "top_logit_delta_magnitude",
    "confidence_margin_magnitude",
    "undirected_saturating_chebyshev",
    "reversed_undirected_saturating_chebyshev",
    "reversed_pearson_correlation",
    "logit_diff_recovered",
)


def choose_metrics(text: str | None, *, discrete: bool) -> tuple[str, ...]:
    """Metrics by the ``--metrics`` option: None for the default set, "all", or a list.

    For continuous actions a metric that needs a softmax or an argmax is refused by name;
    "all" and the default leave it out.
    """

    def usable(name: str) -> bool:
        return discrete or not METRICS[name].discrete

    if text is None or text == "all":
        return tuple(filter(usable, DEFAULT_METRICS if text is None else METRICS))
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise InputError(
                f"--metrics: unknown metric {name!r}; valid: all, {', '.join(METRICS)}"
            )
        if not usable(name):
            raise InputError(
                f"--metrics: {name!r} needs discrete actions and this agent's are continuous; "
                f"valid: {', '.join(filter(usable, METRICS))}"
            )
        if names.count(name) > 1:
            raise InputError(f"--metrics: {name!r} is given twice")
    if not names:
        raise InputError(f"--metrics: the list is empty; valid: all, {', '.join(METRICS)}")
    return names
