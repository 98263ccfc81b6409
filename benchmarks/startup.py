"""Wall time of the whole ``raypatch run`` on the example beside the bare cost of Ray.

Bare: a process that starts a local Ray with two actors that import torch, calls each once
and shuts Ray down. Both are whole processes, in turn, in one run.

    python benchmarks/startup.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BARE = """
import os
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
import logging, ray
ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", num_cpus=2,
         object_store_memory=256 << 20, log_to_driver=False, logging_level=logging.ERROR)
@ray.remote(num_cpus=1)
class Actor:
    def __init__(self):
        import torch
    def ready(self):
        return 1
actors = [Actor.remote() for _ in range(2)]
assert ray.get([a.ready.remote() for a in actors]) == [1, 1]
ray.shutdown()
"""


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = [
                sys.executable, "-m", "raypatch.cli", "run",
                "--agent_path", "examples/lavacrossing_dqn",
                "--definition_file", "Definitions/single_neuron_experiment.json",
                "--output_dir", f"{folder}/out", "--num_actors", "2",
            ]  # fmt: skip
            rows.append((seconds_of([sys.executable, "-c", BARE]), seconds_of(run)))
    bare, ours = (statistics.median(column) for column in zip(*rows))
    more = statistics.median(b - a for a, b in rows)
    print(f"bare Ray, two torch actors  {bare:6.2f} s")
    print(f"raypatch run on the example {ours:6.2f} s")
    print(f"more, pair by pair (median) {more:+6.2f} s")


if __name__ == "__main__":
    main()
