"""What one bill says, pure: from what was owed when its cycle closed to its sums and what is due of it.

The ledger decides the same in SQL for many accounts at once (`ledger.billing`); from here `ledger audit`
makes every bill again, and a court could.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from pos_gateway.ledger.credit.debts import (
    Item,
    Origin,
    interest_minor,
    minimum_minor,
    overdue_fee_minor,
    total_minor,
)
from pos_gateway.ledger.credit.terms import CreditTerms, Part


@dataclass(frozen=True, slots=True)
class Held:
    """One thing that was owed at some time in the cycle. `paid`: what lowered it, by day; below zero where it
    was owed again. `amount_minor`: as it was owed before all of them.

    `closing`: the bill it stands on, None while it waits for one. `revolves`: the next bill takes it.
    `bears_from`: principal bears interest from the day after.
    """

    item: Item
    amount_minor: int
    paid: Sequence[tuple[date, int]]
    closing: date | None
    revolves: bool = False
    bears_from: date | None = None
    counts: bool = False
    """Against the line's limit."""

    @property
    def owed_minor(self) -> int:
        return self.amount_minor - sum(amount for _, amount in self.paid)

    def balances(self, after: date, until: date) -> list[tuple[date, int]]:
        """What is owed at the end of each day from the one after `after` on, as `interest_minor` takes it."""
        first = after + timedelta(days=1)
        days = sorted({first, *(day for day, _ in self.paid if first < day <= until)})
        return [(day, self.amount_minor - sum(a for d, a in self.paid if d <= day)) for day in days]


@dataclass(frozen=True, slots=True)
class Due:
    """An earlier bill: what was due of it, and the overdue fees that were charged for it."""

    due_minor: int
    charged_minor: int


@dataclass(frozen=True, slots=True)
class Billed:
    """A bill's sums; `purchases_minor` is below zero where more was paid than owed. `fees`: the overdue fees
    by the bill that they are for. `carried_due_minor`, `purchases_due_minor`: what of those must be paid."""

    purchases_minor: int
    carried_minor: int
    instalments_minor: int
    instalment_fees_minor: int
    interest_minor: int
    overdue_fee_minor: int
    arrears_minor: int
    total_minor: int
    minimum_minor: int
    due_minor: int
    carried_due_minor: int
    purchases_due_minor: int
    fees: Mapping[date, int]


def bill(
    *,
    principal_minor: int,
    held: Sequence[Held],
    instalments: Sequence[tuple[int, int]],
    earlier: Mapping[date, Due],
    previous: date,
    closing: date,
    terms: CreditTerms,
) -> Billed:
    """Close a cycle. `principal_minor`: all that counts against the limit at its end, less what is ahead of
    plans; `instalments`: principal and fee of each that this bill takes, before which it is ahead.
    `earlier`: the bills that things in `held` stand on."""
    owed = [one for one in held if one.owed_minor]
    purchases_minor = principal_minor - sum(one.owed_minor for one in owed if one.counts)
    carried = [one for one in owed if one.revolves]
    days_minor = 0
    fee_days: dict[date, int] = defaultdict(int)
    for one in held:
        if one.bears_from is not None and one.bears_from < closing:
            days_minor += _days_minor(one, max(one.bears_from, previous), closing)
        due_on = one.item.due_on
        bears_fee = not one.revolves and one.item.part is not Part.OVERDUE_FEE
        if one.closing is not None and due_on is not None and due_on < closing and bears_fee:
            fee_days[one.closing] += _days_minor(one, max(due_on, previous), closing)
    fees = {
        of: fee
        for of, minor in fee_days.items()
        if (
            fee := overdue_fee_minor(
                minor, 1, terms, charged_minor=earlier[of].charged_minor, minimum_minor=earlier[of].due_minor
            )
        )
    }
    # One balance for one day: the sum over days is exact, and rounded once.
    interest = interest_minor([(closing, days_minor)], closing, terms)
    carried_minor = sum(one.owed_minor for one in carried)
    new = [
        Item(str(number), origin, part, amount_minor, closing)
        for number, (origin, part, amount_minor) in enumerate(
            [
                (Origin.PURCHASE, Part.PRINCIPAL, carried_minor),
                (Origin.PURCHASE, Part.PRINCIPAL, max(purchases_minor, 0)),
                (Origin.CHARGE, Part.INTEREST, interest),
                (Origin.CHARGE, Part.OVERDUE_FEE, sum(fees.values())),
                *((Origin.INSTALMENT, Part.PRINCIPAL, principal) for principal, _ in instalments),
                *((Origin.INSTALMENT, Part.INSTALMENT_FEE, fee) for _, fee in instalments),
            ]
        )
    ]
    standing = [one.item for one in owed if not one.revolves]
    arrears_minor = sum(one.owed_minor for one in owed if not one.revolves and one.closing is not None)
    minimum = minimum_minor([*standing, *new], terms, closing)
    spare_minor = minimum - total_minor(standing) - total_minor(new[2:])
    carried_due_minor = min(spare_minor, carried_minor)
    return Billed(
        purchases_minor=purchases_minor,
        carried_minor=carried_minor,
        instalments_minor=sum(principal for principal, _ in instalments),
        instalment_fees_minor=sum(fee for _, fee in instalments),
        interest_minor=interest,
        overdue_fee_minor=sum(fees.values()),
        arrears_minor=arrears_minor,
        total_minor=total_minor(standing) + total_minor(new),
        minimum_minor=minimum,
        due_minor=minimum - arrears_minor - sum(fees.values()),
        carried_due_minor=carried_due_minor,
        purchases_due_minor=spare_minor - carried_due_minor,
        fees=fees,
    )


def _days_minor(one: Held, after: date, until: date) -> int:
    balances = one.balances(after, until)
    ends = [day for day, _ in balances[1:]] + [until + timedelta(days=1)]
    return sum((end - start).days * minor for (start, minor), end in zip(balances, ends, strict=True))
