"""Files and folders for people that appear with everything in them, or not at all.

What a run commits goes through :mod:`raypatch.results.store`, which also survives the machine.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, of the same suffix; it takes the target's place when all is written."""
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    with _named(target):
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
    with _named(target):
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """What goes wrong is said of the target: Arrow names no file, and nobody knows the partial
    one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it is about what is read, or says all in its text
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
