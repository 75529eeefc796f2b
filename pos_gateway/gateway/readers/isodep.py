"""ISO/IEC 14443-4, the reader's side, free of I/O: RATS and ATS, and half-duplex blocks that carry APDUs.

nfcpy has an implementation of its own. This one is stricter where a till must be: it bounds what a card
may ask for (time extensions, repeats, length), takes any ATS that the standard allows, and tells a card
that left from one that talks nonsense.

A dialogue with the card is a generator: it yields a frame and how long to wait for the answer, and is sent
the answer, or None when none came or it was damaged on its way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final, TypeVar

from pos_gateway.errors import CardLeft, InvalidCardData

CARRIER_HZ: Final = 13.56e6
FRAME_SIZES: Final = (16, 24, 32, 40, 48, 64, 96, 128, 256)
MAX_RESPONSE_BYTES: Final = 258
"""Data and status word of a short APDU."""

_FWT_UNIT_S: Final = 4096 / CARRIER_HZ
_FWT_SLACK_S: Final = 49152 / CARRIER_HZ  # ISO/IEC 14443-4 §7.2: delta FWT
_RATS_WAIT_S: Final = 65536 / CARRIER_HZ + _FWT_SLACK_S + 0.025  # FWT of activation, and some for slow phones
_DEFAULT_FWI: Final = 4
_MAX_REPEATS: Final = 3
_MAX_EXTENSIONS: Final = 250
_LEAST_WAIT_S: Final = 0.02
"""No wait is set shorter than what a USB round trip may take by itself."""

_I_BLOCK, _R_ACK, _R_NAK, _S_DESELECT, _S_WTX = 0x02, 0xA2, 0xB2, 0xC2, 0xF2
_CHAINING: Final = 0x10
_TAP_AGAIN: Final = "present it again"
_WHERE: Final = "ISO 14443-4 block"

Frame = tuple[bytes, float]
"""What to send, and how long to wait for the answer, in seconds."""
Result = TypeVar("Result")
Exchange = Generator[Frame, bytes | None, Result]


@dataclass(frozen=True, slots=True)
class Ats:
    """The answer to select (ISO/IEC 14443-4 §5.2): how long frames to the card may be, how long it may
    take for one, and its historical bytes."""

    frame_bytes: int
    frame_wait_s: float
    historical: bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> Ats:
        """Any ATS of the standard; what it leaves out has the standard's defaults.

        Raises:
            InvalidCardData: its length or its interface bytes contradict it.
        """
        where = "ATS"
        if not data or data[0] != len(data):
            raise InvalidCardData("its length byte is not its length", where=where)
        format_byte = data[1] if len(data) > 1 else 0x02
        count = sum(1 for bit in (0x10, 0x20, 0x40) if format_byte & bit) if len(data) > 1 else 0
        if len(data) < 2 + count and len(data) > 1:
            raise InvalidCardData("interface bytes are missing", where=where)
        at = 2 + (1 if format_byte & 0x10 else 0)
        fwi = data[at] >> 4 if len(data) > 1 and format_byte & 0x20 else _DEFAULT_FWI
        fsci = min(format_byte & 0x0F, len(FRAME_SIZES) - 1)
        return cls(FRAME_SIZES[fsci], frame_wait_s(fwi), data[2 + count :])


def frame_wait_s(fwi: int) -> float:
    """The frame waiting time (ISO/IEC 14443-4 §7.2); 15 is reserved and read as the default."""
    return _FWT_UNIT_S * (1 << (fwi if fwi < 15 else _DEFAULT_FWI))


def activate_a(most_frame_bytes: int = 256) -> Exchange[Ats]:
    """RATS for a type A card, CID 0. Asked twice at most (§5.6.1.2). `most_frame_bytes`: the longest frame
    that the reader can receive.

    Raises:
        CardLeft: no answer.
        InvalidCardData: an ATS that is none.
    """
    for _ in range(2):
        answer = yield bytes([0xE0, _size_code(most_frame_bytes) << 4]), _RATS_WAIT_S
        if answer is not None:
            return Ats.from_bytes(answer)
    raise CardLeft("the card left before it was activated", advice=_TAP_AGAIN)


def activate_b(atqb: bytes, most_frame_bytes: int = 256) -> Exchange[Ats]:
    """ATTRIB for a type B card with this ATQB (ISO/IEC 14443-3 §7.9, §7.10). `most_frame_bytes` as for A.

    Raises:
        CardLeft: no answer.
        InvalidCardData: an ATQB or an answer that is none.
    """
    if len(atqb) < 12 or atqb[0] != 0x50 or not atqb[10] & 0x01:
        raise InvalidCardData("it speaks no ISO/IEC 14443-4", where="ATQB")
    attrib = b"\x1d" + atqb[1:5] + bytes([0x00, _size_code(most_frame_bytes), 0x01, 0x00])
    answer = yield attrib, _RATS_WAIT_S
    if answer is None:
        raise CardLeft("the card left before it was activated", advice=_TAP_AGAIN)
    if not answer or answer[0] & 0x0F:
        raise InvalidCardData("another card identifier than it was given", where="ATTRIB")
    return Ats(FRAME_SIZES[min(atqb[10] >> 4, 8)], frame_wait_s(atqb[11] >> 4), b"")


def _size_code(frame_bytes: int) -> int:
    """FSDI of the longest frame size of the standard that is not longer than this."""
    return max((code for code, size in enumerate(FRAME_SIZES) if size <= frame_bytes), default=0)


class BlockProtocol:
    """The block protocol of one activated card (ISO/IEC 14443-4 §7.5).

    `answer_wait_s`: how long a card may take for one answer altogether, time extensions included.
    `most_frame_bytes`: the longest frame the reader can send, prologue and CRC counted. `now`: a clock in
    seconds.
    """

    def __init__(
        self,
        ats: Ats,
        *,
        answer_wait_s: float,
        most_frame_bytes: int = 256,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._part_bytes = min(ats.frame_bytes, most_frame_bytes) - 3
        self._wait_s = max(ats.frame_wait_s + _FWT_SLACK_S, _LEAST_WAIT_S)
        self._answer_wait_s = answer_wait_s
        self._now = now
        self._number = 0

    def exchange(self, command: bytes) -> Exchange[bytes]:
        """Send one command APDU, return the whole response APDU.

        Raises:
            CardLeft: no answer, also to repeats, or none within the time for one answer.
            InvalidCardData: blocks that break the protocol, or more than a response can hold.
        """
        deadline = self._now() + self._answer_wait_s
        answer = b""
        for start in range(0, len(command), self._part_bytes):
            part = command[start : start + self._part_bytes]
            more = start + self._part_bytes < len(command)
            block = bytes([_I_BLOCK | self._number | (_CHAINING if more else 0)]) + part
            answer = yield from self._block(block, deadline)
            if more:
                if answer[0] & 0xFE != _R_ACK:
                    raise InvalidCardData("no acknowledgement of a chained block", where=_WHERE)
                self._number ^= 1
        response = bytearray()
        while True:
            if not answer or answer[0] & 0xEE != _I_BLOCK:
                raise InvalidCardData("no information block", where=_WHERE)
            self._number ^= 1
            response += answer[1:]
            if len(response) > MAX_RESPONSE_BYTES:
                raise InvalidCardData("an answer without end", where=_WHERE)
            if not answer[0] & _CHAINING:
                return bytes(response)
            answer = yield from self._block(bytes([_R_ACK | self._number]), deadline)

    def deselect(self) -> Exchange[None]:
        """Let go of the card (§8): it may answer or not."""
        yield bytes([_S_DESELECT]), self._wait_s

    def _block(self, block: bytes, deadline: float) -> Exchange[bytes]:
        """Send one block; the block that answers it."""
        send, wait_s, repeats, extensions = block, self._wait_s, 0, 0
        while True:
            left_s = deadline - self._now()
            if left_s <= 0:
                raise CardLeft("no answer in the time a card may take", advice=_TAP_AGAIN)
            answer = yield send, min(wait_s, left_s)
            wait_s = self._wait_s
            # An information block with the number of the one before is that one again, late: not this answer.
            if not answer or (answer[0] & 0xE2 == _I_BLOCK and answer[0] & 1 != self._number):
                repeats += 1
                if repeats > _MAX_REPEATS:
                    raise CardLeft("the card left before it had answered", advice=_TAP_AGAIN)
                # Rule 4 (§7.5.4.2): ask for the last block again; while the card chains, acknowledge again.
                send = block if block[0] & 0xFE == _R_ACK else bytes([_R_NAK | self._number])
            elif answer[0] == _S_WTX and len(answer) == 2:
                extensions += 1
                multiplier = answer[1] & 0x3F
                if not 1 <= multiplier <= 59 or extensions > _MAX_EXTENSIONS:
                    raise InvalidCardData("a time extension it may not ask for", where=_WHERE)
                send, wait_s = bytes([_S_WTX, multiplier]), self._wait_s * multiplier
            elif answer[0] & 0xFE == _R_ACK and answer[0] & 1 != self._number:
                # Rule 6: the card did not get this block.
                repeats += 1
                if repeats > _MAX_REPEATS:
                    raise CardLeft("the card does not hear us", advice=_TAP_AGAIN)
                send = block
            elif answer[0] & 1 != self._number:
                raise InvalidCardData("wrong block number", where=_WHERE)
            else:
                return answer
