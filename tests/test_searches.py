"""Coalitions against a brute-force greedy search; the attribution screen against real patches."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, LAVA
from networks import Transformer
from torch import nn

import raypatch
from raypatch.engine.layers import find_layers
from raypatch.engine.reference import reference_outputs
from raypatch.errors import InputError
from raypatch.results import locks
from raypatch.searches.coalition import SearchOptions, find_coalition
from raypatch.searches.inprocess import Bench
from raypatch.searches.screening import attribute


@pytest.fixture(scope="module")
def lava():
    return Bench(str(LAVA))


def kl_and_flips(bench, spec):
    """Mean KL over both directions and inputs, and changed actions, from plain float64 hooks."""
    total, flips = [], 0
    for target, source in (("corrupted", "clean"), ("clean", "corrupted")):
        b = bench.agent.network.double()(bench.sides[target].double())
        p = reference_outputs(bench.agent.network, [spec], bench.sides[source], bench.sides[target])
        bench.agent.network.float()
        log_b, log_p = b.log_softmax(1), p[0].log_softmax(1)
        total.append(float((log_b.exp() * (log_b - log_p)).sum(1).mean()))
        flips += int((b.argmax(1) != p[0].argmax(1)).sum())
    return np.mean(total), flips


def test_the_search_equals_a_brute_force_greedy_one(lava, tmp_path):
    options = SearchOptions("kl_divergence", candidates=6)
    steps = find_coalition(str(LAVA), str(tmp_path / "c"), options, max_size=4)
    neurons = lava.neurons()
    single = {n: kl_and_flips(lava, {n[0]: [n[1]]})[0] for n in neurons}
    ranked = sorted(neurons, key=lambda n: -single[n])
    held = [ranked[0]]
    while len(held) < 4:
        rest = [n for n in ranked if n not in held][:6]

        def spec(extra, held=held):
            found = {}
            for layer, neuron in [*held, extra]:
                found.setdefault(layer, []).append(neuron)
            return found

        held.append(max(rest, key=lambda n: kl_and_flips(lava, spec(n))[0]))
    assert [(s.layer, s.neuron) for s in steps] == held
    for n, step in enumerate(steps, 1):
        found = {}
        for layer, neuron in held[:n]:
            found.setdefault(layer, []).append(neuron)
        score, flips = kl_and_flips(lava, found)
        assert step.score == pytest.approx(score, rel=1e-3) and step.flips == flips


def test_a_search_by_a_similarity_looks_for_what_is_least_alike(tmp_path):
    found = {}
    for metric in ("reversed_pearson_correlation", "pearson_correlation"):
        options = SearchOptions(metric, candidates=4)
        steps = find_coalition(str(LAVA), str(tmp_path / metric), options, max_size=3)
        found[metric] = [(step.layer, step.neuron) for step in steps]
        assert steps[0].flips > 0
    assert len(set(map(tuple, found.values()))) == 1


@pytest.mark.parametrize("against", ["baseline", "current"])
@pytest.mark.parametrize("combine", ["average", "maximum"])
def test_a_monotone_search_never_gets_weaker_nor_flips_less(tmp_path, against, combine):
    options = SearchOptions("kl_divergence", combine=combine, against=against, monotone=True)
    steps = find_coalition(str(LAVA), str(tmp_path / "c"), options, max_size=12)
    assert len(steps) > 3
    for one, two in itertools.pairwise(steps):
        assert two.score > one.score and two.flips >= one.flips
    assert steps[-1].flips > steps[0].flips


def _single_flips():
    bench = Bench(str(LAVA))
    return bench.flips(bench.outputs([{layer: [i]} for layer, i in bench.neurons()]))


def test_the_coalition_flips_at_least_as_many_actions_as_the_best_single_neuron(tmp_path):
    options = SearchOptions("kl_divergence", monotone=True)
    steps = find_coalition(str(LAVA), str(tmp_path / "c"), options, max_size=12)
    assert steps[-1].flips >= max(_single_flips())


def test_an_interrupted_search_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    options = SearchOptions("kl_divergence", candidates=5)
    whole = find_coalition(str(LAVA), str(tmp_path / "whole"), options, max_size=6)
    find_coalition(str(LAVA), str(tmp_path / "parts"), options, max_size=3)
    with (tmp_path / "parts" / "steps.jsonl").open("a") as file:
        file.write('{"size": 4, "lay')  # torn by a crash
    assert find_coalition(str(LAVA), str(tmp_path / "parts"), options, max_size=6) == whole
    (tmp_path / "parts" / "definition.json").unlink()  # a crash before it was written
    find_coalition(str(LAVA), str(tmp_path / "parts"), options, max_size=6)
    for name in ("steps.jsonl", "definition.json"):
        one, two = ((tmp_path / f / name).read_text() for f in ("whole", "parts"))
        assert one == two


def test_a_second_search_in_the_same_directory_is_refused_while_the_first_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    refused, options = [], SearchOptions("kl_divergence", candidates=2)

    def start_another(_):
        with pytest.raises(InputError, match="another run is writing here"):
            find_coalition(str(LAVA), str(tmp_path / "c"), options, max_size=2)
        refused.append(True)

    find_coalition(str(LAVA), str(tmp_path / "c"), options, max_size=2, on_step=start_another)
    lines = (tmp_path / "c" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["size"] for line in lines] == [1, 2] and len(refused) == 2


def test_another_searchs_directory_is_refused_with_what_differs(command, tmp_path):
    words = ("coalition", "--agent_path", LAVA, "--output_dir", tmp_path / "c", "--max_size", 2)
    assert command(*words, "--metric", "kl_divergence").code == 0
    ended = command(*words, "--metric", "logit_difference_norm")
    assert ended.code == 2 and "different: metric" in ended.err
    assert command(*words, "--metric", "logit_difference_norm", "--overwrite").code == 0


def test_a_shorter_search_in_a_longer_ones_directory_says_where_its_coalition_is(command, tmp_path):
    words = ("coalition", "--agent_path", LAVA, "--output_dir", tmp_path / "c", "--candidates", 2)
    words += ("--metric", "kl_divergence", "--max_size")
    assert "before" not in command(*words, 3).out
    shorter = command(*words, 2)
    assert shorter.code == 0 and "3 neurons, 3 of them found before" in shorter.out
    assert "its first 2 steps are the coalition of that size" in shorter.out


def test_what_a_search_writes_can_be_run(command, run_inline, tmp_path):
    words = ("coalition", "--agent_path", LAVA, "--output_dir", tmp_path / "c", "--max_size", 3)
    ended = command(*words, "--metric", "kl_divergence")
    assert ended.code == 0 and "3 neurons; steps, definition and curve" in ended.out
    results = raypatch.open_results(run_inline(LAVA, tmp_path / "c" / "definition.json"))
    steps = [json.loads(x) for x in (tmp_path / "c" / "steps.jsonl").read_text().splitlines()]
    rows = sorted(results.rank("kl_divergence"), key=lambda row: row["experiment_index"])
    np.testing.assert_allclose(
        [row["kl_divergence_mean"] for row in rows], [s["score"] for s in steps], rtol=1e-3
    )
    assert (tmp_path / "c" / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--metric", "x"), "unknown metric"), (("--metric", "all"), "unknown metric 'all'; valid: "),
     (("--candidates", 0), "below 1"),
     (("--combine", "x"), "not one of average, maximum"), (("--direction", "x"), "--direction")],
)  # fmt: skip
def test_bad_search_options_are_one_line(command, tmp_path, more, message):
    words = ["coalition", "--agent_path", LAVA, "--output_dir", tmp_path / "c"]
    words += [] if "--metric" in more else ["--metric", "kl_divergence"]
    ended = command(*words, *more)
    assert ended.code == 2 and message in ended.err and len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()


# -------------------------------------------------------------------------------- screen


def test_for_a_linear_network_the_estimate_is_the_effect():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3))
    source, target = torch.randn(5, 4), torch.randn(5, 4)
    found = attribute(network, find_layers(network, (target,)), source, target)
    action = network(target).argmax(1)
    for i in range(6):
        patched = reference_outputs(network, [{"0": [i]}], source, target)[0]
        change = patched - network(target).double()
        expected = change.gather(1, action[:, None])[:, 0].detach()
        np.testing.assert_allclose(found["0"][:, i], expected, atol=1e-6)


def test_small_changes_of_a_convolution_are_estimated_to_first_order():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 4)
    )
    target = torch.randn(6, 1, 4, 4)
    source = target + 1e-2 * torch.randn_like(target)
    found = attribute(network, find_layers(network, (target,)), source, target)
    action = network(target).argmax(1)
    for layer, neuron in (("0", 1), ("3", 4)):
        patched = reference_outputs(network, [{layer: [neuron]}], source, target)[0]
        change = (patched - network(target).double()).gather(1, action[:, None])[:, 0].detach()
        np.testing.assert_allclose(found[layer][:, neuron], change, rtol=0.1, atol=2e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n_inputs", [3, 5])  # of three steps, and of another number
def test_small_changes_are_estimated_wherever_a_layer_holds_its_inputs(n_inputs, batch_first):
    torch.manual_seed(0)
    network = Transformer(batch_first).double().eval()
    target = torch.randn(n_inputs, 6, dtype=torch.float64)
    source = target + 1e-5 * torch.randn_like(target)
    layers = find_layers(network, (target,))
    found = attribute(network, layers, source, target)
    action = network(target).argmax(1)
    for name in ("embed", "positions", "encoder.layers.1.linear1", "head"):
        experiments = [{name: [i]} for i in range(layers[name].neurons)]
        change = reference_outputs(network, experiments, source, target) - network(target)
        change = change[:, range(n_inputs), action].T.detach()
        np.testing.assert_allclose(found[name], change, rtol=1e-2, atol=1e-8)


def test_the_screen_writes_a_definition_that_runs_and_a_comparison(
    command, run_inline, single_neurons, tmp_path
):
    definition, estimates = tmp_path / "d.json", tmp_path / "e.json"
    ended = command(
        "screen", "--agent_path", LAVA, "--top", 30, "--output", definition, "--estimates",
        estimates,
    )  # fmt: skip
    assert ended.code == 0 and "the strongest 30 of 195" in ended.out
    assert len(json.loads(definition.read_text())) == 30
    out = run_inline(LAVA, definition)
    ended = command("report", out, "--screen", estimates, "--output", tmp_path / "r.html")
    assert ended.code == 0, ended.err
    from raypatch.searches.screening import compared

    whole = run_inline(LAVA, single_neurons(LAVA), out=tmp_path / "whole")
    found = compared(raypatch.open_results(whole), str(estimates))
    assert [len(layer["truth"]) for layer in found["layers"]] == [64, 64, 64, 3]
    *many, few = (layer["correlation"] for layer in found["layers"])
    assert min(many) > 0.5 and few is None  # three neurons tell nothing
    bad = command("report", out, "--screen", definition, "--output", tmp_path / "x.html")
    assert bad.code == 2 and not (tmp_path / "x.html").exists()


def test_a_search_for_cartpole_grows_by_one_neuron_a_step(tmp_path):
    steps = find_coalition(
        str(CARTPOLE), str(tmp_path / "c"), SearchOptions("logit_difference_norm"), max_size=5
    )
    assert [s.size for s in steps] == [1, 2, 3, 4, 5]


def test_a_layer_called_twice_counts_twice_and_one_without_a_gradient_for_nothing():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = x + self.table(torch.zeros(len(x), dtype=torch.int64))
            return self.b(self.a(h) + self.a(2 * h))

    torch.manual_seed(0)
    network, source, target = Twice(), torch.randn(5, 4), torch.randn(5, 4)
    network.table.weight.requires_grad_(False)
    found = attribute(network, find_layers(network, (target,)), source, target)
    action = network(target).argmax(1)
    for i in range(4):
        patched = reference_outputs(network, [{"a": [i]}], source, target)[0]
        change = (patched - network(target).double()).gather(1, action[:, None])[:, 0].detach()
        np.testing.assert_allclose(found["a"][:, i], change, atol=1e-6)
    assert not found["table"].any()
