"""``raypatch coalition``: greedy search for a set of neurons that together move the outputs.

What researchers do by hand: start from the strongest neuron; at each step try the next best
ones added to the set, keep the one with which the set is strongest; write down every step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypatch.definition_files import write_definition
from raypatch.engine.identity import network_digest
from raypatch.errors import InputError
from raypatch.results.analysis import COMBINATIONS, combined, strength
from raypatch.results.locks import ALL_EXPERIMENTS
from raypatch.results.store import DiskStore
from raypatch.searches.inprocess import Bench
from raypatch.sweeps.sweep import check_identity, files_digest, sha256_of, unreadable_records
from raypatch.whole_files import whole_file

AGAINST = ("baseline", "current")
OPTIONS, STEPS, DEFINITION, CURVE = (
    "coalition.json", "steps.jsonl", "definition.json", "curve.png",
)  # fmt: skip
BATCH = 4096

Neuron = tuple[str, int]


@dataclass(frozen=True)
class SearchOptions:
    """What decides a search's steps; a directory of another search is refused."""

    metric: str
    candidates: int = 20
    direction: str = "both"
    combine: str = "average"
    against: str = "baseline"
    monotone: bool = False


@dataclass(frozen=True)
class Step:
    """The coalition after a step: what was added, how strong it is now.

    ``score`` is the metric against the baseline, the directions combined; ``flips`` counts
    greedy actions that change, over pairs and directions (None for continuous actions).
    """

    size: int
    layer: str
    neuron: int
    score: float
    flips: int | None
    tried: int

    def line(self) -> str:
        return json.dumps(asdict(self))


def specification(neurons: Sequence[Neuron]) -> dict[str, list[int]]:
    """The experiment that patches all of them."""
    spec: dict[str, list[int]] = {}
    for layer, neuron in neurons:
        spec.setdefault(layer, []).append(neuron)
    return {layer: sorted(found) for layer, found in spec.items()}


def find_coalition(
    agent_path: str,
    output_dir: str,
    options: SearchOptions,
    *,
    max_size: int = 30,
    overwrite: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    **bench_options: Any,
) -> list[Step]:
    """Search, or go on with a search in ``output_dir``; every step is on disk before the next.

    Raises InputError where options, inputs or directory do not fit.
    """
    _check(options, max_size)
    bench = Bench(agent_path, direction=options.direction, **bench_options)
    bench.check_metric(options.metric)
    store = DiskStore(Path(output_dir))
    identity = {
        **asdict(options),
        "agent": files_digest(bench.agent.files),
        "network": network_digest(bench.agent.network, bench.patcher.graph),
        "inputs": sha256_of(json.dumps(bench.inputs.ids).encode(), *bench.inputs.sides.values()),
    }
    _check_place(store)
    store.make()
    with store.lock(0, ALL_EXPERIMENTS):
        steps = _resumed(store, identity, overwrite)
        if steps:
            _write_prefixes(steps, store)
        search = _Search(bench, options)
        while len(steps) < min(max_size, len(search.ranked)):
            step = search.next_step(steps)
            if step is None:
                break
            store.append_lines(STEPS, [step.line()])
            steps.append(step)
            _write_prefixes(steps, store)
            on_step(step)
        _draw_curve(steps, options, store.path(CURVE))
    return steps


def _check_place(store: DiskStore) -> None:
    """Raises InputError where the directory is something else's."""
    names = store.entries() if store.exists() else {}
    if OPTIONS not in names and any(not name.startswith(".") for name in names):
        raise InputError(
            f"--output_dir {store.location}: holds files but no search; choose a new directory"
        )


def _write_prefixes(steps: list[Step], store: DiskStore) -> None:
    """The coalition after each step, as a definition."""
    neurons = [(done.layer, done.neuron) for done in steps]
    prefixes = [specification(neurons[: n + 1]) for n in range(len(neurons))]
    write_definition(prefixes, store.path(DEFINITION))


def _check(options: SearchOptions, max_size: int) -> None:
    for name, valid in (("combine", COMBINATIONS), ("against", AGAINST)):
        if getattr(options, name) not in valid:
            raise InputError(
                f"--{name}: {getattr(options, name)!r} is not one of {', '.join(valid)}"
            )
    for name, value in (("candidates", options.candidates), ("max_size", max_size)):
        if value < 1:
            raise InputError(f"--{name}: {value} is below 1")


