"""Files for people are whole or not there, and errors name them."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time

import pytest

from raypatch.whole_files import whole_file, whole_folder


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_full_disk_is_said_of_the_target_and_nothing_is_left(tmp_path, whole):
    target = tmp_path / "results.json"
    with pytest.raises(OSError) as caught, whole(target) as partial:
        inside = partial / "a" if whole is whole_folder else partial
        inside.write_text("half of it")
        raise OSError(errno.ENOSPC, "Error writing bytes to file")  # as Arrow says it
    assert caught.value.filename == str(target) and "space" in caught.value.strerror
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_that_cannot_be_written_is_called_by_its_target(tmp_path):
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "x.json") as partial:
        partial.mkdir()
        partial.write_text("")
    assert caught.value.filename == str(tmp_path / "x.json")


def test_what_cannot_be_read_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, whole_folder(tmp_path / "out"):
        (tmp_path / "not_there").read_text()
    assert caught.value.filename == str(tmp_path / "not_there")
    with pytest.raises(OSError, match="a disk of inputs"), whole_file(tmp_path / "out"):
        raise OSError(errno.EIO, "a disk of inputs")


def test_a_terminated_command_leaves_nothing_half_written(tmp_path):
    words = [
        "generate", "--type", "single_neuron", "--layer_structure", '{"a": 2000000000}',
        "--output", tmp_path / "large.arrow",
    ]  # fmt: skip
    command = subprocess.Popen(
        [sys.executable, "-m", "raypatch.cli", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    while not any(tmp_path.iterdir()):
        assert command.poll() is None
        time.sleep(0.02)
    command.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 143 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
