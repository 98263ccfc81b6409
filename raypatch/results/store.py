"""An output directory's files, each of which exists whole or not at all.

Two kinds of place, one face (:class:`Store`): a directory of this machine or a shared disk
(:class:`DiskStore`), where a file is written under a dot-name, flushed and renamed; and
anything :mod:`pyarrow.fs` reaches by URI (:class:`RemoteStore`), where an object store's put
of the final key is what appears whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs

from raypatch.errors import InputError, RunError, first_line
from raypatch.results.locks import Lease, RangeLock, short_lock

HASH_CHUNK = 1 << 20
PARTIAL = ".partial"
# A put of the final key appears whole on these; elsewhere a file is moved into place.
OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})


def on_step(step: str) -> None:
    """Called at every step of a write; tests put a kill in its place, nothing else does."""


class Store(Protocol):
    """The files of one directory, by names relative to it.

    Raises RunError where the place refuses a read or write, with what to do.
    """

    location: str

    def exists(self) -> bool:
        """Whether the directory is there; raises InputError where it is a file."""

    def make(self, *folders: str) -> None:
        """Create the directory and folders in it."""

    def entries(self, folder: str = "") -> dict[str, int]:
        """Names and bytes of what lies in a folder, dot-names too; empty where it is missing."""

    def read(self, name: str) -> bytes | None:
        """A file's content, None where there is no such file."""

    def write(self, name: str, content: bytes | memoryview) -> str:
        """Write a whole file; its sha256."""

    @contextmanager
    def sink(self, name: str) -> Iterator[Any]:
        """A file to write in pieces, which appears whole at the end."""
        yield

    def append_lines(self, name: str, lines: Sequence[str]) -> None:
        """Append lines, flushed once; a torn line that a crash left before them is cut off."""

    def flush(self) -> None:
        """Make appended lines durable where :meth:`append_lines` could not at once."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def open(self, name: str) -> pa.NativeFile:
        """A file to read at any place; raises InputError where it is missing."""

    def dataset_files(self, names: list[str]) -> tuple[list[str], Any]:
        """Paths and file system for :func:`pyarrow.dataset.dataset`."""

    def lock(self, first: int, last: int) -> AbstractContextManager[None]:
        """Hold experiments ``first`` to ``last`` against other runs; InputError where held."""

    def changing(self) -> AbstractContextManager[None]:
        """Hold the directory's records for a moment, against runs on other ranges."""

    def busy(self) -> bool:
        """Whether a run is writing here now."""


def open_store(location: str | Path) -> Store:
    """The store at a path or URI; raises InputError where the URI cannot be used."""
    text = str(location)
    if text.startswith("file:"):
        address = urlsplit(text)
        if address.netloc not in ("", "localhost") or not address.path.startswith("/"):
            raise InputError(f"{text}: a file's address is file:///path, on this machine")
        return DiskStore(Path(unquote(address.path)))
    if "://" not in text:
        return DiskStore(Path(text))
    try:
        system, path = pyarrow.fs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{text}: not a usable URI: {first_line(error)}") from None
    return RemoteStore(text, system, path)


def digest_of(store: Store, name: str) -> str | None:
    """sha256 of a file, read in pieces; None where it is missing or unreadable."""
    digest = hashlib.sha256()
    try:
        with store.open(name) as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
    except (InputError, RunError, OSError):
        return None
    return digest.hexdigest()


