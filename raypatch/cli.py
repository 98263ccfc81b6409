"""The command line: arguments to one config, one call, one exit code.

Help is instant: torch, ray and pyarrow are imported by what a command calls, never here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from raypatch import __version__
from raypatch.definitions import DEFAULT_GROUP_SIZE, KINDS
from raypatch.errors import InputError, Interrupted, RaypatchError

if TYPE_CHECKING:
    from raypatch.results.reader import Results

# Dashes and underscores are the same in option names; values keep what they are.
SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
FINISHED_WITH_FAILURES = 3
AGENT_OPTIONS = [
    click.option("--agent_file", metavar="F", help="Which file of the directory is the agent."),
    click.option("--agent_factory", metavar="M:F", help="Function that builds the module."),
    click.option("--agent_output", metavar="NAME", help="Submodule that is the action network."),
    click.option("--activation", metavar="A", help="Between the layers of a plain MLP: relu, ..."),
    click.option(
        "--trust_agent_code", is_flag=True, help="Allow running code from the agent's directory."
    ),
]


def with_options(options: list[Any]) -> Callable[[Any], Any]:
    """Attach a list of options to a command."""

    def attach(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return attach


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="raypatch")
def cli() -> None:
    """Which neurons of a trained RL agent cause its actions: activation patching on Ray."""


# ------------------------------------------------------------------------------ generate


@cli.command()
@click.option("--type", "kind", required=True, type=click.Choice(KINDS), help="Kind of definition.")
@click.option("--agent_path", metavar="DIR", help="Agent whose layers are read.")
@click.option(
    "--layer_structure", metavar="JSON|FILE", help="Layers and sizes; goes before the agent."
)
@click.option("--group_size", default=DEFAULT_GROUP_SIZE, show_default=True, type=int)
@click.option("--custom_spec", metavar="JSON|FILE", help="Experiments of --type custom.")
@click.option("--output", metavar="FILE", help="Default: Definitions/<type>_experiment.json")
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
    from raypatch.generating import generate_definition

    path, count = generate_definition(**given)
    click.echo(f"{count:,} {given['kind']} experiments written to {path}")


# ----------------------------------------------------------------------------------- run


RUN_OPTIONS = [
    click.option("--agent_path", metavar="DIR", help="Directory of the trained agent."),
    click.option("--definition_file", metavar="FILE", help="What to patch; see generate."),
    click.option("--output_dir", metavar="DIR", help="Where results go; resumes a run there."),
    click.option("--start_index", type=int, help="First experiment.  [default: 0]"),
    click.option("--end_index", type=int, help="One past the last experiment.  [default: all]"),
    click.option(
        "--additional_args",
        metavar="ARGS",
        help='Further options, as in "--save=metrics,--seed=1".',
    ),
    click.option("--clean_inputs", metavar="FILE", help="Default: in the agent's directory."),
    click.option("--corrupted_inputs", metavar="FILE", help="Default: in the agent's directory."),
    click.option("--input_ids", metavar="A,B", help="Only these pairs."),
    *AGENT_OPTIONS,
    click.option(
        "--direction", metavar="WHICH", help="both, denoising or noising.  [default: both]"
    ),
    click.option("--source", metavar="KIND", help="pair, zero, mean or resample.  [default: pair]"),
    click.option(
        "--source_activations", metavar="FILE", help="Recorded source values, <id>_<layer>.npz."
    ),
    click.option("--seed", type=int, help="Of resampling and verification.  [default: 0]"),
    click.option("--metrics", metavar="LIST", help="all, or names with commas; see docs."),
    click.option("--save", metavar="MODE", help="full, metrics or summary.  [default: full]"),
    click.option("--compression", metavar="KIND", help="none, lz4 or zstd.  [default: lz4]"),
    click.option("--num_actors", type=int, help="Default: one a GPU, else one a core."),
    click.option("--gpus_per_actor", type=float, help="May be a fraction.  [default: 1]"),
    click.option("--device", metavar="D", help="auto, cpu or cuda.  [default: auto]"),
    click.option("--dtype", metavar="T", help="float32 or float64.  [default: float32]"),
    click.option("--batch_size", metavar="auto|N", help="Passes in a batch.  [default: auto]"),
    click.option("--memory_per_actor", metavar="SIZE", help="As 512M or 4G.  [default: 4G]"),
    click.option("--address", metavar="ADDRESS", help="A Ray cluster.  [default: a local Ray]"),
    click.option("--backend", metavar="B", help="ray, or inline without Ray.  [default: ray]"),
    click.option("--verify", type=int, help="Experiments re-checked.  [default: 8]"),
    click.option(
        "--max_failures", type=int, help="Quarantined experiments to bear.  [default: 100]"
    ),
    click.option("--watchdog_s", type=float, help="Longest wait for an item.  [default: 600]"),
    click.option("--overwrite", is_flag=True, default=None, help="Replace another sweep there."),
    click.option("--quiet", is_flag=True, default=None, help="Only errors."),
    click.option("--debug", is_flag=True, default=None, help="Ray's logs, and tracebacks."),
]


@cli.command()
@with_options(RUN_OPTIONS)
def run(**given: Any) -> None:
    """Patch every experiment of a definition into every pair; resumes where it stopped."""
    options = run_options(given)
    from raypatch.driver import RunConfig, run_config

    config = RunConfig(**options)
    echo = None if config.quiet else lambda text: click.echo(text, err=True)
    results = run_config(config, on_start=echo)
    if not config.quiet:
        from raypatch.ending import show_ending

        show_ending(results)
    if results.failures:
        click.get_current_context().exit(FINISHED_WITH_FAILURES)


def run_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options the user really gave, ``--additional_args`` taken apart, values converted."""
    extra = given.pop("additional_args", None)
    options = {name: value for name, value in given.items() if value is not None}
    if extra:
        parser = run.make_parser(click.Context(run, **SETTINGS))  # type: ignore[arg-type]
        words = [word.strip() for word in extra.split(",") if word.strip()]
        # A word without dashes belongs to the list before it: --metrics=a,b
        joined: list[str] = []
        for word in words:
            if word.startswith("-") or not joined:
                joined.append(word)
            else:
                joined[-1] += f",{word}"
        context = click.Context(run, **SETTINGS)  # type: ignore[arg-type]
        try:
            parsed, rest, _ = parser.parse_args(args=joined)
            if rest:
                raise InputError(f"--additional_args: {rest[0]!r} is no option; write --name=value")
            for parameter in run.params:
                if parameter.name in parsed:
                    value = parameter.type_cast_value(context, parsed[parameter.name])
                    options[str(parameter.name)] = value
        except click.ClickException as error:
            raise InputError(f"--additional_args: {error.format_message()}") from None
    for name in ("agent_path", "definition_file", "output_dir"):
        if name not in options:
            raise InputError(f"--{name} is missing; see raypatch run --help")
    if options.get("batch_size") == "auto":
        del options["batch_size"]
    if "batch_size" in options:
        options["batch_size"] = _whole(options["batch_size"], "--batch_size", "auto or a number")
    if "memory_per_actor" in options:
        options["memory_per_actor"] = _bytes(options["memory_per_actor"])
    return options


