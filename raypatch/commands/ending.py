"""Short tables for people: how a run ended, how far it is, what ranks first."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from typing import Any

from raypatch.results.analysis import rank
from raypatch.results.reader import Results
from raypatch.sweeps.progress import counted, duration, short_number
from raypatch.terminal import console


def status_of(results: Results) -> dict[str, Any]:
    """How far a run is, as plain data."""
    n_experiments = results.sweep["identity"]["n_experiments"]
    done = results.n_tried
    return {
        "output_dir": str(results.path),
        "state": _state(results),
        "experiments": n_experiments,
        "experiments_committed": done,
        "rows": results.n_rows,
        "bytes": sum((r.bytes or 0) + r.summary_bytes for r in results.receipts),
        "items_committed": len(results.receipts),
        "quarantined": [asdict(failure) for failure in results.failures],
        "items_retried": sum(r.tries > 1 for r in results.receipts),
        "agent": results.sweep["agent"]["loaded_as"],
        "fingerprint": results.sweep["fingerprint"],
        "verification_failed": results.distrusted,
        "runs": results.sweep.get("runs", []),
    }


def _state(results: Results) -> str:
    if results.complete:
        return "complete"
    return "running" if results.store.busy() else "stopped"


def _next_command(facts: dict[str, Any]) -> str:
    where = shlex.quote(facts["output_dir"])
    if facts["state"] == "running":
        return f"raypatch status {where}"
    if facts["state"] == "stopped":
        if facts["verification_failed"]:
            return "report this with your agent; --overwrite recomputes everything"
        return "run the same command again; it resumes where it stopped"
    return f"raypatch rank {where}"


def _another(results: Results) -> str:
    """A metric to look at next that is defined for some experiment of the first part."""
    means = [f"{metric}_mean" for metric in results.metrics]
    part = next(results.summary_parts(means))
    useful = [m for m in results.metrics if part[f"{m}_mean"].null_count < len(part)]
    return (useful or list(results.metrics))[-1]


def show_status(facts: dict[str, Any]) -> None:
    """Print a run's state."""
    share = facts["experiments_committed"] / facts["experiments"]
    table = _facts_table()
    _add_row(table, "state", facts["state"])
    _add_row(
        table,
        "experiments",
        f"{facts['experiments_committed']:,} of {facts['experiments']:,} committed ({share:.0%})",
    )
    _add_row(table, "rows", f"{facts['rows']:,} in {counted(facts['items_committed'], 'item')}")
    _add_row(table, "size", f"{facts['bytes'] / 1e6:.1f} MB")
    _add_row(table, "retried items", f"{facts['items_retried']:,}")
    _add_row(table, "agent", facts["agent"])
    if facts["verification_failed"]:
        _add_row(table, "not to be trusted", facts["verification_failed"])
    if facts["quarantined"]:
        _add_row(table, "quarantined", f"{len(facts['quarantined']):,} experiments without results")
    screen = console()
    screen.print(table)
    show_failures(facts["quarantined"])
    screen.print(f"\nNext: {_next_command(facts)}", markup=False, soft_wrap=True)


def show_failures(failures: list[dict[str, Any]], limit: int = 5) -> None:
    """Name the first quarantined experiments and why."""
    screen = console()
    for failure in failures[:limit]:
        screen.print(
            f"  {failure['experiment_index']} {failure['name']}: {failure['error']}", markup=False
        )
    if len(failures) > limit:
        screen.print(f"  and {len(failures) - limit} more in failures.jsonl", markup=False)


def show_ending(results: Results) -> None:
    """Print what ran, how fast, the verification, the strongest neurons and what is next."""
    last = results.sweep["runs"][-1]
    facts = status_of(results)
    table = _facts_table()
    _add_row(table, 
        "ran", f"{last['passes']:,} passes in {duration(last['seconds'])}, "
        f"{short_number(last['passes_per_second'])} passes/s",
    )  # fmt: skip
    _add_row(
        table,
        "committed",
        f"{facts['experiments_committed']:,} of {facts['experiments']:,} experiments, "
        f"{facts['rows']:,} rows, {facts['bytes'] / 1e6:.1f} MB in {results.path}",
    )
    _add_row(table, "verified", _verified(last["verification"]))
    if facts["quarantined"]:
        _add_row(
            table,
            "quarantined",
            f"{len(facts['quarantined']):,} experiments failed every try and have no results:",
        )
    screen = console()
    screen.print(table)
    show_failures(facts["quarantined"])
    strongest = rank(results, results.default_metric, top=8, internal_only=True)
    if strongest:
        metric = results.default_metric
        sides = "both directions" if len(results.directions) > 1 else results.directions[0]
        screen.print(
            f"\nStrongest neurons by mean {metric}, {sides}, output_logits left out", markup=False
        )
        show_ranking(strongest, metric)
    command = f"raypatch rank {shlex.quote(str(results.path))} --metric {_another(results)}"
    screen.print(f"\nNext: {command}", markup=False, soft_wrap=True)


def show_ranking(rows: list[dict[str, Any]], metric: str, statistic: str = "mean") -> None:
    """Print a ranking; the columns are those the rows have."""
    from rich.table import Table

    table = Table(box=None)
    table.add_column("rank", justify="right")
    table.add_column("experiment", overflow="fold")
    table.add_column(metric if statistic == "mean" else f"{metric} {statistic}", justify="right")
    with_interval = any(row.get("ci_low") is not None for row in rows)
    if with_interval:
        table.add_column("95% interval", justify="right")
    table.add_column("z", justify="right")
    table.add_column("action flips", justify="right")
    named = Counter(row["name"] for row in rows)
    patched = Counter((row["name"], row["patches"]) for row in rows)
    for row in rows:
        # Groups of one size have one name in the original's scheme, repeated experiments too.
        label, patches = row["name"], row["patches"]
        if patched[label, patches] > 1:
            label += f" (experiment {row['experiment_index']})"
        elif named[label] > 1:
            label += f" ({patches})"
        rate = row["action_changed_rate"]
        cells = [str(row["rank"]), label, f"{row[f'{metric}_{statistic}']:.4g}"]
        if with_interval:
            low, high = row["ci_low"], row["ci_high"]
            cells.append("-" if low is None else f"{low:.3g} to {high:.3g}")
        _add_row(table, *cells, f"{row['z_score']:+.2f}", "-" if rate is None else f"{rate:.1%}")
    console().print(table)


def _verified(record: dict[str, Any]) -> str:
    if not record["checked"]:
        return "nothing (--verify 0, or nothing was left to compute)"
    return (
        f"{record['checked']} experiments against the float64 reference, "
        f"largest difference {record['largest_difference']:.1e}"
    )


def _add_row(table: Any, *cells: str) -> None:
    """Add a row as it is: names may hold what looks like the printer's markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _facts_table() -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
