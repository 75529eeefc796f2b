"""The credit product through the shop's door and the issuer's desk: plans with their payments, refunds into
plans, the vault and the line, loans; and what it charges against independent oracles."""

from __future__ import annotations

from importlib.resources import files

import numpy_financial as npf  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.enrolment import Merchant
from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.instalments import Charge, Offer, quote
from pos_gateway.lab.credit_history import offers
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, store
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.credit.scorecard import Scorecard
from pos_gateway.ledger.credit.terms import CreditTerms, Scene
from pos_gateway.ledger.purposes import Purpose
from pos_gateway.ledger.settlement import AlarmKind
from pos_gateway.money import currency
from pos_gateway.records import Kind, Verdict
from tests.ledger.shop import Clock, Shop
from tests.ledger.test_billing import at, buy, check, repay

FLAT, ANNUITY, FUNDED = offers()


def card_for(ledger: Ledger, account_id: str, icc_key: rsa.RSAPrivateKey) -> VirtualCard:
    issued = ledger.issue_token(account_id, icc_key=icc_key, per_tap_cap_minor=10**6, instalment_class=3)
    ledger.publish()
    return VirtualCard(issued.personalisation)


@pytest.fixture
def shopping(ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey) -> tuple[str, VirtualCard, Shop]:
    ledger.set_policy(Policy(offers=offers(), per_tap_cap_minor=10**6))
    clock.now_s = at(2027, 1, 10)
    account_id = ledger.open_account(holder="Li Na", limit_minor=500_000).id
    return account_id, card_for(ledger, account_id, icc_key), Shop.enrol(ledger)


def test_a_tap_in_instalments_keeps_its_plan_and_a_refund_shrinks_it(
    ledger: Ledger, clock: Clock, shopping: tuple[str, VirtualCard, Shop]
) -> None:
    account_id, card, shop = shopping
    payment = shop.tap(card, 120_000, plan=quote(FUNDED, 120_000, 12))
    assert shop.verdict(payment) is Verdict.POSTED
    assert shop.verdict(payment) is Verdict.DUPLICATE
    (plan,) = ledger.credit.plans(account_id)
    assert (plan.periods, plan.ahead_minor, plan.offer_id) == (12, 120_000, "funded")
    assert ledger.trial_balance()["income_merchant_fee"] == -3_600
    clock.now_s = at(2027, 2, 6)
    assert shop.verdict(shop.correct(Kind.REFUND, payment, 60_000)) is Verdict.POSTED
    (bill,) = ledger.credit.bills(account_id)  # closed before anything happened to the account
    assert (bill.instalments_minor, bill.total_minor) == (10_000, 10_000)
    (plan,) = ledger.credit.plans(account_id)
    assert (plan.left_minor, plan.ahead_minor) == (60_000, 50_000)
    assert ledger.trial_balance()["income_merchant_fee"] == -1_800
    clock.now_s = at(2027, 3, 6)
    ledger.credit.close_bills()
    assert ledger.credit.bills(account_id)[-1].instalments_minor == 4_545
    assert shop.verdict(shop.correct(Kind.REFUND, payment, 60_000)) is Verdict.POSTED
    assert (ledger.account(account_id).outstanding_minor, ledger.credit.plans(account_id)[0].ahead_minor) == (
        0,
        0,
    )
    assert ledger.trial_balance()["income_merchant_fee"] == 0
    check(ledger)


def test_what_waited_while_a_cycle_closed_is_the_next_bills(
    ledger: Ledger, clock: Clock, shopping: tuple[str, VirtualCard, Shop]
) -> None:
    """A replica whose clock is behind posts after another one has closed the day."""
    account_id, card, shop = shopping
    assert shop.verdict(shop.tap(card, 10_000)) is Verdict.POSTED
    clock.now_s = at(2027, 2, 5, 16)
    assert ledger.credit.close_bills() == 1
    clock.now_s -= 2
    ledger.publish()
    assert shop.verdict(shop.tap(card, 700, plan=quote(FLAT, 700, 3))) is Verdict.POSTED
    repay(ledger, account_id, 10_000, "all")
    check(ledger)
    clock.now_s = at(2027, 3, 6)
    ledger.credit.close_bills()
    first, second = ledger.credit.bills(account_id)
    assert (first.total_minor, first.open_minor, second.instalments_minor) == (10_000, 0, 233)
    check(ledger)


