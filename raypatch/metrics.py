"""Effect of a patch on the outputs: one table of formulas, in float64.

Symbols (design 9): b and p are baseline and patched logits, P_b and P_p their softmax, a the
argmax of b, s its runner-up. Every formula works on columns ``[outputs, rows]``.

Formulas are written in the differences d = p - b, which are exact in float64 for float32
logits, so that tiny effects keep their digits: with m = sum P_b d and e = d - m,

    S              = 1 + sum P_b (expm1(e) - e)                    because sum P_b e = 0
    P_p - P_b      = P_b (expm1(e) - (S - 1)) / S                  because P_p = P_b exp(e) / S
    KL(P_b || P_p) = log S
    KL(P_p || P_b) = (sum P_b expm1(e) e) / S - log S
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from raypatch.errors import InputError

# Rows at a time: enough to make the call of an operation cheap, few enough for the cache.
BLOCK_ROWS = 16384
SMALL = 1e-10  # keeps the saturating ratios defined, as in the original


@dataclass(frozen=True)
class Baselines:
    """Unpatched outputs ``[inputs, outputs]`` of one direction.

    ``source`` is None where patched values are no run's own (zero, mean).
    """

    target: Tensor
    source: Tensor | None


class Fixed:
    """What depends on the baselines only, for a block of rows; computed once a block size."""

    def __init__(self, baselines: Baselines, repeats: int) -> None:
        def columns(outputs: Tensor) -> Tensor:
            return outputs.double().t().repeat(1, repeats).contiguous()

        self.b = columns(baselines.target)
        self.b_source = None if baselines.source is None else columns(baselines.source)

    def pick(self, columns: Tensor, which: Tensor) -> Tensor:
        """Each column's element at row ``which``, ``[1, rows]``."""
        return columns.view(-1).index_select(0, which).view(1, -1)

    @cached_property
    def at_a(self) -> Tensor:
        """Flat places of the actions, for :meth:`pick`."""
        return _flat_places(self.a)

    @cached_property
    def at_s(self) -> Tensor:
        return _flat_places(self.s)

    @cached_property
    def a(self) -> Tensor:
        return first_argmax(self.b).view(1, -1)

    @cached_property
    def s(self) -> Tensor:
        """Runner-up; the action itself where there is only one."""
        if len(self.b) == 1:
            return self.a
        return first_argmax(self.b.scatter(0, self.a, -torch.inf)).view(1, -1)

    @cached_property
    def prob(self) -> Tensor:
        return self.b.softmax(0)

    @cached_property
    def sqrt_prob(self) -> Tensor:
        return self.prob.sqrt()

    @cached_property
    def share(self) -> Tensor:
        return self.b.gather(0, self.a).abs() / self.b.abs().sum(0, keepdim=True)

    @cached_property
    def centred_unit(self) -> Tensor:
        return _unit(self.b - self.b.mean(0, keepdim=True))

    @cached_property
    def unit(self) -> Tensor:
        return _unit(self.b)

    @cached_property
    def recovery(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Flat places of the source's action, LD_b, and LD_src - LD_b (NaN where the actions
        agree)."""
        if self.b_source is None:
            return None
        a_source = first_argmax(self.b_source).view(1, -1)
        base = self.b.gather(0, a_source) - self.b.gather(0, self.a)
        span = self.b_source.gather(0, a_source) - self.b_source.gather(0, self.a) - base
        span = torch.where((a_source == self.a) | (span == 0), torch.nan, span)
        return _flat_places(a_source), base, span


def _flat_places(which: Tensor) -> Tensor:
    """Row numbers ``[1, rows]`` of columns to places in the flattened columns."""
    n_rows = which.shape[1]
    return which.view(-1) * n_rows + torch.arange(n_rows)


def first_argmax(columns: Tensor) -> Tensor:
    """Row of each column's largest element, the first of several, int64 ``[rows]``.

    torch's reductions over a short first axis are ten times slower than comparing rows.
    """
    if len(columns) > 32:
        return torch.from_numpy(columns.t().contiguous().numpy().argmax(1))
    best, place = columns[0].clone(), torch.zeros(columns.shape[1], dtype=torch.int64)
    for number in range(1, len(columns)):
        place.masked_fill_(columns[number] > best, number)
        torch.maximum(best, columns[number], out=best)
    return place


def _length(x: Tensor) -> Tensor:
    """L2 norm of each column. Squares of float32 logits stay far inside float64's range, and
    this is several times faster than torch.linalg.vector_norm across short columns."""
    return (x * x).sum(0, keepdim=True).sqrt_()


def _unit(x: Tensor) -> Tensor:
    """Columns over their length; NaN for a zero column."""
    return x / _length(x)


class Rows:
    """One block: patched logits ``p`` ``[outputs, rows]`` and the terms formulas share."""

    def __init__(self, p: Tensor, fixed: Fixed) -> None:
        self.p = p
        self.fixed = fixed
        self.d = p - fixed.b

    @cached_property
    def p_a(self) -> Tensor:
        return self.fixed.pick(self.p, self.fixed.at_a)

    @cached_property
    def d_a(self) -> Tensor:
        return self.fixed.pick(self.d, self.fixed.at_a)

    @cached_property
    def e(self) -> Tensor:
        return self.d - (self.fixed.prob * self.d).sum(0, keepdim=True)

    @cached_property
    def x(self) -> Tensor:
        """expm1(e), by NumPy, whose vector kernel is several times faster than torch's."""
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.expm1(self.e.numpy()))

    @cached_property
    def excess(self) -> Tensor:
        """S - 1."""
        return (self.fixed.prob * (self.x - self.e)).sum(0, keepdim=True)

    @cached_property
    def wild(self) -> Tensor | None:
        """Rows whose probabilities change by more than float64's range; None if there are none."""
        if float(self.e.max()) <= 500:
            return None
        return (self.e > 500).any(0, keepdim=True)

    @cached_property
    def log_s(self) -> Tensor:
        log_s = torch.log1p(self.excess)
        if self.wild is not None:
            shift = (self.fixed.prob * self.d).sum(0, keepdim=True)
            exact = self.p.logsumexp(0, keepdim=True) - self.fixed.b.logsumexp(0, keepdim=True)
            log_s = torch.where(self.wild, exact - shift, log_s)
        return log_s

    @cached_property
    def prob_change(self) -> Tensor:
        """P_p - P_b."""
        change = (self.x - self.excess).mul_(self.fixed.prob).div_(1 + self.excess)
        if self.wild is not None:
            change = torch.where(self.wild, self.p.softmax(0) - self.fixed.prob, change)
        return change

    @cached_property
    def chebyshev(self) -> Tensor:
        """max |p - b| over the outputs but the action."""
        size = self.d.abs()
        size.view(-1).index_fill_(0, self.fixed.at_a, 0.0)
        return size.amax(0, keepdim=True)

    @cached_property
    def directed(self) -> Tensor:
        """Saturating ratio; the chebyshev distance is the scale."""
        return self.d_a / (self.chebyshev + self.d_a.abs() + SMALL)

    @cached_property
    def pearson_distance(self) -> Tensor:
        """1 - r as half the squared distance of the centred unit vectors."""
        mine = _unit(self.p - self.p.mean(0, keepdim=True))
        return (mine - self.fixed.centred_unit).square_().sum(0, keepdim=True) / 2


