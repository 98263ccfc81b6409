"""What ``raypatch inspect`` shows of an agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raypatch.terminal import console


def inspect_agent(path: str, *, write_manifest: bool = False, **options: Any) -> dict[str, Any]:
    """Facts of an agent as plain data; ``options`` are those of loading."""
    import torch

    from raypatch.agents import AgentOptions, finding, load_agent
    from raypatch.engine.patcher import Patcher

    agent_options = AgentOptions(**options)
    agent = load_agent(path, agent_options)
    if write_manifest:
        finding.write_manifest(Path(path), agent.files[0], agent_options)
    patcher = Patcher(agent.network)
    # Two different inputs, so that a trial of the fast path has something to tell apart.
    trial = torch.linspace(0, 1, 2).view(2, *[1] * len(agent.observation_shape))
    patcher.prepare(target=trial.expand(2, *agent.observation_shape).contiguous(), kind="zero")
    return {
        "loaded_as": agent.loaded_as,
        "notes": list(agent.notes),
        "files": [str(file) for file in agent.files],
        "observation_shape": list(agent.observation_shape),
        "observation_parts": {k: list(v) for k, v in (agent.observation_parts or {}).items()},
        "outputs": agent.output_size,
        "output_kind": agent.output_kind,
        "actions": agent.actions,
        "parameters": sum(agent.parameters.values()),
        "engine": patcher.path,
        "layers": [
            {
                "name": layer.name,
                "neurons": layer.neurons,
                "kind": layer.kind,
                "output_shape": list(layer.output_shape),
                "parameters": sum(
                    n for name, n in agent.parameters.items() if name.startswith(f"{layer.name}.")
                ),
            }
            for layer in agent.layers.values()
        ],
    }


def show_agent(facts: dict[str, Any]) -> None:
    """Print the facts as a table."""
    from rich.table import Table
    from rich.text import Text

    screen = console()
    screen.print(facts["loaded_as"], markup=False)
    for note in facts["notes"]:
        screen.print(f"note: {note}", markup=False)
    screen.print(
        f"observation {facts['observation_shape']} -> {facts['outputs']} {facts['output_kind']} "
        f"({facts['actions']} actions), {facts['parameters']:,} parameters",
        markup=False,
    )
    screen.print(f"patched by: {facts['engine']}", markup=False)
    table = Table(box=None)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for column in ("neurons", "parameters"):
        table.add_column(column, justify="right")
    for layer in facts["layers"]:
        counts = (f"{layer['neurons']:,}", f"{layer['parameters']:,}")
        table.add_row(*map(Text, (layer["name"], layer["kind"], *counts)))
    table.add_row("output_logits", "the output itself", f"{facts['outputs']:,}", "")
    screen.print(table)
