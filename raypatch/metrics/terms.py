"""What the formulas of metrics are made of: baselines, differences, sums; in float64.

Symbols (design 9): b and p are baseline and patched logits, P_b and P_p their softmax, a the
argmax of b, s its runner-up. Every formula works on ``[inputs, outputs, experiments]``:
with the experiments of a block last, what belongs to an input is one number for a whole run of
memory, and sums over outputs or inputs add such runs.

Formulas are written in the differences d = p - b, so that tiny effects keep their digits: in
float64 they are exact for float32 logits whose sizes are not more than 2^29 apart; of others the
probabilities are compared themselves. With
m = sum P_b d and e = d - m,

    S              = 1 + sum P_b expm1(e) - sum P_b e              because sum P_b e = 0
    P_p - P_b      = P_b (expm1(e) - (S - 1)) / S                  because P_p = P_b exp(e) / S
    KL(P_b || P_p) = log S
    KL(P_p || P_b) = (sum P_b expm1(e) e) / S - log S

A block is larger than a level of the cache: every pass over all its outputs that a formula can do
without is time saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raypatch.metrics.arrays import (
    Array,
    as_array,
    as_tensor,
    count,
    dot,
    largest,
    less,
    library,
    products,
    weighted,
)

SMALL = 1e-10  # keeps the saturating ratios defined, as in the original
FAR_APART = 2.0**29  # between logits, beyond which their difference is not exact
WILD = 500  # beyond this exp comes near the end of float64's range
DIGITS_LEFT = 1e-6  # of float64's sixteen digits, a difference may lose six


@dataclass(frozen=True)
class Baselines:
    """Unpatched outputs ``[inputs, outputs]`` of one direction.

    ``source`` is None where patched values are no run's own (zero, mean).
    """

    target: Tensor
    source: Tensor | None

    def of_inputs(self, first: int, last: int) -> Baselines:
        source = None if self.source is None else self.source[first:last]
        return Baselines(self.target[first:last], source)


class Fixed:
    """What depends on the baselines only: ``[inputs, outputs, 1]``, or ``[inputs, 1]`` where
    there is one number an input."""

    def __init__(self, baselines: Baselines) -> None:
        def columns(outputs: Tensor) -> Array:
            return as_array(outputs.double())[..., None]

        self.b = columns(baselines.target)
        self.b_source = None if baselines.source is None else columns(baselines.source)

    @cached_property
    def a(self) -> Array:
        """Actions, ``[inputs]``."""
        return self.b[..., 0].argmax(1)

    @cached_property
    def s(self) -> Array:
        """Runners-up; the action itself where there is only one."""
        if self.b.shape[1] == 1:
            return self.a
        actions = as_tensor(self.a)[:, None]
        return as_array(as_tensor(self.b[..., 0]).scatter(1, actions, -torch.inf).argmax(1))

    @cached_property
    def prob(self) -> Array:
        return softmax(self.b)

    @cached_property
    def prob_a(self) -> Array:
        return pick(self.prob, self.a)

    @cached_property
    def prob_s(self) -> Array:
        return pick(self.prob, self.s)

    @cached_property
    def sqrt_prob(self) -> Array:
        return self.prob**0.5

    @cached_property
    def share(self) -> Array:
        return abs(pick(self.b, self.a)) / abs(self.b).sum(1)

    @cached_property
    def centred(self) -> Array:
        return centred(self.b)

    @cached_property
    def centred_length(self) -> Array:
        return length(self.centred)

    @cached_property
    def least_length(self) -> Array:
        """Squared, below which a centred patched output has lost its digits."""
        return DIGITS_LEFT * self.centred_length**2

    @cached_property
    def surely_long(self) -> float:
        """No centred patched output of this length has lost its digits, whatever the input."""
        return float(self.least_length.max()) ** 0.5

    @cached_property
    def centred_unit(self) -> Array:
        return unit(self.centred)

    @cached_property
    def unit(self) -> Array:
        return unit(self.b)

    @cached_property
    def weights(self) -> Array:
        """``[inputs, 3, outputs]`` of the sums that several formulas need of d."""
        xp = library(self.b)
        equal = xp.full_like(self.b, self.b.shape[1] ** -0.5)
        return xp.stack([self.prob, self.centred_unit, equal], 1)[..., 0]

    @cached_property
    def recovery(self) -> tuple[Array, Array] | None:
        """The source's actions, and LD_src - LD_b (NaN where the actions agree)."""
        if self.b_source is None:
            return None
        a_source = self.b_source[..., 0].argmax(1)
        base = pick(self.b, a_source) - pick(self.b, self.a)
        span = pick(self.b_source, a_source) - pick(self.b_source, self.a) - base
        agree = (a_source == self.a)[:, None]
        return a_source, library(span).where(agree | (span == 0), torch.nan, span)


