"""Metrics against plain definitions in high precision, one row at a time."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypatch.errors import InputError
from raypatch.metrics import table as metric_table
from raypatch.metrics.formulas import DEFAULT_METRICS, METRICS, choose_metrics
from raypatch.metrics.table import MetricTable, summarise
from raypatch.metrics.terms import Baselines
from raypatch.results.analysis import LIKENESS, SIGNED, strength

mpmath.mp.dps = 60


def exact(b, p, source) -> dict[str, float]:
    """Every metric of one row by its definition (design 9), in 60 digits."""
    b, p, source = ([mpmath.mpf(float(v)) for v in row] for row in (b, p, source))
    n = len(b)

    def softmax(x):
        top = max(x)
        e = [mpmath.e ** (v - top) for v in x]
        total = sum(e)
        return [v / total for v in e]

    def ratio(x, y):
        return x / y if y else mpmath.nan

    def kl(x, y):
        return sum(u * (mpmath.log(u) - mpmath.log(v)) for u, v in zip(x, y) if u > 0)

    def norm(x):
        return mpmath.sqrt(sum(v * v for v in x))

    def centred(x):
        mean = sum(x) / n
        return [v - mean for v in x]

    def cosine(x, y):
        return ratio(sum(u * v for u, v in zip(x, y)), norm(x) * norm(y))

    pb, pp = softmax(b), softmax(p)
    a = max(range(n), key=lambda i: (b[i], -i))
    s = max((i for i in range(n) if i != a), key=lambda i: (b[i], -i), default=a)
    d = [u - v for u, v in zip(p, b)]
    chebyshev = max((abs(d[i]) for i in range(n) if i != a), default=mpmath.mpf(0))
    margin = (pp[a] - pp[s]) - (pb[a] - pb[s])
    directed = d[a] / (chebyshev + abs(d[a]) + mpmath.mpf("1e-10"))
    a_source = max(range(n), key=lambda i: (source[i], -i))
    span = (source[a_source] - source[a]) - (b[a_source] - b[a])
    r = cosine(centred(b), centred(p))
    return {
        "output_logit_delta": d[a],
        "top_logit_delta_magnitude": abs(d[a]),
        "logit_difference_norm": norm(d),
        "action_probability_delta": pp[a] - pb[a],
        "top_action_probability_gap": max(pp) - max(pb),
        "kl_divergence": kl(pb, pp),
        "reverse_kl_divergence": kl(pp, pb),
        "hellinger_distance": norm([mpmath.sqrt(u) - mpmath.sqrt(v) for u, v in zip(pb, pp)])
        / mpmath.sqrt(2),
        "confidence_margin_change": margin,
        "confidence_margin_magnitude": abs(margin),
        "logit_proportion_change": ratio(abs(p[a]), sum(map(abs, p)))
        - ratio(abs(b[a]), sum(map(abs, b))),
        "chebyshev_distance_excluding_top": chebyshev,
        "directed_saturating_chebyshev": directed,
        "undirected_saturating_chebyshev": abs(directed),
        "reversed_undirected_saturating_chebyshev": chebyshev
        / (chebyshev + abs(d[a]) + mpmath.mpf("1e-10")),
        "cosine_similarity": cosine(b, p),
        "pearson_correlation": r,
        "reversed_pearson_correlation": 1 - r,
        "logit_diff_recovered": mpmath.nan
        if a_source == a
        else ratio((p[a_source] - p[a]) - (b[a_source] - b[a]), span),
    }


def computed(b, p, source) -> dict[str, float]:
    def tensor(row):
        return torch.tensor(np.asarray(row, np.float32))[None]

    table = MetricTable(list(METRICS), Baselines(tensor(b), tensor(source)))
    out = torch.empty(len(METRICS), 1, 1, dtype=torch.float64)
    table.compute(tensor(p)[None], out)
    return dict(zip(METRICS, out.flatten().tolist()))


def assert_equal_to_definitions(b, p, source, rel=1e-9, absolute=1e-13):
    b, p, source = (np.asarray(x, np.float32) for x in (b, p, source))
    expected, found = exact(b, p, source), computed(b, p, source)
    for name in METRICS:
        if mpmath.isnan(expected[name]):
            assert math.isnan(found[name]), name
        else:
            assert found[name] == pytest.approx(float(expected[name]), rel=rel, abs=absolute), name


def test_the_table_is_the_contracts_and_the_default_set_is_part_of_it():
    assert len(METRICS) == 19
    assert set(DEFAULT_METRICS) <= set(METRICS)
    assert set(exact([1, 2], [2, 1], [0, 1])) == set(METRICS)


logits = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        *[st.lists(st.floats(-30, 30, width=32), min_size=n, max_size=n) for _ in range(3)]
    )
)


@settings(max_examples=150, deadline=None)
@given(logits)
def test_every_metric_equals_its_definition(rows):
    assert_equal_to_definitions(*rows, rel=1e-7, absolute=1e-11)


@pytest.mark.parametrize(
    ("b", "p", "source"),
    [
        ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([2, 2, 0], [2, 2, 1], [0, 1, 5]),
        ([0, 0], [0, 0], [0, 0]),
        ([3], [5], [1]),
        ([0, -800], [0, 0], [0, 1]),
        ([1000, 0, -1000], [-1000, 0, 1000], [0, 1, 0]),
        ([1e30, -1e30], [-1e30, 1e30], [0, 1]),
        ([1e15, 0, 0], [2, 1, 0], [0, 1, 0]),
        ([4e8, 0, 0], [20, 0, 0], [0, 1, 0]),
        ([9.4e28, 1.3e29, 2e29], [0.306, 0.0048, -0.215], [0, 1, 0]),
        ([2, 1], [1e30, 1e30], [0, 1]),
        ([2, 1, 0], [1e30, 1e30, 1e30], [0, 1, 0]),
        ([2, 1, 0], [1e30, -1e30, 3e29], [0, 1, 0]),
        ([1, 2, 3, 4], [1.5, 3, 4.5, 6], [0, 1, 0, 0]),
        ([1, 2, 3, 4], [4, 3, 2, 1], [0, 1, 0, 0]),
        ([1, 2, 3, 4], [7, 7, 7, 7], [0, 1, 0, 0]),
        ([1, 2, 3, 4], [7, 7, 7, 7.000001], [0, 1, 0, 0]),
        ([1, 2, 3, 4], [1, 2, 3, 4.000001], [0, 1, 0, 0]),
        (np.linspace(-3, 3, 3000), np.linspace(3, -3, 3000), np.cos(np.arange(3000))),
    ],
)
def test_hard_rows_ties_equal_outputs_one_action_and_huge_logits(b, p, source):
    assert_equal_to_definitions(b, p, source, rel=1e-7, absolute=1e-11)


@pytest.mark.parametrize("scale", [1e-3, 1e-5])
def test_tiny_effects_keep_six_digits(scale):
    b = np.array([0.5, -0.25, 1.0, 0.125], np.float32)
    p = b + np.float32(scale) * np.array([1, -2, 0.5, 3], np.float32)
    expected, found = exact(b, p, b), computed(b, p, b)
    for name in ("kl_divergence", "reverse_kl_divergence", "hellinger_distance"):
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-6), name


def test_a_kl_of_1e_12_keeps_six_digits():
    b = np.array([0.5, -0.25, 1.0, 0.125], np.float32)
    p = b.copy()
    p[0] += np.float32(3e-6)
    expected = float(exact(b, p, b)["kl_divergence"])
    assert 1e-13 < expected < 1e-11
    assert computed(b, p, b)["kl_divergence"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_experiments", [1, 7, 500])
def test_the_answer_does_not_depend_on_how_rows_are_cut_into_blocks(n_experiments):
    generator = torch.Generator().manual_seed(0)
    target, source = (torch.randn(13, 4, generator=generator) for _ in range(2))
    patched = torch.randn(n_experiments, 13, 4, generator=generator)
    whole = torch.empty(len(METRICS), n_experiments, 13, dtype=torch.float64)
    MetricTable(list(METRICS), Baselines(target, source)).compute(patched, whole)
    alone = torch.empty(len(METRICS), 1, 13, dtype=torch.float64)
    for i in {0, n_experiments // 2, n_experiments - 1}:
        MetricTable(list(METRICS), Baselines(target, source)).compute(patched[i : i + 1], alone)
        torch.testing.assert_close(alone[:, 0], whole[:, i], rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("Unable to allocate 2.00 GiB")],
)
def test_a_block_for_which_memory_runs_out_is_halved_with_the_same_answer(monkeypatch, error):
    generator = torch.Generator().manual_seed(6)
    target, source, *patched = torch.randn(52, 8, 4, generator=generator)
    real, sizes = MetricTable._compute_block, []

    def compute(self, block, *results):
        sizes.append(len(block))
        if len(block) > 15:
            raise error
        real(self, block, *results)

    found = torch.empty(2, len(METRICS), 50, 8, dtype=torch.float64)
    for values, method in zip(found, (real, compute)):
        monkeypatch.setattr(MetricTable, "_compute_block", method)
        table = MetricTable(list(METRICS), Baselines(target, source))
        table._step = 50
        table.compute(torch.stack(patched), values)
    assert sizes == [50, 25, 12, 12, 12, 12, 2]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-15, equal_nan=True)


def test_what_a_strong_effect_is_agrees_with_the_formulas():
    generator = torch.Generator().manual_seed(4)
    target, source, *patched = torch.randn(40, 8, 5, generator=generator)
    patched = torch.stack([target, *patched])
    found = torch.empty(len(METRICS), len(patched), 8, dtype=torch.float64)
    MetricTable(list(METRICS), Baselines(target, source)).compute(patched, found)
    for name, (nothing, *others) in zip(METRICS, found):
        values, unchanged = torch.stack(others), 1.0 if name in LIKENESS else 0.0
        defined = ~nothing.isnan()
        torch.testing.assert_close(
            nothing[defined], torch.full_like(nothing, unchanged)[defined], rtol=0, atol=1e-7
        )
        both_ways = bool((values < -1e-6).any() and (values > 1e-6).any())
        if name != "logit_diff_recovered" and name not in LIKENESS:
            assert both_ways == (name in SIGNED), name
        effects = strength(name, values[:, defined].numpy())
        # A larger share of what is recovered is the stronger effect, so that has a sign.
        assert name == "logit_diff_recovered" or effects.min() > -1e-9


def test_many_inputs_are_taken_in_parts_with_the_same_answer(monkeypatch):
    monkeypatch.setattr(metric_table, "BLOCK_LOGITS", 1000)
    generator = torch.Generator().manual_seed(1)
    target, source, patched = torch.randn(3, 3000, 3, generator=generator)
    patched = torch.stack([patched, target, patched.flip(0)])
    whole = torch.empty(len(METRICS), 3, 3000, dtype=torch.float64)
    statistics = torch.empty(4, len(METRICS), 3, dtype=torch.float64)
    rate, actions = torch.empty(3), torch.empty(3, 3000, dtype=torch.int32)
    table = MetricTable(list(METRICS), Baselines(target, source))
    table.compute(patched, whole, statistics=statistics, changed_rate=rate, actions=actions)
    some = slice(2000, 2010)
    few = torch.empty(len(METRICS), 3, 10, dtype=torch.float64)
    MetricTable(list(METRICS), Baselines(target[some], source[some])).compute(patched[:, some], few)
    torch.testing.assert_close(whole[..., some], few, rtol=1e-12, atol=1e-15, equal_nan=True)
    assert torch.equal(actions.long(), patched.argmax(-1))
    changed = (patched.argmax(-1) != target.argmax(-1)).double().mean(-1)
    torch.testing.assert_close(rate.double(), changed, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics[0], whole.nanmean(-1), rtol=1e-9, atol=1e-12)
    low = whole.nan_to_num(torch.inf).amin(-1)
    assert torch.equal(statistics[2], low)


@pytest.mark.parametrize("n_inputs", [1, 2, 13])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("pairs", ["all", "some have no runner-up to recover", "no source"])
def test_statistics_are_those_of_the_values_with_two_passes(n_inputs, size, pairs):
    generator = torch.Generator().manual_seed(2)
    target, source = (torch.randn(n_inputs, 4, generator=generator) for _ in range(2))
    if pairs != "all":
        source[::2] = target[::2]
    patched = target + size * torch.randn(300, n_inputs, 4, generator=generator)
    patched[5] = target  # nothing changes
    patched[6] = target + size  # all logits by the same
    patched[7] = patched[7, :1]  # all inputs give the same
    patched[8, 0] = 0.5  # no direction of its own
    if n_inputs > 1:
        target[1] = 0.25  # no correlation with anything
    table = MetricTable(list(METRICS), Baselines(target, None if pairs == "no source" else source))
    values = torch.empty(len(METRICS), 300, n_inputs, dtype=torch.float64)
    found = torch.empty(4, len(METRICS), 300, dtype=torch.float64)
    table.compute(patched, values, statistics=found)
    with np.errstate(invalid="ignore"):
        expected = [torch.from_numpy(summarise(metric.numpy().T)) for metric in values]
    for name, got, right in zip(METRICS, found.transpose(0, 1), expected):
        torch.testing.assert_close(
            got, right, rtol=1e-9, atol=1e-9 * right.nan_to_num(0).abs().max().item(),
            equal_nan=True, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("size", [0.1, 1 / 3, 1e5 + 0.1])
def test_equal_logits_in_float64_have_no_direction(size):
    b = torch.full((1, 3), size, dtype=torch.float64)
    names = ["pearson_correlation", "reversed_pearson_correlation"]
    found = torch.empty(2, 2, 1, dtype=torch.float64)
    p = torch.tensor([[[1.0, 2.0, 4.0]], [[size, size, size]]], dtype=torch.float64)
    MetricTable(names, Baselines(b, None)).compute(p, found)
    assert bool(found.isnan().all())
    MetricTable(names, Baselines(p[0], None)).compute(p, found)
    assert bool(found[:, 1].isnan().all()) and found[:, 0].flatten().tolist() == [1, 0]


def test_without_a_source_run_nothing_is_recovered():
    target = torch.randn(3, 4)
    table = MetricTable(["logit_diff_recovered"], Baselines(target, None))
    out = torch.zeros(1, 2, 3, dtype=torch.float64)
    table.compute(torch.randn(2, 3, 4), out)
    assert bool(out.isnan().all())


def test_statistics_leave_out_what_is_undefined():
    nan = torch.nan
    columns = [[1.0, 3.0, nan], [2.0, 6.0, nan]]
    mixed = [[1.0, 3.0, nan], [nan, 2.0, 6.0]]
    nothing = [[nan] * 3, [nan] * 3]
    with np.errstate(invalid="ignore"):
        for metric in (columns, mixed):
            found = summarise(np.array(metric).T)
            assert found.tolist() == [[2, 4], [1, 2], [1, 2], [3, 6]]
        assert bool(np.isnan(summarise(np.array(nothing).T)).all())


def test_the_spread_of_values_far_from_zero_keeps_its_digits():
    values = 1e6 + np.array([[0.0, 3.0], [1.0, 3.0], [2.0, 3.0]])
    std = summarise(values)[1]
    assert std[0] == pytest.approx(math.sqrt(2 / 3), rel=1e-9) and std[1] == 0


@pytest.mark.parametrize("n_inputs", [1, 3, 7, 49, 64, 1000])
def test_what_is_the_same_for_all_inputs_is_its_mean_and_does_not_spread(n_inputs):
    assert summarise(np.ones((n_inputs, 2))).T.tolist() == [[1, 0, 1, 1]] * 2


def test_a_continuous_agent_is_refused_metrics_of_actions_by_name():
    assert choose_metrics(None, discrete=False) == (
        "logit_difference_norm",
        "reversed_pearson_correlation",
    )
    with pytest.raises(InputError, match="'kl_divergence' needs one discrete action"):
        choose_metrics("kl_divergence", discrete=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "unknown metric 'nope'"),
        ("kl_divergence,kl_divergence", "given twice"),
        (",", "empty"),
    ],
)
def test_bad_metric_lists_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        choose_metrics(text, discrete=True)


def test_thousands_of_actions_ties_and_tiny_differences_agree_with_scipy():
    from scipy import special, stats
    from scipy.spatial import distance

    rng = np.random.default_rng(0)
    b = rng.normal(size=(6, 3000)).astype(np.float32)
    b[1, :] = 0.5  # all tied
    p = (b + rng.normal(size=b.shape) * np.array([1, 1, 1e-3, 0, 5, 1e-5])[:, None]).astype(
        np.float32
    )
    table = MetricTable(list(METRICS), Baselines(torch.from_numpy(b), None))
    found = torch.empty(len(METRICS), 1, len(b), dtype=torch.float64)
    table.compute(torch.from_numpy(p)[None], found)
    got = dict(zip(METRICS, found[:, 0].numpy()))
    b, p = b.astype(np.float64), p.astype(np.float64)
    for i in range(len(b)):
        P, Q = special.softmax(b[i]), special.softmax(p[i])
        assert got["kl_divergence"][i] == pytest.approx(stats.entropy(P, Q), rel=1e-6, abs=1e-13)
        assert got["reverse_kl_divergence"][i] == pytest.approx(
            stats.entropy(Q, P), rel=1e-6, abs=1e-13
        )
        assert got["hellinger_distance"][i] == pytest.approx(
            np.linalg.norm(np.sqrt(P) - np.sqrt(Q)) / np.sqrt(2), rel=1e-6, abs=1e-9
        )
        assert got["cosine_similarity"][i] == pytest.approx(
            1 - distance.cosine(b[i], p[i]), abs=1e-9
        )
        assert got["logit_difference_norm"][i] == pytest.approx(distance.euclidean(b[i], p[i]))
        if b[i].std() and p[i].std():
            r = stats.pearsonr(b[i], p[i]).statistic
            assert got["pearson_correlation"][i] == pytest.approx(r, abs=1e-9)
