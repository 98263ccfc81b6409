"""inspect, collect, coalition, screen: an agent looked at in this process."""

from __future__ import annotations

import json
from typing import Any

import click

from raypatch.commands.options import (
    AGENT_OPTIONS,
    COMBINE_HELP,
    INPUT_OPTIONS,
    LOCAL_PATH,
    with_options,
)


@click.command()
@click.argument("agent_dir")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--write_manifest", is_flag=True, help="Keep these options as agent.json there.")
@with_options(AGENT_OPTIONS)
def inspect(agent_dir: str, as_json: bool, **given: Any) -> None:
    """Layers of an agent, how it was loaded and how it will be patched."""
    from raypatch.commands.inspecting import inspect_agent, show_agent

    facts = inspect_agent(agent_dir, **given)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show_agent(facts)


@click.command()
@click.option("--env", required=True, metavar="ID", help="Of gymnasium.make, as CartPole-v1.")
@click.option(
    "--agent_path", type=LOCAL_PATH, required=True, metavar="DIR", help="Directory of the agent."
)
@click.option("--pairs", required=True, type=int, metavar="N", help="How many to write.")
@click.option(
    "--corruption",
    default="other_state",
    show_default=True,
    metavar="KIND",
    help="other_state, shuffle, noise, zero, mean or module:function.",
)
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--differing", is_flag=True, help="Only pairs whose greedy actions differ.")
@click.option(
    "--output_dir", type=LOCAL_PATH, metavar="DIR", help="Default: activation_inputs of the agent."
)
@click.option("--overwrite", is_flag=True, help="Replace inputs that are there.")
@with_options(AGENT_OPTIONS)
def collect(**given: Any) -> None:
    """Pairs of inputs from the agent playing in its environment."""
    from raypatch.commands.collecting import collect_pairs, show_collected

    show_collected(collect_pairs(**given))


SEARCH_OPTIONS = [
    click.option(
        "--agent_path",
        type=LOCAL_PATH,
        required=True,
        metavar="DIR",
        help="Directory of the agent.",
    ),
    *INPUT_OPTIONS,
    click.option("--direction", default="both", show_default=True),
    *AGENT_OPTIONS,
]


@click.command()
@click.option("--metric", required=True, help="What makes a coalition strong.")
@click.option("--candidates", default=20, show_default=True, help="Tried at each step.")
@click.option("--max_size", default=30, show_default=True, help="Neurons at most.")
@click.option("--combine", help=COMBINE_HELP)
@click.option(
    "--against",
    default="baseline",
    show_default=True,
    help="Choose by the effect on the baseline, or on the current coalition's outputs.",
)
@click.option(
    "--monotone",
    is_flag=True,
    help="Stop when no candidate makes it stronger while changing at least as many actions.",
)
@click.option(
    "--output_dir", type=LOCAL_PATH, default="coalition", show_default=True, metavar="DIR"
)
@click.option("--overwrite", is_flag=True, help="Start anew.")
@with_options(SEARCH_OPTIONS)
def coalition(
    metric: str,
    candidates: int,
    combine: str | None,
    against: str,
    monotone: bool,
    direction: str,
    output_dir: str,
    max_size: int,
    **given: Any,
) -> None:
    """Greedy search for neurons that move the outputs together; resumes where it stopped."""
    from raypatch.results.analysis import usual_combination
    from raypatch.searches.coalition import SearchOptions, Step, find_coalition
    from raypatch.sweeps.progress import counted

    shown = []

    def show(step: Step) -> None:
        shown.append(step)
        changed = "" if step.flips is None else f", {counted(step.flips, 'greedy action')} changed"
        click.echo(
            f"{step.size:3}  {step.layer}_neuron_{step.neuron}  {metric} {step.score:.4g}{changed}"
        )

    combine = combine or usual_combination(metric)
    options = SearchOptions(metric, candidates, direction, combine, against, monotone)
    steps = find_coalition(
        output_dir=output_dir, options=options, max_size=max_size, on_step=show, **given
    )
    held = len(steps) - len(shown)
    before = f", {held} of them found before" if held else ""
    click.echo(f"{len(steps)} neurons{before}; steps, definition and curve in {output_dir}")
    if len(steps) > max_size:
        click.echo(
            f"--max_size {max_size}: the search in {output_dir} was longer; its first {max_size} "
            "steps are the coalition of that size"
        )


@click.command()
@click.option("--top", default=100, show_default=True, help="Neurons to verify by real patches.")
@click.option(
    "--output", type=LOCAL_PATH, default="Definitions/screen_experiment.json", show_default=True
)
@click.option(
    "--estimates",
    type=LOCAL_PATH,
    default="screen_estimates.json",
    show_default=True,
    metavar="FILE",
)
@with_options(SEARCH_OPTIONS)
def screen(top: int, output: str, estimates: str, **given: Any) -> None:
    """Guess every neuron's effect from gradients; writes a definition of the strongest."""
    from raypatch.searches.screening import screen as guess

    found = guess(top=top, output=output, estimates=estimates, **given)
    n_neurons = sum(map(len, found.values()))
    click.echo(
        f"the strongest {min(top, n_neurons)} of {n_neurons} neurons by estimate written to "
        f"{output}, all estimates to {estimates}\nNext: raypatch run with that definition, then "
        f"raypatch report DIR --screen {estimates}"
    )
