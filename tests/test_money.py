from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import InvalidInput
from pos_gateway.money import MAX_AMOUNT_MINOR, Currency, Money, currency

CURRENCIES = st.sampled_from([currency(code) for code in ("CNY", "JPY", "KWD")])


@given(CURRENCIES, st.integers(0, MAX_AMOUNT_MINOR))
def test_what_is_written_is_read_back_exactly(unit: Currency, amount_minor: int) -> None:
    assert unit.parse(unit.format(amount_minor)) == amount_minor


@given(CURRENCIES, st.text(max_size=20))
def test_any_text_is_an_exact_amount_or_an_error(unit: Currency, text: str) -> None:
    try:
        amount_minor = unit.parse(text)
    except InvalidInput:
        return
    assert 0 <= amount_minor <= MAX_AMOUNT_MINOR


@pytest.mark.parametrize(
    ("code", "text", "amount_minor"),
    [
        ("CNY", "19.3", 1930),
        ("CNY", "0.01", 1),
        ("JPY", "500", 500),
        ("JPY", "500.0", 500),
        ("KWD", "1.005", 1005),
    ],
)
def test_parse(code: str, text: str, amount_minor: int) -> None:
    assert currency(code).parse(text) == amount_minor


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("CNY", "1.001"),
        ("JPY", "1.5"),
        ("CNY", "-1"),
        ("CNY", "1e3"),
        ("CNY", "１"),
        ("CNY", ""),
        ("CNY", "9" * 14),
    ],
)
def test_parse_refuses_rather_than_rounds(code: str, text: str) -> None:
    with pytest.raises(InvalidInput):
        currency(code).parse(text)


def test_unknown_currency_names_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="CNY"):
        currency("XXX")


def test_money_reads_like_money() -> None:
    assert str(Money(1930, currency("CNY"))) == "19.30 CNY"
    assert str(Money(-5, currency("CNY"))) == "-0.05 CNY"
