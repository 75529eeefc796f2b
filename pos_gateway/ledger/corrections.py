"""Reversals and refunds: what a gateway may take back of a payment, and never beyond it. Pure.

A reversal voids the whole payment, a refund gives part of it back. Neither moves a card's counter: the
points that the payment claimed stay claimed. No card signs them; they are the merchant's own loss, told
by the gateway that took the payment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pos_gateway.errors import AuthenticationFailed, InvalidMessage
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.money import MAX_AMOUNT_MINOR, Currency
from pos_gateway.records import Kind, Record, Verdict

_WAITS: Final = "The payment itself has not arrived yet; this is kept and settled when it does."
_VOID: Final = "Void; nothing is charged."
_REFUNDED: Final = "Refunded."


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    about: str
    amount_minor: int = Field(gt=0, le=MAX_AMOUNT_MINOR)
    currency: str
    at_unix_ms: int = Field(ge=0)
    reason: str = Field(max_length=120)
    gateway_id: str
    terminal_id: str
    merchant_id: str


@dataclass(frozen=True, slots=True)
class Correction:
    """A reversal or refund of the authorization `about`."""

    kind: Kind
    about: UUID
    amount_minor: int
    at_unix_ms: int


@dataclass(slots=True)
class Original:
    """How the payment that is spoken of stands. `left_minor`: what is still charged of it."""

    verdict: Verdict
    account_id: str | None
    token_id: str | None = None
    amount_minor: int = 0
    left_minor: int = 0
    voided: bool = False
    book: tuple[str, str] = ("", "")
    """What was debited for it, and whose: a correction credits the same."""


@dataclass(frozen=True, slots=True)
class Judged:
    """`moves`: money goes back. `wrong`: an honest gateway would not have asked."""

    verdict: Verdict
    reason: str
    moves: bool = False
    wrong: bool = False


def read_correction(record: Record, gateway: Gateway, currency: Currency) -> Correction:
    """The correction a record tells, held to whom it comes from.

    Raises:
        InvalidMessage: a fact is missing or wrong.
        AuthenticationFailed: step `facts`: it speaks for another shop.
    """
    try:
        facts = _Facts.model_validate(record.facts())
        about = UUID(facts.about)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidMessage(first["msg"], where=f"fact {place or 'root'}") from None
    except ValueError:
        raise InvalidMessage("not a UUID", where="fact about") from None
    for what, claimed, true in (
        ("gateway", facts.gateway_id, gateway.id),
        ("terminal", facts.terminal_id, gateway.terminal_id),
        ("merchant", facts.merchant_id, gateway.merchant.id),
        ("currency", facts.currency, currency.code),
    ):
        if claimed != true:
            raise AuthenticationFailed(f"the {what} is not this gateway's", step="facts")
    return Correction(record.kind, about, facts.amount_minor, facts.at_unix_ms)


def judge(correction: Correction, original: Original | None) -> Judged:
    """What becomes of a correction, whatever the order in which it and its payment arrived."""
    if original is None or original.verdict is Verdict.UNKNOWN:
        return Judged(Verdict.UNKNOWN, _WAITS)
    posted = original.verdict is Verdict.POSTED
    if correction.kind is Kind.REVERSAL:
        if not posted:
            return Judged(Verdict.POSTED, _VOID)
        if original.voided:
            return _wrong("The payment is void already.")
        if original.left_minor != original.amount_minor:
            return _wrong("A part of the payment was refunded: refund the rest instead.")
        if correction.amount_minor != original.amount_minor:
            return _wrong("A reversal is of the whole payment, and this is another amount.")
        return Judged(Verdict.POSTED, _VOID, moves=True)
    if not posted:
        return Judged(Verdict.INVALID, "The payment itself was not paid: there is nothing to refund.")
    if original.voided:
        return _wrong("The payment is void: there is nothing to refund.")
    if correction.amount_minor > original.left_minor:
        return _wrong("More than what is left of the payment.")
    return Judged(Verdict.POSTED, _REFUNDED, moves=True)


def _wrong(reason: str) -> Judged:
    return Judged(Verdict.INVALID, reason, wrong=True)
