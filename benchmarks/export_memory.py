"""Memory of `raypatch export` and `raypatch report` against the length of the run.

Anonymous memory (mapped files are the kernel's to take back), the most of samples 50 times a
second, for a run of the long sweep's network and one four times as long, in parts of full size.

    python benchmarks/export_memory.py [--experiments 300000]
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from long_sweep import experiments, make_agent, memory_of

from raypatch.definition_files import write_definition

LONGER = 4
EXPORTS = (
    ("parquet", "experiment", 1),
    ("csv", "experiment", 1),
    # A file an experiment, and every experiment in each file: for the sizes people have.
    ("json", "experiment", 120),
    ("json", "input", 120),
)


def peak_mib(words: list[str]) -> tuple[float, float]:
    """Peak anonymous memory of a command, and its seconds."""
    started, most = time.perf_counter(), 0.0
    process = subprocess.Popen(
        [sys.executable, "-m", "raypatch.cli", *words], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, StopIteration):
            most = max(most, memory_of(process.pid, "RssAnon"))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return most, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=300_000)
    largest = parser.parse_args().experiments * LONGER
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        make_agent(folder)
        runs = {}
        for count in sorted({largest // d // t for *_, d in EXPORTS for t in (1, LONGER)}):
            definition, out = folder / f"{count}.arrow", folder / f"out_{count}"
            write_definition(experiments(count), definition)
            peak_mib(
                ["run", "--agent_path", name, "--definition_file", str(definition),
                 "--output_dir", str(out), "--backend", "inline", "--quiet"]
            )  # fmt: skip
            runs[count] = str(out)
        for kind, by, share in EXPORTS:
            for count in (largest // share // LONGER, largest // share):
                target = str(folder / f"{kind}_{by}_{count}")
                peak, seconds = peak_mib(
                    ["export", runs[count], "--format", kind, "--by", by, "--output", target]
                )
                print(f"{kind} by {by}: {count:,} experiments, {peak:.0f} MiB, {seconds:.1f} s")
        for count in (largest // LONGER, largest):
            page = str(folder / f"{count}.html")
            peak, seconds = peak_mib(["report", runs[count], "--output", page])
            print(f"report: {count:,} experiments, {peak:.0f} MiB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
