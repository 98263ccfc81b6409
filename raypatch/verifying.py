"""``raypatch verify``: a finished or stopped run's files against their records and the truth.

Every committed file is read and hashed again; then the items around a random sample of
experiments are computed anew and compared with what their parts hold, and their outputs with
the float64 reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from raypatch.config import RunConfig
from raypatch.driver import Job
from raypatch.errors import RunError
from raypatch.inline import InlineBackend
from raypatch.interruption import Interruption
from raypatch.recovery import fault_of
from raypatch.results import layout, tables
from raypatch.results.reader import Results, open_results
from raypatch.verification import choose_sample
from raypatch.worker import Item, Worker

# Another processor may round differently than the one that wrote the parts.
RELATIVE, ABSOLUTE = 1e-3, 1e-5


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
    faults = [(r.part, fault_of(results.store, r)) for r in results.receipts]
    bad = [f"{part}: {fault}" for part, fault in faults if fault is not None]
    if bad:
        advice = "run the sweep's own command again to compute them anew"
        count = f"{len(bad)} of {len(faults)} parts are damaged; {advice}"
        raise RunError("\n".join([*bad[:10], count]))
    recomputed, difference = 0, 0.0
    if sample and results.receipts:
        recomputed, difference = _recompute(results, sample, seed, agent_options)
    n_files = sum(len(receipt.files) for receipt in results.receipts)
    return Verified(len(results.receipts), n_files, recomputed, difference)


def _recompute(
    results: Results, sample: int, seed: int, agent_options: dict[str, Any]
) -> tuple[int, float]:
    from raypatch.sweep import Range

    ranges = [Range(receipt.first, receipt.last) for receipt in results.receipts]
    chosen = choose_sample(ranges, sample, seed)
    job = Job(_config(results, agent_options, sample), _backend(results), Interruption())
    with _closed(job):
        job.ranges = ranges
        worker, verifier = Worker(job.worker_spec()), job.verifier()
        for receipt in results.receipts:
            inside = sorted(i for i in chosen if receipt.first <= i < receipt.last)
            if not inside:
                continue
            item = Item(receipt.item, receipt.first, receipt.last, frozenset(receipt.quarantined))
            arrays, outputs = worker.arrays(item, job.experiments_of(item))
            _compare(results, receipt, worker, arrays)
            place = {int(index): at for at, index in enumerate(arrays.indices)}
            verifier.check({i: outputs[place[i]].numpy() for i in inside if i in place})
    return verifier.checked, verifier.largest_difference


def _compare(results: Results, receipt: layout.Receipt, worker: Worker, arrays: Any) -> None:
    builders: dict[str, tuple[Callable[..., pa.Table], pa.Schema]] = {
        layout.SUMMARY: (tables.summary_table, worker.summary_schema),
        layout.SHARDS: (tables.row_table, worker.row_schema),
    }
    for name in receipt.files:
        build, table_schema = builders[name.split("/")[0]]
        expected = build(arrays, table_schema)
        with results.store.open(name) as file:
            held = pa.ipc.open_file(file).read_all()
        for column in expected.column_names:
            if not _close(held[column], expected[column]):
                raise RunError(
                    f"{results.path}: {name}: column {column} is not what the agent gives now; "
                    "run the sweep again with --overwrite, and report this if it comes back"
                )


def _close(held: pa.ChunkedArray, expected: pa.ChunkedArray) -> bool:
    if held.equals(expected):
        return True
    if held.type != expected.type or len(held) != len(expected):
        return False
    one, two = held.combine_chunks(), expected.combine_chunks()
    if pa.types.is_fixed_size_list(one.type):
        one, two = one.flatten(), two.flatten()
    if not pa.types.is_floating(one.type):
        return False
    a, b = (column.to_numpy(zero_copy_only=False) for column in (one, two))
    return bool(np.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True))


def _config(results: Results, agent_options: dict[str, Any], sample: int) -> RunConfig:
    """The run's own options, with today's place of its files."""
    record = results.sweep
    known = {field.name for field in fields(RunConfig)}
    options = {name: value for name, value in record["options"].items() if name in known}
    options |= {name: value for name, value in agent_options.items() if value}
    sides = dict(zip(record["identity"]["sides"], record["input_files"]))
    return RunConfig(
        **{
            **options,
            "agent_path": agent_options.get("agent_path") or record["agent"]["path"],
            "definition_file": record["definition_file"],
            "output_dir": results.path,
            "backend": "inline",
            "device": record["device"],
            "overwrite": False,
            "verify": sample,
            **{f"{side}_inputs": file for side, file in sides.items()},
        }
    )


def _backend(results: Results) -> InlineBackend:
    return InlineBackend(results.sweep["device"])


@contextmanager
def _closed(job: Job) -> Iterator[None]:
    """The job read and planned against the directory, which is left as it is."""
    import torch

    n_threads = torch.get_num_threads()
    try:
        job.read()
        job.plan()
        yield
    finally:
        torch.set_num_threads(n_threads)