def _whole(text: str, option: str, valid: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not {valid}") from None


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = units.get(number[-1:], 1)
    try:
        return int(float(number.rstrip("KMGT")) * unit)
    except ValueError:
        raise InputError(f"--memory_per_actor: {text!r} is not a size like 512M or 4G") from None


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--address", required=True, metavar="URL", help="As http://127.0.0.1:8265.")
@click.option("--no_wait", is_flag=True, help="Do not follow the job.")
@click.argument("run_words", nargs=-1, type=click.UNPROCESSED, metavar="-- RUN OPTIONS")
def submit(address: str, no_wait: bool, run_words: tuple[str, ...]) -> None:
    """The same run as a job on a Ray cluster: raypatch submit --address URL -- RUN OPTIONS."""
    given = run.make_context("run", list(run_words)).params
    run_options(dict(given))  # refuses what run would refuse
    from raypatch.submitting import submit as send

    options = {name: value for name, value in given.items() if value not in (None, False)}
    done = send(address, options, wait=not no_wait, say=lambda text: click.echo(text, err=True))
    if done.exit_code is not None:
        _say_outcome(str(options["output_dir"]))
        click.get_current_context().exit(done.exit_code)
    click.echo(done.job_id)


def _say_outcome(output_dir: str) -> None:
    """How far the sweep is, by its own directory, where this machine sees it."""
    from raypatch.ending import show_status, status_of

    try:
        facts = status_of(_open(output_dir))
    except RaypatchError:
        click.echo(f"{output_dir} cannot be seen from here; the job's log has its ending", err=True)
        return
    show_status(facts)


# ------------------------------------------------------------------------------- reading


@cli.command()
@click.argument("agent_dir")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--write_manifest", is_flag=True, help="Keep these options as agent.json there.")
@with_options(AGENT_OPTIONS)
def inspect(agent_dir: str, as_json: bool, **given: Any) -> None:
    """Layers of an agent, how it was loaded and how it will be patched."""
    from raypatch.inspecting import inspect_agent, show_agent

    facts = inspect_agent(agent_dir, **given)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show_agent(facts)


@cli.command()
@click.option("--env", required=True, metavar="ID", help="Of gymnasium.make, as CartPole-v1.")
@click.option("--agent_path", required=True, metavar="DIR", help="Directory of the agent.")
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
@click.option("--output_dir", metavar="DIR", help="Default: activation_inputs of the agent.")
@click.option("--overwrite", is_flag=True, help="Replace inputs that are there.")
@with_options(AGENT_OPTIONS)
def collect(**given: Any) -> None:
    """Pairs of inputs from the agent playing in its environment."""
    from raypatch.collecting import collect_pairs, show_collected

    show_collected(collect_pairs(**given))


@cli.command()
@click.argument("output_dir")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(output_dir: str, as_json: bool) -> None:
    """How far a run is; works while it runs."""
    from raypatch.ending import show_status, status_of

    facts = status_of(_open(output_dir))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show_status(facts)


@cli.command()
@click.argument("output_dir")
@click.option("--sample", default=8, show_default=True, type=click.IntRange(0))
@click.option("--seed", default=0, show_default=True, type=int, help="Of the sample.")
@click.option("--agent_path", metavar="DIR", help="Where the agent is now, if it was moved.")
@with_options(AGENT_OPTIONS)
def verify(output_dir: str, **given: Any) -> None:
    """Re-read every part of a run, and compute a random sample of it again."""
    from raypatch.verifying import verify_run

    found = verify_run(output_dir, **given)
    click.echo(
        f"{found.parts:,} parts in {found.files:,} files are as committed; "
        f"{found.experiments_recomputed} experiments computed again agree, largest difference "
        f"from the float64 reference {found.largest_difference:.1e}"
    )


@cli.command()
@click.argument("output_dir")
@click.option("--metric", default="kl_divergence", show_default=True)
@click.option("--statistic", default="mean", show_default=True, help="mean, std, min or max.")
@click.option("--direction", default="both", show_default=True, help="Or one of the two.")
@click.option(
    "--combine", default="average", show_default=True, help="Both directions: average or maximum."
)
@click.option("--top", default=10, show_default=True, type=click.IntRange(1))
@click.option("--bottom", is_flag=True, help="The weakest first.")
@click.option("--layer", help="Only experiments that patch this layer.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--csv", "as_csv", is_flag=True, help="For spreadsheets.")
def rank(output_dir: str, metric: str, as_json: bool, as_csv: bool, **options: Any) -> None:
    """The experiments that move the outputs most, and how sure that is."""
    rows = _open(output_dir).rank(metric, bootstrap=True, **options)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif as_csv:
        _echo_csv(rows)
    else:
        from raypatch.ending import show_ranking

        show_ranking(rows, metric, options["statistic"])


def _echo_csv(rows: list[dict[str, Any]]) -> None:
    import csv

    writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


@cli.command()
@click.argument("output_dir")
@click.option("--format", "form", required=True, type=click.Choice(["json", "parquet", "csv"]))
@click.option(
    "--by",
    type=click.Choice(["experiment", "input"]),
    default="experiment",
    show_default=True,
    help="json: one file an experiment, or an input.",
)
@click.option("--output", required=True, metavar="PATH", help="A new directory.")
def export(output_dir: str, form: str, by: str, output: str) -> None:
    """Results as Parquet, CSV, or JSON in the original tool's layouts."""
    from raypatch.exporting import export as write

    click.echo(f"written to {write(_open(output_dir), form, by, output)}")


@cli.command()
@click.argument("output_dir")
@click.option("--output", metavar="FILE", help="Default: <name>_report.html here.")
@click.option("--screen", metavar="FILE", help="Estimates of raypatch screen, to compare.")
def report(output_dir: str, output: str | None, screen: str | None) -> None:
    """One self-contained HTML page: heat maps, distributions, the strongest neurons."""
    from raypatch.reporting.page import write_report

    results = _open(output_dir)
    target = output or f"{output_dir.rstrip('/').rpartition('/')[2]}_report.html"
    click.echo(f"written to {write_report(results, target, screen)}")


@cli.command()
@click.argument("output_dir")
@click.option("--metric", default="kl_divergence", show_default=True)
@click.option("--output", default="plots", show_default=True, metavar="DIR")
@click.option(
    "--format", "form", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True
)
def plot(output_dir: str, metric: str, output: str, form: str) -> None:
    """Figures for papers: heat maps, distributions by layer, denoising against noising."""
    from raypatch.reporting.figures import write_figures

    for path in write_figures(_open(output_dir), metric, output, form):
        click.echo(f"written to {path}")


# ------------------------------------------------------------------------------ searches


SEARCH_OPTIONS = [
    click.option("--agent_path", required=True, metavar="DIR", help="Directory of the agent."),
    click.option("--clean_inputs", metavar="FILE", help="Default: in the agent's directory."),
    click.option("--corrupted_inputs", metavar="FILE", help="Default: in the agent's directory."),
    click.option("--direction", default="both", show_default=True),
    *AGENT_OPTIONS,
]


@cli.command()
@click.option("--metric", required=True, help="What makes a coalition strong.")
@click.option("--candidates", default=20, show_default=True, help="Tried at each step.")
@click.option("--max_size", default=30, show_default=True, help="Neurons at most.")
@click.option("--combine", default="mean", show_default=True, help="Directions: mean or max.")
@click.option(
    "--against",
    default="baseline",
    show_default=True,
    help="Choose by the effect on the baseline, or on the current coalition's outputs.",
)
@click.option("--monotone", is_flag=True, help="Stop where no candidate makes it stronger.")
@click.option("--output_dir", default="coalition", show_default=True, metavar="DIR")
@click.option("--overwrite", is_flag=True, help="Start anew.")
@with_options(SEARCH_OPTIONS)
def coalition(
    metric: str,
    candidates: int,
    combine: str,
    against: str,
    monotone: bool,
    direction: str,
    output_dir: str,
    **given: Any,
) -> None:
    """Greedy search for neurons that move the outputs together; resumes where it stopped."""
    from raypatch.coalition import SearchOptions, Step, find_coalition

    def show(step: Step) -> None:
        flips = "" if step.flips is None else f", {step.flips} greedy actions changed"
        click.echo(
            f"{step.size:3}  {step.layer}_neuron_{step.neuron}  {metric} {step.score:.4g}{flips}"
        )

    options = SearchOptions(metric, candidates, direction, combine, against, monotone)
    steps = find_coalition(output_dir=output_dir, options=options, on_step=show, **given)
    click.echo(f"{len(steps)} neurons; steps, definition and curve in {output_dir}")


@cli.command()
@click.option("--top", default=100, show_default=True, help="Neurons to verify by real patches.")
@click.option("--output", default="Definitions/screen_experiment.json", show_default=True)
@click.option("--estimates", default="screen_estimates.json", show_default=True, metavar="FILE")
@with_options(SEARCH_OPTIONS)
def screen(top: int, output: str, estimates: str, **given: Any) -> None:
    """Guess every neuron's effect from gradients; writes a definition of the strongest."""
    from raypatch.screening import screen as guess

    found = guess(top=top, output=output, estimates=estimates, **given)
    n_neurons = sum(map(len, found.values()))
    click.echo(
        f"the strongest {min(top, n_neurons)} of {n_neurons} neurons by estimate written to "
        f"{output}, all estimates to {estimates}\nNext: raypatch run with that definition, then "
        f"raypatch report DIR --screen {estimates}"
    )


def _open(output_dir: str) -> Results:
    from raypatch.results.reader import open_results

    return open_results(output_dir)


# ---------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # What a command ends with through its context comes back as a number.
        code = cli.main(arguments, prog_name="raypatch", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error.format_message().replace("\n", " "), 2)
    except Interrupted as error:
        return _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped at once; committed results are kept", 130)
    except RaypatchError as error:
        if "--debug" in arguments:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        click.echo(f"raypatch: {line}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
