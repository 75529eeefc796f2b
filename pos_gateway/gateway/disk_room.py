"""Is there room on the journal's disk to begin a payment, and to finish whatever was begun?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pos_gateway.errors import Unavailable

_ACKNOWLEDGEMENT_BYTES: Final = 2048
"""A record's acknowledgement takes less in the journal, its indexes and its write-ahead log together."""

_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """`needed_bytes` is kept free for payments under way and for the ledger's answers to those waiting."""

    free_bytes: int
    needed_bytes: int

    @property
    def short(self) -> bool:
        return self.free_bytes < self.needed_bytes

    def check(self) -> None:
        """
        Raises:
            Unavailable: too little is left to begin anything.
        """
        if self.short:
            raise Unavailable(
                f"the disk is nearly full ({self.free_bytes // _MIB} MiB left, payments need "
                f"{-(-self.needed_bytes // _MIB)} MiB): no payment is begun",
                advice="make room; payments go on by themselves then",
            )


def disk_room(folder: Path, *, headroom_bytes: int, waiting: int) -> DiskRoom:
    """How the disk of the folder stands. `waiting`: records without the ledger's answer.

    Raises:
        Unavailable: the disk cannot be asked.
    """
    try:
        told = os.statvfs(folder)
    except OSError as error:
        raise Unavailable(f"the journal's disk does not answer: {error.strerror}") from None
    return DiskRoom(
        free_bytes=told.f_bavail * told.f_frsize,
        needed_bytes=headroom_bytes + waiting * _ACKNOWLEDGEMENT_BYTES,
    )
