"""``raypatch verify``: a finished or stopped run's files against their records and the truth.

Every committed file is read and hashed again; then the items around a random sample of
experiments are computed anew and compared with what their parts hold, and their outputs with
the float64 reference.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from raypatch.errors import InputError, RunError
from raypatch.results import layout
from raypatch.results.reader import Results, open_results
from raypatch.sweeps.config import RunConfig
from raypatch.sweeps.driver import Job
from raypatch.sweeps.inline import InlineBackend
from raypatch.sweeps.interruption import Interruption
from raypatch.sweeps.rechecking import recheck
from raypatch.sweeps.recovery import description_fault, fault_of
from raypatch.sweeps.verification import choose_sample

# Options that allow code to run. A directory from elsewhere cannot give them: only the user can.
CONSENTS = ("agent_factory", "trust_agent_code")


@dataclass(frozen=True)
class Verified:
    """What was found to be as recorded."""

    parts: int
    files: int
    experiments_recomputed: int
    largest_difference: float


def verify_run(location: str, *, sample: int, seed: int, **agent_options: Any) -> Verified:
    """Check an output directory; ``agent_options`` as for loading the agent.

    Raises RunError naming each part that is not what was committed, or that differs from what
    the agent gives when it is computed again; InputError where the agent or the inputs are
    not those of the run any more.
    """
    results = open_results(location)
    if results.distrusted is not None:
        raise RunError(f"{location}: {results.distrusted}")
    faults = [fault_of(results.store, receipt) for receipt in results.receipts]
    bad = [f"{r.part}: {fault}" for r, fault in zip(results.receipts, faults) if fault is not None]
    parts = [f"{len(bad)} of {len(faults)} parts are damaged"] if bad else []
    for name in (layout.EXPERIMENTS, layout.BASELINES):
        if (fault := description_fault(results.store, results.sweep, name)) is not None:
            parts.append(fault)
    if parts:
        advice = "run the sweep's own command again to restore what is damaged"
        raise RunError("\n".join([*bad[:10], *parts, advice]))
    recomputed, difference = 0, 0.0
    if sample and results.receipts:
        recomputed, difference = _recompute(results, sample, seed, agent_options)
    n_files = sum(len(receipt.files) for receipt in results.receipts)
    return Verified(len(results.receipts), n_files, recomputed, difference)


def _recompute(
    results: Results, sample: int, seed: int, agent_options: dict[str, Any]
) -> tuple[int, float]:
    from raypatch.sweeps.sweep import Range

    ranges = [Range(receipt.first, receipt.last) for receipt in results.receipts]
    chosen = choose_sample(ranges, sample, seed)
    backend = _AsRecorded(results.sweep["device"])
    job = Job(_config(results, agent_options, sample), backend, Interruption())
    job.read()
    job.plan()  # against the directory, which is left as it is
    job.ranges = ranges
    verifier = job.verifier()
    recheck(
        results.store, results.receipts, chosen, job.worker_spec(), job.experiments_of, verifier
    )
    return verifier.checked, verifier.largest_difference


def _config(results: Results, agent_options: dict[str, Any], sample: int) -> RunConfig:
    """The run's own options, with today's place of its files."""
    record = results.sweep
    known = {field.name for field in fields(RunConfig)}
    options = {
        name: value
        for name, value in record["options"].items()
        if name in known and name not in CONSENTS
    }
    options |= {name: value for name, value in agent_options.items() if value}
    needed = [name for name in CONSENTS if record["options"].get(name) and not options.get(name)]
    if needed:
        values = {name: record["options"][name] for name in needed}
        given = " ".join(f"--{n}" if v is True else f"--{n} {v}" for n, v in values.items())
        raise InputError(
            f"{results.path}: this run's agent was loaded with {given}, which runs code; give it "
            "again to allow that here"
        )
    files = (_moved(file, record["agent"]["path"], agent_options) for file in record["input_files"])
    sides = dict(zip(record["identity"]["sides"], files))
    return RunConfig(
        **{
            **options,
            "agent_path": agent_options.get("agent_path") or record["agent"]["path"],
            "definition_file": record["definition_file"],
            "output_dir": results.path,
            "device": record["device"],
            "overwrite": False,
            "verify": sample,
            **{f"{side}_inputs": file for side, file in sides.items()},
        }
    )


def _moved(file: str, agent_path: str, agent_options: dict[str, Any]) -> str:
    """Where an input file is now, if it was moved along with the agent."""
    path, now = Path(file), agent_options.get("agent_path")
    if now and not path.exists() and path.is_relative_to(agent_path):
        return str(Path(now) / path.relative_to(agent_path))
    return file


class _AsRecorded(InlineBackend):
    """Cuts items as they were cut where the run computed them, whether that is at hand or not."""

    def wait_started(self) -> None:
        self.device = self._wanted
