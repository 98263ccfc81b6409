"""Zip archives from strangers: looked at before anything in them is read, never extracted."""

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from raypatch.errors import AgentError

# Saved weights hardly compress; what unpacks to more than this and to many times its size
# is no agent.
BOMB_BYTES = 64 << 20
BOMB_RATIO = 50
MAX_MEMBERS = 100_000
DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError,
    ValueError, IndexError,
)  # fmt: skip


def check_archive(source: Path | BinaryIO, origin: str) -> list[str]:
    """Names of the members of a zip archive that is fit to be read.

    Raises AgentError for a damaged archive and for one with absolute names, names that leave
    its folder, links, a name twice, or contents that unpack to far more than they are.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
    except DAMAGE as error:
        raise AgentError(f"{origin}: damaged archive ({error})") from None
    if len(members) > MAX_MEMBERS:
        raise AgentError(f"{origin}: {len(members)} members; no agent has that many")
    names = [member.filename for member in members]
    for member in members:
        fault = _fault(member)
        if fault is not None:
            raise AgentError(f"{origin}: member {member.filename[:100]!r} {fault}; refused")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AgentError(f"{origin}: member {twice[:100]!r} appears twice; refused")
    unpacked, packed = (sum(getattr(m, k) for m in members) for k in ("file_size", "compress_size"))
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * max(packed, 1):
        raise AgentError(
            f"{origin}: {packed:,} bytes claim to unpack to {unpacked:,}; refused as a zip bomb"
        )
    return names


def _fault(member: zipfile.ZipInfo) -> str | None:
    if not member.filename.isprintable():
        return "has an unprintable name"
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or (path.parts and path.parts[0].endswith(":")):
        return "has an absolute name"
    if ".." in path.parts:
        return "leads out of the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a symbolic link"
    return None


def read_member(file: Path, name: str) -> bytes:
    """One member of an archive that :func:`check_archive` has seen."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(archive.getinfo(name)) as member:
            return member.read()
    except KeyError:
        raise AgentError(f"{file}: no {name} inside; not a Stable-Baselines3 archive") from None
    except DAMAGE as error:
        raise AgentError(f"{file}: {name}: damaged archive ({error})") from None


def is_archive(source: Path | BinaryIO) -> bool:
    """Whether something is a zip archive; a damaged end of one makes it none."""
    try:
        return zipfile.is_zipfile(source)
    except DAMAGE:
        return False


def check_torch_file(source: Path | bytes, origin: str) -> None:
    """Refuse a torch file whose archive is not fit to be read; older formats are no archives."""
    stream: Path | BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source
    if is_archive(stream):
        check_archive(stream, origin)


def repacked(members: dict[str, bytes]) -> io.BytesIO:
    """A fresh archive of these members.

    Two readers may disagree on what a crafted archive holds; of this one they cannot.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    stream.seek(0)
    return stream
