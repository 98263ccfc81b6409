"""Who may write into an output directory: one run a range of experiments.

On a disk the kernel holds the lock, byte ``i`` of a lock file standing for experiment ``i``,
and lets go of it when the process ends, however it ends. An object store has no locks: there
a run keeps a small object fresh, and one that is not fresh any more counts for nothing.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs

from raypatch.errors import InputError, RunError

LOCK_FILE = ".lock"
# Past every experiment index: the byte that guards the records for a moment.
RECORDS_BYTE = 1 << 62
# The whole directory: more experiments than any definition has.
ALL_EXPERIMENTS = 1 << 61
PATIENCE_S = 1.0
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

# POSIX locks belong to the process and fall when any handle of the file is closed, so a
# process opens each lock file once and keeps it.
_handles: dict[str, int] = {}
# Neither do they keep this process's own runs apart: its ranges by directory.
_ranges: dict[str, list[tuple[int, int]]] = {}
_one_at_a_time = threading.Lock()


def _handle(root: Path) -> int | None:
    """The process's handle of a directory's lock file; None where locks cannot be had."""
    key = str(root.resolve())
    if key not in _handles:
        try:
            _handles[key] = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
    return _handles[key]


def _set(handle: int, kind: int, start: int, length: int) -> bool:
    import fcntl

    try:
        fcntl.lockf(handle, kind, length, start)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in NO_LOCKS:
            return True  # a file system without locks: nothing to hold
        raise
    return True


@contextmanager
def short_lock(root: Path) -> Iterator[None]:
    """Hold a directory's records while a line is appended or a record replaced."""
    import fcntl

    handle = _handle(root)
    if handle is None:
        yield
        return
    _set(handle, fcntl.LOCK_EX, RECORDS_BYTE, 1)
    try:
        yield
    finally:
        _set(handle, fcntl.LOCK_UN, RECORDS_BYTE, 1)


class RangeLock:
    """Experiments ``first`` to ``last`` of a directory on a disk; a context manager.

    Raises InputError where another run holds any of them.
    """

    def __init__(self, root: Path, first: int, last: int) -> None:
        self._root, self._first, self._length = root, first, last - first
        self._own = (first, last)

    def __enter__(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self._taken():
            if time.monotonic() > deadline:
                raise InputError(
                    f"--output_dir {self._root}: another run is writing here; wait for it to end, "
                    "or choose another directory (or another range of a sweep)"
                )
            time.sleep(0.05)

    def _taken(self) -> bool:
        """Take the range, unless somebody holds some of it."""
        import fcntl

        with _one_at_a_time:
            handle = _handle(self._root)
            if handle is None:
                raise RunError(
                    f"{self._root}: cannot be written: no lock file can be made there; make it "
                    "writable or choose another --output_dir"
                )
            own = _ranges.setdefault(str(self._root.resolve()), [])
            is_own = any(first < self._own[1] and self._first < last for first, last in own)
            exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
            if is_own or not _set(handle, exclusive, self._first, self._length):
                self._let_go()
                return False
            own.append(self._own)
            return True

    def __exit__(self, *_: object) -> None:
        import fcntl

        key = str(self._root.resolve())
        with _one_at_a_time:
            _set(_handles[key], fcntl.LOCK_UN, self._first, self._length)
            _ranges[key].remove(self._own)
            self._let_go()

    def _let_go(self) -> None:
        """Close the lock file where this process holds no range of it."""
        key = str(self._root.resolve())
        if not _ranges[key]:
            del _ranges[key]
            os.close(_handles.pop(key))

    @staticmethod
    def held(root: Path) -> bool:
        """Whether another process holds any experiment here."""
        import fcntl

        key = str(root.resolve())
        if key in _handles:
            return False
        try:
            handle = os.open(root / LOCK_FILE, os.O_RDONLY)
        except OSError:
            return False
        try:
            return not _set(handle, fcntl.LOCK_SH | fcntl.LOCK_NB, 0, RECORDS_BYTE)
        finally:
            os.close(handle)


class Lease:
    """A whole directory on an object store: an object put again and again while a run lives.

    Times are the store's own (the objects' modification times), so clocks of machines need
    not agree. A crash leaves an object that counts for nothing after ``LIFE_S``.
    """

    PREFIX = ".lease-"
    REFRESH_S = 20.0
    LIFE_S = 90.0

    def __init__(self, location: str, system: Any, path: str) -> None:
        self._location, self._system, self._path = location, system, path
        self._name = f"{self.PREFIX}{uuid.uuid4().hex}"
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="raypatch-lease", daemon=True)

    def _put(self) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        with self._system.open_output_stream(f"{self._path}/{self._name}") as file:
            file.write(json.dumps(owner).encode())

    def _refresh(self) -> None:
        while not self._ending.wait(self.REFRESH_S):
            try:
                self._put()
            except OSError:
                continue  # the next put may go through; the run's own writes report a real loss

    def __enter__(self) -> None:
        self._put()
        leases = _leases(self._system, self._path)
        mine = leases.pop(self._name)
        # Of two that start at once both may go: which came first cannot be told for sure,
        # because a lease that is refreshed looks young.
        if any((mine - since).total_seconds() < self.LIFE_S for since in leases.values()):
            self._system.delete_file(f"{self._path}/{self._name}")
            raise InputError(
                f"--output_dir {self._location}: another run is writing here; wait for it, or "
                f"{self.LIFE_S:.0f} s if it has died, or choose another directory"
            )
        for name in leases:
            self._system.delete_file(f"{self._path}/{name}")
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        try:
            self._system.delete_file(f"{self._path}/{self._name}")
        except OSError:
            return  # it runs out by itself

    @classmethod
    def held(cls, system: Any, path: str) -> bool:
        """Whether any lease was refreshed of late, by this machine's clock."""
        now = time.time()
        return any(now - since.timestamp() < cls.LIFE_S for since in _leases(system, path).values())


def _leases(system: Any, path: str) -> dict[str, Any]:
    selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
    return {
        info.base_name: info.mtime
        for info in system.get_file_info(selector)
        if info.base_name.startswith(Lease.PREFIX)
    }
