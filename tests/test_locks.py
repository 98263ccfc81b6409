"""Who may write into a directory while another run does, and who is told what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from conftest import LAVA, resume
from kill_points import state_of

import raypatch
from raypatch.errors import InputError, RunError
from raypatch.results import locks
from raypatch.results.store import RemoteStore


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


def test_overwriting_is_refused_while_another_range_is_being_written(command, small, tmp_path):
    out = tmp_path / "out"
    assert resume(command, small, out, "--quiet", "--end_index", 11).code == 0
    before = state_of(out)
    with ranged_run(out, 0, 11):
        ended = resume(command, small, out, "--overwrite", "--start_index", 11)
        assert ended.code == 2 and "another run is writing" in ended.err
    assert state_of(out) == before


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
