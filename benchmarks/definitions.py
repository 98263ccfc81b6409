"""Definitions of any size: generating, checking and describing experiments a second, and memory.

python benchmarks/definitions.py [--experiments 100000000]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raypatch.definition_files import read_definition, write_definition
from raypatch.definitions import generate_chunks
from raypatch.results.store import open_store
from raypatch.sweeps.records import write_experiments

LAYERS = 4


def step(name: str, n_experiments: int, folder: str) -> None:
    """One step in a process of its own, so that its peak memory is its own."""
    sizes = {f"q_net.{2 * i}": n_experiments // LAYERS for i in range(LAYERS)}
    path = Path(folder) / "definition.arrow"
    started = time.perf_counter()
    if name == "generate":
        write_definition(generate_chunks("single_neuron", sizes, include_output_logits=False), path)
    else:
        experiments = read_definition(path, sizes)
        if name == "describe":
            started = time.perf_counter()
            write_experiments(open_store(folder), experiments)
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    anonymous = next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )
    print(
        f"{name:9} {n_experiments:,} in {seconds:6.1f} s, "
        f"{n_experiments / seconds / 1e6:5.2f} M/s, "
        f"peak {usage:,.0f} MiB with mapped files, {anonymous:,.0f} MiB without"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=100_000_000)
    parser.add_argument("--step")
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.step:
        step(options.step, options.experiments, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for count in (options.experiments // 100, options.experiments):
            for name in ("generate", "check", "describe"):
                subprocess.run(
                    [sys.executable, __file__, "--step", name, "--experiments", str(count),
                     "--folder", folder], check=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
