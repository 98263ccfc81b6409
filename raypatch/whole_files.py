"""Files and folders for people that appear with everything in them, or not at all.

What a run commits goes through :mod:`raypatch.results.store`, which also survives the machine.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, of the same suffix; it takes the target's place when all is written."""
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    with _named(target, partial):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the target's name when everything is in it."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _named(target, partial):
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _named(target: Path, partial: Path) -> Iterator[None]:
    """What goes wrong with the partial one, which nobody knows, is said of the target, and a full
    disk, too, of which Arrow names no file."""
    try:
        yield
    except OSError as error:
        name = error.filename
        is_partial = name is not None and str(name).startswith(str(partial))
        if error.errno is None or not (is_partial or (name is None and error.errno in FULL)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
