from __future__ import annotations

from datetime import date, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pos_gateway.errors import InvalidInput
from pos_gateway.ledger.credit.debts import (
    Item,
    Origin,
    after,
    allocate,
    interest_minor,
    minimum_minor,
    overdue_fee_minor,
    total_minor,
)
from pos_gateway.ledger.credit.terms import CreditTerms, Part

TODAY = date(2027, 6, 30)
TERMS = CreditTerms()

DAYS = st.dates(TODAY - timedelta(days=200), TODAY + timedelta(days=30))
ITEMS = st.lists(
    st.builds(
        Item,
        id=st.uuids().map(str),
        origin=st.sampled_from(Origin),
        part=st.sampled_from(Part),
        owed_minor=st.integers(0, 1_000_000),
        since=DAYS,
        due_on=st.none() | DAYS,
    ),
    max_size=12,
    unique_by=lambda item: item.id,
)


@given(ITEMS, st.integers(1, 10_000_000))
def test_allocation_conserves_money_and_overpays_nothing(items: list[Item], repayment_minor: int) -> None:
    allocations, left_minor = allocate(repayment_minor, items, TERMS, TODAY)
    assert sum(a.amount_minor for a in allocations) + left_minor == repayment_minor
    assert all(a.amount_minor > 0 for a in allocations)
    rest = after(items, allocations)
    assert all(item.owed_minor >= 0 for item in rest)
    assert total_minor(items) - total_minor(rest) == repayment_minor - left_minor
    assert left_minor == 0 or total_minor(rest) == 0


@given(ITEMS, st.integers(1, 500_000), st.integers(1, 500_000))
def test_paying_in_two_parts_on_one_day_comes_to_the_same_unless_it_ends_lateness(
    items: list[Item], first_minor: int, second_minor: int
) -> None:
    terms = CreditTerms(late_after_days=10_000)
    one, one_left = allocate(first_minor + second_minor, items, terms, TODAY)
    early, early_left = allocate(first_minor, items, terms, TODAY)
    late, late_left = allocate(second_minor, after(items, early), terms, TODAY)
    assert after(items, one) == after(after(items, early), late)
    assert one_left == early_left + late_left


def item(
    id: str, part: Part = Part.PRINCIPAL, owed: int = 100, due: date | None = TODAY, **more: object
) -> Item:
    fields = {"origin": Origin.PURCHASE, "since": TODAY - timedelta(days=40)} | more
    return Item(id=id, part=part, owed_minor=owed, due_on=due, **fields)  # type: ignore[arg-type]


def order_of(items: list[Item], terms: CreditTerms = TERMS) -> list[str]:
    return [a.item_id for a in allocate(10**9, items, terms, TODAY)[0]]


def test_older_bills_first_then_parts_then_what_is_on_no_bill() -> None:
    items = [
        item("unbilled", due=None),
        item("now, principal"),
        item("now, interest", Part.INTEREST),
        item("before, principal", due=TODAY - timedelta(days=31)),
        item("before, fee", Part.OVERDUE_FEE, due=TODAY - timedelta(days=31)),
    ]
    assert order_of(items) == [
        "before, fee",
        "before, principal",
        "now, interest",
        "now, principal",
        "unbilled",
    ]


def test_who_is_very_late_repays_principal_first() -> None:
    items = [
        item("fee", Part.OVERDUE_FEE, due=TODAY - timedelta(days=91)),
        item("interest", Part.INTEREST, due=TODAY - timedelta(days=91)),
        item("principal", due=TODAY),
        item("unbilled", due=None),
    ]
    assert order_of(items) == ["principal", "interest", "fee", "unbilled"]
    assert order_of(items, CreditTerms(late_after_days=91)) == ["fee", "interest", "principal", "unbilled"]


@pytest.mark.parametrize("repayment_minor", [0, -1])
def test_nothing_is_no_repayment(repayment_minor: int) -> None:
    with pytest.raises(InvalidInput):
        allocate(repayment_minor, [], TERMS, TODAY)


@given(ITEMS)
def test_the_minimum_is_never_more_than_everything(items: list[Item]) -> None:
    least_minor = minimum_minor(items, TERMS, TODAY)
    assert 0 <= least_minor <= total_minor(items)
    assert least_minor >= min(TERMS.minimum_floor_minor, total_minor(items))
    due = [i for i in items if i.origin is not Origin.PURCHASE or i.is_overdue(TODAY)]
    assert least_minor >= total_minor(due)


def test_the_minimum_by_hand() -> None:
    items = [
        item("purchase", owed=100_005),
        item("instalment", owed=20_000, origin=Origin.INSTALMENT),
        item("its fee", Part.INSTALMENT_FEE, 100, origin=Origin.INSTALMENT),
        item("arrears", owed=3_000, due=TODAY - timedelta(days=31)),
    ]
    assert minimum_minor(items, TERMS, TODAY) == 20_000 + 100 + 3_000 + 10_001
    assert minimum_minor(items[:1], CreditTerms(minimum_share_ppm=0), TODAY) == TERMS.minimum_floor_minor
    assert minimum_minor([item("small", owed=30)], TERMS, TODAY) == 30


@given(st.lists(st.tuples(DAYS, st.integers(0, 10**9)), min_size=1, max_size=8), st.integers(0, 60))
def test_interest_is_exact_over_the_days_and_rounded_once(
    balances: list[tuple[date, int]], more: int
) -> None:
    balances.sort(key=lambda pair: pair[0])
    until = balances[-1][0] + timedelta(days=more)
    exact, day = Fraction(0), balances[0][0]
    while day <= until:
        owed_minor = next(b for start, b in reversed(balances) if start <= day)
        exact += Fraction(owed_minor * TERMS.interest_per_day_ppm, 1_000_000)
        day += timedelta(days=1)
    assert abs(interest_minor(balances, until, TERMS) - exact) <= Fraction(1, 2)


def test_days_that_fall_are_refused() -> None:
    with pytest.raises(InvalidInput):
        interest_minor([(TODAY, 1), (TODAY - timedelta(days=2), 1)], TODAY, TERMS)


@given(st.integers(0, 10**9), st.lists(st.integers(1, 60), max_size=10))
def test_overdue_fees_stop_at_their_cap_however_they_are_charged(least_minor: int, spans: list[int]) -> None:
    charged_minor = 0
    for days in spans:
        fee_minor = overdue_fee_minor(
            least_minor, days, TERMS, charged_minor=charged_minor, minimum_minor=least_minor
        )
        assert fee_minor >= 0
        charged_minor += fee_minor
    assert charged_minor <= least_minor * TERMS.overdue_fee_cap_ppm // 1_000_000


def test_the_overdue_fee_by_hand() -> None:
    assert overdue_fee_minor(10_000, 10, TERMS, charged_minor=0, minimum_minor=10_000) == 50
    assert overdue_fee_minor(10_000, 400, TERMS, charged_minor=0, minimum_minor=10_000) == 500
    assert overdue_fee_minor(10_000, 10, TERMS, charged_minor=480, minimum_minor=10_000) == 20


def test_an_order_names_every_part_once() -> None:
    with pytest.raises(ValidationError, match="every part"):
        CreditTerms(order=(Part.PRINCIPAL,))