@contextmanager
def _hashing(content: bytes | memoryview) -> Iterator[Future[str]]:
    """The sha256 of what is written meanwhile: a disk that is waited for needs no processor."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(lambda: hashlib.sha256(content).hexdigest())


class DiskStore:
    """A directory on a disk of this machine or one that all machines mount."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def path(self, name: str) -> Path:
        return self.root / name

    def exists(self) -> bool:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--output_dir {self.root}: this is a file, not a directory")
        return self.root.is_dir()

    def make(self, *folders: str) -> None:
        with _disk_errors(self.root):
            for folder in ("", *folders):
                self.path(folder).mkdir(parents=True, exist_ok=True)

    def entries(self, folder: str = "") -> dict[str, int]:
        found = {}
        with _disk_errors(self.path(folder), "read"):
            if self.path(folder).is_dir():
                for entry in os.scandir(self.path(folder)):
                    # Another run may rename or remove a file between its name and its size.
                    with suppress(FileNotFoundError):
                        found[entry.name] = entry.stat().st_size
        return found

    def read(self, name: str) -> bytes | None:
        with _disk_errors(self.path(name), "read"):
            try:
                return self.path(name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes | memoryview) -> str:
        with _hashing(content) as digest:
            with self.sink(name) as file:
                half = len(content) // 2
                file.write(content[:half])
                file.flush()
                on_step(f"{name}: half written")
                file.write(content[half:])
            return digest.result()

    @contextmanager
    def sink(self, name: str) -> Iterator[Any]:
        target = self.path(name)
        partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
        with _disk_errors(target):
            try:
                # Buffered: an unbuffered file may take less than it is given, and say so only
                # by a number.
                with partial.open("wb") as file:
                    on_step(f"{name}: opened")
                    yield file
                    file.flush()
                    on_step(f"{name}: written")
                    os.fsync(file.fileno())
                    on_step(f"{name}: synced")
                partial.replace(target)
                on_step(f"{name}: renamed")
                sync_directory(target.parent)
                on_step(f"{name}: directory synced")
            finally:
                _forgiving_unlink(partial)

    def append_lines(self, name: str, lines: Sequence[str]) -> None:
        content = "".join(f"{line}\n" for line in lines).encode()
        path = self.path(name)
        with _disk_errors(path), short_lock(self.root), path.open("a+b", buffering=0) as file:
            end = _cut_torn_line(file)
            try:
                half = len(content) // 2
                on_step(f"{name}: opened")
                _write_all(file, content[:half])
                on_step(f"{name}: half written")
                _write_all(file, content[half:])
                on_step(f"{name}: written")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
            on_step(f"{name}: synced")

    def flush(self) -> None:
        """Every append is durable already."""

    def remove(self, name: str) -> None:
        with _disk_errors(self.path(name)):
            self.path(name).unlink(missing_ok=True)

    def open(self, name: str) -> pa.NativeFile:
        try:
            return pa.memory_map(str(self.path(name)))
        except OSError:
            raise self._unreadable(name) from None

    def _unreadable(self, name: str) -> InputError:
        return InputError(
            f"{self.path(name)}: missing or unreadable; run the sweep again to restore it"
        )

    def dataset_files(self, names: list[str]) -> tuple[list[str], Any]:
        for name in names:
            if not self.path(name).is_file():
                raise self._unreadable(name)
        return [str(self.path(name)) for name in names], None

    def lock(self, first: int, last: int) -> AbstractContextManager[None]:
        return RangeLock(self.root, first, last)

    def changing(self) -> AbstractContextManager[None]:
        return short_lock(self.root)

    def busy(self) -> bool:
        return RangeLock.held(self.root)


