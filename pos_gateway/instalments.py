"""Instalment plans, pure: what a purchase costs in so many periods, to the minor unit.

An issuer signs **offers**; a customer takes one for a number of periods, and the **quote** says what will
be charged: exactly this, whoever computes it, the till or the ledger. Three ways to charge:

- *flat fee*: each period repays an equal share of the principal and pays a fee that is a fixed part of the
  whole principal, whatever is still owed;
- *annuity*: each period pays the same, first the interest on what is still owed, then principal;
- *merchant-funded*: the customer pays the principal alone, the merchant a part of it to the issuer.

Each period's amount is rounded half-up in minor units; the last period absorbs the difference. Rates are
integers: basis points (1/10,000) where an issuer sets them, parts per million where they are told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, localcontext
from enum import Enum
from fractions import Fraction
from typing import Any, Final

from pos_gateway.errors import InvalidInput
from pos_gateway.money import MAX_AMOUNT_MINOR, Currency, currency

MAX_PERIODS: Final = 24
MAX_RATE_BPS: Final = 1_000
"""Ten percent a period: beyond it somebody has mistaken the unit."""
PERIODS_A_YEAR: Final = 12
PLAN_DIGEST_BYTES: Final = 16

MAX_CLASS: Final = 255

_OFFER_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,24}", re.ASCII)
_CATEGORY: Final = re.compile(r"\d{4}", re.ASCII)
_FIELD_KINDS: Final[dict[str, type]] = {
    "id": str,
    "currency": str,
    "charge": str,
    "rate_per_period_bps": int,
    "min_amount_minor": int,
    "max_amount_minor": int,
    "instalment_class": int,
}
_KIND_NAMES: Final[dict[type, str]] = {str: "text", int: "an integer"}
_PLAN_DOMAIN: Final = b"pos-gateway instalment plan 1\0"
_BPS: Final = 10_000
_PPM: Final = 1_000_000
_RATE_DIGITS: Final = 40
_RATE_STEP: Final = Decimal(10) ** -25


class Charge(Enum):
    """How a plan is paid for."""

    FLAT_FEE = "flat_fee"
    ANNUITY = "annuity"
    MERCHANT_FUNDED = "merchant_funded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What an issuer offers: which numbers of periods, for which amounts, at which price.

    `rate_per_period_bps` is a part of the whole principal (flat fee), of what is still owed (annuity), or,
    once and not per period, what the merchant gives up of the principal (merchant-funded). It is for tokens
    whose limit record has at least `instalment_class`, at merchants of these `categories` (ISO 18245), or
    of any if none is named.

    Raises:
        InvalidInput: a value that no plan can have.
    """

    id: str
    currency: Currency
    charge: Charge
    periods: tuple[int, ...]
    rate_per_period_bps: int
    min_amount_minor: int = 1
    max_amount_minor: int = MAX_AMOUNT_MINOR
    instalment_class: int = 0
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if _OFFER_ID.fullmatch(self.id) is None:
            raise InvalidInput("1 to 24 letters, digits, '.', '_' or '-'", where="offer id")
        if not self.periods or list(self.periods) != sorted(set(self.periods)):
            raise InvalidInput("numbers of periods must be given once each, in rising order", where="periods")
        if not 1 <= self.periods[0] <= self.periods[-1] <= MAX_PERIODS:
            raise InvalidInput(f"1 to {MAX_PERIODS} periods", where="periods")
        if not 0 <= self.rate_per_period_bps <= MAX_RATE_BPS:
            raise InvalidInput(
                f"0 to {MAX_RATE_BPS} basis points",
                where="rate per period",
                advice="50 is half a percent",
            )
        if not 1 <= self.min_amount_minor <= self.max_amount_minor <= MAX_AMOUNT_MINOR:
            raise InvalidInput("the smallest and largest amount contradict each other", where="amounts")
        if not 0 <= self.instalment_class <= MAX_CLASS:
            raise InvalidInput(f"0 to {MAX_CLASS}", where="instalment class")
        if any(_CATEGORY.fullmatch(category) is None for category in self.categories):
            raise InvalidInput("four digits each", where="categories", advice="see ISO 18245")

    def takes(self, amount_minor: int) -> bool:
        return self.min_amount_minor <= amount_minor <= self.max_amount_minor

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "currency": self.currency.code,
            "charge": self.charge.value,
            "periods": list(self.periods),
            "rate_per_period_bps": self.rate_per_period_bps,
            "min_amount_minor": self.min_amount_minor,
            "max_amount_minor": self.max_amount_minor,
            "instalment_class": self.instalment_class,
            "categories": list(self.categories),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Offer:
        """
        Raises:
            InvalidInput: a field is missing, unknown, or of the wrong kind.
        """
        wanted = set(cls.__dataclass_fields__)
        if set(document) != wanted:
            odd = ", ".join(sorted(map(str, wanted ^ set(document))))
            raise InvalidInput(f"missing or unknown: {odd}", where="offer")
        for name, kind in _FIELD_KINDS.items():
            if type(document[name]) is not kind:
                raise InvalidInput(f"must be {_KIND_NAMES[kind]}", where=f"offer field {name}")
        for name, kind in (("periods", int), ("categories", str)):
            items = document[name]
            if not isinstance(items, (list, tuple)) or any(type(item) is not kind for item in items):
                raise InvalidInput(f"must be a list, each {_KIND_NAMES[kind]}", where=f"offer field {name}")
        try:
            charge = Charge(document["charge"])
        except ValueError:
            known = ", ".join(charge.value for charge in Charge)
            raise InvalidInput("unknown", where="offer field charge", advice=f"one of {known}") from None
        exact = {
            "currency": currency(document["currency"]),
            "charge": charge,
            "periods": tuple(document["periods"]),
            "categories": tuple(document["categories"]),
        }
        return cls(**{**document, **exact})


