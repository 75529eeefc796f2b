"""What may be voided and refunded: never beyond the payment, never both."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.authorization.correction import Standing, why_not_refund, why_not_void


@given(st.integers(1, 100), st.booleans(), st.lists(st.tuples(st.booleans(), st.integers(-5, 120))))
def test_whatever_is_asked_no_more_is_given_back_than_was_paid(
    amount: int, refused: bool, asked: list[tuple[bool, int]]
) -> None:
    standing = Standing(amount, refused=refused)
    for whole, part in asked:
        if whole and why_not_void(standing) is None:
            assert not standing.voided
            assert standing.refunded_minor == 0
            standing = replace(standing, voided=True)
        elif not whole and why_not_refund(standing, part) is None:
            assert not refused
            standing = replace(standing, refunded_minor=standing.refunded_minor + part)
        assert 0 <= standing.refunded_minor <= amount
        assert not (standing.voided and standing.refunded_minor)
        assert 0 <= standing.left_minor <= amount


def test_everything_that_is_left_can_be_refunded_and_no_more() -> None:
    standing = Standing(100, refunded_minor=30)
    assert why_not_refund(standing, 70) is None
    assert why_not_refund(standing, 71) == "70 minor units are left of the payment"
    assert why_not_void(standing) == "a part of the payment was refunded: refund the rest instead"


def test_a_payment_that_the_ledger_refused_can_be_voided_and_not_refunded() -> None:
    standing = Standing(100, refused=True)
    assert why_not_void(standing) is None
    assert why_not_refund(standing, 1) is not None
