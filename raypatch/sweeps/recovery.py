"""What an output directory holds when a run starts, and how it is put in order.

The protocol of a commit: a part is written under a dot-name, flushed, renamed; its manifest
line follows; ``_SUCCESS`` comes last. A process may die between any two of these steps, so a
start finds leftovers of dead attempts, parts without a line, lines without their parts, a
torn last line. :func:`survey` sees them and writes nothing; :func:`repair` puts them right.

Only the range of experiments that this run holds a lock on is looked at: other ranges may
have a run of their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypatch.errors import InputError
from raypatch.results import layout
from raypatch.results.store import PARTIAL, Store, digest_of
from raypatch.sweeps.progress import counted
from raypatch.sweeps.sweep import Range, check_identity, unreadable_records

HASHING_THREADS = 4
BEACON = ".beacon-"
RECORDS = (
    layout.SUCCESS, layout.MANIFEST, layout.FAILURES, layout.SWEEP, layout.EXPERIMENTS,
    layout.BASELINES,
)  # fmt: skip


def held_receipts(
    store: Store, identity: dict[str, Any], *, overwrite: bool
) -> list[layout.Receipt]:
    """Receipts of the same sweep in the directory, none where it is new.

    Raises InputError where the directory holds another sweep (naming the fields that differ)
    or files that are no sweep's. Writes nothing.
    """
    exists = store.exists()
    if overwrite or not exists:
        return []
    content = store.read(layout.SWEEP)
    if content is None:
        visible = [name for name in store.entries() if not name.startswith(".")]
        ours = {layout.SHARDS, layout.SUMMARY, layout.EXPERIMENTS, layout.BASELINES}
        other = next((name for name in visible if name not in ours), None)
        if other is not None:
            raise InputError(
                f"--output_dir {store.location}: holds {other!r} but no sweep; choose a new "
                "directory, or --overwrite to replace a run's files in it"
            )
        return []
    try:
        record = layout.parse_sweep(content)
        held = record["identity"]
        receipts = layout.read_manifest(store.read(layout.MANIFEST))
    except ValueError as error:
        raise unreadable_records(store.location, error) from None
    check_identity(held, identity, store.location, "sweep")
    if layout.DISTRUSTED in record:
        raise InputError(
            f"--output_dir {store.location}: an earlier run failed its verification, so its "
            f"results cannot be trusted ({record[layout.DISTRUSTED]}); choose a new directory, or "
            "--overwrite to compute everything anew"
        )
    beyond = next((r for r in receipts if r.last > identity["n_experiments"]), None)
    if beyond is not None:
        raise InputError(
            f"--output_dir {store.location}: its {layout.MANIFEST} names {beyond.part}, past the "
            f"definition's {identity['n_experiments']} experiments; choose a new directory, or "
            "--overwrite"
        )
    return receipts


@dataclass(frozen=True)
class Survey:
    """What was found; ``believed`` and ``adopted`` are kept, the rest is computed again."""

    believed: tuple[layout.Receipt, ...] = ()
    adopted: tuple[layout.Receipt, ...] = ()
    # Receipts whose files are missing or hold other bytes, with the reason.
    broken: dict[layout.Receipt, str] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()

    @property
    def committed(self) -> tuple[layout.Receipt, ...]:
        return self.believed + self.adopted

    def notes(self) -> Iterator[str]:
        """What a user should know, one line each."""
        for receipt, reason in self.broken.items():
            yield f"{receipt.part}: {reason}; its experiments are computed again"
        if self.adopted:
            parts = counted(len(self.adopted), "part")
            yield f"kept {parts} that an earlier run finished but did not record"


@dataclass(frozen=True)
class Expected:
    """What a whole part of this sweep looks like."""

    fingerprint: str
    save: str
    rows_each: int
    n_directions: int
    item_length: int


def survey(
    store: Store, expected: Expected, receipts: Iterable[layout.Receipt], wanted: Range
) -> Survey:
    """Compare the records with the files of the experiments in ``wanted``."""
    mine: list[layout.Receipt] = []
    others: list[layout.Receipt] = []
    for receipt in receipts:
        inside = receipt.first < wanted.last and wanted.first < receipt.last
        (mine if inside else others).append(receipt)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        faults = list(threads.map(lambda receipt: fault_of(store, receipt), mine))
    believed = [receipt for receipt, fault in zip(mine, faults) if fault is None]
    broken = {receipt: fault for receipt, fault in zip(mine, faults) if fault is not None}
    known = {f"{folder}/{r.part}" for r in believed + others for folder in _folders(expected)}
    found = {
        f"{folder}/{name}"
        for folder in (layout.SHARDS, layout.SUMMARY)
        for name in store.entries(folder)
        if _inside(layout.part_range(name), wanted)
    }
    # A part that is not what was committed may still be readable: it is never adopted.
    distrusted = {f"{folder}/{r.part}" for r in broken for folder in _folders(expected)}
    candidates = sorted(found - known - distrusted)
    adopted = _adopted(store, expected, candidates, believed + others)
    known |= {f"{folder}/{r.part}" for r in adopted for folder in _folders(expected)}
    return Survey((*believed, *others), tuple(adopted), broken, tuple(sorted(found - known)))


def _folders(expected: Expected) -> tuple[str, ...]:
    return (layout.SUMMARY,) if expected.save == "summary" else (layout.SHARDS, layout.SUMMARY)


def _inside(part: tuple[int, int] | None, wanted: Range) -> bool:
    return part is not None and part[0] < wanted.last and wanted.first < part[1]


def fault_of(store: Store, receipt: layout.Receipt) -> str | None:
    """What is wrong with a committed part's files, None where nothing is."""
    for name, (_, digest) in receipt.files.items():
        found = digest_of(store, name)
        if found is None:
            return f"{name} is missing or unreadable"
        if found != digest:
            return f"{name} is not what was committed (its sha256 differs)"
    return None


