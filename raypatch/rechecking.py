"""Parts that lie there are computed again around a sample and compared: wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from raypatch.definitions import Experiments
from raypatch.errors import VerificationError
from raypatch.results import layout, tables
from raypatch.results.store import Store
from raypatch.results.tables import ItemArrays
from raypatch.worker import Item, Worker, WorkerSpec, outputs_of

if TYPE_CHECKING:
    from raypatch.verification import Verifier

# Another processor may round differently than the one that wrote the parts.
RELATIVE, ABSOLUTE = 1e-3, 1e-5
# By how many units in the last place outputs are moved to see what that does to a number, how
# often, and how many times as far the number may lie away: a ratio of two differences that are
# rounding errors may be anything.
MOVED_BY, MOVED_TIMES, SPREAD = 16, 8, 4


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
            moved = _Moved(worker, item, outputs)
            _compare(store, receipt, worker, arrays, moved)
            place = {int(index): at for at, index in enumerate(arrays.indices)}
            verifier.check({i: outputs_of(outputs, place[i]) for i in inside if i in place})
    finally:
        torch.set_num_threads(n_threads)


class _Moved:
    """The same results from outputs that differ by as much as two processors may round."""

    def __init__(self, worker: Worker, item: Item, outputs: list[torch.Tensor]) -> None:
        self._worker, self._item, self._outputs = worker, item, outputs

    @cached_property
    def arrays(self) -> list[ItemArrays]:
        """Computed only where it is asked for."""
        return [self._once(seed) for seed in range(MOVED_TIMES)]

    def _once(self, seed: int) -> ItemArrays:
        generator = torch.Generator().manual_seed(seed)

        def moved(outputs: torch.Tensor) -> torch.Tensor:
            unit = torch.finfo(outputs.dtype).eps * MOVED_BY
            steps = 2 * torch.rand(outputs.shape, generator=generator) - 1
            return outputs + steps.to(outputs) * unit * outputs.abs().clamp(min=1)

        return self._worker.arrays_of(self._item, list(map(moved, self._outputs)))


def _compare(
    store: Store, receipt: layout.Receipt, worker: Worker, arrays: ItemArrays, moved: _Moved
) -> None:
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
            if _close(held[column], expected[column]):
                continue
            others = [build(other, table_schema)[column] for other in moved.arrays]
            if not _close(held[column], expected[column], others):
                raise VerificationError(
                    f"{store.location}: {name}: column {column} is not what the agent gives now; "
                    "run the sweep again with --overwrite, and report this if it comes back"
                )


def _close(
    held: pa.ChunkedArray, expected: pa.ChunkedArray, moved: Sequence[pa.ChunkedArray] = ()
) -> bool:
    """Whether each number is what is expected, or as near to it as those ``moved`` are."""
    if held.equals(expected):
        return True
    if held.type != expected.type or len(held) != len(expected):
        return False
    a, b, *others = map(_numbers, (held, expected, *moved))
    if not np.issubdtype(a.dtype, np.floating):
        return bool(np.logical_or.reduce([a == right for right in (b, *others)]).all())
    allowed = ABSOLUTE + RELATIVE * np.abs(b)
    for other in others:
        allowed = np.maximum(allowed, SPREAD * np.abs(other - b))
    # Where the patch makes a number undefined or not, NaN is one of what it may be.
    undefined = np.logical_or.reduce([np.isnan(right) for right in (b, *others)])
    return bool(((np.abs(a - b) <= allowed) | np.isnan(a) & undefined).all())


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)
