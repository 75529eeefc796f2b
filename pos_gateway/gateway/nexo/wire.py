"""JSON in and out with exact decimals, and amounts that fit their currency or are refused."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Final

from pos_gateway.errors import InvalidMessage
from pos_gateway.money import MAX_AMOUNT_MINOR, Currency

MAX_MESSAGE_BYTES: Final = 256 * 1024

_MAX_NUMBER_CHARACTERS: Final = 40
_MAX_DIGITS_BEFORE_POINT: Final = 14


def parse(data: bytes) -> dict[str, Any]:
    """Read one message: an object, UTF-8, no name twice in one object, numbers as `Decimal` or `int`.

    Raises:
        InvalidMessage: anything else.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidMessage(f"over {MAX_MESSAGE_BYTES} bytes", where="message")
    try:
        value = json.loads(
            data.decode(),
            parse_float=_decimal,
            parse_int=_integer,
            parse_constant=_refuse,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError):
        raise InvalidMessage("not JSON of the form expected", where="message") from None
    if not isinstance(value, dict):
        raise InvalidMessage("not a JSON object", where="message")
    return value


def dumps(value: Any) -> bytes:
    """Canonical enough to be kept: same value, same bytes. A `Decimal` becomes the number it is."""
    return _text(value).encode()


def enclose(envelope: str, body: bytes) -> bytes:
    """`{envelope: body}`, where `body` is JSON already."""
    return b"{" + _text(envelope).encode() + b":" + body + b"}"


def amount_minor(value: object, unit: Currency, where: str) -> int:
    """`19.30` CNY → `1930`, exactly.

    Raises:
        InvalidMessage: no number, not positive, too large, or finer than the currency's minor unit.
    """
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise InvalidMessage("must be a number", where=where)
    exact = Decimal(value)
    if not exact.is_finite():
        raise InvalidMessage("must be a number", where=where)
    if exact <= 0:
        raise InvalidMessage("must be more than nothing", where=where)
    if exact.adjusted() >= _MAX_DIGITS_BEFORE_POINT:
        raise InvalidMessage("too large", where=where)
    _, digits, exponent = exact.as_tuple()
    shift = int(exponent) + unit.exponent
    number = int("".join(map(str, digits)))
    if shift >= 0:
        minor = number * 10**shift
    else:
        minor, rest = divmod(number, 10**-shift) if -shift <= len(digits) else (0, number)
        if rest:
            raise InvalidMessage(f"{unit.code} has {unit.exponent} decimals", where=where)
    if minor > MAX_AMOUNT_MINOR:
        raise InvalidMessage("too large", where=where)
    return int(minor)


def number(minor: int, unit: Currency) -> Decimal:
    """`1930` CNY → `19.30`, as it is to be written."""
    return Decimal(unit.format(minor))


def _text(value: Any) -> str:
    text = _ENCODER.encode(value)
    return _MARKED.sub(r"\1", text) if _MARK in text else text


def _marked(value: object) -> str:
    """The encoder has no word for a decimal number: it is written as a marked text and unmarked then. No
    text from elsewhere can hold the mark."""
    if isinstance(value, Decimal) and value.is_finite():
        return f"{_MARK}{value:f}"
    raise TypeError(type(value).__name__)


_MARK: Final = secrets.token_hex(16)
_MARKED: Final = re.compile(f'"{_MARK}(-?[0-9.]+)"')
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_marked)


def _decimal(text: str) -> Decimal:
    if len(text) > _MAX_NUMBER_CHARACTERS:
        raise ValueError
    return Decimal(text)


def _integer(text: str) -> int:
    if len(text) > _MAX_NUMBER_CHARACTERS:
        raise ValueError
    return int(text)


def _refuse(text: str) -> None:
    raise ValueError(text)


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError
        out[name] = value
    return out