class RemoteStore:
    """A directory on anything pyarrow reaches by URI: s3://, gs://, hdfs:// and others.

    There is no append: lines are collected and the whole file is put again, so seldom that
    it takes at most a twentieth of the time. A run that dies before loses no shard: the next
    one adopts shards that have no line.
    """

    PUT_EVERY_S = 2.0
    PUT_SHARE = 20.0

    def __init__(self, location: str, system: Any, path: str) -> None:
        # A query may hold an endpoint, never a secret: those come from the environment.
        self.location = location
        self._system = system
        self._path = path.rstrip("/")
        self._lines: dict[str, bytearray] = {}
        self._unsaved: set[str] = set()
        self._next_put = 0.0

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def exists(self) -> bool:
        with self._errors("", "read"):
            return bool(self.entries())

    def make(self, *folders: str) -> None:
        with self._errors(""):
            for folder in ("", *folders):
                self._system.create_dir(self._at(folder), recursive=True)

    def entries(self, folder: str = "") -> dict[str, int]:
        selector = pyarrow.fs.FileSelector(self._at(folder), allow_not_found=True)
        with self._errors(folder, "read"):
            return {info.base_name: info.size or 0 for info in self._system.get_file_info(selector)}

    def read(self, name: str) -> bytes | None:
        with self._errors(name, "read"):
            try:
                with self._system.open_input_stream(self._at(name)) as file:
                    return bytes(file.read())
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes | memoryview) -> str:
        with _hashing(content) as digest:
            with self.sink(name) as file:
                file.write(content)
            return digest.result()

    @contextmanager
    def sink(self, name: str) -> Iterator[Any]:
        whole = self._system.type_name in OBJECT_STORES
        folder, _, base = name.rpartition("/")
        partial = name if whole else f"{folder}/.{base}{PARTIAL}".lstrip("/")
        with self._errors(name):
            with self._system.open_output_stream(self._at(partial), compression=None) as file:
                yield file
            if not whole:
                self._system.move(self._at(partial), self._at(name))

    def append_lines(self, name: str, lines: Sequence[str]) -> None:
        if name not in self._lines:
            held = self.read(name) or b""
            self._lines[name] = bytearray(held[: held.rfind(b"\n") + 1])
        self._lines[name] += "".join(f"{line}\n" for line in lines).encode()
        self._unsaved.add(name)
        if time.monotonic() >= self._next_put:
            self.flush()

    def flush(self) -> None:
        started = time.monotonic()
        for name in sorted(self._unsaved):
            self.write(name, bytes(self._lines[name]))
        self._unsaved.clear()
        spent = time.monotonic() - started
        self._next_put = time.monotonic() + max(self.PUT_EVERY_S, spent * self.PUT_SHARE)

    def remove(self, name: str) -> None:
        self._lines.pop(name, None)
        self._unsaved.discard(name)
        with self._errors(name):
            try:
                self._system.delete_file(self._at(name))
            except FileNotFoundError:
                return

    def open(self, name: str) -> pa.NativeFile:
        try:
            return self._system.open_input_file(self._at(name))
        except OSError:
            raise InputError(
                f"{self.location}: {name} is missing or unreadable; run the sweep again to "
                "restore it"
            ) from None

    def dataset_files(self, names: list[str]) -> tuple[list[str], Any]:
        return [self._at(name) for name in names], self._system

    @contextmanager
    def lock(self, first: int, last: int) -> Iterator[None]:
        # Lines are put as whole files here, so two runs would lose each other's.
        with ExitStack() as stack:
            with self._errors(""):
                stack.enter_context(Lease(self.location, self._system, self._path))
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        yield

    def busy(self) -> bool:
        with self._errors("", "read"):
            return Lease.held(self._system, self._path)

    @contextmanager
    def _errors(self, name: str, verb: str = "written") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{self.location}: {name}" if name else self.location
            raise RunError(
                f"{where}: cannot be {verb}: {first_line(error)}; check the address, your "
                "credentials and the space left, then run the same command again to resume"
            ) from None


def _write_all(file: Any, content: bytes) -> None:
    """Unbuffered files may take less than they are given when a disk is nearly full."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _cut_torn_line(file: Any) -> int:
    """Cut what follows the last line end of a file of lines; its length then."""
    end = file.seek(0, os.SEEK_END)
    keep = end
    while keep:
        start = max(0, keep - HASH_CHUNK)
        file.seek(start)
        found = file.read(keep - start).rfind(b"\n")
        if found >= 0:
            keep = start + found + 1
            break
        keep = start
    if keep != end:
        file.truncate(keep)
    return int(keep)


# What is wrong with a path itself, so that running again cannot help.
NO_PLACE = {
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
}


def sync_directory(path: Path) -> None:
    """Make a rename in a directory survive a power cut, where the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def _forgiving_unlink(path: Path) -> None:
    """What cannot be removed now, on a disk just gone read-only, is removed at the next start."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


@contextmanager
def _disk_errors(path: Path, verb: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some space and run the same command again to resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "make it writable or choose another --output_dir"
        elif error.errno in NO_PLACE:
            fix = "choose another --output_dir"
        elif error.errno == errno.EFBIG:
            fix = "raise the limit on the size of files (ulimit -f)"
        else:
            fix = "run the same command again to resume"
        raise RunError(f"{path}: cannot be {verb}: {error.strerror}; {fix}") from None
