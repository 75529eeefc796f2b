"""What a card of ours keeps for others: a note that its issuer lets shops write, and a short log of its TCs.

The note travels in GET PROCESSING OPTIONS (DF01); the card cannot read it and does not have to. It is
written with PUT DATA, proprietary in content:

    sequence (4) ‖ note (1 to 240) ‖ MAC (8)
    MAC = HMAC-SHA-256(note key of the card, "pos-gateway note 1\\0" ‖ sequence ‖ note), the first 8 bytes
    note key = HMAC-SHA-256(MK_AC of the card, "pos-gateway note key 1\\0")

The card takes a note only with its issuer's MAC and with a higher sequence than the one it has, whole or not
at all. Not diversified by ATC: a note may be written at a later tap than the one it was made for.

The log (DF14, GET DATA) holds 20 bytes for each TC, oldest first: terminal (8) ‖ amount (n12) ‖ counter (6).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pos_gateway.emv.application import counter_bytes
from pos_gateway.errors import AuthenticationFailed, InvalidCardData, InvalidInput

MAX_NOTE_BYTES: Final = 240
MAX_LOG_ENTRIES: Final = 12

_SEQUENCE_BYTES: Final = 4
_MAC_BYTES: Final = 8
_LOG_ENTRY_BYTES: Final = 20
_DOMAIN: Final = b"pos-gateway note 1\0"
_KEY_DOMAIN: Final = b"pos-gateway note key 1\0"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One of the card's latest TCs: who asked, how much, and where its counter stood after it."""

    terminal: str
    amount_minor: int
    counter: int


def put_note_data(mk_ac: bytes, sequence: int, note: bytes) -> bytes:
    """The issuer's side: the data of PUT DATA for one card.

    Raises:
        InvalidInput: a sequence or note that does not fit.
    """
    if not 0 <= sequence < 1 << 32:
        raise InvalidInput("out of range", where="note sequence")
    if not 1 <= len(note) <= MAX_NOTE_BYTES:
        raise InvalidInput(f"{len(note)} bytes, must be 1 to {MAX_NOTE_BYTES}", where="note")
    signed = sequence.to_bytes(_SEQUENCE_BYTES, "big") + note
    return signed + _mac(mk_ac, signed)


def take_note_data(mk_ac: bytes, data: bytes) -> tuple[int, bytes]:
    """The card's side: sequence and note.

    Raises:
        InvalidInput: too short or too long.
        AuthenticationFailed: step `note MAC`: not its issuer's.
    """
    if not _SEQUENCE_BYTES + 1 + _MAC_BYTES <= len(data) <= _SEQUENCE_BYTES + MAX_NOTE_BYTES + _MAC_BYTES:
        raise InvalidInput(f"{len(data)} bytes", where="PUT DATA")
    signed, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(mk_ac, signed)):
        raise AuthenticationFailed("not made with this card's key", step="note MAC")
    return int.from_bytes(signed[:_SEQUENCE_BYTES], "big"), signed[_SEQUENCE_BYTES:]


def encode_log(entries: Iterable[LogEntry]) -> bytes:
    """As much of the newest as fits one answer."""
    return b"".join(
        entry.terminal.encode("latin-1").ljust(8)
        + bytes.fromhex(f"{entry.amount_minor:012d}")
        + counter_bytes(entry.counter)
        for entry in list(entries)[-MAX_LOG_ENTRIES:]
    )


def parse_log(data: bytes) -> tuple[LogEntry, ...]:
    """
    Raises:
        InvalidCardData: names the byte.
    """
    if len(data) % _LOG_ENTRY_BYTES or len(data) > MAX_LOG_ENTRIES * _LOG_ENTRY_BYTES:
        raise InvalidCardData(f"{len(data)} bytes are no log", where="tag DF14")
    entries = []
    for at in range(0, len(data), _LOG_ENTRY_BYTES):
        terminal, amount, counter = data[at : at + 8], data[at + 8 : at + 14].hex(), data[at + 14 : at + 20]
        if not amount.isdecimal():
            raise InvalidCardData("an amount is no number", where=f"tag DF14, byte {at + 8}")
        name = terminal.decode("latin-1").rstrip(" ")
        entries.append(LogEntry(name, int(amount), int.from_bytes(counter, "big")))
    return tuple(entries)


def _mac(mk_ac: bytes, signed: bytes) -> bytes:
    key = hmac.digest(mk_ac, _KEY_DOMAIN, "sha256")
    return hmac.digest(key, _DOMAIN + signed, "sha256")[:_MAC_BYTES]
