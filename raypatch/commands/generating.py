"""What ``raypatch generate`` does: settle the layers, write the definition."""

from __future__ import annotations

from pathlib import Path

from raypatch.agents.agent import AgentOptions
from raypatch.checking import MAX_NEURONS, check_experiments, check_layer_structure, json_argument
from raypatch.definition_files import write_definition
from raypatch.definitions import (
    DEFAULT_GROUP_SIZE,
    FALLBACK_LAYERS,
    OUTPUT_LOGITS,
    Experiment,
    generate_chunks,
)
from raypatch.errors import AgentError, InputError
from raypatch.terminal import say

DEFAULT_FOLDER = Path("Definitions")


def generate_definition(
    kind: str,
    agent_path: str | None = None,
    layer_structure: str | None = None,
    group_size: int | None = None,
    custom_spec: str | None = None,
    output: str | None = None,
    include_output_logits: bool = True,
    strict: bool = False,
    **agent_options: object,
) -> tuple[Path, int]:
    """Write a definition file; its path and number of experiments.

    Parameters are the command's options. Raises InputError for what cannot be used.
    """
    if group_size is not None and kind != "neuron_groups":
        # The original tool takes it with every type.
        say(f"raypatch: note: --group_size does nothing for --type {kind}")
    group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    if not 0 < group_size <= MAX_NEURONS:
        raise InputError(f"--group_size: {group_size} is not between 1 and {MAX_NEURONS}")
    options = AgentOptions(**agent_options)  # type: ignore[arg-type]
    path = Path(output) if output else DEFAULT_FOLDER / f"{kind}_experiment.json"
    if kind == "custom":
        experiments = _custom(custom_spec, agent_path, layer_structure, options)
        return path, write_definition(experiments, path)
    if custom_spec is not None:
        raise InputError(f"--custom_spec: only for --type custom, not {kind}")
    layers, output_size = _layers(agent_path, layer_structure, options, strict)
    generated = generate_chunks(
        kind,
        layers,
        output_size=output_size,
        group_size=group_size,
        include_output_logits=include_output_logits,
    )
    return path, write_definition(generated, path)


def _custom(
    spec: str | None, agent_path: str | None, layer_structure: str | None, options: AgentOptions
) -> list[Experiment]:
    """The user's experiments, checked against the layers where those are given."""
    if spec is None:
        raise InputError("--custom_spec is missing: give JSON or a file for --type custom")
    raw, origin = json_argument(spec, "--custom_spec", keep_pairs=True)
    if agent_path is None and layer_structure is None:
        # No layers to check against: accept any layer, as large as it needs to be.
        counts = _sizes_in(raw)
        return list(check_experiments(raw, counts, origin))
    layers, output_size = _layers(agent_path, layer_structure, options, strict=True)
    checked = check_experiments(raw, {OUTPUT_LOGITS: output_size, **layers}, origin)
    return list(checked)


def _sizes_in(raw: object) -> dict[str, int]:
    if not isinstance(raw, list):
        return {}
    names = {str(name) for pairs in raw if isinstance(pairs, list) for name, _ in pairs}
    return dict.fromkeys(sorted(names), 1 << 31)


def _layers(
    agent_path: str | None, layer_structure: str | None, options: AgentOptions, strict: bool
) -> tuple[dict[str, int], int]:
    """Layers and the number of logits, from the option, the agent, or the fallback."""
    if layer_structure is not None:
        structure, origin = json_argument(layer_structure, "--layer_structure", keep_pairs=True)
        layers = check_layer_structure(structure, origin)
        return layers, list(layers.values())[-1]
    reason = "no --agent_path or --layer_structure given"
    if agent_path is not None:
        from raypatch.agents import read_layer_structure

        if not Path(agent_path).exists():
            raise InputError(f"--agent_path {agent_path}: no such directory")
        try:
            layers, n_outputs, doubt = read_layer_structure(agent_path, options)
            if doubt is not None:
                if strict:
                    raise InputError(f"--strict: {doubt}")
                say(f"raypatch: note: {doubt}")
            return layers, n_outputs
        except AgentError as error:
            if strict:
                raise
            reason = str(error)
    elif strict:
        raise InputError(f"--strict: {reason}")
    say(
        f"raypatch: WARNING: {reason}\n"
        "raypatch: WARNING: USING THE DEFAULT LAYER STRUCTURE, which is probably not your "
        f"agent's: {', '.join(f'{name}: {size}' for name, size in FALLBACK_LAYERS.items())}\n"
        "raypatch: WARNING: --strict makes this an error"
    )
    return dict(FALLBACK_LAYERS), list(FALLBACK_LAYERS.values())[-1]
