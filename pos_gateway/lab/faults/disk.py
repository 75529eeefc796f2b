"""A disk as a power cut may leave it, rebuilt from a recording of a process's calls.

The model promises no more than POSIX: data is there once an fsync of its file has returned, a name once an
fsync of its folder has. Everything later may be there in part, in any order, sector by sector. After an
fsync that failed the kernel counts the pages as clean: what they held is lost unless it is written again,
though readers saw it until the power went.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pos_gateway.lab.faults.shim import Call, Operation

SECTOR_BYTES: Final = 512


@dataclass(slots=True)
class _File:
    """`kept` is what a power cut cannot take; `pending` came later: (offset, data), or (size, None)."""

    kept: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


class Disk:
    """Files of one folder. Feed it operations in order; `after_power_cut` may be asked at any point."""

    def __init__(self) -> None:
        self._names: dict[str, _File] = {}
        self._kept_names: dict[str, _File] = {}

    def apply(self, operation: Operation) -> None:
        if operation.error:
            if operation.call is Call.SYNC and operation.name in self._names:
                self._names[operation.name].pending.clear()
            return
        match operation.call:
            case Call.WRITE:
                self._file(operation.name).pending.append((operation.at, operation.data))
            case Call.TRUNCATE:
                self._file(operation.name).pending.append((operation.at, None))
            case Call.SYNC if operation.name == "":
                self._kept_names = dict(self._names)
            case Call.SYNC:
                file = self._file(operation.name)
                for change in file.pending:
                    _change(file.kept, *change)
                file.pending.clear()
            case Call.UNLINK:
                self._names.pop(operation.name, None)
            case Call.RENAME:
                self._names[operation.second] = self._names.pop(operation.name, _File())

    def after_power_cut(self, chance: random.Random | None, *, kept: float) -> dict[str, bytes]:
        """The files that are found. Of what was not synced each sector is there with probability `kept`."""
        names = dict(self._kept_names)
        for name in sorted(self._names.keys() | names.keys()):
            if self._names.get(name) is not names.get(name) and _happens(chance, kept):
                if name in self._names:
                    names[name] = self._names[name]
                else:
                    del names[name]
        return {name: _content(file, chance, kept) for name, file in names.items()}

    def _file(self, name: str) -> _File:
        return self._names.setdefault(name, _File())


def write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def apply_all(operations: Iterable[Operation]) -> Disk:
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    return disk


def _content(file: _File, chance: random.Random | None, kept: float) -> bytes:
    content = bytearray(file.kept)
    for at, data in file.pending:
        if data is None:
            if _happens(chance, kept):
                _change(content, at, None)
            continue
        begin = 0
        while begin < len(data):
            end = min(len(data), begin + SECTOR_BYTES - (at + begin) % SECTOR_BYTES)
            if _happens(chance, kept):
                _change(content, at + begin, data[begin:end])
            begin = end
    return bytes(content)


def _change(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        content.extend(bytes(at - len(content)))
        return
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    content[at : at + len(data)] = data


def _happens(chance: random.Random | None, probability: float) -> bool:
    return probability > 0 if chance is None else chance.random() < probability
