"""Names of the files of a run, and what stands in its records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 1
SWEEP = "sweep.json"
MANIFEST = "manifest.jsonl"
FAILURES = "failures.jsonl"
EXPERIMENTS = "experiments.arrow"
BASELINES = "baselines.arrow"
SHARDS = "shards"
SUMMARY = "summary"
SUCCESS = "_SUCCESS"


def part_name(first: int, last: int) -> str:
    """File name of the experiments ``first`` to ``last`` (exclusive)."""
    return f"part-{first:012d}-{last:012d}.arrow"


_PART = re.compile(r"part-(\d{12})-(\d{12})\.arrow")


def part_range(name: str) -> tuple[int, int] | None:
    """First and last experiment in a part's name, or in that of a part still being written."""
    found = _PART.search(name)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class Receipt:
    """A committed work item: one line of the manifest.

    ``bytes`` and ``sha256`` are the shard's, None where the run keeps summaries only; the
    same of the summary part follow. ``seconds`` is the actor's time for the item, 0 where
    the shard was found without its line and adopted. ``quarantined`` are the experiments of
    the range that have no rows, because they failed every try.
    """

    item: int
    first: int
    last: int
    rows: int
    bytes: int | None
    sha256: str | None
    summary_bytes: int
    summary_sha256: str
    tries: int
    seconds: float
    quarantined: tuple[int, ...] = ()

    @property
    def part(self) -> str:
        return part_name(self.first, self.last)

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """Bytes and sha256 by file name."""
        files = {f"{SUMMARY}/{self.part}": (self.summary_bytes, self.summary_sha256)}
        if self.bytes is not None and self.sha256 is not None:
            files[f"{SHARDS}/{self.part}"] = (self.bytes, self.sha256)
        return files

    def line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Receipt:
        """Raises ValueError where the line is no receipt."""
        fields = json.loads(line)
        if not isinstance(fields, dict) or not isinstance(fields.get("quarantined", []), list):
            raise ValueError("not an object of a receipt's fields")
        try:
            receipt = cls(**{**fields, "quarantined": tuple(fields.get("quarantined", ()))})
        except TypeError as error:
            raise ValueError(str(error)) from None
        whole = [receipt.item, receipt.first, receipt.last, receipt.rows, receipt.summary_bytes]
        whole += [receipt.tries, *receipt.quarantined]
        whole += [] if receipt.bytes is None else [receipt.bytes]
        digests = [receipt.summary_sha256, *([] if receipt.sha256 is None else [receipt.sha256])]
        if (
            any(type(number) is not int or number < 0 for number in whole)
            or type(receipt.seconds) not in (int, float)
            or any(not isinstance(digest, str) for digest in digests)
            or (receipt.bytes is None) != (receipt.sha256 is None)
            or not receipt.first < receipt.last <= 10**12
        ):
            raise ValueError("a field of the receipt is out of its range")
        return receipt


def read_manifest(content: bytes | None) -> list[Receipt]:
    """Receipts of a manifest, one a range; a torn last line, left by a crash, is dropped.

    Raises ValueError with the number of a line that is damaged elsewhere.
    """
    lines = (content or b"").split(b"\n")
    receipts: dict[tuple[int, int], Receipt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            receipt = Receipt.from_line(line.decode())
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f"line {number} of {MANIFEST} is damaged") from None
            continue
        receipts[receipt.first, receipt.last] = receipt
    return list(receipts.values())


@dataclass(frozen=True)
class Failure:
    """A quarantined experiment: one line of ``failures.jsonl``."""

    experiment_index: int
    name: str
    error: str
    tries: int

    def line(self) -> str:
        return json.dumps(asdict(self))


def read_failures(content: bytes | None) -> list[Failure]:
    """Quarantined experiments, one line each; lines a crash left torn are passed over."""
    found: dict[int, Failure] = {}
    for line in (content or b"").split(b"\n"):
        try:
            failure = Failure(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if type(failure.experiment_index) is int:
            found[failure.experiment_index] = failure
    return list(found.values())


# The field of sweep.json that says how a verification failed.
DISTRUSTED = "verification_failed"
# The field of sweep.json with the sha256 of the other files that describe the sweep.
DIGESTS = "sha256"
# What other code relies on in sweep.json: path of keys and type.
_SWEEP_FIELDS: dict[tuple[str, ...], type] = {
    ("format_version",): int,
    ("fingerprint",): str,
    ("identity",): dict,
    ("identity", "n_experiments"): int,
    ("identity", "layers"): dict,
    ("identity", "metrics"): list,
    ("identity", "directions"): list,
    ("identity", "save"): str,
    ("agent",): dict,
    ("agent", "path"): str,
    ("agent", "loaded_as"): str,
    ("agent", "discrete"): bool,
    ("input_ids",): list,
    ("n_outputs",): int,
    ("options",): dict,
    ("definition_file",): str,
    ("input_files",): list,
    ("units",): dict,
    ("device",): str,
    ("precision",): str,
    ("runs",): list,
}


def parse_sweep(content: bytes) -> dict[str, Any]:
    """The record of a sweep; raises ValueError where a field is missing or of another type."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{SWEEP} is no JSON: {str(error) or 'nested too deeply'}") from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise ValueError(f"format version {version}; this raypatch reads {FORMAT_VERSION}")
    for path, kind in _SWEEP_FIELDS.items():
        value: Any = record
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                raise ValueError(f"{SWEEP} has no {'.'.join(path)}")
            value = value[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{SWEEP}: {'.'.join(path)} is not of type {kind.__name__}")
    identity = record["identity"]
    texts = [*identity["metrics"], *identity["directions"], *record["input_ids"]]
    if not all(isinstance(text, str) for text in texts) or identity["n_experiments"] < 1:
        raise ValueError(f"{SWEEP}: metrics, directions or input_ids are not lists of texts")
    directions = identity["directions"]
    if not directions or len(set(directions)) < len(directions) or len(directions) > 2:
        raise ValueError(f"{SWEEP}: directions are not one or two different ones")
    return dict(record)
