"""A directory in any state that a crash, a full disk or a careless hand can leave it in."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LAVA
from kill_points import state_of

import raypatch
from raypatch.errors import InputError, RunError
from raypatch.results import layout, locks, store
from raypatch.results.store import RemoteStore
from raypatch.sweeps import recovery
from raypatch.sweeps.sweep import Range

HERE = Path(__file__).parent


@pytest.fixture
def small(tmp_path):
    """A definition that is cut into three items."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps([{"q_net.0": [i]} for i in range(33)]))
    return path


@pytest.fixture
def finished(run_inline, small, tmp_path):
    return run_inline(LAVA, small, out=tmp_path / "finished")


def resume(command, small, out, *more):
    return command(
        "run", "--agent_path", LAVA, "--definition_file", small, "--output_dir", out,
        "--backend", "inline", *more,
    )  # fmt: skip


@contextmanager
def another_run(out):
    with ranged_run(out, 0, 33):
        yield


@contextmanager
def ranged_run(out, first, last):
    """A process of its own that holds a range as a run does; killed, not ended."""
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from pathlib import Path; from raypatch.results.locks import RangeLock\n"
         "with RangeLock(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):\n"
         "    print('held', flush=True); time.sleep(60)",
         str(out), str(first), str(last)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.kill()
        holder.wait()


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


def test_a_second_driver_is_refused_while_the_first_lives_and_not_after_it_was_killed(
    command, small, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    with another_run(out):
        assert locks.RangeLock.held(out)
        ended = resume(command, small, out)
        assert ended.code == 2 and "another run is writing here" in ended.err
        assert len(ended.err.strip().splitlines()) == 1
    assert not locks.RangeLock.held(out)
    assert resume(command, small, out).code == 0


def test_ranges_of_one_process_hold_their_own_experiments_until_each_ends(tmp_path):
    first, second = locks.RangeLock(tmp_path, 0, 50), locks.RangeLock(tmp_path, 50, 100)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    with pytest.raises(InputError, match="another run is writing here"):
        locks.RangeLock(tmp_path, 0, 60).__enter__()
    program = (
        "import sys; from pathlib import Path; from raypatch.results.locks import RangeLock\n"
        "print(RangeLock.held(Path(sys.argv[1])))"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(words, capture_output=True, text=True).stdout.strip() == "True"
    second.__exit__()
    assert not locks.RangeLock.held(tmp_path)


def test_a_refused_run_does_not_hide_who_holds_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    with another_run(tmp_path):
        with pytest.raises(InputError, match="another run is writing here"):
            locks.RangeLock(tmp_path, 0, 10).__enter__()
        assert locks.RangeLock.held(tmp_path)


def test_two_drivers_on_disjoint_ranges_of_one_directory_make_one_sweep(
    small, tmp_path, run_inline
):
    out = tmp_path / "out"
    drivers = [
        subprocess.Popen(
            [sys.executable, "-m", "raypatch.cli", "run", "--agent_path", str(LAVA),
             "--definition_file", str(small), "--output_dir", str(out), "--backend", "inline",
             "--quiet", "--start_index", str(first), "--end_index", str(last)],
        ) for first, last in ((0, 11), (11, 33))
    ]  # fmt: skip
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    assert raypatch.open_results(out).complete
    assert state_of(out) == state_of(run_inline(LAVA, small, out=tmp_path / "alone"))


def test_status_tells_running_stopped_and_complete_and_what_to_type(command, small, tmp_path):
    out = tmp_path / "out"
    more = ("--quiet", "--end_index", 11)
    assert resume(command, small, out, *more).code == 0
    stopped = command("status", out)
    assert "stopped" in stopped.out and "run the same command again" in stopped.out
    with another_run(out):
        assert json.loads(command("status", out, "--json").out)["state"] == "running"
    assert resume(command, small, out, "--quiet").code == 0
    assert json.loads(command("status", out, "--json").out)["state"] == "complete"


def test_a_clock_that_jumps_changes_nothing(monkeypatch, command, small, finished, tmp_path):
    jumps = iter([1e9, -1e9] * 10_000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: max(0.0, real() + next(jumps)))
    out = tmp_path / "out"
    assert resume(command, small, out, "--quiet").code == 0
    assert state_of(out) == state_of(finished)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EACCES, "make it writable"), (errno.EROFS, "make it writable"),
     (errno.EDQUOT, "free some space"), (errno.ENOSPC, "free some space"),
     (errno.EIO, "run the same command again")],
)  # fmt: skip
@pytest.mark.parametrize("place", ["shards", "summary", "manifest.jsonl"])
def test_a_place_that_refuses_midway_ends_the_run_with_one_line_and_it_resumes(
    monkeypatch, command, small, finished, tmp_path, number, advice, place
):
    out, real, seen = tmp_path / "out", store.on_step, []

    def refuse(step):
        if step.startswith(place) and step.endswith(": opened"):
            seen.append(step)
            if len(seen) == 2:
                raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, "on_step", refuse)
    ended = resume(command, small, out, "--quiet")
    assert ended.code == 1
    assert os.strerror(number) in ended.err and advice in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    monkeypatch.setattr(store, "on_step", real)
    assert resume(command, small, out, "--quiet").code == 0
    assert state_of(out) == state_of(finished)


