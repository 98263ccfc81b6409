"""Kills a small inline run at every step of every write, resumes it, and compares the result.

A program of its own, because it forks: torch must not have started threads before.
Usage: kill_points.py AGENT DEFINITION FOLDER [PAIRS]; prints one JSON object.

``PAIRS`` runs are killed twice: at a random step, and at a random step of the resuming run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from raypatch import cli
from raypatch.results import store


def run(arguments, on_step) -> int:
    """The command in a child process; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        store.on_step = on_step
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(cli.main(arguments))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killer(at: int):
    """Kill this process at its ``at``-th step."""
    steps = iter(range(1 << 30))

    def on_step(_: str) -> None:
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


def state_of(out: Path) -> dict[str, object]:
    """Everything a reader believes, without times and attempts."""
    files = {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for folder in ("shards", "summary")
        for p in sorted((out / folder).iterdir())
    }
    manifest = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    for line in manifest:
        del line["seconds"], line["tries"]
    visible = {p.name for p in out.iterdir()} - {".lock"}
    return {
        "files": files,
        "manifest": sorted(manifest, key=lambda line: line["first"]),
        "experiments": hashlib.sha256((out / "experiments.arrow").read_bytes()).hexdigest(),
        "baselines": hashlib.sha256((out / "baselines.arrow").read_bytes()).hexdigest(),
        "names": sorted(visible),
    }


def main(agent: str, definition: str, folder: str, pairs: int = 0) -> None:
    torch.set_num_threads(1)

    def arguments(out: Path) -> list[str]:
        return [
            "run", "--agent_path", agent, "--definition_file", definition, "--output_dir",
            str(out), "--backend", "inline", "--quiet", "--verify", "0",
        ]  # fmt: skip

    undisturbed, log = Path(folder) / "undisturbed", Path(folder) / "steps"

    def record(step: str) -> None:
        with log.open("a") as file:
            file.write(f"{step}\n")

    assert run(arguments(undisturbed), record) == 0
    expected, steps = state_of(undisturbed), log.read_text().splitlines()
    wrong, out = [], Path(folder) / "out"
    draw = random.Random(0)
    plans = [(k,) for k in range(len(steps))]
    plans += [(draw.randrange(len(steps)), draw.randrange(len(steps))) for _ in range(pairs)]
    for kills in plans:
        shutil.rmtree(out, ignore_errors=True)
        for place, at in enumerate(kills):
            code = run(arguments(out), killer(at))
            if code != -signal.SIGKILL and place == 0:
                wrong.append([kills, f"was not killed: {code}"])
        code = run(arguments(out), lambda _: None)
        if code != 0:
            wrong.append([kills, f"resume ended with {code}"])
        elif state_of(out) != expected:
            wrong.append([kills, f"differs after {steps[kills[0]]}"])
    print(json.dumps({"steps": steps, "plans": len(plans), "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:4], pairs=int(sys.argv[4]) if len(sys.argv) > 4 else 0)
