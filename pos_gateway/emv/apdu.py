"""Command and response APDUs in short form (ISO/IEC 7816-4; EMV 4.3 Book 1 §11, Book 3 §6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from pos_gateway.emv import application, tlv
from pos_gateway.errors import InvalidCardData, InvalidInput

SW_OK: Final = 0x9000
SW_FILE_NOT_FOUND: Final = 0x6A82

INS_SELECT: Final = 0xA4
INS_GET_PROCESSING_OPTIONS: Final = 0xA8
INS_READ_RECORD: Final = 0xB2
INS_GENERATE_AC: Final = 0xAE
INS_GET_RESPONSE: Final = 0xC0
INS_GET_DATA: Final = 0xCA
INS_PUT_DATA: Final = 0xDA

TAG_COMMAND_TEMPLATE: Final = 0x83
CDA_REQUESTED: Final = 0x10
MAX_LE: Final = 256

_STATUS_NAMES: Final = {
    0x9000: "normal processing",
    0x6283: "selected file invalidated",
    0x6300: "authentication failed",
    0x6581: "memory failure",
    0x6700: "wrong length",
    0x6900: "command not allowed",
    0x6982: "security status not satisfied",
    0x6983: "authentication method blocked",
    0x6984: "referenced data invalidated",
    0x6985: "conditions of use not satisfied",
    0x6986: "command not allowed, no file selected",
    0x6A80: "incorrect data",
    0x6A81: "function not supported",
    0x6A82: "file not found",
    0x6A83: "record not found",
    0x6A86: "incorrect P1 or P2",
    0x6A88: "referenced data not found",
    0x6B00: "wrong P1 or P2",
    0x6D00: "instruction not supported",
    0x6E00: "class not supported",
    0x6F00: "no precise diagnosis",
}


class CryptogramKind(Enum):
    """What GENERATE AC asks for, and what the CID says was given (EMV 4.3 Book 3 §6.5.5)."""

    AAC = 0x00
    TC = 0x40
    ARQC = 0x80


def status_name(sw: int) -> str:
    """A status word with its meaning, for people: `"6985 conditions of use not satisfied"`."""
    if sw >> 8 == 0x61:
        return f"{sw:04X} more data available"
    if sw >> 8 == 0x6C:
        return f"{sw:04X} wrong expected length"
    if sw >> 4 == 0x63C:
        return f"{sw:04X} counter at {sw & 0xF}"
    return f"{sw:04X} {_STATUS_NAMES.get(sw, 'unknown status')}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command. `le` is how many bytes may come back at most (1 to 256); None expects no data."""

    cla: int
    ins: int
    p1: int
    p2: int
    data: bytes = field(default=b"", repr=False)
    le: int | None = None

    def to_bytes(self) -> bytes:
        """
        Raises:
            InvalidInput: more than a short APDU can carry.
        """
        if len(self.data) > 255:
            raise InvalidInput(f"{len(self.data)} bytes do not fit a short APDU", where="command data")
        if self.le is not None and not 1 <= self.le <= MAX_LE:
            raise InvalidInput("out of range", where="Le")
        body = bytes([len(self.data)]) + self.data if self.data else b""
        tail = b"" if self.le is None else bytes([self.le & 0xFF])
        return bytes([self.cla, self.ins, self.p1, self.p2]) + body + tail

    @classmethod
    def from_bytes(cls, data: bytes) -> Command:
        """What a card receives.

        Raises:
            InvalidInput: no command APDU in short form.
        """
        if len(data) < 4:
            raise InvalidInput(f"{len(data)} bytes are no command", where="command APDU")
        cla, ins, p1, p2 = data[:4]
        if len(data) == 4:
            return cls(cla, ins, p1, p2)
        if len(data) == 5:
            return cls(cla, ins, p1, p2, le=data[4] or MAX_LE)
        lc = data[4]
        rest = len(data) - 5 - lc
        if lc == 0 or rest not in (0, 1):
            raise InvalidInput(f"Lc says {lc} bytes, {len(data) - 5} follow", where="command APDU")
        le = (data[-1] or MAX_LE) if rest else None
        return cls(cla, ins, p1, p2, data[5 : 5 + lc], le)


@dataclass(frozen=True, slots=True)
class Response:
    """A response: data and status word."""

    data: bytes = field(repr=False)
    sw: int

    def to_bytes(self) -> bytes:
        return self.data + self.sw.to_bytes(2, "big")

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "response") -> Response:
        """
        Raises:
            InvalidCardData: shorter than a status word, or longer than a short response can be.
        """
        if not 2 <= len(data) <= MAX_LE + 2:
            raise InvalidCardData(f"{len(data)} bytes are no response", where=where)
        return cls(data[:-2], int.from_bytes(data[-2:], "big"))


def select(name: bytes) -> Command:
    """SELECT by DF name, first occurrence (EMV 4.3 Book 1 §11.3)."""
    return Command(0x00, INS_SELECT, 0x04, 0x00, name, MAX_LE)


def get_processing_options(pdol_values: bytes) -> Command:
    """GET PROCESSING OPTIONS with the values a PDOL asked for (EMV 4.3 Book 3 §6.5.8)."""
    data = tlv.encode(TAG_COMMAND_TEMPLATE, pdol_values)
    return Command(0x80, INS_GET_PROCESSING_OPTIONS, 0x00, 0x00, data, MAX_LE)


def read_record(sfi: int, number: int) -> Command:
    """READ RECORD (EMV 4.3 Book 3 §6.5.11). `sfi` 1 to 30, `number` 1 to 255."""
    return Command(0x00, INS_READ_RECORD, number, sfi << 3 | 4, le=MAX_LE)


def generate_ac(kind: CryptogramKind, cdol_values: bytes, *, cda: bool) -> Command:
    """GENERATE AC; with `cda` the answer is to be signed (EMV 4.3 Book 3 §6.5.5)."""
    p1 = kind.value | (CDA_REQUESTED if cda else 0)
    return Command(0x80, INS_GENERATE_AC, p1, 0x00, cdol_values, MAX_LE)


def put_note(data: bytes) -> Command:
    """PUT DATA of the note (DF01) with its issuer's MAC (after EMV 4.3 Book 3 Annex E; `note`)."""
    return Command(0x84, INS_PUT_DATA, application.TAG_NOTE >> 8, application.TAG_NOTE & 0xFF, data)


def get_log() -> Command:
    """GET DATA of the card's short log (DF14)."""
    tag = application.TAG_LOG
    return Command(0x80, INS_GET_DATA, tag >> 8, tag & 0xFF, le=MAX_LE)


def get_response(length: int) -> Command:
    """GET RESPONSE after 61xx (ISO/IEC 7816-4)."""
    return Command(0x00, INS_GET_RESPONSE, 0x00, 0x00, le=length or MAX_LE)
