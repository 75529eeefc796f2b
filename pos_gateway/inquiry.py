"""What a shop or a phone asks the ledger on the spot, and what it is answered: the words all of them share.

    gateway → ledger   {"gateway_id", "sale_id", "proof"}   signed like a batch; proof sealed like a record's
    wallet  → ledger   {"transcript"}                       its card's cryptogram over a fresh challenge
    answer             {"grant", "note", "limit", "refused"}   each null when there is none

The proof says everything else: amount, terminal and counter are read from what the card signed.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from pos_gateway.errors import InvalidMessage
from pos_gateway.limits.single import SINGLE_BYTES
from pos_gateway.records import MAX_PROOF_BYTES, parse_object

MAX_INQUIRY_BYTES: Final = 2 * MAX_PROOF_BYTES
_MAX_PUT_DATA_BYTES: Final = 255
_MAX_REASON_CHARACTERS: Final = 300


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A gateway's question about one tap. The same tap is asked about with the same bytes."""

    gateway_id: str
    sale_id: UUID
    proof: bytes = field(repr=False)

    def to_body(self) -> bytes:
        raw = {"gateway_id": self.gateway_id, "sale_id": str(self.sale_id), "proof": _text(self.proof)}
        return json.dumps(raw, separators=(",", ":")).encode()

    @classmethod
    def from_body(cls, body: bytes) -> Inquiry:
        """
        Raises:
            InvalidMessage: names the field.
        """
        raw = parse_object(body, where="inquiry")
        gateway_id = raw.get("gateway_id")
        if not isinstance(gateway_id, str):
            raise InvalidMessage("must be text", where="inquiry field gateway_id")
        try:
            sale_id = UUID(str(raw.get("sale_id")))
        except ValueError:
            raise InvalidMessage("not a UUID", where="inquiry field sale_id") from None
        return cls(gateway_id, sale_id, _bytes(raw.get("proof"), "proof", MAX_PROOF_BYTES))


def wallet_body(transcript: bytes) -> bytes:
    return json.dumps({"transcript": _text(transcript)}).encode()


def wallet_transcript(body: bytes) -> bytes:
    """
    Raises:
        InvalidMessage: no wallet's question.
    """
    raw = parse_object(body, where="inquiry")
    return _bytes(raw.get("transcript"), "transcript", MAX_PROOF_BYTES)


@dataclass(frozen=True, slots=True)
class NoteToWrite:
    """A note on its way to a card: `data` is what PUT DATA carries, MAC included."""

    sequence: int
    valid_until_unix_s: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """`reason` is one of `authorization.reasons.Reason`, as its value."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class OwnLimit:
    """What a phone is told of its own note, to know how far it can go."""

    ceiling: int
    digest: bytes
    valid_until_unix_s: int


@dataclass(frozen=True, slots=True)
class OnlineAnswer:
    grant: bytes | None = field(default=None, repr=False)
    note: NoteToWrite | None = None
    limit: OwnLimit | None = None
    refused: Refusal | None = None

    def to_json(self) -> str:
        note, limit, refused = self.note, self.limit, self.refused
        raw: dict[str, Any] = {
            "grant": None if self.grant is None else _text(self.grant),
            "note": note
            and {
                "sequence": note.sequence,
                "valid_until_unix_s": note.valid_until_unix_s,
                "data": _text(note.data),
            },
            "limit": limit
            and {
                "ceiling": limit.ceiling,
                "digest": limit.digest.hex(),
                "valid_until_unix_s": limit.valid_until_unix_s,
            },
            "refused": refused and {"reason": refused.reason, "detail": refused.detail},
        }
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> OnlineAnswer:
        """
        Raises:
            InvalidMessage: not such an answer, or a part of it too long.
        """
        raw = parse_object(text, where="answer")
        grant, note, limit, refused = (raw.get(name) for name in ("grant", "note", "limit", "refused"))
        try:
            return cls(
                grant=None if grant is None else _bytes(grant, "grant", SINGLE_BYTES),
                note=None
                if note is None
                else NoteToWrite(
                    _integer(note["sequence"]),
                    _integer(note["valid_until_unix_s"]),
                    _bytes(note["data"], "note", _MAX_PUT_DATA_BYTES),
                ),
                limit=None
                if limit is None
                else OwnLimit(
                    _integer(limit["ceiling"]),
                    bytes.fromhex(limit["digest"]),
                    _integer(limit["valid_until_unix_s"]),
                ),
                refused=None
                if refused is None
                else Refusal(_words(refused["reason"]), _words(refused["detail"])),
            )
        except (KeyError, TypeError, ValueError):
            raise InvalidMessage("a part of it cannot be read", where="answer") from None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(value: object, name: str, longest: int) -> bytes:
    try:
        if not isinstance(value, str) or len(value) > 4 * longest // 3 + 4:
            raise ValueError
        data = base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        raise InvalidMessage("not base64, or too long", where=f"field {name}") from None
    if len(data) > longest:
        raise InvalidMessage(f"over {longest} bytes", where=f"field {name}")
    return data


def _integer(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _words(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return "".join(character for character in value if character.isprintable())[:_MAX_REASON_CHARACTERS]
