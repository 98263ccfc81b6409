"""Standard output and error that are closed, full or read by nobody."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LAVA, ROOT

needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="not there")


@pytest.fixture(autouse=True)
def output_is_buffered(monkeypatch):
    """As in a terminal: unbuffered, nothing would be left to write at a process's end."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def test_a_reader_that_goes_away_is_no_failure(run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA))
    for words in (["rank", out, "--csv", "--top", "1000"], ["status", out]):
        command = subprocess.Popen(
            [sys.executable, "-m", "raypatch.cli", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        command.stdout.close()
        assert (command.stderr.read(), command.wait()) == (b"", 0)


@needs_full_device
def test_output_that_cannot_be_written_is_one_line(run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA))
    with Path("/dev/full").open("wb") as full:
        words = [sys.executable, "-m", "raypatch.cli", "status", str(out)]
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "raypatch: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    "closed", ["2>&-", ">&- 2>&- <&-", pytest.param("2>/dev/full", marks=needs_full_device)]
)
def test_a_run_that_nobody_can_read_of_is_complete(tmp_path, closed):
    words = [
        sys.executable, "-m", "raypatch.cli", "run", "--agent_path", LAVA, "--definition_file",
        ROOT / "Definitions" / "layer_experiment.json", "--output_dir", tmp_path / "out", "--backend", "inline", "--save", "summary",
    ]  # fmt: skip
    done = subprocess.run(f"{shlex.join(map(str, words))} {closed}", shell=True)
    assert done.returncode == 0 and (tmp_path / "out" / "_SUCCESS").exists()
