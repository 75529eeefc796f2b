"""Two signed authorizations of one card on overlapping points of its counter line: a clone, proven.

The file that is verified here stands by itself: both journal records with their gateways' signatures, the
card's evidence for each, and the public keys it all hangs on. Whoever doubts it gives the keys they trust.

    each record:   gateway's signature ─► facts = what the card signed ◄─ certificates ◄─ CA key
    both together: one card, two cryptograms, and the intervals (counter before, counter after] overlap

It holds the full token number, which the card's signature covers: handle it like the card itself.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.emv import application, tlv
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.authentication import (
    CaPublicKey,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.dialogue import CardRead, card_date
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import AuthenticationFailed, InvalidMessage
from pos_gateway.records import Kind, Record, parse_object

FORMAT: Final = "pos-gateway conflict 1"
MAX_BYTES: Final = 256 * 1024

_PAIR: Final = 2


@dataclass(frozen=True, slots=True)
class Authorization:
    """One side: a journal record, its gateway's public key, and the card's evidence (a transcript)."""

    record: Record
    gateway_key: bytes
    proof: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Claim:
    """What one side proves: which points, at which terminal, when by that shop's clock."""

    record_id: str
    gateway_id: str
    terminal_id: str
    merchant_id: str
    at_unix_ms: int
    amount_minor: int
    counter_before: int
    counter_after: int
    atc: int
    cryptogram: bytes


