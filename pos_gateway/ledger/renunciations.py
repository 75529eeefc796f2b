"""Renunciations: a gateway tells of a TC that it asked for and will never present. Pure.

The card may have moved its counter all the same. Where to, its next cryptogram tells: it points back, by a
digest, to the CDOL1 values of the TC before. The gateway shows those values, so that nobody can renounce
what another terminal asked for, nor another amount.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pos_gateway.emv import application, tlv
from pos_gateway.errors import AuthenticationFailed, InvalidCardData, InvalidMessage
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.money import MAX_AMOUNT_MINOR
from pos_gateway.records import Record

NOTED = "Noted: this payment will not be presented."


class _Facts(BaseModel):
    """The body of a renunciation: `sale_id` of the payment that is renounced, the CDOL1 values it sent."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    sale_id: str
    token_key: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    amount_minor: int = Field(gt=0, le=MAX_AMOUNT_MINOR)
    cdol1_values: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){1,255}$")]
    gateway_id: str
    terminal_id: str


@dataclass(frozen=True, slots=True)
class Renunciation:
    """A TC over `amount_minor` that its gateway renounces. `previous_digest`: how the card's next one
    points back to it."""

    token_key: bytes
    sale_id: bytes
    amount_minor: int
    previous_digest: bytes


def read_renunciation(record: Record, gateway: Gateway) -> Renunciation:
    """The renunciation a record tells, held to whom it comes from.

    Raises:
        InvalidMessage, InvalidCardData: a fact is missing, wrong or unreadable.
        AuthenticationFailed: step `facts`: another terminal asked for that TC, or for another amount.
    """
    try:
        facts = _Facts.model_validate(record.facts())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidMessage(first["msg"], where=f"fact {place or 'root'}") from None
    asked = bytes.fromhex(facts.cdol1_values)
    bound = tlv.split_dol(tlv.parse_dol(application.CDOL1), asked, where="fact cdol1_values")
    digits = bound[0x9F02].hex()
    if not digits.isdecimal():
        raise InvalidCardData("the amount is no number", where="fact cdol1_values")
    sale_id = bound[application.TAG_SALE_ID]
    for what, claimed, true in (
        ("gateway", facts.gateway_id, gateway.id),
        ("terminal", facts.terminal_id, gateway.terminal_id),
        ("terminal", bound[0x9F1C], gateway.terminal_id.ljust(8).encode()),
        ("sale id", facts.sale_id.replace("-", ""), sale_id.hex()),
        ("amount", facts.amount_minor, int(digits)),
    ):
        if claimed != true:
            raise AuthenticationFailed(f"the {what} is not the one that was asked for", step="facts")
    return Renunciation(
        token_key=bytes.fromhex(facts.token_key),
        sale_id=sale_id,
        amount_minor=facts.amount_minor,
        previous_digest=application.previous_digest(asked),
    )
