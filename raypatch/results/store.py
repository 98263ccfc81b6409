"""Files of an output directory, written so that each exists whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raypatch.errors import RunError


class Store:
    """One directory; names are relative to it. Raises RunError where the disk refuses."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, name: str) -> Path:
        return self.root / name

    def make(self, *folders: str) -> None:
        """Create the directory and folders in it."""
        with _disk_errors(self.root):
            for folder in ("", *folders):
                self.path(folder).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: bytes | memoryview) -> str:
        """Write a whole file under a dot-name, flush it to the disk, rename; its sha256."""
        target = self.path(name)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        with _disk_errors(target):
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
                sync_directory(target.parent)
            finally:
                partial.unlink(missing_ok=True)
        return hashlib.sha256(content).hexdigest()

    def append_line(self, name: str, line: str) -> None:
        """Append one line and flush it to the disk."""
        with _disk_errors(self.path(name)), self.path(name).open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, name: str) -> bytes | None:
        """A file's content, None where there is no such file."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{self.path(name)}: cannot be read: {error.strerror}") from None


def sync_directory(path: Path) -> None:
    """Make a rename in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some space and run the same command again to resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "make it writable or choose another --output_dir"
        else:
            fix = "run the same command again to resume"
        raise RunError(f"{path}: cannot be written: {error.strerror}; {fix}") from None
