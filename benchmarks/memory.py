"""Memory of the driver against the number of experiments, on Ray with one actor.

Runs the example agent over ever longer definitions and prints the driver's peak resident
memory, the definition's own size in memory, and the rest.

    python benchmarks/memory.py [--sizes 10000,100000,1000000]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).parent.parent
AGENT = ROOT / "examples" / "lavacrossing_dqn"
BYTES_EACH = 48  # two neurons in two layers: offsets, layers, neurons


def write_definition(path: Path, size: int) -> None:
    """Pairs of neurons in two layers; column-wise, so that writing is no matter."""
    i = np.arange(size)
    layers = pa.DictionaryArray.from_arrays(
        pa.array(np.tile([0, 1], size).astype(np.int32)), pa.array(["q_net.0", "q_net.2"])
    ).cast(pa.string())
    pairs = np.stack([i % 64, i // 64 % 64], 1).astype(np.int32).ravel()
    cells = pa.ListArray.from_arrays(np.arange(2 * size + 1, dtype=np.int32), pa.array(pairs))
    ends = pa.array(np.arange(0, 2 * size + 1, 2, dtype=np.int32))
    table = pa.table(
        {
            "layers": pa.ListArray.from_arrays(ends, layers),
            "neurons": pa.ListArray.from_arrays(ends, cells),
        }
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=65536)


CHILD = """
import resource, sys
from raypatch.cli import main
code = main(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(definition: Path, out: Path) -> float:
    words = [
        "run", "--agent_path", AGENT, "--definition_file", definition, "--output_dir", out,
        "--num_actors", 1, "--save", "summary", "--quiet", "--metrics", "kl_divergence",
        "--input_ids", "lava_beside_00,lava_beside_01",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, words)], capture_output=True, text=True
    )
    code, kib = done.stdout.split()[-2:]
    if code != "0":
        raise SystemExit(done.stderr)
    return int(kib) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    sizes = [int(size) for size in parser.parse_args().sizes.split(",")]
    assert resource.RUSAGE_SELF == 0
    print(f"{'experiments':>12} {'peak MiB':>9} {'definition MiB':>15} {'rest MiB':>9}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            definition = Path(folder) / "d.arrow"
            write_definition(definition, size)
            peak = peak_mib(definition, Path(folder) / "out")
        own = size * BYTES_EACH / 2**20
        print(f"{size:12,} {peak:9.0f} {own:15.1f} {peak - own:9.0f}")


if __name__ == "__main__":
    main()
