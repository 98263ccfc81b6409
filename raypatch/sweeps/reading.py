"""What a run is about: everything its options name, read and checked; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypatch.agents import load_agent
from raypatch.agents.agent import Agent
from raypatch.checking import layer_resolver
from raypatch.definition_files import read_definition
from raypatch.definitions import OUTPUT_LOGITS, Experiments
from raypatch.errors import InputError
from raypatch.inputs import (
    INPUTS_FOLDER,
    SIDES,
    Inputs,
    ObservationShape,
    find_inputs,
    read_activations,
    read_inputs,
)
from raypatch.metrics.formulas import choose_metrics
from raypatch.results.schema import DIRECTIONS, TARGET_SIDE
from raypatch.sweeps.config import RunConfig, ids_in
from raypatch.sweeps.sweep import Range


@dataclass(frozen=True)
class Subject:
    """An agent, experiments on it and inputs to run it on.

    ``wanted`` are the experiments of this run; ``given`` holds recorded source values of every
    patched layer, for the source kind "given".
    """

    agent: Agent
    metrics: tuple[str, ...]
    experiments: Experiments
    wanted: Range
    inputs: Inputs
    directions: tuple[str, ...]
    source_kind: str
    given: Mapping[str, Any]


def read_subject(config: RunConfig) -> Subject:
    """Read what the options name; raises InputError for what does not fit."""
    agent = load_agent(config.agent_path, config.agent_options())
    metrics = choose_metrics(config.metrics, discrete=agent.discrete)
    experiments = read_definition(config.definition_file, agent.neuron_counts)
    wanted = _range(config, len(experiments))
    paths = _input_paths(config)
    ids = None if config.input_ids is None else ids_in(config.input_ids)
    shape = ObservationShape(agent.observation_shape, agent.observation_parts)
    inputs = read_inputs(paths, shape, input_ids=ids)
    if config.source == "resample" and len(inputs) == 1:
        raise InputError(
            f"--source resample: needs at least two inputs; there is only {inputs.ids[0]!r}"
        )
    directions = _directions(config, inputs)
    recorded = config.source_activations
    return Subject(
        agent, metrics, experiments, wanted, inputs, directions,
        source_kind=config.source if recorded is None else "given",
        given={} if recorded is None else _recorded(Path(recorded), agent, experiments, inputs),
    )  # fmt: skip


def _range(config: RunConfig, n_experiments: int) -> Range:
    first = config.start_index
    last = n_experiments if config.end_index is None else config.end_index
    if first >= n_experiments:
        raise InputError(
            f"--start_index {first}: the definition has {n_experiments} experiments, 0 to "
            f"{n_experiments - 1}"
        )
    if not first < last <= n_experiments:
        raise InputError(f"--end_index {last}: valid are {first + 1} to {n_experiments}")
    return Range(first, last)


def _input_paths(config: RunConfig) -> dict[str, Path]:
    """The input files by side."""
    folder = Path(config.agent_path) / INPUTS_FOLDER
    given = {side: getattr(config, f"{side}_inputs") for side in SIDES}
    paths = {side: Path(given[side] or find_inputs(folder, side)) for side in SIDES}
    if config.source_activations is not None:
        side = TARGET_SIDE[config.direction]
        return {side: paths[side]}
    if config.source == "pair":
        return paths
    # No pair is needed, as patched values are no run's own: of both sides, one that is named alone
    # is the only one.
    sides = [side for side in SIDES if given[side]] or list(SIDES)
    if config.direction != "both":
        sides = [TARGET_SIDE[config.direction]]
    found = {side: paths[side] for side in sides if given[side] or paths[side].is_file()}
    if not found:
        side = TARGET_SIDE.get(config.direction, "clean")
        raise InputError(f"{paths[side]}: no such input file; give --{side}_inputs")
    return found


def _directions(config: RunConfig, inputs: Inputs) -> tuple[str, ...]:
    """Those asked for of which there are target inputs."""
    asked = DIRECTIONS if config.direction == "both" else (config.direction,)
    possible = tuple(d for d in asked if TARGET_SIDE[d] in inputs.sides)
    if not possible:
        side = TARGET_SIDE[asked[0]]
        raise InputError(f"--direction {asked[0]}: needs the {side} inputs; give --{side}_inputs")
    return possible


def _recorded(
    path: Path, agent: Agent, experiments: Experiments, inputs: Inputs
) -> Mapping[str, Any]:
    """Recorded source values of every layer the definition patches."""
    shapes = {name: layer.output_shape for name, layer in agent.layers.items()}
    shapes[OUTPUT_LOGITS] = (agent.output_size,)
    needed = {name: shapes[name] for name in experiments.used_layers()}
    return read_activations(path, inputs.ids, needed, layer_resolver(agent.neuron_counts))