def pick(columns: Array, which: Array) -> Array:
    """One output ``which`` ``[inputs]`` of each input, ``[inputs, experiments]``."""
    return columns[count(which), which]


def softmax(columns: Array) -> Array:
    powers = library(columns).exp(columns - largest(columns)[:, None])
    powers /= powers.sum(1)[:, None]
    return powers


def log_softmax(columns: Array) -> Array:
    below, xp = columns - largest(columns)[:, None], library(columns)
    return below - xp.log(xp.exp(below).sum(1))[:, None]


def length(x: Array) -> Array:
    """L2 norm over the outputs. Squares of float32 logits stay far inside float64's range."""
    return library(x).sqrt(dot(x, x))


def centred(x: Array) -> Array:
    """Outputs less their mean; all exactly zero where they are equal."""
    apart = x - x[:, :1]
    apart -= apart.mean(1)[:, None]
    return apart


def unit(x: Array) -> Array:
    """Outputs over their length; NaN where all are zero."""
    return x / length(x)[:, None]


def experiments_last(patched: Tensor) -> Tensor:
    """``[experiments, inputs, outputs]`` to float64 ``[inputs, outputs, experiments]``."""
    n_experiments, n_inputs, n_outputs = patched.shape
    # Turned around before it is twice as wide.
    turned = patched.new_empty(n_outputs, n_inputs, n_experiments)
    turned.copy_(patched.permute(2, 1, 0))
    columns = turned.new_empty(n_inputs, n_outputs, n_experiments, dtype=torch.float64)
    return columns.copy_(turned.transpose(0, 1))


