"""generate, run, submit: from an agent to committed results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from raypatch.commands.options import (
    AGENT_OPTIONS,
    INPUT_OPTIONS,
    LOCAL_PATH,
    SETTINGS,
    open_run,
    with_options,
)
from raypatch.definitions import DEFAULT_GROUP_SIZE, KINDS
from raypatch.errors import InputError, RaypatchError
from raypatch.terminal import say

FINISHED_WITH_FAILURES = 3


@click.command()
@click.option("--type", "kind", required=True, type=click.Choice(KINDS), help="Kind of definition.")
@click.option("--agent_path", type=LOCAL_PATH, metavar="DIR", help="Agent whose layers are read.")
@click.option(
    "--layer_structure", metavar="JSON|FILE", help="Layers and sizes, instead of the agent's own."
)
@click.option(
    "--group_size",
    type=int,
    help=f"Neurons patched together, of neuron_groups.  [default: {DEFAULT_GROUP_SIZE}]",
)
@click.option("--custom_spec", metavar="JSON|FILE", help="Experiments of --type custom.")
@click.option(
    "--output", type=LOCAL_PATH, metavar="FILE", help="Default: Definitions/<type>_experiment.json"
)
@click.option(
    "--include_output_logits/--exclude_output_logits",
    default=True,
    show_default=True,
    help="Experiments that patch the outputs themselves.",
)
@click.option("--strict", is_flag=True, help="An agent that cannot be read is an error.")
@with_options(AGENT_OPTIONS)
def generate(**given: Any) -> None:
    """Write a definition: which neurons are patched together, experiment by experiment."""
    from raypatch.commands.generating import generate_definition
    from raypatch.sweeps.progress import counted

    path, count = generate_definition(**given)
    click.echo(f"{counted(count, given['kind'] + ' experiment')} written to {path}")


# ----------------------------------------------------------------------------------- run


RUN_OPTIONS = [
    click.option(
        "--agent_path", type=LOCAL_PATH, metavar="DIR", help="Directory of the trained agent."
    ),
    click.option("--definition_file", metavar="FILE", help="What to patch; see generate."),
    click.option("--output_dir", metavar="DIR", help="Where results go; resumes a run there."),
    click.option("--start_index", type=int, help="First experiment.  [default: 0]"),
    click.option("--end_index", type=int, help="One past the last experiment.  [default: all]"),
    click.option(
        "--additional_args",
        metavar="ARGS",
        help='Further options, as in "--save=metrics,--seed=1".',
    ),
    *INPUT_OPTIONS,
    click.option("--input_ids", metavar="A,B", help='Only these pairs; "quotes" keep commas.'),
    *AGENT_OPTIONS,
    click.option(
        "--direction", metavar="WHICH", help="both, denoising or noising.  [default: both]"
    ),
    click.option("--source", metavar="KIND", help="pair, zero, mean or resample.  [default: pair]"),
    click.option(
        "--source_activations",
        type=LOCAL_PATH,
        metavar="FILE",
        help="Recorded source values, <id>_<layer>.npz.",
    ),
    click.option("--seed", type=int, help="Of resampling and verification.  [default: 0]"),
    click.option("--metrics", metavar="LIST", help="all, or names with commas (docs/results.md)."),
    click.option("--save", metavar="MODE", help="full, metrics or summary.  [default: full]"),
    click.option("--compression", metavar="KIND", help="none, lz4 or zstd.  [default: lz4]"),
    click.option("--num_actors", type=int, help="Default: one a GPU, else one a core."),
    click.option("--gpus_per_actor", type=float, help="May be a fraction.  [default: 1]"),
    click.option(
        "--cpu_actors", type=int, help="Beside those on GPUs, for small networks.  [default: 0]"
    ),
    click.option("--device", metavar="D", help="auto, cpu or cuda.  [default: auto]"),
    click.option("--dtype", metavar="T", help="float32 or float64.  [default: float32]"),
    click.option("--batch_size", metavar="auto|N", help="Passes in a batch.  [default: auto]"),
    click.option(
        "--memory_per_actor",
        metavar="SIZE",
        help="As 512M or 4G.  [default: 2G a direction; on a GPU half of what is free]",
    ),
    click.option("--address", metavar="ADDRESS", help="A Ray cluster.  [default: a local Ray]"),
    click.option("--backend", metavar="B", help="ray, or inline without Ray.  [default: ray]"),
    click.option("--verify", type=int, help="Experiments re-checked.  [default: 8]"),
    click.option(
        "--max_failures", type=int, help="Quarantined experiments before giving up.  [default: 100]"
    ),
    click.option("--watchdog_s", type=float, help="Longest wait for an item.  [default: 600]"),
    click.option("--overwrite", is_flag=True, default=None, help="Replace another sweep there."),
    click.option("--quiet", is_flag=True, default=None, help="Only errors."),
    click.option("--debug", is_flag=True, default=None, help="Ray's logs, and tracebacks."),
]


@click.command()
@with_options(RUN_OPTIONS)
def run(**given: Any) -> None:
    """Patch every experiment of a definition into every pair; resumes where it stopped."""
    options = run_options(given)
    from raypatch.sweeps.config import config_of
    from raypatch.sweeps.driver import run_config

    config = config_of(options)
    results = run_config(config, on_start=None if config.quiet else say)
    if not config.quiet:
        from raypatch.commands.ending import show_ending

        show_ending(results)
    if results.failures:
        click.get_current_context().exit(FINISHED_WITH_FAILURES)


def run_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options the user really gave, ``--additional_args`` taken apart."""
    extra = given.pop("additional_args", None)
    options = {name: value for name, value in given.items() if value is not None}
    if extra:
        words = [word.strip() for word in extra.split(",") if word.strip()]
        # A word without dashes belongs to the list before it: --metrics=a,b
        joined: list[str] = []
        for word in words:
            if word.startswith("-") or not joined:
                joined.append(word)
            else:
                joined[-1] += f",{word}"
        if joined and not joined[0].startswith("-"):
            raise InputError(f"--additional_args: {joined[0]!r} is no option; write --name=value")
        apart = next((word for word in joined if " " in word.partition("=")[0]), None)
        if apart is not None:
            raise InputError(
                f"--additional_args: {apart!r}: write --name=value, with commas between options"
            )
        try:
            inside = _typed(joined)
            if "additional_args" in inside:
                raise InputError("--additional_args: cannot be given inside itself")
            options |= inside
        except click.ClickException as error:
            raise InputError(f"--additional_args: {error.format_message()}") from None
    return options


