"""Taking a payment back: what may still be voided or refunded of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """How a journalled authorization stands. Amounts in minor units.

    `refused`: the ledger has said that it does not pay it.
    """

    amount_minor: int
    refunded_minor: int = 0
    voided: bool = False
    refused: bool = False

    @property
    def left_minor(self) -> int:
        """What can still be refunded."""
        return 0 if self.voided or self.refused else self.amount_minor - self.refunded_minor


def why_not_void(standing: Standing) -> str | None:
    """Why the whole payment cannot be voided; None if it can."""
    if standing.voided:
        return "the payment is void already"
    if standing.refunded_minor:
        return "a part of the payment was refunded: refund the rest instead"
    return None


def why_not_refund(standing: Standing, amount_minor: int) -> str | None:
    """Why so much of the payment cannot be refunded; None if it can."""
    if amount_minor <= 0:
        return "a refund must be of more than nothing"
    if standing.voided:
        return "the payment is void: there is nothing to refund"
    if standing.refused:
        return "the ledger did not pay this payment: there is nothing to refund"
    if amount_minor > standing.left_minor:
        return f"{standing.left_minor} minor units are left of the payment"
    return None