def test_an_offer_never_signed_is_refused_whoever_signed_the_tap(
    ledger: Ledger, shopping: tuple[str, VirtualCard, Shop]
) -> None:
    account_id, card, shop = shopping
    cheap = Offer(
        id="flat", currency=FLAT.currency, charge=Charge.FLAT_FEE, periods=(12,), rate_per_period_bps=0
    )
    verdict = shop.present(shop.tap(card, 1_200, plan=quote(cheap, 1_200, 12)))[0]
    assert (verdict.verdict, "never signed" in verdict.reason) == (Verdict.INVALID, True)
    assert [alarm.kind for alarm in ledger.alarms()] == [AlarmKind.FALSE_EVIDENCE]
    # One that an earlier policy held is good.
    ledger.set_policy(Policy(per_tap_cap_minor=10**6))
    assert shop.verdict(shop.tap(card, 1_200, plan=quote(FLAT, 1_200, 12))) is Verdict.POSTED
    assert len(ledger.credit.plans(account_id)) == 1
    check(ledger)


def test_the_class_of_instalments_is_in_the_limit_record(
    ledger: Ledger, shopping: tuple[str, VirtualCard, Shop]
) -> None:
    _, card, shop = shopping
    assert shop.tap(card, 100)
    with ledger.database.read() as connection:
        rows = connection.execute(sa.select(store.tokens)).all()
    assert [(row.instalment_class, row.record_instalment_class) for row in rows] == [(3, 3)]


def example_scorecard() -> Scorecard:
    text = files("pos_gateway.ledger").joinpath("policies", "scorecard-example.json").read_text("utf-8")
    return Scorecard.model_validate_json(text)


def test_from_the_vault_to_a_line_and_back(ledger: Ledger, clock: Clock) -> None:
    clock.now_s = at(2027, 1, 10)
    account_id = ledger.open_account(holder="Student", limit_minor=0).id
    ledger.receive(account_id, Purpose.VAULT_LOCK, reference="in", amount_minor=200_000)
    ledger.settle_movement(account_id, "in", final=True)
    with pytest.raises(NotFound, match="scorecard"):
        ledger.credit.evaluate(account_id)
    ledger.credit.add_scorecard(example_scorecard())
    ledger.credit.add_scorecard(example_scorecard())
    with pytest.raises(Conflict):
        ledger.credit.add_scorecard(example_scorecard().model_copy(update={"base_points": 1}))
    with pytest.raises(Conflict, match="young"):
        ledger.credit.upgrade(account_id)
    for month in range(2, 6):
        buy(ledger, account_id, 50_000)
        clock.now_s = at(2027, month, 6)
        ledger.credit.close_bills()
        repay(ledger, account_id, ledger.credit.bills(account_id)[-1].total_minor, str(month))
    with pytest.raises(InvalidInput, match="no such feature"):
        ledger.credit.evaluate(account_id, {"zodiac": 3})
    found = ledger.credit.upgrade(account_id)
    assert (found.upgrades, found.limit_minor) == (True, 2_000_000)
    account = ledger.account(account_id)
    assert (account.vault_minor, account.limit_minor) == (0, 2_000_000), "funds left, the limit stays"
    assert ledger.trial_balance()["customer_vault"] == 0
    ledger.credit.downgrade(account_id)
    assert ledger.account(account_id).limit_minor == 0
    with ledger.database.read() as connection:
        kept = connection.execute(sa.select(store.evaluations)).all()
    assert [row.upgrades for row in sorted(kept, key=lambda row: row.evaluated_unix_ms)] == [False, True]
    check(ledger)


