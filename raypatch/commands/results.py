"""status, verify, rank, export, report, plot: what a run has found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raypatch.commands.options import (
    AGENT_OPTIONS,
    COMBINE_HELP,
    LOCAL_PATH,
    open_run,
    with_options,
)
from raypatch.errors import InputError
from raypatch.terminal import say

if TYPE_CHECKING:
    from raypatch.results.reader import Results


@click.command()
@click.argument("output_dir")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(output_dir: str, as_json: bool) -> None:
    """How far a run is; works while it runs."""
    from raypatch.commands.ending import show_status, status_of

    facts = status_of(open_run(output_dir))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show_status(facts)


@click.command()
@click.argument("output_dir")
@click.option("--sample", default=8, show_default=True, type=click.IntRange(0))
@click.option("--seed", default=0, show_default=True, type=int, help="Of the sample.")
@click.option(
    "--agent_path", type=LOCAL_PATH, metavar="DIR", help="Where the agent is now, if it was moved."
)
@with_options(AGENT_OPTIONS)
def verify(output_dir: str, **given: Any) -> None:
    """Re-read every part of a run, and compute a random sample of it again."""
    from raypatch.commands.verifying import verify_run
    from raypatch.sweeps.progress import counted

    found = verify_run(output_dir, **given)
    click.echo(
        f"{counted(found.parts, 'part')} in {counted(found.files, 'file')} as committed; "
        f"{counted(found.experiments_recomputed, 'experiment')} computed again, largest difference "
        f"from the float64 reference {found.largest_difference:.1e}"
    )


@click.command()
@click.argument("output_dir")
@click.option("--metric", help="Default: kl_divergence, or the first that was computed.")
@click.option("--statistic", default="mean", show_default=True, help="mean, std, min or max.")
@click.option("--direction", default="both", show_default=True, help="Or one of the two.")
@click.option("--combine", help=COMBINE_HELP)
@click.option("--top", default=10, show_default=True, type=click.IntRange(1))
@click.option("--bottom", is_flag=True, help="The weakest first.")
@click.option("--layer", help="Only experiments that patch this layer.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--csv", "as_csv", is_flag=True, help="For spreadsheets.")
def rank(output_dir: str, metric: str | None, as_json: bool, as_csv: bool, **options: Any) -> None:
    """The experiments that move the outputs most, and how sure that is."""
    if as_json and as_csv:
        raise InputError("--json and --csv: one form at a time; leave out one")
    results = _opened(output_dir)
    results.require_rows()
    metric = metric or results.default_metric
    rows = results.rank(metric, bootstrap=True, **options)
    if not rows:
        say(f"{metric} is undefined for every experiment asked for")
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif as_csv:
        _echo_csv(rows)
    else:
        from raypatch.commands.ending import show_ranking

        show_ranking(rows, metric, options["statistic"])


def _opened(output_dir: str) -> Results:
    """The results there are; says so where more are to come."""
    results = open_run(output_dir)
    if not results.complete:
        done, total = results.n_tried, results.sweep["identity"]["n_experiments"]
        say(f"note: {done:,} of {total:,} experiments so far")
    return results


def _echo_csv(rows: list[dict[str, Any]]) -> None:
    import csv

    writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


@click.command()
@click.argument("output_dir")
@click.option("--format", "form", required=True, type=click.Choice(["json", "parquet", "csv"]))
@click.option(
    "--by",
    type=click.Choice(["experiment", "input"]),
    default="experiment",
    show_default=True,
    help="json: one file an experiment, or an input.",
)
@click.option("--output", type=LOCAL_PATH, required=True, metavar="PATH", help="A new directory.")
def export(output_dir: str, form: str, by: str, output: str) -> None:
    """Results as Parquet, CSV, or JSON in the original tool's layouts."""
    from raypatch.reporting.exporting import export as write

    click.echo(f"written to {write(_opened(output_dir), form, by, output)}")


@click.command()
@click.argument("output_dir")
@click.option("--output", type=LOCAL_PATH, metavar="FILE", help="Default: <name>_report.html here.")
@click.option(
    "--screen", type=LOCAL_PATH, metavar="FILE", help="Estimates of raypatch screen, to compare."
)
def report(output_dir: str, output: str | None, screen: str | None) -> None:
    """One self-contained HTML page: heat maps, distributions, the strongest neurons."""
    from raypatch.reporting.page import write_report

    results = _opened(output_dir)
    folder = output_dir if "://" in output_dir else str(Path(output_dir).resolve())
    target = output or f"{folder.rstrip('/').rpartition('/')[2]}_report.html"
    click.echo(f"written to {write_report(results, target, screen)}")


@click.command()
@click.argument("output_dir")
@click.option("--metric", help="Default: kl_divergence, or the first that was computed.")
@click.option("--output", type=LOCAL_PATH, default="plots", show_default=True, metavar="DIR")
@click.option(
    "--format", "form", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True
)
def plot(output_dir: str, metric: str | None, output: str, form: str) -> None:
    """Figures for papers: heat maps, distributions by layer, denoising against noising."""
    from raypatch.reporting.figures import write_figures

    results = _opened(output_dir)
    for path in write_figures(results, metric or results.default_metric, output, form):
        click.echo(f"written to {path}")
