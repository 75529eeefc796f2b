"""Builds the recorder and fault injector of `disk_shim.c`, reads its recordings, sets its clock."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from pos_gateway.errors import InvalidMessage, Unavailable

_SOURCE: Final = Path(__file__).with_name("disk_shim.c")
_ENTRY: Final = struct.Struct("=IIqQiI")


class Call(Enum):
    WRITE = 1
    TRUNCATE = 2
    SYNC = 3
    UNLINK = 4
    RENAME = 5


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. `at`: the offset of a write, the size of a truncation. `error`: errno, 0 if it was done."""

    call: Call
    name: str
    at: int
    data: bytes
    error: int
    second: str


@dataclass(frozen=True, slots=True)
class Fault:
    """From the `nth` call of its kind on (`sync`, `write` or `truncate`) so many fail with this errno; only
    calls on files whose name begins with `prefix` count."""

    call: str
    nth: int
    errno: int
    times: int
    prefix: str


def build(folder: Path) -> Path:
    """Compile the shim into the folder.

    Raises:
        Unavailable: there is no C compiler.
    """
    library = folder / "disk_shim.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable("gcc is missing", advice="run tools/prepare") from None
    if done.returncode:
        raise Unavailable(f"the disk shim does not compile: {done.stderr[-300:]}")
    return library


def environment(
    library: Path, folder: Path, *, log: Path | None = None, fault: Fault | None = None
) -> dict[str, str]:
    """What a process is started with to be watched."""
    variables = {**os.environ, "LD_PRELOAD": str(library), "POS_GATEWAY_DISK_FOLDER": str(folder)}
    if log is not None:
        variables["POS_GATEWAY_DISK_LOG"] = str(log)
    if fault is not None:
        variables["POS_GATEWAY_DISK_FAIL"] = (
            f"{fault.call} {fault.nth} {fault.errno} {fault.times} {fault.prefix}"
        )
    return variables


class WrongClock:
    """The wall clock of a process that is started with `environment`; others keep theirs."""

    def __init__(self, library: Path, file: Path) -> None:
        self._library = library
        self._file = file
        self.ahead_s = 0.0
        self.set(0.0)

    def set(self, ahead_s: float) -> None:
        """From now on it is so far ahead of the true time; behind it, if negative."""
        self.ahead_s = ahead_s
        with self._file.open("r+b" if self._file.exists() else "w+b") as file:
            file.write(struct.pack("=q", int(ahead_s * 1_000_000_000)))

    def environment(self) -> dict[str, str]:
        return {**os.environ, "LD_PRELOAD": str(self._library), "POS_GATEWAY_CLOCK_FILE": str(self._file)}


def read_recording(path: Path) -> Iterator[Operation]:
    """
    Raises:
        InvalidMessage: the recording ends in the middle.
    """
    data = path.read_bytes()
    at = 0
    while at < len(data):
        try:
            call, name_length, offset, size, error, second_length = _ENTRY.unpack_from(data, at)
        except struct.error:
            raise InvalidMessage("the recording is cut off", where=f"byte {at}") from None
        name_at = at + _ENTRY.size
        second_at = name_at + name_length
        data_at = second_at + second_length
        at = data_at + size
        if at > len(data):
            raise InvalidMessage("the recording is cut off", where=f"byte {data_at}")
        yield Operation(
            Call(call),
            data[name_at:second_at].decode(),
            offset,
            data[data_at:at],
            error,
            data[second_at:data_at].decode(),
        )
