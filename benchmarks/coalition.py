"""Candidate sets a second of ``raypatch coalition``, the whole search with its files.

python benchmarks/coalition.py [--max_size 30] [--candidates 128]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from raypatch.searches.coalition import SearchOptions, find_coalition

EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_size", type=int, default=30)
    parser.add_argument("--candidates", type=int, default=128)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for metric in ("kl_divergence", "top_logit_delta_magnitude"):
        options = SearchOptions(metric, candidates=given.candidates)
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            ends: list[float] = []

            def on_step(_: object, ends: list[float] = ends) -> None:
                ends.append(time.perf_counter())

            steps = find_coalition(
                str(EXAMPLES / "lavacrossing_dqn"), f"{folder}/out", options,
                max_size=given.max_size, on_step=on_step,
            )  # fmt: skip
            whole = time.perf_counter() - begun
        sets = sum(step.tried for step in steps)
        searching = ends[-1] - ends[0]
        print(
            f"{metric}: {sets:,} sets in {whole:.2f} s with loading and the curve; after the "
            f"first step {(sets - steps[0].tried) / searching:,.0f} sets/s"
        )


if __name__ == "__main__":
    main()
