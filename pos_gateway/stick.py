"""Sets of files on a stick that may be full, broken, write-protected or pulled out at any moment.

A set is a folder with `manifest.json`, which names its files with sizes and SHA-256; files are named after
their digests. Written: every file under another name, synced, renamed; read back from the medium; then the
manifest the same way; then what the manifest before named is removed. So whoever reads sees one whole set,
the old or the new one. A set says nothing about who wrote it: what is in its files is signed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pos_gateway.carrying import MAX_CARRIED_BYTES
from pos_gateway.errors import InvalidMessage, NotFound, Unavailable
from pos_gateway.records import canonical_json, parse_object

MANIFEST: Final = "manifest.json"

_FORMAT: Final = 1
_NAME: Final = re.compile(r"[0-9a-f]{32}\.json", re.ASCII)
_MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
_MAX_FILES: Final = 20_000


@dataclass(frozen=True, slots=True)
class _Named:
    name: str
    size: int
    sha256: str


def write_set(folder: Path, contents: Iterable[bytes]) -> int:
    """Put a set in the place of what is there, if anything; returns how many bytes it has.

    Raises:
        Unavailable: the stick is full, write-protected, pulled out, or does not keep what is written to it;
            the set that was there is there still.
    """
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        named: list[_Named] = []
        try:
            for data in contents:
                digest = hashlib.sha256(data).hexdigest()
                file = _Named(f"{digest[:32]}.json", len(data), digest)
                if _read(folder / file.name, MAX_CARRIED_BYTES) != data:
                    put_file(folder / file.name, data)
                named.append(file)
            files = [{"name": f.name, "bytes": f.size, "sha256": f.sha256} for f in named]
            for file in named:
                if not _holds(folder, file):
                    raise Unavailable(
                        f"{folder} does not keep what is written to it", advice="use another stick"
                    )
            put_file(folder / MANIFEST, canonical_json({"format": _FORMAT, "files": files}).encode())
        finally:
            _remove_others(folder)
    return sum(file.size for file in named)


def read_set(folder: Path) -> Iterator[tuple[str, bytes | None]]:
    """Each file of a set by its name; None where it is missing, cut short or damaged.

    Raises:
        NotFound: there is no set.
        InvalidMessage: the manifest is damaged: nothing in this set can be told apart.
        Unavailable: the stick cannot be read.
    """
    with _told(folder):
        data = _read(folder / MANIFEST, _MAX_MANIFEST_BYTES)
        if data is None:
            raise NotFound(f"{folder} has no {MANIFEST}", advice="was it copied whole?")
        for file in _manifest(data, str(folder / MANIFEST)):
            content = _read(folder / file.name, file.size)
            whole = content is not None and hashlib.sha256(content).hexdigest() == file.sha256
            yield file.name, content if whole else None


def put_file(path: Path, data: bytes) -> None:
    """Write one file whole or not at all, and see to it that the medium has it."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise trouble(folder, error) from None


def trouble(folder: Path, error: OSError) -> Unavailable:
    """What a stick's error means to whoever holds it."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return Unavailable(f"{folder} is full", advice="make room on the stick, or take another one")
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return Unavailable(f"{folder} cannot be written to", advice="is the stick write-protected?")
        case _:
            return Unavailable(
                f"{folder}: {error.strerror}", advice="plug the stick in again, or take another one"
            )


def _manifest(data: bytes, where: str) -> list[_Named]:
    raw = parse_object(data, where=where)
    try:
        if raw["format"] != _FORMAT or len(raw["files"]) > _MAX_FILES:
            raise ValueError
        named = [_Named(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in raw["files"]]
        if any(not _NAME.fullmatch(f.name) or not 0 <= f.size <= MAX_CARRIED_BYTES for f in named):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InvalidMessage("not a manifest this program understands", where=where) from None
    return named


def _read(path: Path, max_bytes: int) -> bytes | None:
    """A plain file's content; None if there is none, it is longer, or not a file at all. No links are
    followed, and nothing that blocks is opened: the stick may be anybody's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR):
            return None
        raise
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = file.read(max_bytes + 1)
    return data if len(data) <= max_bytes else None


def _holds(folder: Path, file: _Named) -> bool:
    """Read back, from the medium and not from memory."""
    descriptor = os.open(folder / file.name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    data = _read(folder / file.name, file.size)
    return data is not None and hashlib.sha256(data).hexdigest() == file.sha256


def _remove_others(folder: Path) -> None:
    """What no manifest names: an older set's files, or those of one that could not be finished."""
    with contextlib.suppress(OSError, InvalidMessage):
        data = _read(folder / MANIFEST, _MAX_MANIFEST_BYTES)
        kept = {file.name for file in _manifest(data, MANIFEST)} if data is not None else set()
        for path in folder.iterdir():
            name = path.name.removeprefix(".").removesuffix(".new")
            if _NAME.fullmatch(name) and path.name not in kept:
                path.unlink(missing_ok=True)
