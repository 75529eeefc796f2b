from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from fractions import Fraction

import numpy_financial  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pos_gateway.cli import offer as offer_command
from pos_gateway.errors import InvalidInput
from pos_gateway.instalments import (
    MAX_PERIODS,
    PERIODS_A_YEAR,
    Charge,
    Offer,
    Quote,
    quote,
    quotes,
    rate_per_period,
)
from pos_gateway.money import MAX_AMOUNT_MINOR, currency

EVERY_NUMBER = tuple(range(1, MAX_PERIODS + 1))


def offer(charge: Charge = Charge.FLAT_FEE, bps: int = 50, **changes: object) -> Offer:
    plain = Offer(
        id="o1", currency=currency("CNY"), charge=charge, periods=EVERY_NUMBER, rate_per_period_bps=bps
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


OFFERS = st.builds(offer, st.sampled_from(Charge), st.integers(0, 1000))
AMOUNTS = st.integers(1, MAX_AMOUNT_MINOR) | st.integers(1, 2000)
PERIODS = st.integers(1, MAX_PERIODS)


def totals(found: Quote) -> list[int]:
    return [part.total_minor for part in found.instalments]


@given(OFFERS, AMOUNTS, PERIODS)
def test_a_quote_sums_exactly_and_repays_something_each_period(
    wanted: Offer, amount_minor: int, periods: int
) -> None:
    try:
        found = quote(wanted, amount_minor, periods)
    except InvalidInput:
        assert amount_minor < periods * periods * 12, "large enough to be spread"
        return
    assert len(found.instalments) == periods
    assert sum(part.principal_minor for part in found.instalments) == amount_minor
    assert sum(totals(found)) == found.total_minor == amount_minor + found.fee_minor
    owed_minor = amount_minor
    for number, part in enumerate(found.instalments, 1):
        owed_minor -= part.principal_minor
        assert part.number == number
        assert part.principal_minor > 0
        assert part.fee_minor >= 0
        assert part.remaining_minor == owed_minor
    assert owed_minor == 0


@given(st.integers(1, 1000), AMOUNTS, PERIODS)
def test_a_flat_fee_is_the_exact_fee_rounded_once_and_even_but_for_the_last(
    bps: int, amount_minor: int, periods: int
) -> None:
    try:
        found = quote(offer(bps=bps), amount_minor, periods)
    except InvalidInput:
        return
    assert abs(found.fee_minor - Fraction(amount_minor * bps * periods, 10_000)) <= Fraction(1, 2)
    assert len({part.principal_minor for part in found.instalments[:-1]}) <= 1


@given(st.integers(1, 1000), st.integers(100_000, MAX_AMOUNT_MINOR), st.integers(2, MAX_PERIODS))
def test_an_annuity_is_even_and_its_rate_is_the_offers(bps: int, amount_minor: int, periods: int) -> None:
    found = quote(offer(Charge.ANNUITY, bps), amount_minor, periods)
    assert len(set(totals(found)[:-1])) == 1
    assert abs(totals(found)[-1] - totals(found)[0]) <= 2 * periods
    expected = -numpy_financial.pmt(bps / 10_000, periods, amount_minor)
    assert totals(found)[0] == pytest.approx(expected, abs=0.51, rel=1e-9)
    assert float(rate_per_period(amount_minor, totals(found))) == pytest.approx(bps / 10_000, abs=2e-5)


@given(OFFERS, st.integers(10_000, 10_000_000), PERIODS)
def test_rates_agree_with_an_independent_library(wanted: Offer, amount_minor: int, periods: int) -> None:
    found = quote(wanted, amount_minor, periods)
    rate = numpy_financial.irr([-amount_minor, *totals(found)])
    assert float(rate_per_period(amount_minor, totals(found))) == pytest.approx(rate, abs=1e-7)
    assert found.annual_percentage_rate_ppm == pytest.approx(PERIODS_A_YEAR * rate * 1e6, abs=2)
    assert found.effective_annual_rate_ppm == pytest.approx(((1 + rate) ** 12 - 1) * 1e6, rel=1e-5, abs=2)


@pytest.mark.parametrize(
    ("advance", "payment", "count", "percent"),
    [
        # 12 CFR 1026 (Regulation Z), Appendix J (c)(1): monthly payments, regular first period.
        (500_000, 23_000, 24, "9.69"),
    ],
)
def test_published_annual_percentage_rates(advance: int, payment: int, count: int, percent: str) -> None:
    rate = rate_per_period(advance, [payment] * count) * PERIODS_A_YEAR * 100
    assert rate.quantize(Decimal("0.01")) == Decimal(percent)


def test_a_flat_fee_costs_nearly_twice_its_simple_rate() -> None:
    found = quote(offer(bps=50), 10_000_000, 24)
    assert (found.fee_minor, found.total_minor) == (1_200_000, 11_200_000)
    assert found.simple_annual_rate_ppm == 60_000
    assert found.annual_percentage_rate_ppm == round(
        12e6 * numpy_financial.rate(24, -sum(totals(found)) / 24, 10_000_000, 0)
    )


def test_who_pays_for_a_merchant_funded_plan() -> None:
    found = quote(offer(Charge.MERCHANT_FUNDED, 300), 100_001, 3)
    assert (found.fee_minor, found.merchant_fee_minor) == (0, 3000)
    assert totals(found) == [33_334, 33_334, 33_333]
    assert found.annual_percentage_rate_ppm == found.effective_annual_rate_ppm == 0


def test_the_last_period_absorbs_the_difference() -> None:
    found = quote(offer(bps=0), 10_000, 3)
    assert totals(found) == [3333, 3333, 3334]


def test_what_is_too_small_to_be_spread_is_refused_and_not_offered() -> None:
    with pytest.raises(InvalidInput, match="too small for 24 periods"):
        quote(offer(), 36, 24)
    assert [found.periods for found in quotes([offer(periods=(3, 24))], 36)] == [3]
    assert quotes([offer(min_amount_minor=100)], 36) == []


@given(OFFERS)
def test_an_offer_survives_json(wanted: Offer) -> None:
    assert Offer.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"id": "no blanks"},
        {"periods": []},
        {"periods": [3, 3]},
        {"periods": [0]},
        {"periods": [25]},
        {"periods": [True]},
        {"periods": "3"},
        {"rate_per_period_bps": -1},
        {"rate_per_period_bps": 1001},
        {"rate_per_period_bps": 1.5},
        {"min_amount_minor": 0},
        {"max_amount_minor": 0},
        {"charge": "free"},
        {"charge": 1},
        {"currency": "XXX"},
        {"extra": 1},
    ],
)
def test_offers_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Offer.from_json({**offer().to_json(), **change})


