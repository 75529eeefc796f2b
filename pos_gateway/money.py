"""Money: integer minor units and an ISO 4217 currency. No float ever comes near it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pos_gateway.errors import InvalidInput

MAX_AMOUNT_MINOR: Final = 999_999_999_999
"""The largest amount a card can be asked for: 12 digits in tag 9F02 (EMV 4.3 Book 3, Annex A)."""

_DECIMAL: Final = re.compile(r"(\d{1,13})(?:\.(\d{1,4}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Currency:
    """An ISO 4217 currency: letters, three-digit number, and how many decimals its minor unit has."""

    code: str
    numeric: int
    exponent: int

    def format(self, amount_minor: int) -> str:
        """`1930` CNY → `"19.30"`; no grouping, no symbol."""
        sign, digits = ("-" if amount_minor < 0 else ""), str(abs(amount_minor))
        if self.exponent == 0:
            return sign + digits
        digits = digits.zfill(self.exponent + 1)
        return f"{sign}{digits[: -self.exponent]}.{digits[-self.exponent :]}"

    def parse(self, text: str) -> int:
        """`"19.3"` CNY → `1930`. Exact: more decimals than the currency has is an error, never rounded.

        Raises:
            InvalidInput: not a plain decimal number, too many decimals, or too large.
        """
        match = _DECIMAL.fullmatch(text.strip())
        if match is None:
            raise InvalidInput("not an amount", where=repr(text[:20]), advice="write it like 19.30")
        units, decimals = match[1], match[2] or ""
        if len(decimals.rstrip("0")) > self.exponent:
            raise InvalidInput(f"{self.code} has {self.exponent} decimals", where=repr(text[:20]))
        amount_minor = int(units + decimals[: self.exponent].ljust(self.exponent, "0"))
        if amount_minor > MAX_AMOUNT_MINOR:
            raise InvalidInput("amount too large", where=repr(text[:20]))
        return amount_minor


_CURRENCIES: Final = {
    c.code: c
    for c in (
        Currency("AUD", 36, 2),
        Currency("CHF", 756, 2),
        Currency("CNY", 156, 2),
        Currency("EUR", 978, 2),
        Currency("GBP", 826, 2),
        Currency("HKD", 344, 2),
        Currency("JPY", 392, 0),
        Currency("KRW", 410, 0),
        Currency("KWD", 414, 3),
        Currency("MOP", 446, 2),
        Currency("MYR", 458, 2),
        Currency("SGD", 702, 2),
        Currency("THB", 764, 2),
        Currency("TWD", 901, 2),
        Currency("USD", 840, 2),
    )
}


def currency(code: str) -> Currency:
    """The currency of an ISO 4217 letter code.

    Raises:
        InvalidInput: a code this program does not know.
    """
    try:
        return _CURRENCIES[code.upper()]
    except KeyError:
        known = ", ".join(sorted(_CURRENCIES))
        raise InvalidInput("unknown currency", where=repr(code[:8]), advice=f"one of {known}") from None


@dataclass(frozen=True, slots=True)
class Money:
    """An amount with its currency."""

    amount_minor: int
    currency: Currency

    def __str__(self) -> str:
        return f"{self.currency.format(self.amount_minor)} {self.currency.code}"
