"""The main job: read, check, plan, compute on a backend, commit, report."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypatch.definitions import Experiments
from raypatch.errors import Interrupted
from raypatch.results import layout
from raypatch.results.locks import ALL_EXPERIMENTS
from raypatch.results.schema import Columns
from raypatch.sweeps.config import RunConfig, check_config, config_of
from raypatch.sweeps.interruption import Interruption, signals_caught
from raypatch.sweeps.progress import Progress, counted

if TYPE_CHECKING:
    from raypatch.results.reader import Results
    from raypatch.sweeps.planning import Plan
    from raypatch.sweeps.reading import Subject
    from raypatch.sweeps.sides import Sides
    from raypatch.sweeps.sweep import Range
    from raypatch.sweeps.verification import Verifier
    from raypatch.sweeps.work import Backend, Item
    from raypatch.sweeps.worker import WorkerSpec


def run_config(config: RunConfig, *, on_start: Callable[[str], None] | None = None) -> Results:
    """Run a sweep, or what is left of it, and open its results.

    Raises InputError before anything is written where an input is wrong, RunError where the
    run fails, Interrupted after a signal; committed work is kept in every case.
    """
    check_config(config)
    from raypatch.actors import PoolOptions, RayBackend
    from raypatch.sweeps.inline import InlineBackend

    backend: Backend
    if config.backend == "inline":
        backend = InlineBackend(config.device)
    else:
        backend = RayBackend(
            PoolOptions(
                config.address,
                config.num_actors,
                config.gpus_per_actor,
                config.cpu_actors,
                config.device,
                quiet=not config.debug,
                watchdog_s=config.watchdog_s,
            )
        )
    say = on_start or (lambda _: None)
    with signals_caught() as interruption, backend:
        job = Job(config, backend, interruption)
        job.read()
        interruption.check()
        job.plan()
        interruption.catch()
        interruption.check()
        with job.opened(say):
            say(job.describe())
            job.compute()
    from raypatch.results.reader import open_results

    return open_results(config.output_dir)


def run(**options: Any) -> Results:
    """Run a sweep from Python; ``options`` are the fields of :class:`RunConfig`.

    ``agent_path``, ``definition_file`` and ``output_dir`` are required. Paths may be
    :class:`pathlib.Path`, and ``metrics`` and ``input_ids`` lists of names.
    """
    return run_config(config_of({"quiet": True, **options}))


class Job:
    """One run from its config to its last commit."""

    subject: Subject
    planned: Plan
    ranges: list[Range]
    # Parts of a run before that have no record of being checked.
    adopted: tuple[layout.Receipt, ...]
    # A file that workers look for, to learn whether they see the output directory.
    beacon = ""

    def __init__(self, config: RunConfig, backend: Backend, interruption: Interruption) -> None:
        from raypatch.results.store import open_store

        self.config = config
        self.backend = backend
        self.interruption = interruption
        self.store = open_store(config.output_dir)

    def read(self) -> None:
        """Read and check every input; nothing is written."""
        from raypatch.sweeps.reading import read_subject

        self.subject = read_subject(self.config)

    def plan(self) -> None:
        """Capture the network, settle device and items, and look at the output directory."""
        import raypatch.results.tables  # noqa: F401  (loads while Ray still starts)
        from raypatch.sweeps import recovery
        from raypatch.sweeps.planning import plan_sweep

        self.planned = plan_sweep(self.config, self.subject, self.backend)
        recovery.held_receipts(self.store, self.planned.identity, overwrite=self.config.overwrite)

    # --------------------------------------------------------------------------- open

    @contextmanager
    def opened(self, say: Callable[[str], None]) -> Iterator[None]:
        """The output directory held against other runs, in order, and described."""
        from raypatch.sweeps import recovery, sweep

        store, config, subject, planned = self.store, self.config, self.subject, self.planned
        store.make(*([layout.SHARDS] if config.save != "summary" else []), layout.SUMMARY)
        wanted = subject.wanted
        held = (0, ALL_EXPERIMENTS) if config.overwrite else (wanted.first, wanted.last)
        with store.lock(*held):
            if config.overwrite:
                recovery.clear(store)
            # Another run may have come and gone since the plan was made.
            receipts = recovery.held_receipts(store, planned.identity, overwrite=config.overwrite)
            expected = recovery.Expected(
                planned.fingerprint, config.save, planned.passes_each, len(subject.directions),
                planned.item_length,
            )  # fmt: skip
            found = recovery.survey(store, expected, receipts, wanted)
            for note in found.notes():
                say(f"note: {note}")
            recovery.repair(store, found)
            recovery.drop_stray_failures(store, wanted)
            committed = [sweep.Range(r.first, r.last) for r in found.committed]
            self.ranges = sweep.remaining(wanted, committed)
            self.n_committed = sum(map(len, committed))
            self.adopted = found.adopted
            self._describe_sweep()
            self.beacon = recovery.beacon_name(wanted)
            with store.changing():
                store.write(self.beacon, b"raypatch")
            try:
                yield
            finally:
                try:
                    store.flush()
                finally:
                    store.remove(self.beacon)

    def _describe_sweep(self) -> None:
        """Write what describes the sweep, unless a run before has done so and it is still that."""
        from raypatch.results import tables
        from raypatch.sweeps import records

        store, subject = self.store, self.subject

        def write_baselines() -> None:
            baselines = tables.baseline_table(
                self.planned.outputs_by_side, subject.inputs.ids, discrete=subject.agent.discrete
            )
            store.write(layout.BASELINES, tables.file_bytes(baselines, self.config.compression))

        writers = {
            layout.EXPERIMENTS: lambda: records.write_experiments(store, subject.experiments),
            layout.BASELINES: write_baselines,
        }
        records.describe(store, self._record(), writers)

    def _record(self) -> dict[str, Any]:
        """The record of a new sweep, ``sweep.json``."""
        from raypatch.sweeps import records

        config, subject, planned = self.config, self.subject, self.planned
        path = str(Path(config.agent_path).resolve())
        return {
            "format_version": layout.FORMAT_VERSION,
            "fingerprint": planned.fingerprint,
            "identity": planned.identity,
            "options": asdict(config),
            "agent": records.agent_record(subject.agent, path, planned.patcher.path),
            "definition_file": _absolute(config.definition_file),
            "input_files": [str(path.resolve()) for path in subject.inputs.files],
            "input_ids": list(subject.inputs.ids),
            "n_outputs": subject.agent.output_size,
            "item_length": planned.item_length,
            "units": self._units(),
            "device": self.backend.device,
            "precision": f"{config.dtype}, TF32 off",
            "backend": self.backend.name,
            "started": records.local_time(time.time()),
            "versions": records.software_versions(),
            "runs": [],
        }

    def describe(self) -> str:
        """One line on what is about to run."""
        config, subject, left = self.config, self.subject, sum(map(len, self.ranges))
        resumed = f", {self.n_committed:,} already committed" if self.n_committed else ""
        found, sides = list(subject.agent.notes), list(subject.inputs.sides.values())
        if config.source == "pair" and len(sides) == 2 and np.array_equal(sides[0], sides[1]):
            found.append("clean and corrupted inputs are the same: no patch changes anything")
        notes = "".join(f"note: {note}\n" for note in found)
        pairs = counted(len(subject.inputs), "pair")
        directions = counted(len(subject.directions), "direction")
        if len(subject.directions) == 1:
            directions += f" ({subject.directions[0]})"
        return (
            f"{subject.agent.loaded_as}\n{notes}"
            f"{counted(left, 'experiment')} x {pairs} x {directions} "
            f"= {left * self.planned.passes_each:,} passes{resumed}; "
            f"{self.planned.patcher.path}, {config.dtype} on {self.planned.device_class}"
        )

    # ------------------------------------------------------------------------- compute

    def compute(self) -> None:
        """Compute what is left, committing item by item."""
        from raypatch.sweeps import sweep
        from raypatch.sweeps.committing import Committer
        from raypatch.sweeps.work import Item, Work

        config, subject = self.config, self.subject
        n_items = sweep.count_items(self.ranges, self.planned.item_length)
        items = (Item(*cut) for cut in sweep.cut(self.ranges, self.planned.item_length))
        work = Work(
            self.worker_spec(), items, n_items, self.experiments_of, lambda: bool(self.interruption)
        )
        n_left = sum(map(len, self.ranges))
        with Progress(n_left, self.planned.passes_each, quiet=config.quiet) as progress:
            committer = Committer(
                self.store, subject.experiments, subject.wanted, self.verifier(), progress,
                config.max_failures,
            )  # fmt: skip
            if config.verify:
                committer.recheck(self.adopted, work, config.verify, config.seed)
            if n_items:
                # Closed here, not when an error that goes through has been dealt with: by then Ray
                # is shut down, and ending its actors would start another.
                with closing(self.backend.outcomes(work)) as events:
                    committer.commit_all(events)
            if self.interruption and progress.done < n_left:
                raise Interrupted(
                    f"interrupted; {progress.done + self.n_committed:,} experiments are committed "
                    f"in {self.store.location}; run the same command again to resume",
                    int(self.interruption.signal_number or signal.SIGINT),
                )
        committer.finish()

    def experiments_of(self, item: Item) -> Experiments:
        """The experiments of an item that are to be computed."""
        if item.skip:
            return self.subject.experiments.take(item.indices)
        return self.subject.experiments.slice(item.first, item.last)

    def verifier(self) -> Verifier:
        """Compares sampled outputs with the float64 reference."""
        from raypatch.sweeps.verification import Verifier

        subject = self.subject
        return Verifier(
            subject.agent.network, subject.experiments, self._sides(), self.config.dtype
        )

    def worker_spec(self) -> WorkerSpec:
        """All that a worker needs of this job."""
        from raypatch.sweeps.verification import choose_sample
        from raypatch.sweeps.worker import WorkerSpec

        config, subject = self.config, self.subject
        return WorkerSpec(
            patcher=self.planned.packed,
            sides=self._sides(),
            discrete=subject.agent.discrete,
            columns=Columns(subject.agent.output_size, subject.metrics, config.save),
            metadata={
                "format_version": layout.FORMAT_VERSION,
                "fingerprint": self.planned.fingerprint,
                "layers": subject.agent.neuron_counts,
                "units": self._units(),
            },
            compression=config.compression,
            output_dir=_absolute(self.store.location),
            beacon=self.beacon,
            samples=choose_sample(self.ranges, config.verify, config.seed),
            device=self.backend.device,
        )

    def _sides(self) -> Sides:
        from raypatch.sweeps.sides import Sides

        subject = self.subject
        return Sides(
            subject.inputs.sides, subject.directions, subject.source_kind, self.config.seed,
            subject.given,
        )  # fmt: skip

    def _units(self) -> dict[str, str]:
        from raypatch.metrics.formulas import METRICS

        return {name: METRICS[name].unit for name in self.subject.metrics}


def _absolute(location: str) -> str:
    """A path from the root, so that it means the same elsewhere; URIs do already."""
    return location if "://" in location else str(Path(location).resolve())
