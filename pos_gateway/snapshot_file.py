"""A snapshot's file on disk. The format and its rules stand in `limits`, which knows no files."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from pos_gateway.errors import InvalidSnapshot, NotFound


class SnapshotFile:
    """A snapshot's file, open for reading at any offset. A context manager."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            NotFound: there is no such file.
            InvalidSnapshot: it cannot be opened.
        """
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"there is no snapshot at {path}", advice="fetch one from the ledger") from None
        except OSError as error:
            raise InvalidSnapshot(f"cannot be opened: {error.strerror}", where=str(path)) from error
        self.size = os.fstat(self._fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """
        Raises:
            InvalidSnapshot: the disk cannot give these bytes.
        """
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise InvalidSnapshot(f"cannot be read: {error.strerror}", where=f"byte {offset}") from error

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
