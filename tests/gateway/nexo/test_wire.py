"""JSON and amounts, exactly."""

from __future__ import annotations

import contextlib
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import InvalidMessage
from pos_gateway.gateway.nexo import wire
from pos_gateway.money import MAX_AMOUNT_MINOR, Currency, currency
from tests.gateway.nexo.counter import UNHURRIED

CNY, JPY, KWD = currency("CNY"), currency("JPY"), currency("KWD")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.decimals(-(10**6), 10**6, places=4, allow_nan=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@UNHURRIED
@given(st.dictionaries(texts, values, max_size=4))
def test_what_is_written_is_read_again(value: dict[str, object]) -> None:
    data = wire.dumps(value)
    assert wire.parse(data) == value
    assert wire.dumps(wire.parse(data)) == data


@UNHURRIED
@given(st.integers(1, MAX_AMOUNT_MINOR), st.sampled_from((CNY, JPY, KWD)))
def test_every_amount_goes_out_and_comes_back(minor: int, unit: Currency) -> None:
    read = wire.parse(b'{"x":' + wire.dumps(wire.number(minor, unit)) + b"}")["x"]
    assert wire.amount_minor(read, unit, "x") == minor


@pytest.mark.parametrize(
    ("text", "unit", "minor"),
    [
        ("19.3", CNY, 1930),
        ("19.300", CNY, 1930),
        ("1.93e1", CNY, 1930),
        ("2e2", JPY, 200),
        ("0.01", CNY, 1),
        ("1.005", KWD, 1005),
        ("9999999999.99", CNY, 999_999_999_999),
        ("7.0", JPY, 7),
    ],
)
def test_an_amount_is_exact(text: str, unit: Currency, minor: int) -> None:
    assert wire.amount_minor(wire.parse(f'{{"x":{text}}}'.encode())["x"], unit, "x") == minor


@pytest.mark.parametrize(
    "text",
    [
        *("19.305", "0.001", "1e-400", "19.299999999999997", "0." + "0" * 35 + "1"),
        *("0", "0.00", "-1", "-0.01"),
        *("1e400", "10000000000.00", "1e13", "1" * 39),
        *("true", '"19.30"', "null", "[1]"),
    ],
)
def test_what_does_not_fit_is_refused(text: str) -> None:
    value = wire.parse(f'{{"x":{text}}}'.encode())["x"]
    with pytest.raises(InvalidMessage, match="x"):
        wire.amount_minor(value, CNY, "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":"\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{" + b" " * wire.MAX_MESSAGE_BYTES + b"}",
        "{}".encode("utf-16"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidMessage):
        wire.parse(data)


@UNHURRIED
@given(st.binary(max_size=64))
def test_random_bytes_never_do_more_than_be_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidMessage):
        assert isinstance(wire.parse(data), dict)


def test_a_number_stays_the_number_it_was() -> None:
    assert wire.dumps({"a": Decimal("19.30"), "b": 7}) == b'{"a":19.30,"b":7}'
