"""From outcomes to a committed sweep: checked, written, recorded; or why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from raypatch.definitions import Experiments, experiment_name
from raypatch.errors import RunError, VerificationError
from raypatch.results import layout
from raypatch.results.store import Store
from raypatch.sweeps import records, recovery
from raypatch.sweeps.progress import Progress
from raypatch.sweeps.rechecking import recheck
from raypatch.sweeps.sweep import Range, remaining
from raypatch.sweeps.verification import Verifier, choose_sample
from raypatch.sweeps.work import Outcome, Quarantined, Tick, Work


class Committer:
    """Takes what a backend gives and makes it durable, in the order it comes."""

    def __init__(
        self,
        store: Store,
        experiments: Experiments,
        wanted: Range,
        verifier: Verifier,
        progress: Progress,
        max_failures: int,
    ) -> None:
        self._store = store
        self._experiments = experiments
        self._wanted = wanted
        self._verifier = verifier
        self._progress = progress
        self._max_failures = max_failures
        self._n_failures = len(layout.read_failures(store.read(layout.FAILURES)))
        self._finished: list[layout.Receipt] = []

    def recheck(
        self, adopted: Sequence[layout.Receipt], work: Work, sample: int, seed: int
    ) -> None:
        """Look at parts that a run which died may not have checked."""
        if adopted:
            chosen = choose_sample([Range(r.first, r.last) for r in adopted], sample, seed)
            with self._trusting():
                recheck(
                    self._store, adopted, chosen, work.spec, work.experiments_of, self._verifier
                )

    def commit_all(self, events: Iterable[Outcome | Quarantined | Tick]) -> None:
        """Commit until there are no more events."""
        try:
            for event in events:
                if isinstance(event, Outcome):
                    self._take(event)
                elif isinstance(event, Quarantined):
                    self._quarantine(event)
                else:
                    self._record()
                    self._progress.update(actors=event.actors, retries=event.retries)
        finally:
            self._record()

    def _take(self, outcome: Outcome) -> None:
        with self._trusting():
            self._verifier.check(outcome.samples)
        for name, content in outcome.files.items():
            self._store.write(name, content)
        self._finished.append(outcome.receipt)

    def _record(self) -> None:
        """One flush for all that finished at a time: it takes longer than all else here."""
        if self._finished:
            lines = [receipt.line() for receipt in self._finished]
            self._store.append_lines(layout.MANIFEST, lines)
            self._progress.update(experiments=sum(r.last - r.first for r in self._finished))
            self._finished.clear()

    def _quarantine(self, event: Quarantined) -> None:
        self._n_failures += 1
        name = experiment_name(event.experiment, self._experiments[event.experiment])
        failure = layout.Failure(event.experiment, name, event.error, event.tries)
        self._store.append_lines(layout.FAILURES, [failure.line()])
        if self._n_failures > self._max_failures:
            raise RunError(
                f"{self._n_failures} experiments failed every try, more than --max_failures "
                f"{self._max_failures}; the last one: {name}: {event.error}; see "
                f"{self._store.location}/{layout.FAILURES}"
            )
        self._progress.update(quarantined=self._n_failures)

    @contextmanager
    def _trusting(self) -> Iterator[None]:
        """Where a verification fails, no later run goes on from this directory."""
        try:
            yield
        except VerificationError as error:
            records.distrust(self._store, str(error))
            raise

    def finish(self) -> None:
        """Record the ending; ``_SUCCESS`` only when the whole definition is done."""
        store, progress = self._store, self._progress
        store.flush()
        recovery.remove_partials(store, self._wanted)
        ending = {
            "seconds": round(progress.seconds, 3),
            "startup_seconds": round(progress.startup_seconds, 3),
            "passes": progress.done * progress.passes_each,
            "passes_per_second": round(progress.passes_per_second),
            "actors": progress.actors,
            "retries": progress.retries,
            "verification": self._verifier.summary(),
        }
        records.add_run(store, ending)
        receipts = layout.read_manifest(store.read(layout.MANIFEST))
        done = [Range(r.first, r.last) for r in receipts]
        if left := remaining(self._wanted, done):
            raise RunError(
                f"{store.location}: experiments {left[0].first} to {left[0].last - 1} are not "
                "committed; run the same command again, and report this"
            )
        if not remaining(Range(0, len(self._experiments)), done):
            with store.changing():
                store.write(layout.SUCCESS, b"")