def test_funds_leave_when_neither_debt_nor_reserve_needs_them(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    clock.now_s = at(2027, 1, 10)
    account_id = ledger.open_account(holder="Student", limit_minor=0).id
    ledger.receive(account_id, Purpose.VAULT_LOCK, reference="in", amount_minor=200_000)
    ledger.settle_movement(account_id, "in", final=True)
    card_for(ledger, account_id, icc_key)
    ledger.receive(account_id, Purpose.VAULT_UNLOCK, reference="out", amount_minor=200_000)
    assert ledger.account(account_id).vault_minor == 200_000
    day = ledger.credit.funds_leave_on(account_id)
    assert day is not None
    clock.now_s = at(day.year, day.month, day.day) + 24 * 3600
    ledger.publish()
    assert ledger.account(account_id).vault_minor == 0
    check(ledger)


def test_loans_are_for_one_purpose_and_beside_the_line(ledger: Ledger, clock: Clock) -> None:
    terms = CreditTerms(
        exposure_cap_minor=900_000,
        scenes={"travel": Scene(categories=("4722",), offers=("annuity",), max_amount_minor=600_000)},
    )
    ledger.set_policy(Policy(offers=offers(), credit=terms))
    clock.now_s = at(2027, 1, 10)
    account_id = ledger.open_account(holder="Li Na", limit_minor=300_000).id
    for merchant in (
        Merchant(id="TOURS", name="Tours", category="4722"),
        Merchant(id="BAR", name="Bar", category="5813"),
    ):
        ledger.invite(merchant)

    def lend(amount_minor: int, reference: str, **other: str) -> object:
        told = {"scene": "travel", "merchant_id": "TOURS", "offer_id": "annuity", **other}
        return ledger.credit.lend(
            account_id,
            scene=told["scene"],
            purpose="To Dali",
            merchant_id=told["merchant_id"],
            amount_minor=amount_minor,
            offer_id=told["offer_id"],
            periods=12,
            reference=reference,
        )

    with pytest.raises(Conflict, match="may come to"):
        lend(100_000, "r1")
    ledger.credit.add_scorecard(example_scorecard().model_copy(update={"version": 2, "base_points": 700}))
    assert ledger.credit.approve_loans(account_id).limit_minor == 2_000_000
    refused: tuple[tuple[type[Exception], str, int, dict[str, str]], ...] = (
        (InvalidInput, "category 5813", 100_000, {"merchant_id": "BAR"}),
        (InvalidInput, "not one for", 100_000, {"offer_id": "flat"}),
        (NotFound, "no loans for", 100_000, {"scene": "yacht"}),
        (InvalidInput, "are up to", 600_001, {}),
        (NotFound, "no merchant", 100_000, {"merchant_id": "NOBODY"}),
    )
    for error, match, amount_minor, other in refused:
        with pytest.raises(error, match=match):
            lend(amount_minor, "r1", **other)
    first = lend(400_000, "r1")
    assert lend(400_000, "r1") == first
    with pytest.raises(Conflict, match="another loan"):
        lend(400_001, "r1")
    with pytest.raises(Conflict, match="exposure"):
        lend(250_000, "r2")
    assert ledger.account(account_id).outstanding_minor == 0
    assert ledger.trial_balance()["customer_loans"] == 400_000
    clock.now_s = at(2027, 2, 6)
    ledger.credit.close_bills()
    (bill,) = ledger.credit.bills(account_id)
    assert bill.total_minor == quote(ANNUITY, 400_000, 12).instalments[0].total_minor
    repay(ledger, account_id, bill.total_minor, "first")
    assert ledger.account(account_id).outstanding_minor == 0, "it paid the loan, not the line"
    assert ledger.trial_balance()["customer_loans"] == 400_000 - bill.instalments_minor
    check(ledger)


@pytest.mark.parametrize(("principal_minor", "periods"), [(1_000_000, 12), (123_457, 24), (60_000, 6)])
def test_what_an_annuity_charges_is_what_numpy_financial_says(principal_minor: int, periods: int) -> None:
    plan = quote(ANNUITY, principal_minor, periods)
    payment = -npf.pmt(0.01, periods, principal_minor)
    assert abs(plan.instalments[0].total_minor - payment) <= 0.5
    for number, instalment in enumerate(plan.instalments[:-1], 1):
        assert abs(instalment.fee_minor + npf.ipmt(0.01, number, periods, principal_minor)) <= 1
    irr = npf.irr([-principal_minor, *(i.total_minor for i in plan.instalments)])
    assert abs(plan.annual_percentage_rate_ppm - irr * 12 * 1e6) <= 1


def test_a_published_amortisation_schedule() -> None:
    """10,000.00 at 9 % a year in 12 monthly payments: the sample calculation of
    emicalculator.site/loan-calculator/monthly-payment.html, which rounds where it prints; here each period's
    interest is rounded."""
    nine = Offer(
        id="t", currency=currency("USD"), charge=Charge.ANNUITY, periods=(12,), rate_per_period_bps=75
    )
    plan = quote(nine, 1_000_000, 12)
    assert {i.total_minor for i in plan.instalments[:11]} == {87_451}
    interest = [7_500, 6_900, 6_296, 5_688, 5_074, 4_457, 3_834, 3_207, 2_575, 1_939, 1_297, 651]
    assert all(abs(i.fee_minor - told) <= 1 for i, told in zip(plan.instalments, interest, strict=True))
    balances = [920_049, 839_497, 758_342, 676_578, 594_201, 511_206, 427_589, 343_343, 258_468, 172_955]
    assert all(
        abs(i.remaining_minor - told) <= 5 for i, told in zip(plan.instalments, balances, strict=False)
    )
