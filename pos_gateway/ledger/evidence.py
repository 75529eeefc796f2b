"""Is a presented authorization true? The card's evidence against the gateway's facts. Pure.

The gateway is not believed: everything that money depends on is read from what the card signed, once for
the shop with its certificates (CDA) and once for the issuer with a key only the two of them have.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pos_gateway.emv import application, cryptogram, tlv
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.authentication import (
    CaPublicKey,
    Cryptogram,
    KnownIssuers,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.dialogue import CardRead, CryptogramAnswer, card_date
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import AuthenticationFailed, InvalidMessage
from pos_gateway.instalments import Offer, Quote, quote
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.keys import MasterKeys, TokenKey
from pos_gateway.limits.record import token_key
from pos_gateway.money import MAX_AMOUNT_MINOR, Currency
from pos_gateway.records import Kind, Record, open_proof

_CARD_KEYS: Final = 16_384
_MAX_TIME_UNIX_MS: Final = 253_402_300_799_999


def _hex(length: int) -> StringConstraints:
    return StringConstraints(pattern=rf"^[0-9a-f]{{{2 * length}}}$")


_Counter = Annotated[int, Field(ge=0, le=application.MAX_COUNTER)]


class Plan(BaseModel):
    """The instalments a payment was made in."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    offer: dict[str, Any]
    periods: int


class Facts(BaseModel):
    """The body of an authorization record, as far as the ledger judges it; other fields may be there."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    sale_id: str
    amount_minor: int = Field(gt=0, le=MAX_AMOUNT_MINOR)
    currency: str
    at_unix_ms: int = Field(ge=0, le=_MAX_TIME_UNIX_MS)
    gateway_id: str
    terminal_id: str
    merchant_id: str
    merchant_category: str
    token_key: Annotated[str, _hex(16)]
    token_last4: str
    atc: int = Field(ge=0, le=0xFFFF)
    ac: Annotated[str, _hex(8)]
    counter_before: _Counter
    counter_after: _Counter
    ceiling: _Counter
    limit_digest: Annotated[str, _hex(16)]
    plan_digest: Annotated[str, _hex(16)]
    sequence_counter: int
    unpredictable_number: Annotated[str, _hex(4)]
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Issuer:
    """What the issuer checks evidence with. `known_issuers`: see `authenticate_card`."""

    currency: Currency
    country_numeric: int
    ca_keys: Sequence[CaPublicKey]
    master: MasterKeys
    token_key: TokenKey
    sealing: X25519PrivateKey = field(repr=False)
    known_issuers: KnownIssuers = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Tap:
    """A genuine TC: which token paid what, and where on its counter line."""

    token_key: bytes
    amount_minor: int
    counter_before: int
    counter_after: int
    atc: int
    cryptogram: bytes
    ceiling: int
    limit_digest: bytes
    at_unix_ms: int
    previous_digest: bytes
    """How the card names the TC it gave before this one."""
    plan: Quote | None = None


def examine(record: Record, gateway: Gateway, issuer: Issuer) -> Tap:
    """Judge one record that its gateway has signed.

    Raises:
        InvalidInput: record, facts or proof cannot be read.
        AuthenticationFailed: they contradict each other or do not verify; `step` says which.
    """
    if record.kind is not Kind.AUTHORIZATION:
        raise InvalidMessage("only authorizations are presented", where="record kind")
    facts = _facts(record)
    _agree("sale id", facts.sale_id, str(record.id))
    _agree("gateway", facts.gateway_id, gateway.id)
    _agree("terminal", facts.terminal_id, gateway.terminal_id)
    _agree("merchant", facts.merchant_id, gateway.merchant.id)
    _agree("merchant category", facts.merchant_category, gateway.merchant.category)
    _agree("currency", facts.currency, issuer.currency.code)

    proof = Transcript.from_bytes(open_proof(record.proof, issuer.sealing))
    card_read, answer = proof.card(), proof.cryptogram_answer()
    # The card's day is the tap's: presented after the card expired, a payment is still good.
    day = _day(facts, card_read, answer)
    card = authenticate_card(card_read, issuer.ca_keys, day, known_issuers=issuer.known_issuers)
    tc = authenticate_cryptogram(card, answer)
    if tc.kind is not CryptogramKind.TC:
        raise AuthenticationFailed(f"the card gave no TC but {tc.kind.name}", step="cryptogram kind")
    if tc.iad.key_index != issuer.master.index:
        raise AuthenticationFailed("made with a key this issuer does not have", step="application cryptogram")
    expected = cryptogram.application_cryptogram(
        card_key(issuer.master.ac, card.pan, card.psn),
        tc.atc,
        answer.sent + card_read.aip + tc.atc.to_bytes(2, "big") + tc.iad.to_bytes(),
    )
    if not hmac.compare_digest(expected, tc.ac):
        raise AuthenticationFailed("not made with this card's key", step="application cryptogram")

    key = token_key(issuer.token_key.secret, card.pan, card.psn)
    _agree("token", facts.token_key, key.hex())
    _agree("token's last digits", facts.token_last4, card.last4)
    _check_bound(facts, tc, record, issuer)
    return Tap(
        token_key=key,
        amount_minor=facts.amount_minor,
        counter_before=facts.counter_before,
        counter_after=facts.counter_after,
        atc=tc.atc,
        cryptogram=tc.ac,
        ceiling=facts.ceiling,
        limit_digest=bytes.fromhex(facts.limit_digest),
        at_unix_ms=facts.at_unix_ms,
        previous_digest=tc.iad.previous_digest,
        plan=_plan(facts),
    )


@lru_cache(maxsize=_CARD_KEYS)
def card_key(master_key: bytes, pan: str, psn: int) -> bytes:
    """A customer pays more than once, and deriving her card's key takes as long as using it."""
    return cryptogram.derive_card_key(master_key, pan, psn)


