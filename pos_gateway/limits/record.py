"""The limit record: what an issuer lets a shop know about one token, in 36 bytes.

| offset | bytes | content                                                        |
|--------|-------|----------------------------------------------------------------|
| 0      | 16    | token key                                                      |
| 16     | 8     | ceiling: the highest counter a TC may reach, at most 2^48 − 1  |
| 24     | 4     | per-tap cap, minor units                                       |
| 28     | 4     | sequence: of two records of one token, the higher one counts   |
| 32     | 1     | status: 1 active, 2 blocked, 3 closed                          |
| 33     | 1     | assurance                                                      |
| 34     | 1     | instalment class                                               |
| 35     | 1     | zero                                                           |

Integers are unsigned and big-endian, so records sort by token key as plain bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from enum import IntEnum
from typing import Final, NamedTuple

from pos_gateway.emv.application import DIGEST_BYTES, MAX_COUNTER
from pos_gateway.errors import InvalidInput, InvalidSnapshot

RECORD_BYTES: Final = 36
TOKEN_KEY_BYTES: Final = 16
NONCE_BYTES: Final = 16
MAX_U32: Final = (1 << 32) - 1

_LAYOUT: Final = struct.Struct(">16sQIIBBBB")
_TOKEN_KEY_DOMAIN: Final = b"pos-gateway token key 1\0"
DIGEST_DOMAIN: Final = b"pos-gateway limit record 1\0"


class Status(IntEnum):
    """May the token pay? Zero is no status, so that no run of zero bytes reads as one."""

    ACTIVE = 1
    BLOCKED = 2
    CLOSED = 3


_STATUSES: Final = {int(status): status for status in Status}


class LimitRecord(NamedTuple):
    """One token's limit. `ceiling` is a position on the card's counter line, not an amount.

    A tuple because one is made in every lookup, where a frozen dataclass would cost a microsecond more.
    """

    token_key: bytes
    ceiling: int
    per_tap_cap_minor: int
    sequence: int
    status: Status = Status.ACTIVE
    assurance: int = 0
    instalment_class: int = 0

    def to_bytes(self) -> bytes:
        """
        Raises:
            InvalidInput: a field that its place on disk, or a card, cannot hold.
        """
        if len(self.token_key) != TOKEN_KEY_BYTES:
            raise InvalidInput(f"{len(self.token_key)} bytes, expected {TOKEN_KEY_BYTES}", where="token_key")
        if not 0 <= self.ceiling <= MAX_COUNTER:
            raise InvalidInput("outside the card's 48-bit counter", where="ceiling")
        try:
            return _LAYOUT.pack(
                self.token_key,
                self.ceiling,
                self.per_tap_cap_minor,
                self.sequence,
                Status(self.status),
                self.assurance,
                self.instalment_class,
                0,
            )
        except (struct.error, ValueError) as error:
            raise InvalidInput(f"a field is out of range: {error}", where="limit record") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> LimitRecord:
        """
        Raises:
            InvalidSnapshot: wrong length, unknown status, a ceiling no card can reach, or a reserved
                byte in use.
        """
        if len(data) != RECORD_BYTES:
            raise InvalidSnapshot(f"{len(data)} bytes, expected {RECORD_BYTES}", where="limit record")
        key, ceiling, cap_minor, sequence, status, assurance, instalment_class, reserved = _LAYOUT.unpack(
            data
        )
        if status not in _STATUSES:
            raise InvalidSnapshot(f"unknown status {status}", where="limit record, byte 32")
        if ceiling > MAX_COUNTER:
            raise InvalidSnapshot("outside the card's 48-bit counter", where="limit record, byte 16")
        if reserved:
            raise InvalidSnapshot("the reserved byte is not zero", where="limit record, byte 35")
        # Past the named constructor, which costs as much again.
        values = (key, ceiling, cap_minor, sequence, _STATUSES[status], assurance, instalment_class)
        return tuple.__new__(cls, values)

    def digest(self, nonce: bytes) -> bytes:
        """The 16 bytes by which a TC names the record it relied on.

        `nonce` comes from the header of the snapshot the record stands in. It is random per
        publication, so a cryptogram over the digest was surely made after that publication.
        """
        if len(nonce) != NONCE_BYTES:
            raise InvalidInput(f"{len(nonce)} bytes, expected {NONCE_BYTES}", where="nonce")
        return hashlib.sha256(DIGEST_DOMAIN + nonce + self.to_bytes()).digest()[:DIGEST_BYTES]


def token_key(secret: bytes, pan: str, psn: int) -> bytes:
    """A token's name in snapshots: HMAC-SHA-256 of its number and sequence number, 16 bytes.

    `secret` is the issuer's token key secret of the epoch, at least 16 bytes.

    Raises:
        InvalidInput: not a token number, PSN out of 0..99, or a secret too short; values are never quoted.
    """
    if not (pan.isascii() and pan.isdigit() and 8 <= len(pan) <= 19):
        raise InvalidInput("not a token number of 8 to 19 digits", where="pan")
    if not 0 <= psn <= 99:
        raise InvalidInput("out of 0..99", where="psn")
    if len(secret) < 16:
        raise InvalidInput("shorter than 16 bytes", where="token key secret")
    message = _TOKEN_KEY_DOMAIN + f"{pan}/{psn:02d}".encode("ascii")
    return hmac.digest(secret, message, "sha256")[:TOKEN_KEY_BYTES]
