"""Our card application's data sheet: its AID, its proprietary tags, its DOLs and its IAD.

A closed-loop application in EMV data formats under a proprietary AID. It is no scheme product.
Everything that the card, the gateway and the issuer must agree on to the byte stands here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pos_gateway.errors import InvalidCardData, InvalidInput

AID: Final = bytes.fromhex("F0504F53475701")
"""First nibble F: proprietary, unregistered (ISO/IEC 7816-5)."""
RID: Final = AID[:5]
PPSE: Final = b"2PAY.SYS.DDF01"

# Proprietary tags, private class DF01..DF7F.
TAG_NOTE: Final = 0xDF01
TAG_CEILING: Final = 0xDF10
TAG_LIMIT_DIGEST: Final = 0xDF11
TAG_SALE_ID: Final = 0xDF12
TAG_PLAN_DIGEST: Final = 0xDF13
TAG_LOG: Final = 0xDF14

PDOL: Final = bytes.fromhex("9F0206 9F0306 9F1A02 9505 5F2A02 9A03 9C01 9F3704")
CDOL1: Final = bytes.fromhex(
    "9F0206 9F0306 5F2A02 9F1A02 9A03 9F2103 9C01 9F3704 9F4104 9F1C08 9F160F 9F1502"
    "DF1006 DF1110 DF1210 DF1310"
)
CDOL2: Final = bytes.fromhex("DF1006 DF1110 9F3704")

MAX_COUNTER: Final = (1 << 48) - 1
DIGEST_BYTES: Final = 16
NO_PLAN: Final = bytes(DIGEST_BYTES)
"""The plan digest of a payment without instalments."""

TRANSACTION_TYPE_PURCHASE: Final = 0x00
TRANSACTION_TYPE_RETURN: Final = 0x21
"""Unused allowance goes back to the issuer: points of the counter line claimed, no money owed."""
TRANSACTION_TYPE_INQUIRY: Final = 0x31
"""The card asks its issuer for a note."""
ISSUER_TERMINAL: Final = "ISSUER"
ISSUER_MERCHANT: Final = "ISSUER"
ISSUER_CATEGORY: Final = "0000"
"""Whom a cryptogram names that is addressed to the issuer; no shop is ever called so."""

IAD_BYTES: Final = 32
_IAD_FORMAT: Final = 0x01
_CVR_BYTES: Final = 5
_CVR_CDCVM_PERFORMED: Final = 0x80  # first byte of the CVR
_PREVIOUS_DIGEST_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Sale:
    """What one cryptogram is bound to: the values a terminal fills into PDOL and CDOL1.

    `at` is the terminal's local time of the transaction (9A, 9F21). Texts are ASCII and padded with
    blanks to their tag's length. The three ids are raw bytes: sale id and digests of 16 bytes each.
    """

    amount_minor: int
    currency_numeric: int
    country_numeric: int
    at: datetime
    unpredictable_number: bytes
    sequence_counter: int
    terminal_id: str
    merchant_id: str
    merchant_category: str
    sale_id: bytes
    ceiling: int
    limit_digest: bytes
    plan_digest: bytes = NO_PLAN
    transaction_type: int = TRANSACTION_TYPE_PURCHASE

    def elements(self) -> dict[int, bytes]:
        """Tag → value, each exactly as long as our DOLs ask for.

        Raises:
            InvalidInput: a value that its tag cannot hold.
        """
        return {
            0x9F02: _bcd(self.amount_minor, 6, "amount"),
            0x9F03: bytes(6),
            0x9F1A: _bcd(self.country_numeric, 2, "country"),
            0x95: bytes(5),
            0x5F2A: _bcd(self.currency_numeric, 2, "currency"),
            0x9A: bytes.fromhex(self.at.strftime("%y%m%d")),
            0x9F21: bytes.fromhex(self.at.strftime("%H%M%S")),
            0x9C: bytes([self.transaction_type]),
            0x9F37: _exactly(self.unpredictable_number, 4, "unpredictable number"),
            0x9F41: _bcd(self.sequence_counter % 100_000_000, 4, "sequence counter"),
            0x9F1C: _text(self.terminal_id, 8, "terminal id"),
            0x9F16: _text(self.merchant_id, 15, "merchant id"),
            0x9F15: _bcd(int(self.merchant_category), 2, "merchant category"),
            TAG_CEILING: counter_bytes(self.ceiling),
            TAG_LIMIT_DIGEST: _exactly(self.limit_digest, DIGEST_BYTES, "limit digest"),
            TAG_SALE_ID: _exactly(self.sale_id, 16, "sale id"),
            TAG_PLAN_DIGEST: _exactly(self.plan_digest, DIGEST_BYTES, "plan digest"),
        }


@dataclass(frozen=True, slots=True)
class Iad:
    """Issuer application data (9F10), 32 bytes:

    | offset | bytes | content                                                             |
    |--------|-------|---------------------------------------------------------------------|
    | 0      | 1     | format, 01                                                          |
    | 1      | 1     | derivation key index                                                |
    | 2      | 1     | cryptogram version                                                  |
    | 3      | 5     | CVR; bit 8 of its first byte: the device verified its holder (CDCVM) |
    | 8      | 8     | counter: in a TC 6 bytes clear and 2 of zero; in an ARQC enciphered |
    | 16     | 8     | digest of the previous TC's CDOL1 values                            |
    | 24     | 8     | zero                                                                |
    """

    key_index: int
    cryptogram_version: int
    cvr: bytes
    counter_field: bytes
    previous_digest: bytes

    @property
    def holder_verified_on_device(self) -> bool:
        return bool(self.cvr[0] & _CVR_CDCVM_PERFORMED)

    @property
    def counter_after(self) -> int:
        """The counter in clear; meaningful in a TC only.

        Raises:
            InvalidCardData: the field is not a clear counter.
        """
        if self.counter_field[6:] != b"\0\0":
            raise InvalidCardData("counter field is not a clear counter", where="tag 9F10, byte 14")
        return int.from_bytes(self.counter_field[:6], "big")

    def to_bytes(self) -> bytes:
        return (
            bytes([_IAD_FORMAT, self.key_index, self.cryptogram_version])
            + _exactly(self.cvr, _CVR_BYTES, "CVR")
            + _exactly(self.counter_field, 8, "counter field")
            + _exactly(self.previous_digest, _PREVIOUS_DIGEST_BYTES, "previous digest")
            + bytes(8)
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Iad:
        """
        Raises:
            InvalidCardData: wrong length, unknown format, or reserved bytes in use.
        """
        if len(data) != IAD_BYTES:
            raise InvalidCardData(f"{len(data)} bytes, expected {IAD_BYTES}", where="tag 9F10")
        if data[0] != _IAD_FORMAT:
            raise InvalidCardData(f"unknown format {data[0]:02X}", where="tag 9F10, byte 0")
        if any(data[24:]):
            raise InvalidCardData("reserved bytes are not zero", where="tag 9F10, byte 24")
        return cls(data[1], data[2], data[3:8], data[8:16], data[16:24])


def bound_by_second(first: Mapping[int, bytes], second: Mapping[int, bytes]) -> dict[int, bytes]:
    """What a second cryptogram binds: the values of CDOL1, and in their place those of CDOL2.

    Raises:
        InvalidCardData: the unpredictable number is not that of the first.
    """
    if second[0x9F37] != first[0x9F37]:
        raise InvalidCardData("another unpredictable number than before", where="CDOL2 values")
    return {**first, **second}


def cvr(*, holder_verified_on_device: bool) -> bytes:
    return bytes([_CVR_CDCVM_PERFORMED if holder_verified_on_device else 0]) + bytes(_CVR_BYTES - 1)


def clear_counter_field(counter: int) -> bytes:
    return counter_bytes(counter) + b"\0\0"


def counter_bytes(counter: int) -> bytes:
    """A position on the counter line as the 6 bytes that cards and terminals exchange."""
    if not 0 <= counter <= MAX_COUNTER:
        raise InvalidInput("counter out of its 48 bits", where="counter")
    return counter.to_bytes(6, "big")


def previous_digest(cdol1_values: bytes) -> bytes:
    """The 8 bytes by which the next TC points back to this one, whether the first GENERATE AC gave it or
    the second."""
    return hashlib.sha256(b"pos-gateway previous TC\0" + cdol1_values).digest()[:_PREVIOUS_DIGEST_BYTES]


def _bcd(number: int, length: int, what: str) -> bytes:
    digits = str(number).zfill(2 * length)
    if number < 0 or len(digits) > 2 * length:
        raise InvalidInput(f"does not fit {2 * length} digits", where=what)
    return bytes.fromhex(digits)


def _text(text: str, length: int, what: str) -> bytes:
    if not text.isascii() or not text.isprintable() or len(text) > length:
        raise InvalidInput(f"must be at most {length} printable ASCII characters", where=what)
    return text.encode("ascii").ljust(length)


def _exactly(data: bytes, length: int, what: str) -> bytes:
    if len(data) != length:
        raise InvalidInput(f"{len(data)} bytes, expected {length}", where=what)
    return data
