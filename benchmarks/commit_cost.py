"""What durability costs: flushing and hashing as a share of a run of ten million rows.

Runs the example agent inline, with clocks around every fsync and every sha256, for each
``--save`` mode. Hashing overlaps with flushing; what counts is the time that passes.

    python benchmarks/commit_cost.py [--rows 10000000] [--agent examples/lavacrossing_dqn]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import raypatch
from raypatch.results import schema, store

ROOT = Path(__file__).parent.parent


class Clock:
    """Seconds during which at least one call was under way, in any thread."""

    def __init__(self) -> None:
        self.seconds, self._open, self._since = 0.0, 0, 0.0
        self._lock = threading.Lock()

    def around(self, function):
        def timed(*args, **kwargs):
            with self._lock:
                if not self._open:
                    self._since = time.perf_counter()
                self._open += 1
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self._open -= 1
                    if not self._open:
                        self.seconds += time.perf_counter() - self._since

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--agent", default=str(ROOT / "examples" / "lavacrossing_dqn"))
    options = parser.parse_args()
    agent = raypatch.load_agent(options.agent)
    layers = list(agent.layers)[:2]
    sizes = [agent.layers[name].neurons for name in layers]
    inputs = json.loads((Path(options.agent) / "activation_inputs/clean_inputs.json").read_text())
    n_experiments = -(-options.rows // (2 * len(inputs)))
    couples = itertools.cycle(itertools.product(*map(range, sizes)))
    fsync, sha256 = os.fsync, hashlib.sha256
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        definition = Path(folder) / "definition.jsonl"
        with definition.open("w") as file:
            for one, two in itertools.islice(couples, n_experiments):
                file.write(json.dumps({layers[0]: [one], layers[1]: [two]}) + "\n")
        for save in schema.SAVE_MODES:
            clock = Clock()
            os.fsync = clock.around(fsync)
            store.hashlib.sha256 = clock.around(sha256)
            started = time.perf_counter()
            results = raypatch.run(
                agent_path=options.agent, definition_file=str(definition),
                output_dir=f"{folder}/{save}", backend="inline", save=save, verify=0,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            os.fsync, store.hashlib.sha256 = fsync, sha256
            rows = sum(receipt.rows for receipt in results.receipts)
            size = sum(n for r in results.receipts for n, _ in r.files.values())
            print(
                f"--save {save:8} {rows:,} rows, {size / 1e6:,.0f} MB in {seconds:.1f} s: flushing "
                f"and hashing {clock.seconds:.2f} s, {clock.seconds / seconds:.1%}"
            )


if __name__ == "__main__":
    main()
