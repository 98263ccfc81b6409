"""Parts that lie there are computed again around a sample and compared: wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from raypatch.definitions import Experiments
from raypatch.errors import VerificationError
from raypatch.results import layout, tables
from raypatch.results.store import Store
from raypatch.worker import Item, Worker, WorkerSpec, outputs_of

if TYPE_CHECKING:
    from raypatch.verification import Verifier

# Another processor may round differently than the one that wrote the parts.
RELATIVE, ABSOLUTE = 1e-3, 1e-5


def recheck(
    store: Store,
    receipts: Iterable[layout.Receipt],
    chosen: frozenset[int],
    spec: WorkerSpec,
    experiments_of: Callable[[Item], Experiments],
    verifier: Verifier,
) -> None:
    """Compute the parts that hold a ``chosen`` experiment again, in this process.

    Raises VerificationError where a part holds something else, or an output differs from the
    reference.
    """
    n_threads = torch.get_num_threads()
    try:
        worker = Worker(spec if torch.cuda.is_available() else replace(spec, device="cpu"))
        for receipt in receipts:
            inside = sorted(i for i in chosen if receipt.first <= i < receipt.last)
            if not inside:
                continue
            item = Item(receipt.item, receipt.first, receipt.last, frozenset(receipt.quarantined))
            arrays, outputs = worker.arrays(item, experiments_of(item))
            _compare(store, receipt, worker, arrays)
            place = {int(index): at for at, index in enumerate(arrays.indices)}
            verifier.check({i: outputs_of(outputs, place[i]) for i in inside if i in place})
    finally:
        torch.set_num_threads(n_threads)


def _compare(store: Store, receipt: layout.Receipt, worker: Worker, arrays: Any) -> None:
    builders: dict[str, tuple[Callable[..., pa.Table], pa.Schema]] = {
        layout.SUMMARY: (tables.summary_table, worker.summary_schema),
        layout.SHARDS: (tables.row_table, worker.row_schema),
    }
    for name in receipt.files:
        build, table_schema = builders[name.split("/")[0]]
        expected = build(arrays, table_schema)
        with store.open(name) as file:
            held = pa.ipc.open_file(file).read_all()
        for column in expected.column_names:
            if not _close(held[column], expected[column]):
                raise VerificationError(
                    f"{store.location}: {name}: column {column} is not what the agent gives now; "
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
