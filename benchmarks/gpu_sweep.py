"""A sweep of dqn_mlp on a GPU, end to end with Ray: passes a second after start-up, with one actor
and with several on the same GPU.

Three neurons in two layers an experiment, 64 pairs, two directions.

    python benchmarks/gpu_sweep.py [--experiments 2000000] [--save summary] [--shares 1,0.5,0.25]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from long_sweep import experiments, make_agent

import raypatch
from raypatch.definition_files import write_definition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=2_000_000)
    parser.add_argument("--save", default="summary")
    parser.add_argument("--shares", default="1,0.5,0.25", help="of a GPU, for an actor")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        make_agent(folder, hidden=3, n_in=106, n_out=5, pairs=64)
        definition = folder / "definition.arrow"
        write_definition(experiments(options.experiments), definition)
        for share in options.shares.split(","):
            out = folder / f"out_{share}"
            subprocess.run(
                [sys.executable, "-m", "raypatch.cli", "run", "--agent_path", name,
                 "--definition_file", str(definition), "--output_dir", str(out), "--save",
                 options.save, "--device", "cuda", "--gpus_per_actor", share, "--quiet"],
                check=True,
            )  # fmt: skip
            results = raypatch.open_results(out)
            run = results.sweep["runs"][-1]
            running = run["seconds"] - run["startup_seconds"]
            busy = sum(receipt.seconds for receipt in results.receipts)
            actors = round(1 / float(share))
            print(f"{actors} actors: {run['passes']:,} passes, {run['passes'] / running:,.0f} "
                  f"a second, {running:.2f} s after {run['startup_seconds']:.1f} s of starting; "
                  f"actors computing {busy / actors / running:.0%} of the time")  # fmt: skip


if __name__ == "__main__":
    main()