def _reverse_kl(r: Rows) -> Tensor:
    kl = (r.fixed.prob * r.x).mul_(r.e).sum(0, keepdim=True) / (1 + r.excess) - r.log_s
    if r.wild is not None:
        far = r.p.softmax(0) * (r.p.log_softmax(0) - r.fixed.b.log_softmax(0))
        kl = torch.where(r.wild, far.sum(0, keepdim=True), kl)
    return kl.clamp_(min=0)


def _hellinger(r: Rows) -> Tensor:
    change = torch.expm1((r.e - r.log_s) / 2) * r.fixed.sqrt_prob
    if r.wild is not None:
        change = torch.where(r.wild, r.p.softmax(0).sqrt() - r.fixed.sqrt_prob, change)
    return _length(change) / 2**0.5


def _margin_change(r: Rows) -> Tensor:
    change = r.prob_change
    return r.fixed.pick(change, r.fixed.at_a) - r.fixed.pick(change, r.fixed.at_s)


def _recovered(r: Rows) -> Tensor:
    if r.fixed.recovery is None:
        return torch.full_like(r.p_a, torch.nan)
    at_source, base, span = r.fixed.recovery
    return (r.fixed.pick(r.p, at_source) - r.p_a - base) / span


def _proportion_change(r: Rows) -> Tensor:
    return r.p_a.abs() / r.p.abs().sum(0, keepdim=True) - r.fixed.share


@dataclass(frozen=True)
class Metric:
    """A formula and what to say of it. ``discrete``: needs an action or probabilities."""

    formula: Callable[[Rows], Tensor]
    unit: str
    discrete: bool = True


