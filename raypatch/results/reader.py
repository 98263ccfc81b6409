"""Reading an output directory back: only what is committed is believed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from raypatch.arrow_arrays import as_numpy, numbers
from raypatch.errors import InputError, offer, one_line
from raypatch.results import layout, schema
from raypatch.results.store import Store, open_store

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow.dataset

DEFAULT_METRIC = "kl_divergence"


@dataclass(frozen=True)
class Results:
    """The committed results of a run; tables are read when asked for."""

    store: Store
    sweep: dict[str, Any]
    receipts: tuple[layout.Receipt, ...]

    def __repr__(self) -> str:
        n_experiments = self.sweep["identity"]["n_experiments"]
        return (
            f"<raypatch results: {self.n_tried:,} of {n_experiments:,} experiments in {self.path}>"
        )

    @property
    def path(self) -> str:
        """The directory, or its URI."""
        return self.store.location

    @property
    def complete(self) -> bool:
        """Whether the run ended with every experiment of its definition done."""
        whole = self.n_tried >= self.sweep["identity"]["n_experiments"]
        return whole and layout.SUCCESS in self.store.entries()

    @property
    def n_tried(self) -> int:
        """Experiments of committed parts, those without results too."""
        return sum(receipt.last - receipt.first for receipt in self.receipts)

    @property
    def distrusted(self) -> str | None:
        """Why nothing here should be believed, where a run has failed its verification."""
        reason = self.sweep.get(layout.DISTRUSTED)
        return None if reason is None else str(reason)

    def require_rows(self) -> None:
        """Raises InputError where no experiment has results."""
        self._require_parts()
        if not any(receipt.rows for receipt in self.receipts):
            raise InputError(
                f"{self.path}: no experiment has results; all that were tried are quarantined in "
                f"{layout.FAILURES}"
            )

    def require_metric(self, metric: str) -> None:
        """Raises InputError for a metric that this run has not computed."""
        if metric not in self.metrics:
            held = offer(metric, self.metrics)
            raise InputError(f"--metric: {metric!r} was not computed by this run; {held}")

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.sweep["identity"]["metrics"])

    @property
    def default_metric(self) -> str:
        """What is shown where no metric is asked for: ``kl_divergence``, or the first there is."""
        return DEFAULT_METRIC if DEFAULT_METRIC in self.metrics else self.metrics[0]

    @property
    def directions(self) -> tuple[str, ...]:
        return tuple(self.sweep["identity"]["directions"])

    @cached_property
    def failures(self) -> tuple[layout.Failure, ...]:
        """Experiments that were quarantined."""
        return tuple(layout.read_failures(self.store.read(layout.FAILURES)))

    @cached_property
    def experiments(self) -> pa.Table:
        """Every experiment of the definition: index, name, layers, neurons."""
        return self._table(layout.EXPERIMENTS)

    @cached_property
    def baselines(self) -> pa.Table:
        """Unpatched outputs and actions by side and input."""
        return self._table(layout.BASELINES)

    def dataset(self) -> pyarrow.dataset.Dataset:
        """All committed rows as one Arrow dataset, nothing read yet."""
        if not self.has_rows:
            raise InputError(f"{self.path}: was run with --save summary and holds no rows")
        import pyarrow.dataset  # brings pandas along, where that is installed

        self._require_parts()
        files, system = self.store.dataset_files(
            [f"{layout.SHARDS}/{receipt.part}" for receipt in self.receipts]
        )
        return pyarrow.dataset.dataset(files, format="ipc", filesystem=system)

    def summary(self) -> pa.Table:
        """Statistics by experiment and direction."""
        self._require_parts()
        return pa.concat_tables(self.summary_parts(None))

    def to_pandas(self) -> pandas.DataFrame:
        """All rows as a pandas frame; InputError where pandas is not installed."""
        if importlib.util.find_spec("pandas") is None:
            raise InputError("to_pandas needs pandas: pip install pandas")
        return self.dataset().to_table().to_pandas()

    def to_polars(self) -> polars.LazyFrame:
        """All rows as a lazy polars frame; InputError where polars is not installed."""
        if importlib.util.find_spec("polars") is None:
            raise InputError("to_polars needs polars: pip install polars")
        import polars

        return polars.scan_pyarrow_dataset(self.dataset())

    def rank(self, metric: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """The strongest experiments by ``metric``, :attr:`default_metric` where it is None; see
        :func:`raypatch.results.analysis.rank`."""
        from raypatch.results.analysis import rank

        return rank(self, metric or self.default_metric, **options)

    @property
    def has_rows(self) -> bool:
        """Whether the run kept rows, not summaries only."""
        return bool(self.sweep["identity"]["save"] != "summary")

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(receipt.rows for receipt in self.receipts) if self.has_rows else 0

    def rows_of(self, indices: Sequence[int], columns: list[str]) -> dict[int, pa.Table]:
        """Rows of some experiments, in the order of direction and input; others are not read
        into memory for longer than their part."""
        wanted, found = set(indices), {}
        for receipt in self.receipts:
            inside = sorted(i for i in wanted if receipt.first <= i < receipt.last)
            if not inside:
                continue
            with self._reading(f"{layout.SHARDS}/{receipt.part}") as reader:
                table = reader.read_all().select(["experiment_index", *columns])
            ids = as_numpy(table["experiment_index"])
            for index in inside:
                first, last = np.searchsorted(ids, [index, index + 1])
                found[index] = table.slice(first, last - first).select(columns)
        return found

    def row_parts(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """Rows part by part, in the order of experiments; ``columns`` None for all."""
        return self._tables(layout.SHARDS, columns)

    def _tables(self, folder: str, columns: list[str] | None) -> Iterator[pa.Table]:
        for receipt in self.receipts:
            with self._reading(f"{folder}/{receipt.part}") as reader:
                table = reader.read_all()
                table = table if columns is None else table.select(columns)
            yield table

    def summary_schema(self) -> pa.Schema:
        """Schema of the summary's parts."""
        return self._schema(layout.SUMMARY)

    def row_schema(self) -> pa.Schema:
        """Schema of the shards."""
        return self._schema(layout.SHARDS)

    def _schema(self, folder: str) -> pa.Schema:
        self._require_parts()
        with self._reading(f"{folder}/{self.receipts[0].part}") as reader:
            return reader.schema

    def _require_parts(self) -> None:
        if not self.receipts:
            raise InputError(f"{self.path}: nothing is committed yet")

    def experiment_batches(self) -> Iterator[pa.RecordBatch]:
        """``experiments.arrow`` batch by batch."""
        with self._reading(layout.EXPERIMENTS) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def experiment_schema(self) -> pa.Schema:
        """Columns of ``experiments.arrow``."""
        with self._reading(layout.EXPERIMENTS) as reader:
            return reader.schema

    def effect_matrix(
        self, metric: str | None = None, direction: str | None = None, statistic: str = "mean"
    ) -> dict[str, np.ndarray]:
        """A metric's statistic by layer: float64 ``[neurons]``, from the experiments that patch a
        single neuron; NaN for neurons that were not patched alone or where it is undefined.

        ``metric`` None is :attr:`default_metric`.
        ``direction`` None averages the directions, of signed metrics it takes the stronger. Raises
        InputError for a metric or direction that was not run.
        """
        from raypatch.results.analysis import BOTH, single_neuron_effects

        return single_neuron_effects(
            self, metric or self.default_metric, direction or BOTH, statistic
        )

    def summary_parts(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """Summary tables part by part, in the order of experiments."""
        return self._tables(layout.SUMMARY, columns)

    def describe(self, indices: list[int]) -> pa.Table:
        """Rows of ``experiments.arrow`` at these indices, without reading the rest."""
        wanted = np.asarray(indices, np.int64)
        with self._reading(layout.EXPERIMENTS) as reader:
            found, order = [pa.Table.from_batches([], reader.schema)], []
            for number in np.unique(wanted // schema.BATCH_ROWS):
                places = np.flatnonzero(wanted // schema.BATCH_ROWS == number)
                batch = reader.get_batch(int(number))
                rows = batch.take(numbers(wanted[places] % schema.BATCH_ROWS))
                found.append(pa.Table.from_batches([rows]))
                order.append(places)
        table = pa.concat_tables(found)
        return table.take(numbers(np.argsort(np.concatenate(order)))) if order else table

    def _table(self, name: str) -> pa.Table:
        with self._reading(name) as reader:
            return reader.read_all()

    @contextmanager
    def _reading(self, name: str) -> Iterator[Any]:
        """An open Arrow file; InputError where it is missing, damaged or of another form."""
        try:
            with self.store.open(name) as source:
                yield pa.ipc.open_file(source)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InputError(
                f"{self.path}: {name} is damaged ({one_line(error)}); run the sweep again to "
                "restore it"
            ) from None


def open_results(path: str | Path) -> Results:
    """Open an output directory; raises InputError where it holds no sweep."""
    store = open_store(path)
    content = store.read(layout.SWEEP) if store.exists() else None
    if content is None:
        raise InputError(f"{path}: no sweep here (no {layout.SWEEP}); give a run's --output_dir")
    try:
        sweep = layout.parse_sweep(content)
        receipts = layout.read_manifest(store.read(layout.MANIFEST))
    except ValueError as error:
        raise InputError(f"{path}: its records cannot be read: {error}") from None
    return Results(store, sweep, tuple(sorted(receipts, key=lambda r: r.first)))
