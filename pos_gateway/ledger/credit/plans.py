"""A running instalment plan, pure: repaid early, refunded in part, and never at a higher cost than before.

The instalments that a bill has taken are debts like any other (see `debts`); what is told here is the
rest, which is not due yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pos_gateway.errors import InvalidInput
from pos_gateway.instalments import Charge, Instalment, Offer, schedule


@dataclass(frozen=True, slots=True)
class Plan:
    """`principal_minor`: what the plan was made for, less refunds. `ahead`: the instalments that no bill has
    taken, in order; their principal is what is not due yet."""

    offer: Offer
    principal_minor: int
    ahead: tuple[Instalment, ...]

    @property
    def ahead_minor(self) -> int:
        return sum(instalment.principal_minor for instalment in self.ahead)


@dataclass(frozen=True, slots=True)
class Settlement:
    """What ends a plan today, and the fees that are spared by it."""

    principal_minor: int
    fee_minor: int
    spared_minor: int

    @property
    def total_minor(self) -> int:
        return self.principal_minor + self.fee_minor


def settle_early(plan: Plan, *, charge_current_period: bool) -> Settlement:
    """All that is ahead, at once. Fees of periods that do not come to pass are not charged;
    `charge_current_period`: whether the one under way counts as begun.

    Raises:
        InvalidInput: nothing is ahead.
    """
    if not plan.ahead:
        raise InvalidInput("every instalment has been billed", where="plan", advice="repay the bill")
    fees_minor = sum(instalment.fee_minor for instalment in plan.ahead)
    fee_minor = plan.ahead[0].fee_minor if charge_current_period else 0
    return Settlement(plan.ahead_minor, fee_minor, fees_minor - fee_minor)


def refund(plan: Plan, amount_minor: int) -> tuple[Plan, int]:
    """The plan after a refund, and how much of the refund goes to what was billed already.

    What is ahead falls first, spread over the periods that are left at the offer's price for the smaller
    principal; a rest too small for them takes fewer. No instalment ever rises by a refund but for the minor
    units that the last one absorbs.

    Raises:
        InvalidInput: nothing is refunded, or more than the plan was made for.
    """
    if not 0 < amount_minor <= plan.principal_minor:
        raise InvalidInput("more than nothing and at most the plan's principal", where="refund")
    ahead_minor = plan.ahead_minor
    from_ahead_minor = min(amount_minor, ahead_minor)
    smaller = replace(
        plan,
        principal_minor=plan.principal_minor - amount_minor,
        ahead=_respread(plan, ahead_minor - from_ahead_minor, plan.principal_minor - amount_minor),
    )
    return smaller, amount_minor - from_ahead_minor


def _respread(plan: Plan, rest_minor: int, principal_minor: int) -> tuple[Instalment, ...]:
    """`rest_minor` over the periods ahead. A flat fee is a part of the whole principal, not of the rest."""
    if rest_minor == 0:
        return ()
    spread = _as_far_as_it_goes(plan.offer, rest_minor, len(plan.ahead))
    flat_minor = None
    if plan.offer.charge is Charge.FLAT_FEE:
        flat_minor = schedule(plan.offer, principal_minor, 1)[0].fee_minor
    return tuple(
        replace(
            new,
            number=old.number,
            fee_minor=min(old.fee_minor, new.fee_minor if flat_minor is None else flat_minor),
        )
        for new, old in zip(spread, plan.ahead, strict=False)
    )


def _as_far_as_it_goes(offer: Offer, principal_minor: int, periods: int) -> tuple[Instalment, ...]:
    while periods > 1:
        try:
            return schedule(offer, principal_minor, periods)
        except InvalidInput:
            periods -= 1
    return schedule(offer, principal_minor, 1)
