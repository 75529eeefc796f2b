"""What a customer owes, item by item, pure: how a repayment is allocated, what is due at least, what being
late costs.

Every function conserves money to the minor unit: what is allocated and what is left over are what was
paid. Amounts are rounded half-up, once, where a period's charge is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import Enum
from typing import Final

from pos_gateway.errors import InvalidInput
from pos_gateway.ledger.credit.terms import CreditTerms, Part

_PPM: Final = 1_000_000


class Origin(Enum):
    """Where an item comes from: what is due of it at least depends on that."""

    PURCHASE = "purchase"
    """Pay later: may revolve."""
    INSTALMENT = "instalment"
    """Due in whole with its bill."""
    CHARGE = "charge"
    """Interest and fees of being late."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that is owed. `due_on` is its bill's due date; None while it stands on no bill yet, and then
    `since` alone says how old it is."""

    id: str
    origin: Origin
    part: Part
    owed_minor: int
    since: date
    due_on: date | None = None

    def is_overdue(self, today: date) -> bool:
        return self.due_on is not None and today > self.due_on

    def days_overdue(self, today: date) -> int:
        return (today - self.due_on).days if self.due_on is not None and self.is_overdue(today) else 0


@dataclass(frozen=True, slots=True)
class Allocation:
    """So much of a repayment went to that item."""

    item_id: str
    part: Part
    amount_minor: int


def allocate(
    repayment_minor: int, items: Iterable[Item], terms: CreditTerms, today: date
) -> tuple[tuple[Allocation, ...], int]:
    """Which items a repayment reduces, and what is left of it.

    What stands on a bill comes before what does not; bills come in the order of their due dates; within a
    bill the terms' order of parts, then age. Once any item is more than `late_after_days` overdue, the
    parts come before the bills, in the order for late payers: principal first is what keeps a debt from
    growing.

    Raises:
        InvalidInput: a repayment of nothing, or an item that is owed a negative amount.
    """
    if repayment_minor <= 0:
        raise InvalidInput("a repayment is more than nothing", where="repayment")
    owed = [item for item in items if item.owed_minor]
    if any(item.owed_minor < 0 for item in owed):
        raise InvalidInput("an item cannot be owed less than nothing", where="debt")
    late = any(item.days_overdue(today) > terms.late_after_days for item in owed)
    rank = {part: place for place, part in enumerate(terms.late_order if late else terms.order)}

    def first_things_first(item: Item) -> tuple[object, ...]:
        due = item.due_on or date.max
        age = (item.since, item.id)
        return (
            (item.due_on is None, rank[item.part], due, age)
            if late
            else (item.due_on is None, due, rank[item.part], age)
        )

    allocations, left_minor = [], repayment_minor
    for item in sorted(owed, key=first_things_first):
        if not left_minor:
            break
        amount_minor = min(left_minor, item.owed_minor)
        allocations.append(Allocation(item.id, item.part, amount_minor))
        left_minor -= amount_minor
    return tuple(allocations), left_minor


def after(items: Iterable[Item], allocations: Iterable[Allocation]) -> tuple[Item, ...]:
    """The items as they are owed after an allocation; none vanishes, some are owed nothing."""
    paid: dict[str, int] = {}
    for allocation in allocations:
        paid[allocation.item_id] = paid.get(allocation.item_id, 0) + allocation.amount_minor
    return tuple(replace(item, owed_minor=item.owed_minor - paid.get(item.id, 0)) for item in items)


def total_minor(items: Iterable[Item]) -> int:
    return sum(item.owed_minor for item in items)


def minimum_minor(items: Sequence[Item], terms: CreditTerms, closing: date) -> int:
    """What must be paid at least on the bill that closes now and holds these items: all arrears, charges and
    instalments, and of purchases the terms' share, not below the floor, never more than everything."""
    whole, revolving = 0, 0
    for item in items:
        if item.origin is Origin.PURCHASE and not item.is_overdue(closing):
            revolving += item.owed_minor
        else:
            whole += item.owed_minor
    share_minor = _half_up(revolving * terms.minimum_share_ppm, _PPM)
    return min(max(whole + share_minor, terms.minimum_floor_minor), whole + revolving)


def interest_minor(balances: Sequence[tuple[date, int]], until: date, terms: CreditTerms) -> int:
    """Interest for being owed: each balance (from that day on) until the next, the last to the end of
    `until`; summed exactly over the days, rounded once.

    Raises:
        InvalidInput: days that do not rise.
    """
    days_minor = 0
    for (start, balance_minor), (end, _) in zip(balances, [*balances[1:], (_next(until), 0)], strict=True):
        if end < start:
            raise InvalidInput("the days of balances must rise", where="interest")
        days_minor += (end - start).days * balance_minor
    return _half_up(days_minor * terms.interest_per_day_ppm, _PPM)


def overdue_fee_minor(
    unpaid_minimum_minor: int, days: int, terms: CreditTerms, *, charged_minor: int, minimum_minor: int
) -> int:
    """The fee for so many days on what was due at least and is not paid; with what was charged for this bill
    before, never beyond the terms' cap on its minimum."""
    fee_minor = _half_up(unpaid_minimum_minor * days * terms.overdue_fee_per_day_ppm, _PPM)
    cap_minor = minimum_minor * terms.overdue_fee_cap_ppm // _PPM
    return max(0, min(fee_minor, cap_minor - charged_minor))


def _next(day: date) -> date:
    return date.fromordinal(day.toordinal() + 1)


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