@dataclass(frozen=True, slots=True)
class Proven:
    """A verified conflict. `overlap` is the half-open interval of points that both claim."""

    last4: str
    claims: tuple[Claim, Claim]
    overlap: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ConflictBundle:
    """All of the file."""

    issuer: str
    currency: str
    ca_keys: tuple[CaPublicKey, ...]
    authorizations: tuple[Authorization, Authorization]

    def verify(
        self,
        *,
        ca_keys: Sequence[CaPublicKey] = (),
        gateway_keys: Collection[bytes] = (),
    ) -> Proven:
        """Check everything. `ca_keys`, `gateway_keys`: those that are trusted; else the bundle's own.

        Raises:
            AuthenticationFailed: something does not verify, or the two do not contradict each other.
            InvalidInput: a record or a proof cannot be read.
        """
        cards, claims = [], []
        for authorization in self.authorizations:
            if gateway_keys and authorization.gateway_key not in gateway_keys:
                raise AuthenticationFailed("a gateway key that is not trusted", step="gateway key")
            card, claim = _claim(authorization, ca_keys or self.ca_keys)
            cards.append(card)
            claims.append(claim)
        if cards[0] != cards[1]:
            raise AuthenticationFailed("the two are of different cards", step="one card")
        one, other = claims
        if one.cryptogram == other.cryptogram:
            raise AuthenticationFailed("it is the same payment twice", step="two cryptograms")
        overlap = (
            max(one.counter_before, other.counter_before),
            min(one.counter_after, other.counter_after),
        )
        if overlap[0] >= overlap[1]:
            raise AuthenticationFailed("the intervals do not overlap", step="overlap")
        return Proven(last4=cards[0][0][-4:], claims=(one, other), overlap=overlap)

    def to_json(self) -> str:
        """The file's text. It holds the full token number."""
        document = {
            "format": FORMAT,
            "issuer": self.issuer,
            "currency": self.currency,
            "ca_keys": [
                {
                    "rid": key.rid.hex(),
                    "index": key.index,
                    "modulus": f"{key.modulus:x}".zfill(2 * key.size),
                    "exponent": key.exponent,
                }
                for key in self.ca_keys
            ],
            "authorizations": [
                {
                    "record": side.record.to_wire(),
                    "gateway_key": side.gateway_key.hex(),
                    "proof": base64.b64encode(side.proof).decode(),
                }
                for side in self.authorizations
            ],
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> ConflictBundle:
        """
        Raises:
            InvalidMessage: not this form; names the field.
        """
        if len(text) > MAX_BYTES:
            raise InvalidMessage(f"more than {MAX_BYTES} bytes", where="conflict")
        raw = parse_object(text, where="conflict")
        if raw.get("format") != FORMAT:
            raise InvalidMessage(f"must be {FORMAT!r}", where="conflict field format")
        sides = _list(raw, "authorizations")
        if len(sides) != _PAIR:
            raise InvalidMessage("must be two", where="conflict field authorizations")
        one, other = (_authorization(side) for side in sides)
        return cls(
            issuer=_text(raw, "issuer"),
            currency=_text(raw, "currency"),
            ca_keys=tuple(_ca_key(key) for key in _list(raw, "ca_keys")),
            authorizations=(one, other),
        )


def _claim(side: Authorization, ca_keys: Sequence[CaPublicKey]) -> tuple[tuple[str, int], Claim]:
    """The card of one side, and what it proves."""
    record = side.record
    if record.kind is not Kind.AUTHORIZATION:
        raise AuthenticationFailed(f"a {record.kind.value} proves no payment", step="record kind")
    try:
        key = Ed25519PublicKey.from_public_bytes(side.gateway_key)
    except ValueError:
        raise InvalidMessage("not an Ed25519 public key of 32 bytes", where="gateway_key") from None
    record.verify(key)
    transcript = Transcript.from_bytes(side.proof)
    read, answer = transcript.card(), transcript.cryptogram_answer()
    card = authenticate_card(read, ca_keys, _day(read, answer.cdol1_values))
    tc = authenticate_cryptogram(card, answer)
    if tc.kind is not CryptogramKind.TC:
        raise AuthenticationFailed(f"the card gave no TC but {tc.kind.name}", step="cryptogram kind")
    facts = record.facts()
    after = tc.iad.counter_after
    amount_minor = _digits(tc.bound[0x9F02])
    signed: dict[str, object] = {
        "sale_id": str(record.id),
        "amount_minor": amount_minor,
        "counter_after": after,
        "counter_before": after - amount_minor,
        "atc": tc.atc,
        "ac": tc.ac.hex(),
        "terminal_id": tc.bound[0x9F1C].decode("ascii", "replace").rstrip(),
        "merchant_id": tc.bound[0x9F16].decode("ascii", "replace").rstrip(),
    }
    for name, value in signed.items():
        if facts.get(name) != value:
            raise AuthenticationFailed(f"the {name} is not the one that was signed for", step="facts")
    if tc.bound[application.TAG_SALE_ID] != record.id.bytes:
        raise AuthenticationFailed("the card signed for another sale", step="facts")
    return (card.pan, card.psn), Claim(
        record_id=str(record.id),
        gateway_id=str(facts.get("gateway_id", "")),
        terminal_id=str(signed["terminal_id"]),
        merchant_id=str(signed["merchant_id"]),
        at_unix_ms=_integer(facts, "at_unix_ms"),
        amount_minor=amount_minor,
        counter_before=after - amount_minor,
        counter_after=after,
        atc=tc.atc,
        cryptogram=tc.ac,
    )


def _digits(value: bytes) -> int:
    digits = value.hex()
    if not digits.isdecimal():
        raise AuthenticationFailed("the amount that was signed is no number", step="facts")
    return int(digits)


def _day(card: CardRead, cdol1_values: bytes) -> date:
    """The shop's local day of the tap, which the cryptogram binds: certificates are judged by it."""
    return card_date(tlv.split_dol(card.cdol1, cdol1_values, where="CDOL1 values")[0x9A], 0x9A)


def _authorization(raw: object) -> Authorization:
    side = _object(raw, "authorizations")
    return Authorization(
        record=Record.from_wire(side.get("record")),
        gateway_key=_hex(side, "gateway_key"),
        proof=_base64(side, "proof"),
    )


def _ca_key(raw: object) -> CaPublicKey:
    key = _object(raw, "ca_keys")
    return CaPublicKey(
        rid=_hex(key, "rid"),
        index=_integer(key, "index"),
        modulus=int.from_bytes(_hex(key, "modulus"), "big"),
        exponent=_integer(key, "exponent"),
    )


def _object(raw: object, name: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise InvalidMessage("must hold objects", where=f"conflict field {name}")
    return raw


def _list(raw: Mapping[str, Any], name: str) -> list[object]:
    value = raw.get(name)
    if not isinstance(value, list) or len(value) > 16:
        raise InvalidMessage("must be a short list", where=f"conflict field {name}")
    return value


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidMessage("must be a whole number", where=f"conflict field {name}")
    return value


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or len(value) > 64 or not value.isprintable():
        raise InvalidMessage("must be a short text", where=f"conflict field {name}")
    return value


def _hex(raw: Mapping[str, Any], name: str) -> bytes:
    try:
        return bytes.fromhex(raw[name])
    except (KeyError, TypeError, ValueError):
        raise InvalidMessage("must be hexadecimal text", where=f"conflict field {name}") from None


def _base64(raw: Mapping[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(raw[name], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise InvalidMessage("must be base64 text", where=f"conflict field {name}") from None