def description_fault(store: Store, sweep: dict[str, Any], name: str) -> str | None:
    """What is wrong with ``experiments.arrow`` or ``baselines.arrow``, None where nothing is."""
    found = digest_of(store, name)
    if found is None:
        return f"{name} is missing or unreadable"
    if found != sweep.get(layout.DIGESTS, {}).get(name, found):
        return f"{name} is not what was written (its sha256 differs)"
    return None


def _adopted(
    store: Store, expected: Expected, names: list[str], committed: list[layout.Receipt]
) -> list[layout.Receipt]:
    failed = {f.experiment_index for f in layout.read_failures(store.read(layout.FAILURES))}
    taken = [(r.first, r.last) for r in committed]
    adopted = []
    for name in names:
        folder, _, part = name.partition("/")
        bounds = layout.part_range(part)
        if folder != layout.SUMMARY or bounds is None or part != layout.part_name(*bounds):
            continue
        if any(bounds[0] < last and first < bounds[1] for first, last in taken):
            continue
        receipt = _receipt_of(store, expected, bounds, failed)
        if receipt is not None:
            adopted.append(receipt)
            taken.append(bounds)
    return adopted


def _receipt_of(
    store: Store, expected: Expected, bounds: tuple[int, int], failed: set[int]
) -> layout.Receipt | None:
    """The receipt of a part that has no line, None unless it is whole and this sweep's."""
    part = layout.part_name(*bounds)
    present = _experiments_in(store, f"{layout.SUMMARY}/{part}", expected, expected.n_directions)
    if present is None or not set(range(*bounds)) - set(present) <= failed:
        return None
    sizes = {}
    for folder in _folders(expected):
        name = f"{folder}/{part}"
        content = store.read(name)
        each = expected.rows_each if folder == layout.SHARDS else expected.n_directions
        if content is None or _experiments_in(store, name, expected, each) != present:
            return None
        sizes[folder] = (len(content), digest_of(store, name))
    n_bytes, digest = sizes.get(layout.SHARDS, (None, None))
    summary_bytes, summary_digest = sizes[layout.SUMMARY]
    assert summary_digest is not None
    return layout.Receipt(
        item=bounds[0] // expected.item_length,
        first=bounds[0],
        last=bounds[1],
        rows=len(present) * expected.rows_each,
        bytes=n_bytes,
        sha256=digest,
        summary_bytes=summary_bytes,
        summary_sha256=summary_digest,
        tries=1,
        seconds=0.0,
        quarantined=tuple(sorted(set(range(*bounds)) - set(present))),
    )