def _typed(words: Sequence[str]) -> dict[str, Any]:
    """Options of run that are among these words, with their values."""
    context = run.make_context("run", list(words), **SETTINGS)  # type: ignore[arg-type]
    typed = click.core.ParameterSource.COMMANDLINE
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is typed
    }


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--address", required=True, metavar="URL", help="As http://127.0.0.1:8265.")
@click.option("--no_wait", is_flag=True, help="Do not follow the job.")
@click.argument("run_words", nargs=-1, type=click.UNPROCESSED, metavar="-- RUN OPTIONS")
def submit(address: str, no_wait: bool, run_words: tuple[str, ...]) -> None:
    """The same run as a job on a Ray cluster: raypatch submit --address URL -- RUN OPTIONS."""
    from raypatch.commands.submitting import submit as send
    from raypatch.sweeps.config import check_options, config_of

    options = run_options(_typed(run_words))
    config = config_of(options)
    check_options(config)  # files may be where the job runs only
    chosen = {name: value for name in options if (value := getattr(config, name)) is not None}
    done = send(address, chosen, wait=not no_wait, say=say)
    if done.exit_code is not None:
        _say_outcome(str(options["output_dir"]))
        click.get_current_context().exit(done.exit_code)
    click.echo(done.job_id)


def _say_outcome(output_dir: str) -> None:
    """How far the sweep is, by its own directory, where this machine sees it."""
    from raypatch.commands.ending import show_status, status_of

    try:
        facts = status_of(open_run(output_dir))
    except RaypatchError:
        say(f"{output_dir} cannot be seen from here; the job's log has its ending")
        return
    show_status(facts)
