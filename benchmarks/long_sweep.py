"""Ten million experiments x 8 pairs x 2 directions: speed against a sweep 100 times smaller,
and the memory of driver and actors over time.

    python benchmarks/long_sweep.py [--experiments 10000000] [--plot docs/memory_over_time.png]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

import raypatch
from raypatch.definition_files import write_definition
from raypatch.definitions import CHUNK, Experiments

LAYERS = ("0", "2", "4")
WIDTH = 64


def experiments(count: int, width: int = WIDTH) -> Iterator[Experiments]:
    """Two neurons of the first layer and one of the second, at random: hardly any twice."""
    rng = np.random.default_rng(0)
    for first in range(0, count, CHUNK):
        n = min(CHUNK, count - first)
        one = rng.integers(width, size=n)
        neurons = np.column_stack(
            [one, (one + 1 + rng.integers(width - 1, size=n)) % width, rng.integers(width, size=n)]
        )
        ends = np.arange(1, n + 1)[:, None] * 3
        offsets = np.concatenate([[0], (ends - [1, 0]).ravel()]).astype(np.int64)
        yield Experiments(
            LAYERS, np.arange(n + 1, dtype=np.int64) * 2,
            np.tile(np.array([0, 1], np.int32), n), offsets, neurons.astype(np.int32).ravel(),
        )  # fmt: skip


def make_agent(
    folder: Path, width: int = WIDTH, hidden: int = 2, *, n_in: int = 8, n_out: int = 4,
    pairs: int = 8,
) -> None:  # fmt: skip
    """An agent of ``n_in`` inputs, hidden layers of a width, ``n_out`` outputs; with its pairs."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [nn.Linear(n_in, width), nn.ReLU()]
    for _ in range(hidden - 1):
        modules += [nn.Linear(width, width), nn.ReLU()]
    network = nn.Sequential(*modules, nn.Linear(width, n_out))
    torch.save(network.state_dict(), folder / "policy.pt")
    (folder / "agent.json").write_text('{"file": "policy.pt", "activation": "relu"}')
    inputs = folder / "activation_inputs"
    inputs.mkdir()
    for side in ("clean", "corrupted"):
        rows = {f"obs_{i}": torch.randn(n_in).tolist() for i in range(pairs)}
        (inputs / f"{side}_inputs.json").write_text(json.dumps(rows))


@dataclass(frozen=True)
class Sample:
    """Memory at a time in MiB: anonymous of driver and largest actor (mapped files are the
    kernel's to take back), shared of the object store."""

    seconds: float
    driver: float
    actor: float
    object_store: float


def memory_of(pid: int, kind: str) -> float:
    """MiB of one kind of a process's memory, by the kernel's own count."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(kind))


def watched(arguments: list[str]) -> tuple[float, list[Sample]]:
    """Run a command; seconds it took, and its memory twice a second."""
    started, samples = time.perf_counter(), []
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        # A process may end between being listed and being read; the next sample has the rest.
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, StopIteration):
            samples.append(_sample(process.pid, time.perf_counter() - started))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    return time.perf_counter() - started, samples


def _sample(pid: int, seconds: float) -> Sample:
    by_name: dict[str, list[int]] = {"actor": [], "raylet": []}
    for child in psutil.Process(pid).children(recursive=True):
        word = " ".join(child.cmdline()[:1])
        if "ray::WorkerActor" in word:
            by_name["actor"].append(child.pid)
        elif word.endswith("raylet"):
            by_name["raylet"].append(child.pid)
    return Sample(
        seconds,
        memory_of(pid, "RssAnon"),
        max((memory_of(actor, "RssAnon") for actor in by_name["actor"]), default=0.0),
        sum(memory_of(raylet, "RssShmem") for raylet in by_name["raylet"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=10_000_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--plot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder, speeds = Path(name), {}
        make_agent(folder)
        for count in (options.experiments // 100, options.experiments):
            definition = folder / f"{count}.arrow"
            write_definition(experiments(count), definition)
            out = folder / f"out_{count}"
            seconds, samples = watched(
                [sys.executable, "-m", "raypatch.cli", "run", "--agent_path", name,
                 "--definition_file", str(definition), "--output_dir", str(out), "--save",
                 "summary", "--num_actors", str(options.actors), "--quiet"]
            )  # fmt: skip
            results = raypatch.open_results(out)
            run = results.sweep["runs"][-1]
            busy = sum(r.seconds for r in results.receipts)
            running = run["seconds"] - run["startup_seconds"]
            speeds[count] = run["passes"] / running
            most = {
                name: max(getattr(sample, name) for sample in samples)
                for name in ("driver", "actor", "object_store")
            }
            print(
                f"{count:,} experiments, {run['passes']:,} passes: {speeds[count]:,.0f} passes/s, "
                f"{running:.1f} s of {seconds:.1f} s in all; actors computing "
                f"{busy / options.actors / running:.1%} of the time; driver at most "
                f"{most['driver']:.0f} MiB, an actor {most['actor']:.0f} MiB, object store "
                f"{most['object_store']:.0f} MiB"
            )
        large, small = speeds[options.experiments], speeds[options.experiments // 100]
        print(f"the large one runs at {large / small:.2f} of the small one's speed")
        if options.plot:
            draw(samples, options.plot)


def draw(samples: list[Sample], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    times = [sample.seconds for sample in samples]
    for name, label, colour in (
        ("driver", "driver", "#0072B2"), ("actor", "largest actor", "#D55E00"),
        ("object_store", "object store", "#009E73"),
    ):  # fmt: skip
        axes.plot(times, [getattr(s, name) for s in samples], label=label, color=colour)
    axes.set_xlabel("seconds")
    axes.set_ylabel("memory (MiB)")
    axes.set_ylim(0)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