def _facts(record: Record) -> Facts:
    try:
        return Facts.model_validate(record.facts())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidMessage(first["msg"], where=f"fact {place or 'root'}") from None


def _plan(facts: Facts) -> Quote | None:
    """The plan whose digest was signed, computed anew; the cryptogram binds nothing else of it."""
    plan = facts.plan
    found = quote(Offer.from_json(plan.offer), facts.amount_minor, plan.periods) if plan is not None else None
    _agree("plan", facts.plan_digest, (found.digest if found is not None else application.NO_PLAN).hex())
    return found


def _day(facts: Facts, card: CardRead, answer: CryptogramAnswer) -> date:
    """The shop's local day of the tap (9A), which the cryptogram binds; no time zone is a day away."""
    signed = tlv.split_dol(card.cdol1, answer.cdol1_values, where="CDOL1 values")[0x9A]
    day = card_date(signed, 0x9A)
    if abs(day - datetime.fromtimestamp(facts.at_unix_ms / 1000, UTC).date()) > timedelta(days=1):
        raise AuthenticationFailed("the day is not the one that was signed for", step="facts")
    return day


def _check_bound(facts: Facts, tc: Cryptogram, record: Record, issuer: Issuer) -> None:
    """Every fact that money depends on, against what the cryptogram signed."""
    bound = tc.bound
    _agree("amount", facts.amount_minor, _digits(bound[0x9F02]))
    _agree("other amount", 0, _digits(bound[0x9F03]))
    _agree("currency", issuer.currency.numeric, _digits(bound[0x5F2A]))
    _agree("country", issuer.country_numeric, _digits(bound[0x9F1A]))
    _agree("transaction type", application.TRANSACTION_TYPE_PURCHASE, bound[0x9C][0])
    _agree("terminal", facts.terminal_id.ljust(8).encode(), bound[0x9F1C])
    _agree("merchant", facts.merchant_id.ljust(15).encode(), bound[0x9F16])
    _agree("merchant category", facts.merchant_category, bound[0x9F15].hex())
    _agree("sequence counter", facts.sequence_counter % 100_000_000, _digits(bound[0x9F41]))
    _agree("unpredictable number", facts.unpredictable_number, bound[0x9F37].hex())
    _agree("sale id", record.id.bytes, bound[application.TAG_SALE_ID])
    _agree("ceiling", facts.ceiling, int.from_bytes(bound[application.TAG_CEILING], "big"))
    _agree("limit digest", facts.limit_digest, bound[application.TAG_LIMIT_DIGEST].hex())
    _agree("plan digest", facts.plan_digest, bound[application.TAG_PLAN_DIGEST].hex())
    _agree("ATC", facts.atc, tc.atc)
    _agree("cryptogram", facts.ac, tc.ac.hex())
    _agree("counter after", facts.counter_after, tc.iad.counter_after)
    _agree("counter before", facts.counter_before, tc.iad.counter_after - facts.amount_minor)
    if facts.counter_after > facts.ceiling:
        raise AuthenticationFailed("the card went past the ceiling it was given", step="ceiling")


def _agree(what: str, claimed: object, signed: object) -> None:
    if claimed != signed:
        raise AuthenticationFailed(f"the {what} is not the one that was signed for", step="facts")


def _digits(value: bytes) -> int:
    digits = value.hex()
    if not digits.isdecimal():
        raise AuthenticationFailed("a number the cryptogram signed is none", step="facts")
    return int(digits)