def _resumed(store: DiskStore, identity: dict[str, Any], overwrite: bool) -> list[Step]:
    """Steps of the same search in the directory; its options are written where it is new."""
    if overwrite:
        for name in (STEPS, DEFINITION, CURVE, OPTIONS):
            store.remove(name)
    content = store.read(OPTIONS)
    if content is None:
        store.write(OPTIONS, json.dumps(identity, indent=2).encode())
        return []
    try:
        held = json.loads(content)
        lines = (store.read(STEPS) or b"").decode().splitlines()
        steps = []
        for line in lines:
            try:
                steps.append(Step(**json.loads(line)))
            except ValueError:
                break  # torn by a crash; appending cuts it off
    except (ValueError, TypeError) as error:
        raise unreadable_records(store.location, error) from None
    check_identity(held, identity, store.location, "search")
    return steps


class _Search:
    """Ranks single neurons once; then finds one step after another."""

    def __init__(self, bench: Bench, options: SearchOptions) -> None:
        self.bench, self.options = bench, options
        neurons = bench.neurons()
        scores = np.concatenate(
            [
                self._scored([[n] for n in neurons[i : i + BATCH]], None)[0]
                for i in range(0, len(neurons), BATCH)
            ]
        )
        strengths = strength(options.metric, scores)
        order = np.argsort(-np.nan_to_num(strengths, nan=-np.inf), kind="stable")
        self.ranked = [neurons[i] for i in order if np.isfinite(scores[i])]
        if not self.ranked:
            raise InputError(
                f"--metric: {options.metric} is undefined for every neuron on these inputs"
            )

    def next_step(self, steps: list[Step]) -> Step | None:
        """The strongest extension by one of the next candidates; None where a monotone search
        finds no stronger one."""
        held = [(step.layer, step.neuron) for step in steps]
        taken = set(held)
        candidates = [n for n in self.ranked if n not in taken][: self.options.candidates]
        if not steps:
            candidates = candidates[:1]
        choice, scores, flips = self._scored(
            [[*held, neuron] for neuron in candidates], held if held else None
        )
        metric = self.options.metric
        allowed = np.isfinite(choice)
        if self.options.monotone and steps:
            allowed &= strength(metric, scores) > strength(metric, np.array(steps[-1].score))
            if flips is not None and steps[-1].flips is not None:
                allowed &= flips >= steps[-1].flips
        if not allowed.any():
            return None
        best = int(np.argmax(np.where(allowed, strength(metric, choice), -np.inf)))
        layer, neuron = candidates[best]
        return Step(
            len(steps) + 1, layer, neuron, float(scores[best]),
            None if flips is None else int(flips[best]), len(candidates),
        )  # fmt: skip

    def _scored(
        self, sets: list[list[Neuron]], current: list[Neuron] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """By what is chosen, score against the baseline, and flips, one of each a set."""
        bench, metric = self.bench, self.options.metric
        outputs = bench.outputs([specification(neurons) for neurons in sets])
        scores = self._combined(bench.scores(metric, outputs, bench.baselines()))
        choice = scores
        if current and self.options.against == "current":
            now = bench.outputs([specification(current)])
            against = {name: found[0] for name, found in now.items()}
            choice = self._combined(bench.scores(metric, outputs, against))
        return choice, scores, bench.flips(outputs) if bench.agent.discrete else None

    def _combined(self, scores: np.ndarray) -> np.ndarray:
        return combined(scores.T, self.options.combine, self.options.metric)


def _draw_curve(steps: list[Step], options: SearchOptions, path: Path) -> None:
    """Strength and flips against the coalition's size, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    sizes = [step.size for step in steps]
    flips = [step.flips for step in steps if step.flips is not None]
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    axes.plot(sizes, [s.score for s in steps], "o-", color="#0072B2", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("neurons in the coalition")
    axes.set_ylabel(options.metric.replace("_", " "), color="#0072B2")
    if flips:
        other = axes.twinx()
        other.plot(sizes, flips, "s--", color="#D55E00", markersize=3)
        other.set_ylabel("greedy actions changed", color="#D55E00")
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