@dataclass(frozen=True, slots=True)
class Instalment:
    """One period's payment. `remaining_minor`: the principal still owed after it."""

    number: int
    principal_minor: int
    fee_minor: int
    remaining_minor: int

    @property
    def total_minor(self) -> int:
        return self.principal_minor + self.fee_minor


@dataclass(frozen=True, slots=True)
class Quote:
    """What one purchase costs under one offer. `merchant_fee_minor` is paid by the merchant, once."""

    offer: Offer
    principal_minor: int
    instalments: tuple[Instalment, ...]
    merchant_fee_minor: int

    @property
    def periods(self) -> int:
        return len(self.instalments)

    @property
    def fee_minor(self) -> int:
        return sum(instalment.fee_minor for instalment in self.instalments)

    @property
    def total_minor(self) -> int:
        return self.principal_minor + self.fee_minor

    @property
    def annual_percentage_rate_ppm(self) -> int:
        """The period's internal rate of return times twelve: the nominal annual rate by the actuarial
        method (12 CFR 1026, Appendix J (b)(1)), in parts per million, half-up."""
        return _ppm(self._rate_per_period() * PERIODS_A_YEAR)

    @property
    def effective_annual_rate_ppm(self) -> int:
        """The same, compounded over a year: (1 + i)^12 − 1."""
        with localcontext() as context:
            context.prec = _RATE_DIGITS
            return _ppm((1 + self._rate_per_period()) ** PERIODS_A_YEAR - 1)

    @property
    def simple_annual_rate_ppm(self) -> int:
        """All fees over the whole principal and the plan's years. It looks away from what was repaid
        meanwhile, so it must always be told as the *simple* rate, never alone."""
        return _half_up(Fraction(self.fee_minor * PERIODS_A_YEAR * _PPM, self.principal_minor * self.periods))

    @property
    def digest(self) -> bytes:
        """The 16 bytes that a card signs with its TC: offer, amount and number of periods. The whole
        schedule follows from them."""
        plan = {
            "offer": self.offer.to_json(),
            "principal_minor": self.principal_minor,
            "periods": self.periods,
        }
        text = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(_PLAN_DOMAIN + text.encode()).digest()[:PLAN_DIGEST_BYTES]

    def _rate_per_period(self) -> Decimal:
        return rate_per_period(self.principal_minor, [i.total_minor for i in self.instalments])

    def to_json(self) -> dict[str, Any]:
        format_amount = self.offer.currency.format
        return {
            "offer": self.offer.id,
            "charge": self.offer.charge.value,
            "currency": self.offer.currency.code,
            "principal_minor": self.principal_minor,
            "periods": self.periods,
            "fee_minor": self.fee_minor,
            "total_minor": self.total_minor,
            "merchant_fee_minor": self.merchant_fee_minor,
            "annual_percentage_rate_ppm": self.annual_percentage_rate_ppm,
            "effective_annual_rate_ppm": self.effective_annual_rate_ppm,
            "simple_annual_rate_ppm": self.simple_annual_rate_ppm,
            "plan_digest": self.digest.hex(),
            "instalments": [
                {
                    "number": instalment.number,
                    "principal_minor": instalment.principal_minor,
                    "fee_minor": instalment.fee_minor,
                    "total_minor": instalment.total_minor,
                    "total": format_amount(instalment.total_minor),
                    "remaining_minor": instalment.remaining_minor,
                }
                for instalment in self.instalments
            ],
        }


