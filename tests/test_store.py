"""Files that are whole or not there, on disks that are full, refuse or fail midway."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LAVA, resume
from kill_points import state_of

import raypatch
from raypatch.results import store
from raypatch.results.store import RemoteStore


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


def test_lines_of_a_removed_file_are_not_written_by_a_later_flush(tmp_path):
    import pyarrow.fs

    store = RemoteStore("file", pyarrow.fs.LocalFileSystem(), str(tmp_path))
    store.append_lines("a.jsonl", ["{}"])
    store.append_lines("a.jsonl", ["{}"])  # kept for the next put
    store.remove("a.jsonl")
    store.flush()
    assert list(tmp_path.iterdir()) == []
