"""The field between a virtual card and vpcd, the virtual reader driver under pcscd.

vpcd listens, the card connects: being connected is being in the field. Messages are a 2-byte big-endian
length and a payload; a 1-byte payload is a control (0 power off, 1 power on, 2 reset, 4 ask for the ATR),
anything longer a command APDU (vsmartcard's "Creating a virtual smart card").
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from pos_gateway.errors import CardLeft

_POWER_ON: Final = b"\x01"
_RESET: Final = b"\x02"
_GET_ATR: Final = b"\x04"

_LOOKS_BEFORE_POWER: Final = 4
"""pcscd asks two or three times for the ATR of a card that it sees arriving, then powers it."""

_HISTORICAL_BYTES: Final = b"POSGW"


def contactless_atr(historical_bytes: bytes = _HISTORICAL_BYTES) -> bytes:
    """The ATR that a PC/SC reader makes up for an ISO 14443-4 type A card: 3B 8n 80 01, the historical
    bytes of its ATS, and an XOR check byte (PC/SC part 3, §3.1.3.2.3.1)."""
    body = bytes([0x80 | len(historical_bytes), 0x80, 0x01]) + historical_bytes
    check = 0
    for byte in body:
        check ^= byte
    return b"\x3b" + body + bytes([check])


class Card(Protocol):
    """What this module can hold into a field."""

    def power_up(self) -> None:
        """The field came up, or the reader reset the card: a session starts."""

    def process(self, command: bytes) -> bytes:
        """Answer one command APDU with data and status word."""


class FaultKind(Enum):
    REMOVE_BEFORE = "remove_before"
    """The card leaves as the command arrives: it never sees it."""
    REMOVE_AFTER = "remove_after"
    """The card leaves with the command processed and the answer unread."""
    SLOW = "slow"
    """The answer comes late, by `delay_s`."""
    MUTE = "mute"
    """The answer never comes; the card stays in the field."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in the field, and when: at the `apdu_number`-th APDU since the card was inserted
    (the first is 1), or at the first one with this `instruction` byte."""

    kind: FaultKind
    apdu_number: int | None = None
    instruction: int | None = None
    delay_s: float = 0.0

    def strikes(self, apdu_number: int, command: bytes) -> bool:
        if self.apdu_number is not None:
            return apdu_number == self.apdu_number
        return self.instruction is not None and command[1:2] == bytes([self.instruction])


class Field:
    """Holds `card` into the virtual reader at `address` until `remove`; served by a thread of its own.

    Raises:
        OSError: nothing listens at `address`.
    """

    def __init__(
        self, card: Card, address: tuple[str, int], *, atr: bytes | None = None, faults: Sequence[Fault] = ()
    ) -> None:
        self.card = card
        self.apdu_count = 0
        self._address = address
        self._atr = contactless_atr() if atr is None else atr
        self._faults = list(faults)
        self._removed = threading.Event()
        self._swapping = threading.Lock()
        self._socket = self._enter()
        self._thread = threading.Thread(target=self._serve, name=f"card-{address[1]}", daemon=True)
        self._thread.start()

    @property
    def present(self) -> bool:
        """False once the card was removed, or the reader is gone."""
        return not self._removed.is_set()

    def remove(self) -> None:
        """Take the card out. A command that it is processing is processed to its end, unanswered."""
        self._leave()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _enter(self) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=5)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _leave(self) -> None:
        with self._swapping:
            self._removed.set()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        try:
            while self._was_mistaken():
                with self._swapping:
                    if self._removed.is_set():
                        return
                    self._socket.close()
                    self._socket = self._enter()
        except OSError:
            pass  # the reader is gone, or the card was taken out: either way it is out of the field
        finally:
            self._leave()
            self._socket.close()

    def _was_mistaken(self) -> bool:
        """Answer the reader until one side leaves. True if the reader took this card for the one before.

        When a client resets or lets go of a card that has just left, pcscd 1.9 calls the field empty
        without looking; if the next card is there when it looks, it sees no change and never powers it.
        As a customer would, such a card is presented again.
        """
        powered, looks = False, 0
        while (message := self._receive()) is not None:
            if len(message) > 1:
                self._exchange(message)
            elif message == _GET_ATR:
                looks += 1
                if looks > _LOOKS_BEFORE_POWER and not powered:
                    return True
                self._send(self._atr)
            elif message in (_POWER_ON, _RESET):
                powered = True
                self.card.power_up()
        return False

    def _exchange(self, command: bytes) -> None:
        self.apdu_count += 1
        fault = next((f for f in self._faults if f.strikes(self.apdu_count, command)), None)
        if fault is not None:
            self._faults.remove(fault)
            if fault.kind is FaultKind.REMOVE_BEFORE:
                self._leave()
                return
        try:
            answer = self.card.process(command)
        except CardLeft:  # a scripted card leaves by itself
            self._leave()
            return
        if fault is not None:
            if fault.kind is FaultKind.REMOVE_AFTER:
                self._leave()
                return
            self._removed.wait(None if fault.kind is FaultKind.MUTE else fault.delay_s)
        self._send(answer)

    def _send(self, payload: bytes) -> None:
        self._socket.sendall(struct.pack(">H", len(payload)) + payload)

    def _receive(self) -> bytes | None:
        header = self._receive_exactly(2)
        return None if header is None else self._receive_exactly(int.from_bytes(header, "big"))

    def _receive_exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            # vpcd writes length and payload so that delayed acknowledgement and Nagle's algorithm would
            # add 40 ms to every APDU. The kernel forgets this option, hence again before each recv.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            part = self._socket.recv(count - len(data))
            if not part:
                return None
            data += part
        return data