def quote(offer: Offer, amount_minor: int, periods: int) -> Quote:
    """What `amount_minor` costs in `periods` periods.

    Raises:
        InvalidInput: the offer does not hold for them, or so small an amount cannot be spread so far.
    """
    if periods not in offer.periods:
        known = ", ".join(map(str, offer.periods))
        raise InvalidInput(f"this offer has {known} periods", where="periods")
    if not offer.takes(amount_minor):
        low, high = (
            offer.currency.format(offer.min_amount_minor),
            offer.currency.format(offer.max_amount_minor),
        )
        raise InvalidInput(f"this offer takes {low} to {high} {offer.currency.code}", where="amount")
    instalments = schedule(offer, amount_minor, periods)
    merchant_fee_minor = 0
    if offer.charge is Charge.MERCHANT_FUNDED:
        merchant_fee_minor = _half_up(Fraction(amount_minor * offer.rate_per_period_bps, _BPS))
    return Quote(offer, amount_minor, instalments, merchant_fee_minor)


def schedule(offer: Offer, principal_minor: int, periods: int) -> tuple[Instalment, ...]:
    """So much principal in so many periods at the offer's price, whatever the offer's own bounds.

    Raises:
        InvalidInput: so small an amount cannot be spread so far.
    """
    rate = Fraction(offer.rate_per_period_bps, _BPS)
    if offer.charge is Charge.ANNUITY and rate:
        shares = _annuity(principal_minor, periods, rate)
    else:
        fee = principal_minor * rate if offer.charge is Charge.FLAT_FEE else Fraction(0)
        principals = _spread(principal_minor, Fraction(principal_minor, periods), periods)
        fees = _spread(_half_up(fee * periods), fee, periods)
        shares = list(zip(principals, fees, strict=True))
    if any(principal <= 0 for principal, _ in shares):
        raise InvalidInput(f"too small for {periods} periods", where="amount", advice="fewer periods")
    instalments, remaining_minor = [], principal_minor
    for number, (share_minor, fee_minor) in enumerate(shares, 1):
        remaining_minor -= share_minor
        instalments.append(Instalment(number, share_minor, fee_minor, remaining_minor))
    return tuple(instalments)


def quotes(offers: Iterable[Offer], amount_minor: int) -> list[Quote]:
    """Every plan that these offers hold for an amount, in the order of the offers."""
    found = []
    for offer in offers:
        if not offer.takes(amount_minor):
            continue
        for periods in offer.periods:
            with contextlib.suppress(InvalidInput):  # too small to be spread so far
                found.append(quote(offer, amount_minor, periods))
    return found


def rate_per_period(advance_minor: int, payments_minor: Sequence[int]) -> Decimal:
    """The internal rate of return of one advance and equally spaced payments after it: the i with
    advance = Σ payment_k / (1 + i)^k. Not negative; 25 decimals.

    Raises:
        InvalidInput: nothing is advanced, a payment is negative, or less comes back than was given.
    """
    if advance_minor <= 0 or any(payment < 0 for payment in payments_minor):
        raise InvalidInput("an advance and payments are positive", where="rate of return")
    excess_minor = sum(payments_minor) - advance_minor
    if excess_minor < 0:
        raise InvalidInput("less is paid back than was advanced", where="rate of return")
    if excess_minor == 0:
        return Decimal(0)
    with localcontext() as context:
        context.prec = _RATE_DIGITS
        low, high = Decimal(0), Decimal(1)
        while _present_value(payments_minor, high) > advance_minor:
            low, high = high, high * 2
        while high - low > _RATE_STEP:
            middle = (low + high) / 2
            if _present_value(payments_minor, middle) > advance_minor:
                low = middle
            else:
                high = middle
        return (low + high) / 2


def _present_value(payments_minor: Sequence[int], rate: Decimal) -> Decimal:
    value, growth = Decimal(0), 1 + rate
    for payment_minor in reversed(payments_minor):
        value = (value + payment_minor) / growth
    return value


def _annuity(amount_minor: int, periods: int, rate: Fraction) -> list[tuple[int, int]]:
    """(principal, interest) of each period; the payment is P·i / (1 − (1 + i)^−n), rounded once."""
    growth = (1 + rate) ** periods
    payment_minor = _half_up(amount_minor * rate * growth / (growth - 1))
    shares, owed_minor = [], amount_minor
    for _ in range(periods - 1):
        interest_minor = _half_up(owed_minor * rate)
        principal_minor = min(payment_minor - interest_minor, owed_minor)
        shares.append((principal_minor, interest_minor))
        owed_minor -= principal_minor
    shares.append((owed_minor, _half_up(owed_minor * rate)))
    return shares


def _spread(total_minor: int, share: Fraction, periods: int) -> list[int]:
    """`share`, rounded half-up, in each period but the last, never more than is left; the rest last."""
    parts, left_minor, each_minor = [], total_minor, _half_up(share)
    for _ in range(periods - 1):
        part_minor = min(each_minor, left_minor)
        parts.append(part_minor)
        left_minor -= part_minor
    return [*parts, left_minor]


def _half_up(value: Fraction) -> int:
    """To the nearest integer, halves away from zero; values here are never negative."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def _ppm(rate: Decimal) -> int:
    return int((rate * _PPM).quantize(Decimal(1), rounding=ROUND_HALF_UP))
