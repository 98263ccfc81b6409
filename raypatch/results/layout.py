"""Names of the files of a run, and what stands in its manifest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True)
class Receipt:
    """A committed work item: one line of the manifest.

    ``bytes`` and ``sha256`` are the shard's, None where the run keeps summaries only; the
    same of the summary part follow. ``seconds`` is the actor's time for the item.
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

    @property
    def part(self) -> str:
        return part_name(self.first, self.last)

    def line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Receipt:
        """Raises ValueError where the line is no receipt."""
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(str(error)) from None


def read_manifest(content: bytes | None) -> list[Receipt]:
    """Receipts of a manifest; a torn last line, left by a crash, is dropped.

    Raises ValueError with the number of a line that is damaged elsewhere.
    """
    lines = (content or b"").split(b"\n")
    receipts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            receipts.append(Receipt.from_line(line.decode()))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"line {number} is damaged") from None
    return receipts