def _experiments_in(store: Store, name: str, expected: Expected, each: int) -> list[int] | None:
    """Experiments of a part, None unless every batch can be read and each has ``each`` rows."""
    try:
        with store.open(name) as file:
            reader = pa.ipc.open_file(file)
            metadata = reader.schema.metadata or {}
            if metadata.get(b"raypatch.fingerprint") != expected.fingerprint.encode():
                return None
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            columns = [batch["experiment_index"].to_numpy() for batch in batches]
    except (pa.ArrowException, InputError, OSError, KeyError):
        return None
    values = np.concatenate(columns) if columns else np.empty(0, np.int64)
    ids, counts = np.unique(values, return_counts=True)
    if (counts != each).any() or not np.array_equal(values, np.repeat(ids, each)):
        return None
    return [int(index) for index in ids]


def repair(store: Store, found: Survey) -> None:
    """Make the directory what the survey believes in: files first, then the records."""
    for name in found.leftovers:
        store.remove(name)
    with store.changing():
        content = store.read(layout.MANIFEST)
        torn = bool(content) and not content.endswith(b"\n")  # type: ignore[union-attr]
        if found.broken or found.adopted or torn:
            # Runs on other ranges may have committed since the survey.
            mine = {(r.first, r.last): r for r in found.committed}
            lost = {(r.first, r.last) for r in found.broken}
            for receipt in layout.read_manifest(content):
                if (receipt.first, receipt.last) not in lost:
                    mine.setdefault((receipt.first, receipt.last), receipt)
            if found.broken:  # before a manifest that lacks something
                store.remove(layout.SUCCESS)
            lines = "".join(f"{receipt.line()}\n" for receipt in mine.values())
            store.write(layout.MANIFEST, lines.encode())


def drop_stray_failures(store: Store, wanted: Range) -> None:
    """Forget quarantined experiments of items that never were committed: they run again."""
    with store.changing():
        content = store.read(layout.FAILURES)
        if content is None:
            return
        receipts = layout.read_manifest(store.read(layout.MANIFEST))
        committed = {index for receipt in receipts for index in receipt.quarantined}
        kept = [
            failure
            for failure in layout.read_failures(content)
            if failure.experiment_index in committed
            or not wanted.first <= failure.experiment_index < wanted.last
        ]
        lines = "".join(f"{failure.line()}\n" for failure in kept).encode()
        if not lines:
            store.remove(layout.FAILURES)
        elif lines != content:
            store.write(layout.FAILURES, lines)


def clear(store: Store) -> None:
    """Remove a run's files, and only those, for ``--overwrite``; the records go first."""
    for name in RECORDS:
        store.remove(name)
    for folder in (layout.SHARDS, layout.SUMMARY):
        for name in store.entries(folder):
            if layout.part_range(name) is not None:
                store.remove(f"{folder}/{name}")


def remove_partials(store: Store, wanted: Range) -> None:
    """Remove what an actor was still writing when it died."""
    for folder in (layout.SHARDS, layout.SUMMARY):
        for name in store.entries(folder):
            if name.endswith(PARTIAL) and _inside(layout.part_range(name), wanted):
                store.remove(f"{folder}/{name}")
    with store.changing():
        for name in store.entries():
            if name.startswith(".") and name.endswith(PARTIAL) and not _of_another(name, wanted):
                store.remove(name)


def beacon_name(wanted: Range) -> str:
    """A file that the workers of the run on a range look for."""
    return f"{BEACON}{wanted.first}-{wanted.last}-{uuid.uuid4().hex}{PARTIAL}"


def _of_another(name: str, wanted: Range) -> bool:
    """Whether a beacon stands for experiments outside of the range."""
    words = name.removeprefix(BEACON).split("-")
    if not name.startswith(BEACON) or not (words[0].isdigit() and words[1].isdigit()):
        return False
    return not _inside((int(words[0]), int(words[1])), wanted)