@pytest.fixture
def tiny_disk(tmp_path):
    """Mounts a file system of 2 MiB; gives its folder for further mount options."""
    mount = tmp_path / "disk"
    mount.mkdir()

    def mounted(*options) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", ",".join(["size=2m", *options]), "tmpfs", str(mount)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is refused here: {done.stderr.strip()}")
        return mount

    yield mounted
    if mount.is_mount():
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_full_disk_ends_with_one_line_and_a_run_resumes_when_there_is_space(
    command, single_neurons, run_inline, tiny_disk, tmp_path, backend
):
    disk = tiny_disk()
    out, definition, ballast = disk / "out", single_neurons(LAVA), disk / "ballast"
    words = ("run", "--agent_path", LAVA, "--definition_file", definition, "--output_dir", out,
             "--backend", backend, "--save", "metrics", "--quiet", "--num_actors", 1)  # fmt: skip
    ballast.write_bytes(b"0" * (1650 << 10))
    ended = command(*words)
    assert ended.code == 1, ended.err
    assert "No space left on device" in ended.err and "free some space" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    held = raypatch.open_results(out)
    assert not held.complete and len(held.receipts) > 0
    ballast.unlink()
    ended = command(*words)
    assert ended.code == 0, ended.err
    undisturbed = run_inline(LAVA, definition, "--save", "metrics", out=tmp_path / "inline")
    assert state_of(out) == state_of(undisturbed)


def test_a_read_only_directory_is_refused_in_one_line(command, small, tiny_disk):
    ended = resume(command, small, tiny_disk("ro") / "out", "--quiet")
    assert ended.code == 1
    assert "Read-only file system; make it writable or choose another --output_dir" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_a_line_appended_after_a_torn_one_does_not_join_it(tmp_path):
    place = store.open_store(tmp_path)
    place.append_lines("lines", ["one"])
    with (tmp_path / "lines").open("ab") as file:
        file.write(b"to")
    place.append_lines("lines", ["two"])
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_a_write_that_fails_leaves_no_half_line(tmp_path, monkeypatch):
    place = store.open_store(tmp_path)
    place.append_lines("lines", ["one"])

    def full(step):
        if step.endswith("half written"):
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store, "on_step", full)
    with pytest.raises(raypatch.errors.RunError, match="free some space"):
        place.append_lines("lines", ["two"])
    assert (tmp_path / "lines").read_text() == "one\n"


def test_a_write_that_is_cut_short_is_an_error_and_leaves_no_file(tmp_path):
    """A limit on the size of files makes the system take only a part, as a full disk may."""
    program = (
        "import resource, sys\n"
        "from raypatch.errors import RunError\n"
        "from raypatch.results.store import open_store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    open_store(sys.argv[1]).write('part', bytes(1500))\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "cannot be written: File too large; raise the limit" in told
    assert list(tmp_path.iterdir()) == []


def test_a_file_renamed_while_a_directory_is_listed_is_no_error(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")

    def scandir(path):
        found = list(os_scandir(path))
        (tmp_path / "a").rename(tmp_path / "c")
        return iter(found)

    os_scandir = os.scandir
    monkeypatch.setattr(store.os, "scandir", scandir)
    assert store.open_store(tmp_path).entries() == {"b": 1}


def test_overwriting_is_refused_while_another_range_is_being_written(command, small, tmp_path):
    out = tmp_path / "out"
    assert resume(command, small, out, "--quiet", "--end_index", 11).code == 0
    before = state_of(out)
    with ranged_run(out, 0, 11):
        ended = resume(command, small, out, "--overwrite", "--start_index", 11)
        assert ended.code == 2 and "another run is writing" in ended.err
    assert state_of(out) == before


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


def test_a_lease_is_refused_to_the_second_whatever_is_refreshed_in_between(tmp_path):
    import pyarrow.fs

    system = pyarrow.fs.LocalFileSystem()
    with locks.Lease("here", system, str(tmp_path)):
        second = locks.Lease("here", system, str(tmp_path))
        put = second._put

        def put_and_be_overtaken():
            put()
            for path in tmp_path.glob(f"{locks.Lease.PREFIX}*"):
                if path.name != second._name:
                    os.utime(path)  # the holder's refresh comes right after

        second._put = put_and_be_overtaken
        with pytest.raises(raypatch.errors.InputError, match="another run is writing here"):
            second.__enter__()
    assert list(tmp_path.iterdir()) == []


class FullSystem:
    """A remote file system that takes no more objects and lists none."""

    type_name = "s3"

    def open_output_stream(self, path, **_):
        raise OSError(28, "no space left")

    def get_file_info(self, _):
        raise OSError(5, "no answer")


def test_a_lease_that_cannot_be_put_is_one_line(tmp_path):
    store = RemoteStore("s3://bucket/out", FullSystem(), "bucket/out")
    with pytest.raises(RunError, match="s3://bucket/out: cannot be written"):
        store.lock(0, 1).__enter__()
    with pytest.raises(RunError, match="s3://bucket/out: cannot be read"):
        store.busy()


def test_lines_of_a_removed_file_are_not_written_by_a_later_flush(tmp_path):
    import pyarrow.fs

    store = RemoteStore("file", pyarrow.fs.LocalFileSystem(), str(tmp_path))
    store.append_lines("a.jsonl", ["{}"])
    store.append_lines("a.jsonl", ["{}"])  # kept for the next put
    store.remove("a.jsonl")
    store.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_named_and_not_taken_for_damage(command, finished, small):
    path = finished / layout.SWEEP
    record = json.loads(path.read_text())
    del record["n_outputs"]
    path.write_text(json.dumps(record | {"format_version": 2}))
    for ended in (command("status", finished), resume(command, small, finished)):
        assert ended.code == 2
        assert "format version 2; this raypatch reads 1" in ended.err
