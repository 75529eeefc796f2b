"""Cycles close in sets, once, wherever they are killed; every bill is what the rules make of it again."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.instalments import Offer, quote
from pos_gateway.lab.credit_history import History, offers
from pos_gateway.ledger import Ledger, billing, store
from pos_gateway.ledger.accounts import lock_account
from pos_gateway.ledger.audit import audit
from pos_gateway.ledger.books import ISSUER_LATE, RECEIVABLE, book
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.credit.terms import CreditTerms
from pos_gateway.ledger.credit_books import Desk
from pos_gateway.ledger.plans import PlanKind, plan_rows
from pos_gateway.ledger.purposes import Purpose
from tests.ledger.shop import Clock

TERMS = CreditTerms(closing_day=5, due_after_days=20, minimum_floor_minor=100)


@pytest.fixture
def opened(ledger: Ledger, clock: Clock) -> str:
    ledger.set_policy(Policy(offers=offers(), credit=TERMS))
    clock.now_s = at(2027, 1, 10)
    return ledger.open_account(holder="Li Na", limit_minor=1_000_000).id


def at(year: int, month: int, day: int, hour: int = 4) -> float:
    """Noon in Shanghai, if the hour is not said."""
    return datetime(year, month, day, hour, tzinfo=UTC).timestamp()


def buy(
    ledger: Ledger, account_id: str, amount_minor: int, offer: Offer | None = None, periods: int = 0
) -> uuid.UUID:
    """A purchase as posting books it, without its card."""

    def work(connection: sa.Connection) -> uuid.UUID:
        account = lock_account(connection, account_id, ledger.now_unix_ms() // 1000)
        desk = Desk(connection, account, TERMS, ledger.now_unix_ms(), date(2027, 1, 1))
        paid = book(
            connection,
            account,
            kind="payment",
            debit=(RECEIVABLE, account_id),
            credit=(ISSUER_LATE, "issuer"),
            amount_minor=amount_minor,
            now_unix_ms=ledger.now_unix_ms(),
        )
        if offer is not None:
            plan, rows = plan_rows(
                account_id, paid, PlanKind.PURCHASE, quote(offer, amount_minor, periods), ledger.now_unix_ms()
            )
            connection.execute(store.plans.insert().values(plan))
            connection.execute(store.plan_instalments.insert(), rows)
        desk.owe(amount_minor)
        return paid

    return ledger.database.transact(work)


def repay(ledger: Ledger, account_id: str, amount_minor: int, reference: str, *, final: bool = True) -> None:
    ledger.receive(account_id, Purpose.REPAYMENT, reference=reference, amount_minor=amount_minor)
    if final:
        ledger.settle_movement(account_id, reference, final=True)


def check(ledger: Ledger) -> None:
    ledger.check_books()
    found = ledger.credit.audit()
    assert found.differences == ()
    assert found.holds


def test_a_purchase_is_billed_free_of_interest_until_due(ledger: Ledger, clock: Clock, opened: str) -> None:
    buy(ledger, opened, 50_000)
    clock.now_s = at(2027, 2, 5, 15)  # 23:00 of the closing day
    assert ledger.credit.close_bills() == 0
    clock.now_s = at(2027, 2, 5, 16)  # midnight
    buy(ledger, opened, 7_000)
    buy(ledger, opened, 1_200, offers()[0], 3)
    assert ledger.credit.close_bills() == 1
    assert ledger.credit.close_bills() == 0
    (bill,) = ledger.credit.bills(opened)
    assert (bill.closing, bill.due_on) == (date(2027, 2, 5), date(2027, 2, 25))
    assert (bill.purchases_minor, bill.total_minor, bill.minimum_minor) == (50_000, 50_000, 5_000)
    clock.now_s = at(2027, 2, 25)
    repay(ledger, opened, 50_000, "all")
    clock.now_s = at(2027, 3, 6)
    assert ledger.credit.close_bills() == 1
    bill = ledger.credit.bills(opened)[-1]
    assert (bill.total_minor, bill.interest_minor, bill.carried_minor) == (7_000 + 400 + 6, 0, 0)
    check(ledger)


def test_what_revolves_bears_interest_by_the_day(ledger: Ledger, clock: Clock, opened: str) -> None:
    buy(ledger, opened, 100_000)
    clock.now_s = at(2027, 2, 20)
    repay(ledger, opened, 10_000, "minimum")
    assert ledger.credit.arrears(opened).days == 0
    clock.now_s = at(2027, 3, 1)
    repay(ledger, opened, 40_000, "more")
    assert ledger.credit.arrears(opened).bucket == "current"
    clock.now_s = at(2027, 3, 6)
    ledger.credit.close_bills()
    bill = ledger.credit.bills(opened)[-1]
    # 90,000 on 26, 27, 28 February; 50,000 from 1 to 5 March; 350 millionths a day.
    assert bill.interest_minor == round((90_000 * 3 + 50_000 * 5) * 350e-6)
    assert (bill.carried_minor, bill.overdue_fee_minor, bill.arrears_minor) == (50_000, 0, 0)
    assert bill.total_minor == 50_000 + bill.interest_minor
    assert bill.minimum_minor == 5_000 + bill.interest_minor
    assert ledger.account(opened).outstanding_minor == 50_000, "interest is owed outside the limit"
    check(ledger)


def test_missing_the_minimum_costs_a_fee_that_is_capped(ledger: Ledger, clock: Clock, opened: str) -> None:
    buy(ledger, opened, 100_000)
    fees = []
    for month in range(3, 12):
        clock.now_s = at(2027, month, 6)
        ledger.credit.close_bills()
        fees.append(ledger.credit.bills(opened)[-1].overdue_fee_minor)
    assert fees[0] == round(10_000 * 8 * 500e-6)  # 26 February to 5 March
    with ledger.database.read() as connection:
        rows = connection.execute(sa.select(store.bills).order_by(store.bills.c.closing)).all()
    assert rows[0].overdue_charged_minor == 500, "5 % of what was due at least"
    assert all(row.overdue_charged_minor <= row.due_minor * 5 // 100 for row in rows)
    arrears = ledger.credit.arrears(opened)
    assert (arrears.bucket, arrears.days) == ("91+", (date(2027, 11, 6) - date(2027, 2, 25)).days)
    check(ledger)


def test_what_was_quoted_is_charged_and_no_more(ledger: Ledger, clock: Clock, opened: str) -> None:
    flat = offers()[0]
    buy(ledger, opened, 100_000, flat, 6)
    billed, fees = [], []
    for number in range(6):
        month = number + 2
        clock.now_s = at(2027, month, 6)
        ledger.credit.close_bills()
        bill = ledger.credit.bills(opened)[-1]
        billed.append(bill.instalments_minor)
        fees.append(bill.instalment_fees_minor)
        assert bill.minimum_minor == bill.total_minor
        repay(ledger, opened, bill.total_minor, str(month))
    assert (billed, fees) == ([16_667] * 5 + [16_665], [500] * 6)
    assert ledger.account(opened).outstanding_minor == 0
    assert ledger.trial_balance()["income_instalment_fee"] == -3_000
    clock.now_s = at(2027, 9, 6)
    ledger.credit.close_bills()
    assert len(ledger.credit.bills(opened)) == 6, "nothing is owed, nothing is billed"
    check(ledger)


def test_a_plan_repaid_early_charges_no_fee_of_periods_to_come(
    ledger: Ledger, clock: Clock, opened: str
) -> None:
    plan_id = buy(ledger, opened, 120_000, offers()[0], 12)
    clock.now_s = at(2027, 2, 6)
    ledger.credit.close_bills()
    settlement, movement = ledger.credit.settle_plan(opened, plan_id, reference="early")
    assert (settlement.total_minor, settlement.spared_minor) == (110_000, 11 * 600)
    assert movement.amount_minor == 110_000
    assert ledger.credit.plans(opened)[0].ahead_minor == 0
    with pytest.raises(InvalidInput, match="every instalment"):
        ledger.credit.settle_plan(opened, plan_id, reference="again")
    with pytest.raises(Conflict):
        ledger.credit.settle_plan(opened, plan_id, reference="early")
    assert ledger.account(opened).outstanding_minor == 10_000
    ledger.settle_movement(opened, "early", final=False)
    clock.now_s = at(2027, 3, 6)
    ledger.credit.close_bills()
    assert ledger.credit.bills(opened)[-1].total_minor > 120_000, "it bounced: it stands on the next bill"
    check(ledger)


def test_a_bounced_repayment_is_owed_again_item_by_item(ledger: Ledger, clock: Clock, opened: str) -> None:
    buy(ledger, opened, 30_000)
    clock.now_s = at(2027, 3, 20)
    ledger.credit.close_bills()
    before = {bill.closing: bill.open_minor for bill in ledger.credit.bills(opened)}
    repay(ledger, opened, 40_000, "salary", final=False)
    paid = ledger.account(opened)
    charges = sum(before.values()) - 30_000
    assert paid.outstanding_minor == 30_000 - (40_000 - charges)
    assert paid.uncleared_minor == 40_000 - charges, "what pays charges frees no credit"
    ledger.settle_movement(opened, "salary", final=False)
    assert {bill.closing: bill.open_minor for bill in ledger.credit.bills(opened)} == before
    assert ledger.account(opened).outstanding_minor == 30_000
    check(ledger)


def test_a_bill_is_spread_only_before_it_is_due_and_only_as_far_as_it_goes(
    ledger: Ledger, clock: Clock, opened: str
) -> None:
    buy(ledger, opened, 90_000)
    clock.now_s = at(2027, 2, 10)
    with pytest.raises(Conflict, match="more than is left"):
        ledger.credit.spread_bill(opened, "annuity", 90_001, 6)
    with pytest.raises(NotFound):
        ledger.credit.spread_bill(opened, "nothing", 60_000, 6)
    ledger.credit.spread_bill(opened, "annuity", 60_000, 6)
    assert ledger.credit.bills(opened)[-1].open_minor == 30_000
    repay(ledger, opened, 30_000, "rest")
    clock.now_s = at(2027, 3, 6)
    ledger.credit.close_bills()
    bill = ledger.credit.bills(opened)[-1]
    assert (bill.instalments_minor + bill.instalment_fees_minor, bill.carried_minor) == (10_353, 0)
    check(ledger)


def test_hardship_stops_interest_and_a_loss_can_be_recovered(
    ledger: Ledger, clock: Clock, opened: str
) -> None:
    buy(ledger, opened, 100_000)
    clock.now_s = at(2027, 5, 6)
    ledger.credit.relieve(opened, "funded", 12, waive=True)
    clock.now_s = at(2027, 6, 6)
    ledger.credit.close_bills()
    bill = ledger.credit.bills(opened)[-1]
    assert (bill.interest_minor, bill.overdue_fee_minor, bill.instalments_minor) == (0, 0, 8_333)
    check(ledger)
    lost_minor = ledger.credit.write_off(opened)
    assert lost_minor == 100_000
    account = ledger.account(opened)
    assert (account.outstanding_minor, account.limit_minor) == (0, 0)
    repay(ledger, opened, 30_000, "late", final=False)
    assert ledger.trial_balance()["credit_recoveries"] == -30_000
    ledger.settle_movement(opened, "late", final=False)
    assert ledger.trial_balance()["credit_recoveries"] == 0
    check(ledger)


def test_the_vault_pays_what_is_long_overdue(ledger: Ledger, clock: Clock, opened: str) -> None:
    ledger.set_line(opened, 0)
    ledger.receive(opened, Purpose.VAULT_LOCK, reference="in", amount_minor=60_000)
    ledger.settle_movement(opened, "in", final=True)
    buy(ledger, opened, 50_000)
    clock.now_s = at(2027, 3, 6)
    ledger.credit.close_bills()
    assert ledger.account(opened).vault_minor == 60_000
    clock.now_s = at(2027, 4, 6)
    ledger.credit.close_bills()
    account = ledger.account(opened)
    assert (account.vault_minor, account.outstanding_minor) == (50_500, 40_500)
    assert account.limit_minor == 50_500, "5,000 was due in February, 4,500 in March"
    check(ledger)


def test_what_was_overpaid_pays_the_next_bill(ledger: Ledger, clock: Clock, opened: str) -> None:
    buy(ledger, opened, 60_000, offers()[0], 3)
    repay(ledger, opened, 85_000, "too much")
    assert ledger.account(opened).outstanding_minor == -25_000
    clock.now_s = at(2027, 2, 6)
    ledger.credit.close_bills()
    bill = ledger.credit.bills(opened)[-1]
    assert (bill.total_minor, bill.purchases_minor, bill.open_minor) == (20_300, -85_000, 0)
    check(ledger)


def test_statements_tell_the_cycle(ledger: Ledger, clock: Clock, opened: str) -> None:
    with pytest.raises(NotFound):
        ledger.credit.statement(opened)
    buy(ledger, opened, 50_000)
    clock.now_s = at(2027, 1, 20)
    repay(ledger, opened, 12_345, "a")
    clock.now_s = at(2027, 2, 6)
    ledger.credit.close_bills()
    told = ledger.credit.statement(opened)
    assert [(line.title, line.amount_minor) for line in told.lines] == [
        ("Purchase", 50_000),
        ("Repayment", -12_345),
    ]
    assert sum(line.amount_minor for line in told.lines) == told.bill.total_minor
    for text in (told.to_text(), told.to_html()):
        assert all(word in text for word in ("2027-02-25", "376.55", "Li Na"))
    assert "<script" not in told.to_html()


@pytest.mark.parametrize(
    ("zone", "closing_day", "closings"),
    [
        ("Asia/Shanghai", 31, [date(2028, 1, 31), date(2028, 2, 29), date(2028, 3, 31), date(2028, 4, 30)]),
        ("Europe/Berlin", 26, [date(2028, 1, 26), date(2028, 2, 26), date(2028, 3, 26), date(2028, 4, 26)]),
        ("America/Santiago", 1, [date(2028, 1, 1), date(2028, 2, 1), date(2028, 3, 1), date(2028, 4, 1)]),
    ],
)
def test_months_end_and_clocks_change(
    ledger: Ledger, clock: Clock, zone: str, closing_day: int, closings: list[date]
) -> None:
    clock.now_s = at(2027, 12, 31, 20)
    account = ledger.open_account(holder="Edge", limit_minor=10**6, time_zone=zone, closing_day=closing_day)
    for closing in closings:
        # One payment in the last second of the closing day, one in the first of the next.
        end_s = _end_s(closing, zone)
        clock.now_s = end_s - 1
        buy(ledger, account.id, 1_000)
        assert ledger.credit.close_bills() == 0
        clock.now_s = end_s
        buy(ledger, account.id, 10)
        assert ledger.credit.close_bills() == 1
        assert ledger.credit.bills(account.id)[-1].closing == closing
    bills = ledger.credit.bills(account.id)
    assert [bill.purchases_minor for bill in bills] == [1_000, 1_010, 1_010, 1_010]
    check(ledger)


def _end_s(day: date, zone: str) -> int:
    midnight = datetime.combine(day + timedelta(days=1), datetime.min.time(), tzinfo=ZoneInfo(zone))
    return int(midnight.timestamp())


def test_a_run_that_is_killed_goes_on_without_a_second_bill(
    ledger: Ledger, clock: Clock, opened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [opened] + [ledger.open_account(holder=f"C{n}", limit_minor=10**6).id for n in range(6)]
    for number, account_id in enumerate(ids):
        buy(ledger, account_id, 1_000 * (number + 1))
    clock.now_s = at(2027, 2, 6)

    class Killed(BaseException):
        pass

    for _ in range(2):
        with pytest.raises(Killed):
            ledger.credit.close_bills(
                batch_accounts=2, progress=lambda batch: (_ for _ in ()).throw(Killed())
            )
    # And in the middle of a batch: nothing of it stays.
    whole = billing.close_batch

    def dies(*args: Any, **keywords: Any) -> None:
        whole(*args, **keywords)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pos_gateway.ledger.billing_run.close_batch", dies)
        with pytest.raises(Killed):
            ledger.credit.close_bills(batch_accounts=2)
    assert ledger.credit.close_bills(batch_accounts=2) == len(ids) - 4
    assert [len(ledger.credit.bills(account_id)) for account_id in ids] == [1] * len(ids)
    check(ledger)


def test_a_history_of_months_is_derived_again_without_a_difference(ledger: Ledger) -> None:
    history = History(ledger.database, 12, 20270110, date(2027, 12, 20), Policy())
    history.run(100)
    found = audit(ledger.database)
    assert found.differences == ()
    assert found.holds
    assert found.derived["bill"] > 30
    assert found.derived["repayment"] > 5
    ledger.database.transact(
        lambda c: c.execute(store.bills.update().values(interest_minor=store.bills.c.interest_minor + 1))
    )
    assert {d.what.split(" ")[0] for d in audit(ledger.database).differences} == {"bill"}


def test_at_once_nothing_is_lost(ledger: Ledger, clock: Clock, opened: str, dialect: str) -> None:
    """Two repayments, purchases, an unlock and a closing at the same moment, on one account."""
    ledger.receive(opened, Purpose.VAULT_LOCK, reference="in", amount_minor=40_000)
    ledger.settle_movement(opened, "in", final=True)
    buy(ledger, opened, 80_000)
    clock.now_s = at(2027, 2, 6)
    failures: list[BaseException] = []

    def during(work: object) -> threading.Thread:
        def run() -> None:
            try:
                work()  # type: ignore[operator]
            except BaseException as error:  # noqa: BLE001 - told by the test itself
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [
        during(lambda: repay(ledger, opened, 30_000, "one")),
        during(lambda: repay(ledger, opened, 20_000, "two")),
        during(lambda: repay(ledger, opened, 20_000, "two")),
        during(lambda: buy(ledger, opened, 5_000)),
        during(lambda: ledger.receive(opened, Purpose.VAULT_UNLOCK, reference="out", amount_minor=40_000)),
        during(lambda: ledger.credit.close_bills()),
    ]
    for thread in threads:
        thread.join(60)
    assert failures == []
    account = ledger.account(opened)
    assert account.outstanding_minor == 80_000 - 50_000 + 5_000
    assert (account.vault_minor, account.uncleared_minor) == (0, 0)
    assert len(ledger.credit.bills(opened)) == 1
    check(ledger)


def test_an_offer_beyond_the_cost_cap_is_no_policy(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cap"):
        ledger.set_policy(Policy(offers=offers(), credit=CreditTerms(annual_cost_cap_ppm=100_000)))
