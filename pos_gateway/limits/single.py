"""A limit record that stands by itself: signed by a key that is online, for one token, for a short while.

A **grant** is the ledger's answer to one terminal on the spot. A **note** travels on the customer's card and
counts at every terminal. Both hold the same 36-byte record as a snapshot does, and its digest is made the
same way with a nonce of its own. Which keys may sign them, and how far, a snapshot's header says
(`OnlineTerms`), under the threshold's signatures.

| offset | bytes | content                                              |
|--------|-------|------------------------------------------------------|
| 0      | 1     | format, 1                                            |
| 1      | 1     | kind: 1 grant, 2 note                                |
| 2      | 36    | limit record                                         |
| 38     | 16    | nonce                                                |
| 54     | 8     | issued, unix seconds                                 |
| 62     | 8     | valid until, unix seconds; not at that second itself |
| 70     | 8     | terminal (9F1C), ASCII; all blanks for any terminal  |
| 78     | 8     | key id: SHA-256 of the public key, the first 8 bytes |
| 86     | 64    | Ed25519 signature over a domain and bytes 0 to 85    |
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pos_gateway.errors import AuthenticationFailed, InvalidSnapshot
from pos_gateway.limits.header import SnapshotTerms
from pos_gateway.limits.record import NONCE_BYTES, LimitRecord

SINGLE_BYTES: Final = 150
KEY_ID_BYTES: Final = 8
TERMINAL_BYTES: Final = 8
ANY_TERMINAL: Final = ""

_FORMAT: Final = 1
_LAYOUT: Final = struct.Struct(f">BB36s{NONCE_BYTES}sQQ{TERMINAL_BYTES}s{KEY_ID_BYTES}s")
_DOMAIN: Final = b"pos-gateway single limit 1\0"
_MAX_TIME_UNIX_S: Final = 253_402_300_799


class Kind(IntEnum):
    GRANT = 1
    NOTE = 2


_KINDS: Final = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleLimit:
    """One record with its own validity. `terminal_id` is `ANY_TERMINAL` in every note and in no grant.

    Raises:
        InvalidSnapshot: a field of the wrong length or out of range, or a kind and a terminal at odds.
    """

    kind: Kind
    record: LimitRecord
    nonce: bytes
    issued_unix_s: int
    valid_until_unix_s: int
    terminal_id: str = ANY_TERMINAL

    def __post_init__(self) -> None:
        if len(self.nonce) != NONCE_BYTES:
            raise InvalidSnapshot(f"{len(self.nonce)} bytes, expected {NONCE_BYTES}", where="nonce")
        if not 0 <= self.issued_unix_s <= self.valid_until_unix_s <= _MAX_TIME_UNIX_S:
            raise InvalidSnapshot("issued and valid until must follow each other", where="single limit times")
        terminal = self.terminal_id
        if not (terminal.isascii() and terminal == terminal.rstrip() and len(terminal) <= TERMINAL_BYTES):
            raise InvalidSnapshot("not a terminal id", where="terminal")
        if terminal and not terminal.isprintable():
            raise InvalidSnapshot("not a terminal id", where="terminal")
        if (self.kind is Kind.NOTE) != (terminal == ANY_TERMINAL):
            raise InvalidSnapshot("a grant names its terminal, a note none", where="terminal")

    @property
    def digest(self) -> bytes:
        """The 16 bytes by which a TC names it."""
        return self.record.digest(self.nonce)

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The whole of it, 150 bytes."""
        signed = _LAYOUT.pack(
            _FORMAT,
            self.kind,
            self.record.to_bytes(),
            self.nonce,
            self.issued_unix_s,
            self.valid_until_unix_s,
            self.terminal_id.encode("ascii").ljust(TERMINAL_BYTES),
            online_key_id(key.public_key().public_bytes_raw()),
        )
        return signed + key.sign(_DOMAIN + signed)


def online_key_id(public_key: bytes) -> bytes:
    """How a single limit names the key that signed it."""
    return hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]


def read_single(data: bytes, header: SnapshotTerms) -> SingleLimit:
    """Verify a single limit against the keys and lives that a verified header allows. Whether it counts
    now, at this terminal: see `why_not`.

    Raises:
        InvalidSnapshot: not of this form.
        AuthenticationFailed: step `online key`: no key of the header's; `single limit signature`: changed;
            `single limit life`: it would live longer than the header lets one of its kind.
    """
    if len(data) != SINGLE_BYTES:
        raise InvalidSnapshot(f"{len(data)} bytes, expected {SINGLE_BYTES}", where="single limit")
    signed, signature = data[: _LAYOUT.size], data[_LAYOUT.size :]
    form, kind, record, nonce, issued, valid_until, terminal, key_id = _LAYOUT.unpack(signed)
    if form != _FORMAT:
        raise InvalidSnapshot(f"format {form}; this program reads {_FORMAT}", where="single limit, byte 0")
    key = next((key for key in header.online.keys if online_key_id(key) == key_id), None)
    if key is None:
        raise AuthenticationFailed("signed by no online key of these limits", step="online key")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _DOMAIN + signed)
    except (InvalidSignature, ValueError):
        raise AuthenticationFailed("its signature does not verify", step="single limit signature") from None
    if kind not in _KINDS:
        raise InvalidSnapshot(f"unknown kind {kind}", where="single limit, byte 1")
    try:
        terminal_id = terminal.decode("ascii").rstrip(" ")
    except UnicodeDecodeError:
        raise InvalidSnapshot("not a terminal id", where="single limit, byte 70") from None
    single = SingleLimit(
        kind=_KINDS[kind],
        record=LimitRecord.from_bytes(record),
        nonce=nonce,
        issued_unix_s=issued,
        valid_until_unix_s=valid_until,
        terminal_id=terminal_id,
    )
    longest_s = header.online.grant_life_s if single.kind is Kind.GRANT else header.online.note_life_s
    if valid_until - issued > longest_s:
        raise AuthenticationFailed(
            f"valid for {valid_until - issued} s, at most {longest_s}", step="single limit life"
        )
    return single


def why_not(
    single: SingleLimit, *, token_key: bytes, terminal_id: str, now_unix_s: int, clock_tolerance_s: int
) -> str | None:
    """Why it says nothing for this token at this terminal now; None if it counts. Pure."""
    if single.record.token_key != token_key:
        return "it is another token's"
    if single.terminal_id not in (ANY_TERMINAL, terminal_id):
        return "it is for another terminal"
    if now_unix_s >= single.valid_until_unix_s:
        return "it has expired"
    if now_unix_s < single.issued_unix_s - clock_tolerance_s:
        return "it is not valid yet: check the clock"
    return None