class Rows:
    """One block of patched logits ``[experiments, inputs, outputs]`` and the terms that
    formulas share: ``[inputs, outputs, experiments]``, or ``[inputs, experiments]`` where there
    is one number a row."""

    def __init__(self, patched: Tensor, fixed: Fixed) -> None:
        self._patched = patched
        self.fixed = fixed
        self.d = as_array(experiments_last(patched).sub_(as_tensor(fixed.b)))

    @cached_property
    def p(self) -> Array:
        """Few formulas need it; as a rule it would only take room in the cache."""
        return as_array(experiments_last(self._patched))

    @cached_property
    def d_a(self) -> Array:
        return pick(self.d, self.fixed.a)

    @cached_property
    def size_a(self) -> Array:
        return abs(self.d_a)

    @cached_property
    def squared_norm(self) -> Array:
        """|d|^2."""
        return dot(self.d, self.d)

    @cached_property
    def norm(self) -> Array:
        return library(self.d).sqrt(self.squared_norm)

    @cached_property
    def sums(self) -> Array:
        """m, and the parts of d along the centred baseline and along equal logits,
        ``[inputs, 3, experiments]``."""
        return products(self.fixed.weights, self.d)

    @cached_property
    def mean_d(self) -> Array:
        """m."""
        return self.sums[:, 0]

    @cached_property
    def e(self) -> Array:
        return less(self.d, self.mean_d[:, None])

    @cached_property
    def growth(self) -> Array:
        """expm1(e)."""
        return library(self.e).expm1(self.e)

    @cached_property
    def excess(self) -> Array:
        """S - 1."""
        # The second sum is what rounding has left of zero in the first.
        excess = weighted(self.fixed.prob, self.growth)
        excess -= weighted(self.fixed.prob, self.e)
        return excess

    @cached_property
    def sum(self) -> Array:
        """S."""
        return 1 + self.excess

    @cached_property
    def longest(self) -> float:
        """The largest |d|."""
        return float(self.squared_norm.max()) ** 0.5

    @cached_property
    def absorbed(self) -> Array:
        """Rows of differences so large that nothing may be left in them of the smaller logits."""
        return self.squared_norm > FAR_APART**2

    @cached_property
    def wild(self) -> Array | None:
        """Rows whose probabilities change by more than float64's range, or whose differences do not
        tell; None if there are none."""
        # No element of e is larger than twice the length of d.
        return (self.e > WILD).any(1) | self.absorbed if 2 * self.longest > WILD else None

    @cached_property
    def log_s(self) -> Array:
        return library(self.excess).log1p(self.excess)

    def or_if_wild(self, usual: Array, exact: Callable[[], Array]) -> Array:
        """``usual``, but what ``exact`` computes for wild rows; either may hold outputs."""
        if self.wild is None:
            return usual
        wild = self.wild if usual.ndim == 2 else self.wild[:, None]
        return library(usual).where(wild, exact(), usual)

    @cached_property
    def prob_change(self) -> Array:
        """P_p - P_b."""
        change = self.growth - self.excess[:, None]
        change *= self.fixed.prob
        change /= self.sum[:, None]
        return self.or_if_wild(change, lambda: softmax(self.p) - self.fixed.prob)

    @cached_property
    def prob_change_a(self) -> Array:
        """P_p(a) - P_b(a)."""
        if self.wild is not None:
            return pick(self.prob_change, self.fixed.a)
        return self._times_sum(self.fixed.a, self.fixed.prob_a) / self.sum

    @cached_property
    def margin_change(self) -> Array:
        if self.wild is not None:
            return self.prob_change_a - pick(self.prob_change, self.fixed.s)
        change = self._times_sum(self.fixed.a, self.fixed.prob_a)
        change -= self._times_sum(self.fixed.s, self.fixed.prob_s)
        change /= self.sum
        return change

    def _times_sum(self, which: Array, prob: Array) -> Array:
        """(P_p - P_b) S of one output of each input."""
        change = pick(self.growth, which)
        change -= self.excess
        change *= prob
        return change

    @cached_property
    def chebyshev(self) -> Array:
        """max |p - b| over the outputs but the action."""
        size = abs(self.d)
        size[count(size), self.fixed.a] = 0.0
        return largest(size)

    @cached_property
    def directed(self) -> Array:
        """Saturating ratio; the chebyshev distance is the scale."""
        return self.d_a / self.scale

    @cached_property
    def scale(self) -> Array:
        scale = self.chebyshev + self.size_a
        scale += SMALL
        return scale

    @cached_property
    def pearson_distance(self) -> Array:
        """1 - r from sums over d alone, as half the squared distance of the centred unit
        vectors.

        Centred, p = b + d has the part A = |b| + d.u along the baseline's unit vector u and a
        rest of squared length D = |d|^2 - (d.u)^2. With L^2 = A^2 + D that distance is
        (L - A) / L, which for A > 0 keeps its digits as D / (L (L + A)).
        """
        xp, always_in_line = library(self.d), self.d.shape[1] <= 2
        rest = self.squared_norm - dot(self.sums[:, 1:], self.sums[:, 1:])
        if always_in_line:
            rest[...] = 0
        part = self.sums[:, 1] + self.fixed.centred_length
        squared = part * part
        squared += rest
        size = xp.sqrt(squared)
        distance = part + size
        distance *= size
        distance = rest / distance
        least = float(part.min())
        if not least > 0:
            distance = xp.where(part > 0, distance, (size - part) / size)
        # Where little is left of what was subtracted, digits are lost.
        delicate = rest < DIGITS_LEFT * self.squared_norm
        if always_in_line:
            delicate[...] = False
        if self.longest > FAR_APART:
            delicate |= self.absorbed
        if not least > self.fixed.surely_long:
            delicate |= squared < self.fixed.least_length
        if delicate.any():
            distance[delicate] = self._pearson_distance_of(delicate)
        return distance

    def _pearson_distance_of(self, some: Array) -> Array:
        """1 - r of the rows of a mask, ``[rows]``, from their own logits."""
        inputs, experiments = library(some).where(some)
        mine = unit(centred(self.p[inputs, :, experiments][..., None]))
        mine -= self.fixed.centred_unit[inputs]
        return dot(mine, mine)[:, 0] / 2
