"""EMV certificates: how an issuer's and a card's public key are signed (EMV 4.3 Book 2 §5.1, §6.1).

Pure but for the signer, which may be a file or a hardware security module.
"""

from __future__ import annotations

import calendar
import hashlib
from dataclasses import dataclass
from datetime import date
from typing import Final, Protocol

from pos_gateway.errors import InvalidInput

_HEADER: Final = b"\x6a"
_TRAILER: Final = b"\xbc"
_SHA1_INDICATOR: Final = 1
_RSA_INDICATOR: Final = 1
_FORMAT_ISSUER: Final = b"\x02"
_FORMAT_ICC: Final = b"\x04"
_FIXED_ISSUER_BYTES: Final = 36  # of a certificate, all but the key's leftmost digits
_FIXED_ICC_BYTES: Final = 42


class RawRsaSigner(Protocol):
    """A private RSA key that answers with block^d mod n and never shows d."""

    @property
    def modulus(self) -> int: ...

    @property
    def exponent(self) -> int:
        """The public exponent."""

    def sign(self, block: bytes) -> bytes:
        """Sign a block exactly as long as the modulus; the answer is as long."""


@dataclass(frozen=True, slots=True)
class SignedKey:
    """A certificate and the digits of the key that did not fit into it (empty if all did)."""

    certificate: bytes
    remainder: bytes


def modulus_bytes(modulus: int) -> bytes:
    return modulus.to_bytes((modulus.bit_length() + 7) // 8, "big")


def exponent_bytes(exponent: int) -> bytes:
    return exponent.to_bytes((exponent.bit_length() + 7) // 8, "big")


def certify_issuer(
    ca: RawRsaSigner, *, issuer_identifier: str, expires: date, serial: bytes, modulus: int, exponent: int
) -> SignedKey:
    """Certificate format 02: the issuer's key under the CA's (EMV 4.3 Book 2, tables 1 and 5).

    `issuer_identifier`: the leading 3 to 8 digits of the issuer's PANs.
    """
    subject = bytes.fromhex(issuer_identifier.ljust(8, "F"))
    return _certify(
        ca, _FORMAT_ISSUER + subject, _FIXED_ISSUER_BYTES, expires, serial, modulus, exponent, b""
    )


def certify_icc(
    issuer: RawRsaSigner,
    *,
    pan: str,
    expires: date,
    serial: bytes,
    modulus: int,
    exponent: int,
    static_data: bytes,
) -> SignedKey:
    """Certificate format 04: a card's key under the issuer's (EMV 4.3 Book 2, tables 9 and 14).

    `static_data`: the static data to be authenticated, which this certificate also vouches for.
    """
    subject = bytes.fromhex(pan.ljust(20, "F"))
    return _certify(
        issuer, _FORMAT_ICC + subject, _FIXED_ICC_BYTES, expires, serial, modulus, exponent, static_data
    )


def end_of_month(day: date) -> date:
    """Certificates expire with a month: MMYY."""
    return day.replace(day=calendar.monthrange(day.year, day.month)[1])


def _certify(
    signer: RawRsaSigner,
    head: bytes,
    fixed_bytes: int,
    expires: date,
    serial: bytes,
    modulus: int,
    exponent: int,
    static_data: bytes,
) -> SignedKey:
    size = len(modulus_bytes(signer.modulus))
    key, public_exponent = modulus_bytes(modulus), exponent_bytes(exponent)
    if len(serial) != 3:
        raise InvalidInput("a certificate serial number has 3 bytes", where="serial")
    if len(key) > size:
        raise InvalidInput(f"{len(key)} bytes are more than the signing key's {size}", where="modulus")
    room = size - fixed_bytes
    signed = (
        head
        + bytes.fromhex(expires.strftime("%m%y"))
        + serial
        + bytes([_SHA1_INDICATOR, _RSA_INDICATOR, len(key), len(public_exponent)])
        + key[:room].ljust(room, b"\xbb")
    )
    remainder = key[room:]
    digest = hashlib.sha1(signed + remainder + public_exponent + static_data, usedforsecurity=False).digest()
    return SignedKey(signer.sign(_HEADER + signed + digest + _TRAILER), remainder)