def test_the_digest_names_the_plan_and_nothing_else() -> None:
    plans = [
        quote(wanted, amount_minor, periods)
        for wanted in (offer(), offer(bps=51), offer(Charge.ANNUITY), offer(id="o2"))
        for amount_minor in (10_000, 10_001)
        for periods in (3, 6)
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert quote(offer(), 10_000, 3).digest == plans[0].digest
    assert len(plans[0].digest) == 16


@pytest.mark.parametrize(("advance", "payments"), [(0, [1]), (100, [-1, 200]), (100, [50, 49])])
def test_rates_that_do_not_exist(advance: int, payments: list[int]) -> None:
    with pytest.raises(InvalidInput):
        rate_per_period(advance, payments)


def test_the_command_tells_the_quote() -> None:
    asked = ["quote", "--amount", "100000", "--currency", "CNY", "--periods", "24"]
    result = CliRunner().invoke(offer_command.app, [*asked, "--fee-per-period-bps", "50", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == quote(offer(id="quoted", periods=(24,)), 10_000_000, 24).to_json()
    told = CliRunner().invoke(offer_command.app, [*asked, "--merchant-fee-bps", "250"]).stdout
    assert "The merchant pays 2500.00 CNY." in told
    assert "Annual percentage rate 0.00 %" in told


def test_the_command_wants_one_way_to_charge() -> None:
    asked = ["quote", "--amount", "100", "--currency", "CNY", "--periods", "3"]
    result = CliRunner().invoke(offer_command.app, asked)
    assert isinstance(result.exception, InvalidInput)