METRICS: dict[str, Metric] = {
    "output_logit_delta": Metric(lambda r: r.d_a, "logits"),
    "top_logit_delta_magnitude": Metric(lambda r: r.d_a.abs(), "logits"),
    "logit_difference_norm": Metric(lambda r: _length(r.d), "logits", discrete=False),
    "action_probability_delta": Metric(
        lambda r: r.fixed.pick(r.prob_change, r.fixed.at_a), "probability"
    ),
    "top_action_probability_gap": Metric(
        lambda r: (
            (r.fixed.prob + r.prob_change).amax(0, keepdim=True)
            - r.fixed.prob.amax(0, keepdim=True)
        ),
        "probability",
    ),
    "kl_divergence": Metric(lambda r: r.log_s.clamp(min=0), "nats"),
    "reverse_kl_divergence": Metric(_reverse_kl, "nats"),
    "hellinger_distance": Metric(_hellinger, "1"),
    "confidence_margin_change": Metric(_margin_change, "probability"),
    "confidence_margin_magnitude": Metric(lambda r: _margin_change(r).abs(), "probability"),
    "logit_proportion_change": Metric(_proportion_change, "1"),
    "chebyshev_distance_excluding_top": Metric(lambda r: r.chebyshev, "logits"),
    "directed_saturating_chebyshev": Metric(lambda r: r.directed, "1"),
    "undirected_saturating_chebyshev": Metric(lambda r: r.directed.abs(), "1"),
    "reversed_undirected_saturating_chebyshev": Metric(
        lambda r: r.chebyshev / (r.chebyshev + r.d_a.abs() + SMALL), "1"
    ),
    "cosine_similarity": Metric(
        lambda r: 1 - (_unit(r.p) - r.fixed.unit).square_().sum(0, keepdim=True) / 2,
        "1",
        discrete=False,
    ),
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


class MetricTable:
    """Metrics of one direction's patched outputs, block by block in bounded memory."""

    def __init__(self, names: Sequence[str], baselines: Baselines) -> None:
        self.names = tuple(names)
        self.baselines = baselines
        self._fixed: dict[int, Fixed] = {}

    def compute(self, patched: Tensor, out: Tensor, actions: Tensor | None = None) -> None:
        """Fill ``out`` ``[metrics, experiments, inputs]`` from ``patched`` ``[experiments,
        inputs, outputs]``; NaN where a metric is not defined. ``actions``, if given,
        ``[experiments, inputs]``, receives the greedy actions."""
        n_experiments, n_inputs, n_outputs = patched.shape
        step = max(1, BLOCK_ROWS // n_inputs)
        for start in range(0, n_experiments, step):
            block = patched[start : start + step]
            repeats = len(block)
            if repeats not in self._fixed:
                # At most the full block and one rest are kept.
                self._fixed = {k: v for k, v in self._fixed.items() if k == step}
                self._fixed[repeats] = Fixed(self.baselines, repeats)
            flat = block.reshape(-1, n_outputs)
            columns = torch.empty(n_outputs, len(flat), dtype=torch.float64).copy_(flat.t())
            rows = Rows(columns, self._fixed[repeats])
            if actions is not None:
                place = first_argmax(columns).view(repeats, n_inputs)
                actions[start : start + step] = place
            for number, name in enumerate(self.names):
                values = METRICS[name].formula(rows)
                out[number, start : start + step] = values.view(repeats, n_inputs)


def summarise(values: Tensor) -> dict[str, Tensor]:
    """Statistics of metrics ``[metrics, ..., inputs]`` over the inputs, in float64, leaving
    out NaN: mean, std (population), min, max; NaN where nothing is defined."""
    found = {
        name: torch.empty(values.shape[:-1], dtype=values.dtype)
        for name in ("mean", "std", "min", "max")
    }
    for number, metric in enumerate(values):
        low = metric.amin(-1)
        if bool(torch.isnan(low).any()):
            _summarise_defined(metric, number, found)
            continue
        # Plain reductions: torch.std_mean and torch.aminmax are ten times slower here.
        mean = metric.mean(-1)
        deviation = metric - mean[..., None]
        found["mean"][number], found["min"][number] = mean, low
        found["max"][number] = metric.amax(-1)
        found["std"][number] = deviation.mul_(deviation).mean(-1).sqrt_()
    return found


def _summarise_defined(metric: Tensor, number: int, found: dict[str, Tensor]) -> None:
    """The statistics of one metric that is undefined for some inputs."""
    defined = ~torch.isnan(metric)
    count = defined.sum(-1)
    mean = torch.where(defined, metric, 0.0).sum(-1) / count
    deviation = torch.where(defined, metric - mean[..., None], 0.0)
    low = torch.where(defined, metric, torch.inf).amin(-1)
    high = torch.where(defined, metric, -torch.inf).amax(-1)
    found["mean"][number] = mean
    found["std"][number] = (deviation.square().sum(-1) / count).sqrt()
    found["min"][number] = torch.where(count == 0, torch.nan, low)
    found["max"][number] = torch.where(count == 0, torch.nan, high)
