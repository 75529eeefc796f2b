"""A field behind nfcpy's `udp` driver: virtual cards that speak ISO/IEC 14443-3 and -4 themselves.

The driver's datagrams are text: the technology, a blank, the frame in hexadecimal ("106A 26"); `RFOFF`
says that the field was switched off. A frame into a field without a card is answered with `RFOFF` at once:
otherwise the driver would wait a second for each look, and the frame waiting time for each frame.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pos_gateway.errors import CardLeft
from pos_gateway.lab.vpcd import Card, Fault, FaultKind

_TECHNOLOGY: Final = b"106A"
_SENS_REQ, _ALL_REQ, _HALT = b"\x26", b"\x52", b"\x50\x00"
_SDD_REQ, _SEL_REQ = b"\x93\x20", b"\x93\x70"
_SENS_RES: Final = b"\x04\x00"
_SAK_ISO_DEP: Final = b"\x20"
_RATS: Final = 0xE0
_NOBODY: Final = b"RFOFF"
_FRAME_BYTES: Final = (16, 24, 32, 40, 48, 64, 96, 128, 256)
_WTX_EVERY_S: Final = 0.05

FULL_ATS: Final = bytes.fromhex("0A 78 80 C0 00 50 4F 53 47 57")
"""Frames of 256 bytes, an FWI of 12 (1.2 s: no machine is so slow that an answer comes after its repeat was
asked for), historical bytes `POSGW`."""


@dataclass(frozen=True, slots=True)
class Radio:
    """How a card behaves below its APDUs.

    `random_uid`: another one at each activation, as phones have (08 first). `deaf_to`: how many RATS it
    does not hear before it wakes. `lost_frames`: the answers with these numbers, counted since it was
    inserted, are lost on the air; `lost_commands` likewise the commands.
    """

    ats: bytes = FULL_ATS
    random_uid: bool = False
    deaf_to: int = 0
    lost_frames: frozenset[int] = frozenset()
    lost_commands: frozenset[int] = frozenset()


class UdpField:
    """A field on a loopback port of its own, from construction to `close`; one thread serves it.

    Several cards may be in it at once: as a reader's anticollision does, the one with the lowest UID that
    is not halted is taken.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._cards: list[_Picc] = []
        self._selected: _Picc | None = None
        self._silent = False
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="udp field", daemon=True)
        self._thread.start()

    @property
    def path(self) -> str:
        """nfcpy's path to this field's reader."""
        return f"udp:127.0.0.1:{self._socket.getsockname()[1]}"

    def insert(self, card: Card, *, faults: Sequence[Fault] = (), radio: Radio | None = None) -> PresentCard:
        """Hold a card into the field, beside those that are there."""
        picc = _Picc(card, list(faults), radio or Radio())
        with self._lock:
            self._cards.append(picc)
        return PresentCard(self, picc)

    def remove(self) -> None:
        """Take all cards out."""
        with self._lock:
            for picc in self._cards:
                picc.present.clear()
            self._cards.clear()
            self._selected = None

    def unplug(self) -> None:
        """The reader answers nothing any more, not even for an empty field."""
        self._silent = True

    def plug_in(self) -> None:
        self._silent = False

    def close(self) -> None:
        self._closed = True
        self.remove()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(_NOBODY, self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._closed:
            datagram, reader = self._socket.recvfrom(1024)
            if self._silent:
                continue
            if datagram.startswith(_NOBODY):
                self._power_off()
                continue
            try:
                technology, text = datagram.split()
                frame = bytes.fromhex(text.decode())
            except ValueError:
                continue
            if technology != _TECHNOLOGY:
                continue
            for answer in self._answers(frame):
                self._socket.sendto(answer, reader)

    def _answers(self, frame: bytes) -> Iterator[bytes]:
        if frame in (_SENS_REQ, _ALL_REQ):
            with self._lock:
                awake = [
                    p for p in self._cards if p.present.is_set() and not (p.halted and frame == _SENS_REQ)
                ]
            for woken in awake:
                woken.wake()
            self._selected = min(awake, key=lambda p: p.uid) if awake else None
            yield _NOBODY if self._selected is None else _datagram(_SENS_RES)
            return
        picc = self._selected
        if picc is not None and picc.present.is_set():
            yield from (_datagram(answer) for answer in picc.answers(frame))
        if picc is None or not picc.present.is_set():
            yield _NOBODY

    def _power_off(self) -> None:
        self._selected = None
        with self._lock:
            for picc in self._cards:
                picc.halted = False


class PresentCard:
    """A card that was held into a field."""

    def __init__(self, field: UdpField, picc: _Picc) -> None:
        self._field = field
        self._picc = picc

    @property
    def present(self) -> bool:
        """False once it was taken out, or tore itself out."""
        return self._picc.present.is_set()

    @property
    def apdu_count(self) -> int:
        return self._picc.apdu_count

    def remove(self) -> None:
        with self._field._lock:
            self._picc.present.clear()
            if self._picc in self._field._cards:
                self._field._cards.remove(self._picc)


class _Picc:
    """One card below its APDUs: selection, activation, and the card's side of the block protocol
    (ISO/IEC 14443-3 §6, -4 §5 and §7)."""

    def __init__(self, card: Card, faults: list[Fault], radio: Radio) -> None:
        self._card = card
        self._faults = faults
        self._radio = radio
        self._deaf_to = radio.deaf_to
        self.uid = b"\x08" + secrets.token_bytes(3)
        self.present = threading.Event()
        self.present.set()
        self.halted = False
        self.apdu_count = 0
        self._sent = 0
        self._heard = 0
        self._reader_bytes = 256
        self._number = 1
        self._command = bytearray()
        self._parts: list[bytes] = []
        self._last = b""
        self._working: _Working | None = None

    def wake(self) -> None:
        """The field came up, or the reader looks for cards again."""
        if self._radio.random_uid:
            self.uid = b"\x08" + secrets.token_bytes(3)
        self._working = None

    def answers(self, frame: bytes) -> Iterator[bytes]:
        """What goes over the air in answer to one frame; nothing if it leaves or keeps silent."""
        self._heard += 1
        if self._heard in self._radio.lost_commands:
            return
        answer = self._answer(frame)
        if answer is None or not self.present.is_set():
            return
        self._sent += 1
        self._last = answer
        if self._sent not in self._radio.lost_frames:
            yield answer

    def _answer(self, frame: bytes) -> bytes | None:
        if frame == _SDD_REQ:
            return self.uid + bytes([self.uid[0] ^ self.uid[1] ^ self.uid[2] ^ self.uid[3]])
        if frame.startswith(_SEL_REQ):
            return _SAK_ISO_DEP if frame[2:6] == self.uid else None
        if frame == _HALT:
            self.halted = True
            return None
        if frame[0] == _RATS and len(frame) == 2:
            return self._activate(frame[1] >> 4)
        return self._block(frame)

    def _activate(self, fsdi: int) -> bytes | None:
        if self._deaf_to:
            self._deaf_to -= 1
            return None
        self._reader_bytes = _FRAME_BYTES[min(fsdi, 8)]
        self._number, self._parts, self._command = 1, [], bytearray()
        self._card.power_up()
        return self._radio.ats

    def _block(self, frame: bytes) -> bytes | None:
        pcb = frame[0]
        if pcb & 0xE2 == 0x02:  # I-block
            self._number ^= 1
            self._command += frame[1:]
            if pcb & 0x10:
                return bytes([0xA2 | self._number])
            command, self._command = bytes(self._command), bytearray()
            return self._process(command)
        if pcb & 0xE6 == 0xA2:  # R-block
            if pcb & 1 == self._number:
                return self._last
            if pcb & 0x10:
                return bytes([0xA2 | self._number])
            self._number ^= 1
            return self._next_part()
        if pcb == 0xC2:  # S(DESELECT)
            self.halted = True
            return frame
        if pcb == 0xF2:  # S(WTX)
            return self._wait_on()
        return None

    def _process(self, command: bytes) -> bytes | None:
        self.apdu_count += 1
        fault = next((f for f in self._faults if f.strikes(self.apdu_count, command)), None)
        if fault is not None:
            self._faults.remove(fault)
            if fault.kind is FaultKind.REMOVE_BEFORE:
                self.present.clear()
                return None
        try:
            answer = self._card.process(command)
        except CardLeft:
            self.present.clear()
            return None
        if fault is not None:
            if fault.kind is FaultKind.REMOVE_AFTER:
                self.present.clear()
                return None
            ends = float("inf") if fault.kind is FaultKind.MUTE else time.monotonic() + fault.delay_s
            self._working = _Working(answer, ends)
            return self._wait_on()
        return self._in_parts(answer)

    def _wait_on(self) -> bytes | None:
        """Ask for more time as long as the answer is not there."""
        working = self._working
        if working is None:
            return None
        left_s = working.ends - time.monotonic()
        if left_s > 0:
            time.sleep(min(left_s, _WTX_EVERY_S / 2))
            return b"\xf2\x02"
        self._working = None
        return self._in_parts(working.answer)

    def _in_parts(self, answer: bytes) -> bytes:
        size = self._reader_bytes - 3
        self._parts = [answer[at : at + size] for at in range(0, len(answer), size)] or [b""]
        return self._next_part()

    def _next_part(self) -> bytes:
        part = self._parts.pop(0) if self._parts else b""
        return bytes([0x02 | self._number | (0x10 if self._parts else 0)]) + part


@dataclass(frozen=True, slots=True)
class _Working:
    answer: bytes
    ends: float


def _datagram(frame: bytes) -> bytes:
    return _TECHNOLOGY + b" " + frame.hex().encode()
