"""Peak memory of a sweep over a large convolutional network and many inputs, under a ceiling.

Patches every channel of the first layers of Atari's network on thousands of inputs with
ever lower ``memory_bytes`` (``--memory_per_actor``) and prints what the process really took
beyond its start, each in a process of its own.

    python benchmarks/memory_ceiling.py [--inputs 2000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CHILD = """
import resource, sys, time
sys.path.insert(0, {folder!r})
import torch
from engine import nature_cnn
from raypatch.engine.patcher import Patcher
torch.set_num_threads(1)
torch.manual_seed(0)
network = nature_cnn().eval()
source, target = torch.rand({inputs}, 4, 84, 84), torch.rand({inputs}, 4, 84, 84)
network(target[:1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
patcher = Patcher(network, memory_bytes={ceiling} << 20)
started = time.perf_counter()
run = patcher.prepare(source, target)
out = run([{{"0": [0]}}, {{"2": [1]}}, {{"4": [5]}}, {{"7": [9]}}])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, len(run._parts), time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    inputs = parser.parse_args().inputs
    print(f"{'ceiling MiB':>12} {'taken MiB':>10} {'parts':>6} {'seconds':>8}")
    for ceiling in (4096, 1024, 256):
        code = CHILD.format(folder=str(Path(__file__).parent), inputs=inputs, ceiling=ceiling)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        taken, parts, seconds = map(float, done.stdout.split())
        print(f"{ceiling:12} {taken:10.0f} {parts:6.0f} {seconds:8.1f}")


if __name__ == "__main__":
    main()
