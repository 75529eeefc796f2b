"""What the local API's requests may hold."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from pos_gateway.gateway.staff import MAX_NAME_CHARACTERS
from pos_gateway.gateway.wire import Shape

_MAX_PIN: Final = 32


class Nothing(Shape):
    """A request that says all by its path."""


class ChosenPlan(Shape):
    offer: str = Field(max_length=64)
    periods: int


class StartPayment(Shape):
    id: str = Field(max_length=64, description="a UUID chosen by the caller; the same on every retry")
    amount_minor: int = Field(description="in the currency's minor unit")
    currency: str = Field(max_length=3, description="ISO 4217; the till's own")
    lane: str | None = Field(default=None, max_length=64, description="a free one if not said")
    plan: ChosenPlan | None = None
    offline_cap_minor: int | None = Field(
        default=None, ge=0, description="do not begin it off the network if it is more than this"
    )
    wait_s: float = Field(
        default=0, ge=0, le=300, description="answer when it is final, or after so many seconds"
    )


class LimitsFrom(Shape):
    folder: str = Field(min_length=1, max_length=4096, description="absolute path on this machine")


class ClockIsRight(Shape):
    time_unix_ms: int = Field(ge=0, lt=1 << 48, description="what the manager reads elsewhere")


class VoidPayment(Shape):
    id: str = Field(max_length=64, description="a UUID chosen by the caller; the same on every retry")
    reason: str = Field(default="", max_length=1000)


class RefundPayment(VoidPayment):
    amount_minor: int


class PrintReceipt(Shape):
    copy_for: str = Field(alias="copy", max_length=16, description="customer or merchant")
    language: str = Field(default="en", max_length=8)


class FirstOwner(Shape):
    code: str = Field(max_length=32)
    name: str = Field(max_length=MAX_NAME_CHARACTERS)
    pin: str = Field(max_length=_MAX_PIN, repr=False)


class SignIn(Shape):
    member: str = Field(max_length=32)
    pin: str = Field(max_length=_MAX_PIN, repr=False)


class Approve(SignIn):
    route: str = Field(max_length=64, description="which request: reversal or refunds")
    payment: str = Field(max_length=36)


class NewMember(Shape):
    name: str = Field(max_length=MAX_NAME_CHARACTERS)
    role: str = Field(max_length=16)
    pin: str = Field(max_length=_MAX_PIN, repr=False)


class ChangeMember(Shape):
    role: str | None = Field(default=None, max_length=16)
    pin: str | None = Field(default=None, max_length=_MAX_PIN, repr=False)
    active: bool | None = None


class NewToken(Shape):
    name: str = Field(max_length=MAX_NAME_CHARACTERS)
    role: str = Field(max_length=16)


class OpenShift(Shape):
    id: str = Field(max_length=64)
    float_minor: int


class MoveCash(Shape):
    id: str = Field(max_length=64)
    amount_minor: int
    reason: str = Field(max_length=1000)


class CountDrawer(Shape):
    counted_minor: int


class CloseShift(Shape):
    reason: str = Field(default="", max_length=64)
    note: str = Field(default="", max_length=1000)


class CloseDay(Shape):
    id: str = Field(max_length=64)
