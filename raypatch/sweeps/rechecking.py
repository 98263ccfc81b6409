"""Parts that lie there are computed again around a sample and compared: wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from raypatch.definitions import Experiments
from raypatch.errors import VerificationError
from raypatch.results import layout, tables
from raypatch.results.store import Store
from raypatch.results.tables import ItemArrays
from raypatch.sweeps.work import Item
from raypatch.sweeps.worker import Worker, WorkerSpec, outputs_of

if TYPE_CHECKING:
    from raypatch.sweeps.verification import Verifier

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
            _compare(store, receipt, worker, item, outputs, arrays)
            place = {int(index): at for at, index in enumerate(arrays.indices)}
            verifier.check({i: outputs_of(outputs, place[i]) for i in inside if i in place})
    finally:
        torch.set_num_threads(n_threads)


def _moved(worker: Worker, item: Item, outputs: list[torch.Tensor]) -> Iterator[ItemArrays]:
    """The same results from outputs that differ by as much as two processors may round."""
    for seed in range(MOVED_TIMES):
        generator = torch.Generator().manual_seed(seed)
        others = []
        for patched in outputs:
            unit = torch.finfo(patched.dtype).eps * MOVED_BY
            steps = (2 * torch.rand(patched.shape, generator=generator) - 1).to(patched)
            others.append(patched + steps * unit * patched.abs().clamp(min=1))
        yield worker.arrays_of(item, others)


def _compare(
    store: Store,
    receipt: layout.Receipt,
    worker: Worker,
    item: Item,
    outputs: list[torch.Tensor],
    arrays: ItemArrays,
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
        doubtful = [c for c in expected.column_names if not _close(held[c], expected[c])]
        if not doubtful:
            continue
        moved = _moved(worker, item, outputs)
        others = [build(other, table_schema).select(doubtful) for other in moved]
        for column in doubtful:
            if not _close(held[column], expected[column], [other[column] for other in others]):
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
        allowed = np.fmax(allowed, SPREAD * np.abs(other - b))
    undefined = [np.isnan(number) for number in (b, *others)]
    any_of_them, all_of_them = np.any(undefined, axis=0), np.all(undefined, axis=0)
    # Whether there is a number at all may hang on rounding too.
    either = any_of_them & ~all_of_them | np.isnan(a) & all_of_them
    return bool(((np.abs(a - b) <= allowed) | either).all())


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)
