"""A directory in any state that a crash or a careless hand can leave it in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LAVA, resume
from kill_points import state_of

from raypatch.results import layout, store
from raypatch.sweeps import recovery
from raypatch.sweeps.sweep import Range

HERE = Path(__file__).parent


def manifest_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def rewrite(out, lines) -> None:
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_killed_at_any_step_of_any_write_a_resumed_run_ends_as_if_nothing_had_happened(tmp_path):
    definition = tmp_path / "two_items.json"
    definition.write_text(json.dumps([{"q_net.0": [i]} for i in range(22)]))
    ended = subprocess.run(
        [sys.executable, str(HERE / "kill_points.py"), str(LAVA), str(definition), str(tmp_path),
         "20"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["wrong"] == []
    kinds = {step.split(": ")[1] for step in found["steps"]}
    assert kinds == {
        "opened", "half written", "written", "synced", "renamed", "directory synced",
    }  # fmt: skip
    names = {step.split(": ")[0].split("-")[0] for step in found["steps"]}
    assert {"sweep.json", "manifest.jsonl", "_SUCCESS", "shards/part", "summary/part"} <= names


def test_a_torn_last_line_is_dropped_and_its_part_adopted_without_computing(
    command, small, finished
):
    expected = state_of(finished)
    content = (finished / "manifest.jsonl").read_bytes()
    (finished / "manifest.jsonl").write_bytes(content[:-20])
    (finished / "_SUCCESS").unlink()
    ended = resume(command, small, finished)
    assert ended.code == 0
    assert "kept 1 part that an earlier run finished but did not record" in ended.err
    assert "= 0 passes" in ended.err
    assert state_of(finished) == expected


def test_a_part_of_another_sweep_is_not_adopted(command, small, finished):
    expected = state_of(finished)
    lines = manifest_of(finished)
    rewrite(finished, lines[:-1])
    part = layout.part_name(lines[-1]["first"], lines[-1]["last"])
    for folder in ("shards", "summary"):
        path = finished / folder / part
        path.write_bytes(
            path.read_bytes().replace(b"raypatch.fingerprint", b"raypatch.fingerprnit")
        )
    ended = resume(command, small, finished)
    assert ended.code == 0 and "kept" not in ended.err
    assert state_of(finished) == expected


@pytest.mark.parametrize("damage", ["missing", "changed", "cut"])
@pytest.mark.parametrize("folder", ["shards", "summary"])
def test_a_committed_part_that_is_gone_or_changed_is_computed_again_and_named(
    command, small, finished, damage, folder
):
    expected = state_of(finished)
    victim = sorted((finished / folder).iterdir())[1]
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    ended = resume(command, small, finished)
    assert ended.code == 0
    assert f"note: {victim.name}: {folder}/{victim.name}" in ended.err
    assert "computed again" in ended.err
    assert state_of(finished) == expected


def test_leftovers_of_dead_attempts_are_removed(command, small, finished):
    expected = state_of(finished)
    rewrite(finished, manifest_of(finished)[:-1])
    lonely = finished / "shards" / layout.part_name(11, 17)
    lonely.write_bytes(b"half of something")
    partial = finished / "shards" / f".{layout.part_name(11, 22)}.4711.partial"
    partial.write_bytes(b"x")
    (sorted((finished / "summary").iterdir())[-1]).unlink()
    assert resume(command, small, finished).code == 0
    assert state_of(finished) == expected


def test_a_clock_that_jumps_changes_nothing(monkeypatch, command, small, finished, tmp_path):
    jumps = iter([1e9, -1e9] * 10_000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: max(0.0, real() + next(jumps)))
    out = tmp_path / "out"
    assert resume(command, small, out, "--quiet").code == 0
    assert state_of(out) == state_of(finished)


def test_what_another_run_is_just_writing_is_left_alone(tmp_path):
    place = store.open_store(tmp_path)
    place.make("shards", "summary")
    theirs, mine = (recovery.beacon_name(Range(*r)) for r in ((0, 5), (5, 9)))
    for name in (theirs, mine, "._SUCCESS.77.partial"):
        (tmp_path / name).write_bytes(b"x")
    recovery.remove_partials(place, Range(5, 9))
    assert [path.name for path in tmp_path.iterdir() if "beacon" in path.name] == [theirs]
    assert not (tmp_path / "._SUCCESS.77.partial").exists()


@pytest.mark.parametrize("name", ["experiments.arrow", "baselines.arrow"])
def test_a_lost_record_is_written_again_by_the_same_command(command, small, finished, name):
    content = (finished / name).read_bytes()
    (finished / name).unlink()
    assert resume(command, small, finished, "--quiet").code == 0
    assert (finished / name).read_bytes() == content


def test_a_newer_format_is_named_and_not_taken_for_damage(command, finished, small):
    path = finished / layout.SWEEP
    record = json.loads(path.read_text())
    del record["n_outputs"]
    path.write_text(json.dumps(record | {"format_version": 2}))
    for ended in (command("status", finished), resume(command, small, finished)):
        assert ended.code == 2
        assert "format version 2; this raypatch reads 1" in ended.err
