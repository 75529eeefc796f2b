"""What a card has shown, checked as only its issuer can: a TC or ARQC, whoever brought it. Pure.

Everything is read from what the card signed, twice over: with its certificate (CDA), and with a key that only
it and the issuer have.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Final
from uuid import UUID

from pos_gateway.emv import application, cryptogram, tlv
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.authentication import Cryptogram, authenticate_card, authenticate_cryptogram
from pos_gateway.emv.dialogue import card_date
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import AuthenticationFailed
from pos_gateway.ledger.evidence import Issuer
from pos_gateway.limits.record import token_key

_A_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Shown:
    """A genuine cryptogram. An ARQC has moved nothing: its counter stands for both ends.

    `note_key`: the card's own key that a note for it is authenticated with.
    """

    token_key: bytes
    kind: CryptogramKind
    amount_minor: int
    counter_before: int
    counter_after: int
    atc: int
    cryptogram: bytes
    previous_digest: bytes
    ceiling: int
    limit_digest: bytes
    sale_id: UUID
    terminal_id: str
    merchant_id: str
    transaction_type: int
    note_key: bytes = field(repr=False)


def read_shown(transcript: Transcript, issuer: Issuer, now_unix_ms: int) -> Shown:
    """
    Raises:
        InvalidCardData: not a whole dialogue with a card of ours.
        AuthenticationFailed: it does not verify, or not for this issuer, or not for about today.
    """
    card_read, answer = transcript.card(), transcript.cryptogram_answer()
    day = card_date(tlv.split_dol(card_read.cdol1, answer.cdol1_values, where="CDOL1 values")[0x9A], 0x9A)
    _check_day(day, now_unix_ms)
    card = authenticate_card(card_read, issuer.ca_keys, day, known_issuers=issuer.known_issuers)
    found = authenticate_cryptogram(card, answer)
    if not found.authentic:
        raise AuthenticationFailed("an AAC proves nothing", step="cryptogram kind")
    if found.iad.key_index != issuer.master.index:
        raise AuthenticationFailed("made with a key this issuer does not have", step="application cryptogram")
    mk_ac = cryptogram.derive_card_key(issuer.master.ac, card.pan, card.psn)
    signed = answer.sent + card_read.aip + found.atc.to_bytes(2, "big") + found.iad.to_bytes()
    if not hmac.compare_digest(cryptogram.application_cryptogram(mk_ac, found.atc, signed), found.ac):
        raise AuthenticationFailed("not made with this card's key", step="application cryptogram")
    bound = found.bound
    _agree("currency", _digits(bound[0x5F2A]), issuer.currency.numeric)
    _agree("country", _digits(bound[0x9F1A]), issuer.country_numeric)
    _agree("other amount", _digits(bound[0x9F03]), 0)
    amount_minor = _digits(bound[0x9F02])
    before, after = _counters(found, amount_minor, issuer, card.pan, card.psn)
    ceiling = int.from_bytes(bound[application.TAG_CEILING], "big")
    if found.kind is CryptogramKind.TC and not 0 <= before < after <= ceiling:
        raise AuthenticationFailed("the card went past the ceiling it was given", step="ceiling")
    return Shown(
        token_key=token_key(issuer.token_key.secret, card.pan, card.psn),
        kind=found.kind,
        amount_minor=amount_minor,
        counter_before=before,
        counter_after=after,
        atc=found.atc,
        cryptogram=found.ac,
        previous_digest=found.iad.previous_digest,
        ceiling=ceiling,
        limit_digest=bound[application.TAG_LIMIT_DIGEST],
        sale_id=UUID(bytes=bound[application.TAG_SALE_ID]),
        terminal_id=_text(bound[0x9F1C]),
        merchant_id=_text(bound[0x9F16]),
        transaction_type=bound[0x9C][0],
        note_key=mk_ac,
    )


def _counters(found: Cryptogram, amount_minor: int, issuer: Issuer, pan: str, psn: int) -> tuple[int, int]:
    if found.kind is CryptogramKind.TC:
        return found.iad.counter_after - amount_minor, found.iad.counter_after
    mk_enc = cryptogram.derive_card_key(issuer.master.enc, pan, psn)
    counter = cryptogram.decipher_counter(mk_enc, found.atc, found.iad.counter_field)
    return counter, counter


def _check_day(day: date, now_unix_ms: int) -> None:
    """No time zone is further away than a day."""
    if abs(day - datetime.fromtimestamp(now_unix_ms / 1000, UTC).date()) > _A_DAY:
        raise AuthenticationFailed("made on another day", step="day")


def _agree(what: str, signed: int, expected: int) -> None:
    if signed != expected:
        raise AuthenticationFailed(f"the {what} is not this issuer's", step="facts")


def _digits(value: bytes) -> int:
    digits = value.hex()
    if not digits.isdecimal():
        raise AuthenticationFailed("a number the cryptogram signed is none", step="facts")
    return int(digits)


def _text(value: bytes) -> str:
    return value.decode("latin-1").rstrip(" ")
