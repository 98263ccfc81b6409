"""Effect of a patch on the outputs: one table of formulas (design 9), in float64.

:mod:`raypatch.metrics.terms` says what the symbols are and why formulas are written as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from raypatch.errors import InputError, offer
from raypatch.metrics.arrays import Array, at_least, dot, largest, library, weighted
from raypatch.metrics.terms import Rows, length, log_softmax, pick, softmax, unit


def _kl(r: Rows) -> Array:
    def exact() -> Array:
        return weighted(r.fixed.prob, log_softmax(r.fixed.b) - log_softmax(r.p))

    return at_least(r.or_if_wild(r.log_s, exact), 0)


def _reverse_kl(r: Rows) -> Array:
    kl = weighted(r.fixed.prob, r.growth * r.e)
    kl /= r.sum
    kl -= r.log_s

    def exact() -> Array:
        return dot(softmax(r.p), log_softmax(r.p) - log_softmax(r.fixed.b))

    return at_least(r.or_if_wild(kl, exact), 0)


def _hellinger(r: Rows) -> Array:
    change = library(r.e).expm1((r.e - r.log_s[:, None]) / 2)
    change *= r.fixed.sqrt_prob
    change = r.or_if_wild(change, lambda: softmax(r.p) ** 0.5 - r.fixed.sqrt_prob)
    return length(change) / 2**0.5


def _probability_gap(r: Rows) -> Array:
    return largest(r.fixed.prob + r.prob_change) - largest(r.fixed.prob)


def _recovered(r: Rows) -> Array:
    if r.fixed.recovery is None:
        return library(r.d).full_like(r.d_a, torch.nan)
    a_source, span = r.fixed.recovery
    gained = pick(r.d, a_source)  # LD_p - LD_b, but for the target's own action
    gained -= r.d_a

    def exact() -> Array:
        b, a = r.fixed.b, r.fixed.a
        return pick(r.p, a_source) - pick(r.p, a) - (pick(b, a_source) - pick(b, a))

    gained = r.or_if_wild(gained, exact)
    gained /= span
    return gained


def _proportion_change(r: Rows) -> Array:
    share: Array = abs(pick(r.p, r.fixed.a)) / abs(r.p).sum(1)
    return share - r.fixed.share


def _cosine_similarity(r: Rows) -> Array:
    apart = unit(r.p)
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
    "top_logit_delta_magnitude": Metric(lambda r: r.size_a, "logits"),
    "logit_difference_norm": Metric(lambda r: r.norm, "logits", discrete=False),
    "action_probability_delta": Metric(lambda r: r.prob_change_a, "probability"),
    "top_action_probability_gap": Metric(_probability_gap, "probability"),
    "kl_divergence": Metric(_kl, "nats"),
    "reverse_kl_divergence": Metric(_reverse_kl, "nats"),
    "hellinger_distance": Metric(_hellinger, "1"),
    "confidence_margin_change": Metric(lambda r: r.margin_change, "probability"),
    "confidence_margin_magnitude": Metric(lambda r: abs(r.margin_change), "probability"),
    "logit_proportion_change": Metric(_proportion_change, "1"),
    "chebyshev_distance_excluding_top": Metric(lambda r: r.chebyshev, "logits"),
    "directed_saturating_chebyshev": Metric(lambda r: r.directed, "1"),
    "undirected_saturating_chebyshev": Metric(lambda r: abs(r.directed), "1"),
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


def choose_metrics(
    text: str | None, *, discrete: bool, option: str = "--metrics"
) -> tuple[str, ...]:
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
        if name == "all":
            raise InputError(f"{option}: 'all' stands for every metric; leave out the others")
        if name not in METRICS:
            raise InputError(f"{option}: unknown metric {name!r}; {offer(name, ['all', *METRICS])}")
        if not usable(name):
            raise InputError(
                f"{option}: {name!r} needs one discrete action, and this agent's actions are "
                "continuous or several at once; "
                f"valid: {', '.join(filter(usable, METRICS))}"
            )
        if names.count(name) > 1:
            raise InputError(f"{option}: {name!r} is given twice")
    if not names:
        raise InputError(f"{option}: the list is empty; valid: all, {', '.join(METRICS)}")
    return names
