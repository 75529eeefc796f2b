from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import InvalidInput
from pos_gateway.instalments import MAX_PERIODS, Charge, Offer, quote
from pos_gateway.ledger.credit.plans import Plan, refund, settle_early
from pos_gateway.money import currency


def offer(charge: Charge, bps: int) -> Offer:
    return Offer(
        id="o1",
        currency=currency("CNY"),
        charge=charge,
        periods=tuple(range(1, MAX_PERIODS + 1)),
        rate_per_period_bps=bps,
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    terms = offer(draw(st.sampled_from(Charge)), draw(st.integers(0, 300)))
    periods = draw(st.integers(1, MAX_PERIODS))
    quoted = quote(terms, draw(st.integers(10_000, 10_000_000)), periods)
    return Plan(terms, quoted.principal_minor, quoted.instalments[draw(st.integers(0, periods)) :])


def cost_minor(plan: Plan) -> int:
    return sum(instalment.total_minor for instalment in plan.ahead)


@given(plans(), st.booleans())
def test_repaying_early_never_costs_more_than_waiting(plan: Plan, current: bool) -> None:
    if not plan.ahead:
        with pytest.raises(InvalidInput):
            settle_early(plan, charge_current_period=current)
        return
    ended = settle_early(plan, charge_current_period=current)
    assert ended.principal_minor == plan.ahead_minor
    assert ended.total_minor + ended.spared_minor == cost_minor(plan)
    assert ended.spared_minor >= 0


@given(plans(), st.data())
def test_a_refund_is_given_whole_and_raises_nothing(plan: Plan, data: st.DataObject) -> None:
    amount_minor = data.draw(st.integers(1, plan.principal_minor))
    smaller, to_billed_minor = refund(plan, amount_minor)
    assert smaller.principal_minor == plan.principal_minor - amount_minor
    assert plan.ahead_minor - smaller.ahead_minor + to_billed_minor == amount_minor
    assert to_billed_minor == 0 or smaller.ahead == ()
    assert cost_minor(smaller) <= cost_minor(plan)
    owed_minor = smaller.ahead_minor
    for new, old in zip(smaller.ahead, plan.ahead, strict=False):
        owed_minor -= new.principal_minor
        assert (new.number, new.remaining_minor) == (old.number, owed_minor)
        assert new.principal_minor > 0
        assert 0 <= new.fee_minor <= old.fee_minor


@given(plans(), st.lists(st.integers(1, 5_000_000), max_size=8))
def test_refunds_add_up(plan: Plan, amounts: list[int]) -> None:
    for amount_minor in [*amounts, plan.principal_minor]:
        if plan.principal_minor:
            plan, _ = refund(plan, min(amount_minor, plan.principal_minor))
    assert (plan.principal_minor, plan.ahead) == (0, ())


def test_a_flat_fee_follows_the_smaller_principal() -> None:
    quoted = quote(offer(Charge.FLAT_FEE, 100), 12_000, 12)
    plan = Plan(quoted.offer, 12_000, quoted.instalments[6:])
    smaller, to_billed_minor = refund(plan, 3_000)
    assert to_billed_minor == 0
    assert [(i.principal_minor, i.fee_minor) for i in smaller.ahead] == [(500, 90)] * 6


def test_a_refund_beyond_what_is_ahead_goes_to_the_bill() -> None:
    quoted = quote(offer(Charge.FLAT_FEE, 100), 12_000, 12)
    smaller, to_billed_minor = refund(Plan(quoted.offer, 12_000, quoted.instalments[9:]), 5_000)
    assert (smaller.ahead, to_billed_minor) == ((), 2_000)


@pytest.mark.parametrize("amount_minor", [0, -1, 12_001])
def test_refunds_that_cannot_be(amount_minor: int) -> None:
    quoted = quote(offer(Charge.FLAT_FEE, 100), 12_000, 12)
    with pytest.raises(InvalidInput):
        refund(Plan(quoted.offer, 12_000, quoted.instalments), amount_minor)
