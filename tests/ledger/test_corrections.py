"""Reversals and refunds: each once, never beyond the payment, whatever the order they come in."""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pos_gateway.enrolment import Merchant
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.accounts import Account
from pos_gateway.ledger.corrections import Correction, Original, judge
from pos_gateway.ledger.settlement import AlarmKind
from pos_gateway.records import Kind, Record, Verdict
from tests.ledger.shop import Clock, Shop

LIMIT_MINOR = 50_000


@pytest.fixture
def account(ledger: Ledger) -> Account:
    return ledger.open_account(holder="Li Na", limit_minor=LIMIT_MINOR)


@pytest.fixture
def card(ledger: Ledger, account: Account, icc_key: rsa.RSAPrivateKey) -> VirtualCard:
    personalisation = ledger.issue_token(account.id, icc_key=icc_key).personalisation
    ledger.publish()
    return VirtualCard(personalisation)


@pytest.fixture
def shop(ledger: Ledger) -> Shop:
    return Shop.enrol(ledger)


def owed(ledger: Ledger, account: Account) -> int:
    ledger.check_books()
    assert sum(ledger.trial_balance().values()) == 0
    return ledger.account(account.id).outstanding_minor


def alarms(ledger: Ledger) -> list[AlarmKind]:
    return [alarm.kind for alarm in ledger.alarms()]


def test_a_void_takes_back_the_whole_payment_and_its_points_stay_claimed(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    payment = shop.tap(card, 1930)
    assert shop.verdict(payment) is Verdict.POSTED
    before = ledger.account(account.id)
    void = shop.correct(Kind.REVERSAL, payment, 1930)
    [verdict] = shop.present(void)
    assert (verdict.verdict, verdict.reason) == (Verdict.POSTED, "Void; nothing is charged.")
    assert owed(ledger, account) == 0
    after = ledger.account(account.id)
    # Not claimable again: only what is owed has changed, and the next limits can give it out anew.
    assert (after.reserve_minor, after.free_minor) == (before.reserve_minor, before.free_minor + 1930)
    assert ledger.trial_balance() == {"customer_receivable": 0, "merchant_payable": 0}
    assert shop.verdict(void) is Verdict.DUPLICATE
    assert shop.verdict(payment) is Verdict.DUPLICATE
    assert [(p.kind, p.amount_minor) for p in ledger.payments()] in (
        [("payment", 1930), ("reversal", -1930)],
        [("reversal", -1930), ("payment", 1930)],
    )
    assert owed(ledger, account) == 0
    assert ledger.alarms() == ()


def test_a_void_before_its_payment_waits_and_the_payment_is_posted_at_zero(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    payment = shop.tap(card, 1930)
    void = shop.correct(Kind.REVERSAL, payment, 1930)
    [waits] = shop.present(void)
    assert (waits.verdict, "not arrived yet" in waits.reason) == (Verdict.UNKNOWN, True)
    assert shop.present(void) == [waits]
    reserve_minor = ledger.account(account.id).reserve_minor
    assert shop.verdict(payment) is Verdict.POSTED
    assert owed(ledger, account) == 0
    assert ledger.account(account.id).reserve_minor == reserve_minor - 1930
    assert shop.verdict(void) is Verdict.DUPLICATE
    assert ledger.verdicts() == {Verdict.POSTED: 2}


def test_refunds_in_part_and_in_full_and_never_beyond(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    payment = shop.tap(card, 1000)
    first, second = (shop.correct(Kind.REFUND, payment, amount) for amount in (300, 700))
    over = shop.correct(Kind.REFUND, payment, 1)
    assert [v.verdict for v in shop.present(payment, first)] == [Verdict.POSTED] * 2
    assert owed(ledger, account) == 700
    too_much = shop.correct(Kind.REFUND, payment, 701)
    assert [v.verdict for v in shop.present(too_much, second, over)] == [
        Verdict.INVALID,
        Verdict.POSTED,
        Verdict.INVALID,
    ]
    assert owed(ledger, account) == 0
    assert alarms(ledger) == [AlarmKind.WRONG_CORRECTION] * 2
    assert [v.verdict for v in shop.present(first, second, over)] == [
        Verdict.DUPLICATE,
        Verdict.DUPLICATE,
        Verdict.INVALID,
    ]
    assert (owed(ledger, account), len(ledger.alarms())) == (0, 2)


def test_a_batch_in_the_wrong_order_is_settled_in_the_right_one(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    payment = shop.tap(card, 1000)
    refund = shop.correct(Kind.REFUND, payment, 400)
    verdicts = shop.present(refund, payment, refund)
    assert [(v.record_id, v.verdict) for v in verdicts] == [
        (str(refund.id), Verdict.POSTED),
        (str(payment.id), Verdict.POSTED),
        (str(refund.id), Verdict.DUPLICATE),
    ]
    assert owed(ledger, account) == 600


def test_what_waits_beyond_its_payment_is_refused_when_that_comes(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    payment = shop.tap(card, 1000)
    refunds = [shop.correct(Kind.REFUND, payment, 600) for _ in range(2)]
    assert [shop.verdict(refund) for refund in refunds[::-1]] == [Verdict.UNKNOWN] * 2
    assert shop.verdict(payment) is Verdict.POSTED
    # The one that the gateway made first.
    assert [v.verdict for v in shop.present(*refunds)] == [Verdict.DUPLICATE, Verdict.INVALID]
    assert owed(ledger, account) == 400
    assert alarms(ledger) == [AlarmKind.WRONG_CORRECTION]


def test_void_and_refund_exclude_each_other(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    voided, refunded = shop.tap(card, 1000), shop.tap(card, 500)
    shop.present(voided, refunded)
    shop.present(shop.correct(Kind.REVERSAL, voided, 1000), shop.correct(Kind.REFUND, refunded, 100))
    wrong = [
        shop.correct(Kind.REVERSAL, voided, 1000),
        shop.correct(Kind.REFUND, voided, 1),
        shop.correct(Kind.REVERSAL, refunded, 500),
    ]
    assert [v.verdict for v in shop.present(*wrong)] == [Verdict.INVALID] * 3
    assert owed(ledger, account) == 400


def test_a_void_of_another_amount_is_not_a_void(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    before, after = shop.tap(card, 1000), shop.tap(card, 500)
    early = shop.correct(Kind.REVERSAL, before, 999)
    shop.present(early)
    shop.present(before, after)
    assert shop.verdict(early) is Verdict.INVALID
    assert shop.verdict(shop.correct(Kind.REVERSAL, after, 501)) is Verdict.INVALID
    assert owed(ledger, account) == 1500


def test_what_was_not_paid_can_be_voided_and_not_refunded(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    late = shop.tap(card, 1000)
    clock.now_s += 30 * 24 * 3600
    ledger.set_line(account.id, 0)  # no credit is free for it
    assert shop.verdict(late) is Verdict.LATE
    assert shop.verdict(shop.correct(Kind.REFUND, late, 1000)) is Verdict.INVALID
    assert shop.verdict(shop.correct(Kind.REVERSAL, late, 1000)) is Verdict.POSTED
    assert ledger.payments() == ()
    assert owed(ledger, account) == 0


def test_no_gateway_corrects_anothers_payment(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    other = Shop.enrol(ledger, Merchant(id="OTHER", name="Other", category="5999"))
    payment = shop.tap(card, 1000)
    shop.present(payment)
    assert other.verdict(other.correct(Kind.REVERSAL, payment, 1000)) is Verdict.UNKNOWN
    assert other.verdict(shop.correct(Kind.REVERSAL, payment, 1000)) is Verdict.INVALID
    assert owed(ledger, account) == 1000


@pytest.mark.parametrize(
    ("fact", "lie"),
    [
        ("amount_minor", 0),
        ("amount_minor", -5),
        ("amount_minor", "5"),
        ("about", "nothing"),
        ("currency", "USD"),
        ("gateway_id", "gw-other"),
        ("terminal_id", "T9999999"),
        ("merchant_id", "OTHER"),
        ("reason", "x" * 121),
        ("at_unix_ms", None),
    ],
)
def test_a_correction_with_a_wrong_fact_moves_nothing(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, fact: str, lie: Any
) -> None:
    payment = shop.tap(card, 1000)
    shop.present(payment)
    refund = shop.correct(Kind.REFUND, payment, 5, lies={fact: lie})
    [verdict] = shop.present(refund)
    assert (verdict.verdict, "correction was not accepted" in verdict.reason) == (Verdict.INVALID, True)
    assert owed(ledger, account) == 1000


def test_a_refund_cannot_be_presented_as_another_kind(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    payment = shop.tap(card, 1000)
    shop.present(payment)
    wire = {**shop.correct(Kind.REFUND, payment, 5).to_wire(), "kind": "reversal"}
    assert shop.present(wire)[0].verdict is Verdict.INVALID
    about_itself = shop.correct(Kind.REFUND, shop.correct(Kind.REFUND, payment, 5), 5)
    assert shop.verdict(about_itself) is Verdict.UNKNOWN
    assert owed(ledger, account) == 1000


@pytest.mark.parametrize("seed", range(6))
def test_any_order_with_duplicates_comes_to_the_same(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, seed: int
) -> None:
    """An honest gateway's records, shuffled, repeated, in batches of any size: what it did is what stands."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    records: list[Record] = []
    expected = 0
    for _ in range(12):
        amount = rng.randint(2, 3000)
        payment = shop.tap(card, amount)
        records.append(payment)
        fate = rng.choice(["kept", "voided", "refunded", "refunded"])
        if fate == "voided":
            records.append(shop.correct(Kind.REVERSAL, payment, amount))
            amount = 0
        elif fate == "refunded":
            for _ in range(rng.randint(1, 3)):
                part = rng.randint(1, amount) if amount else 0
                if part:
                    records.append(shop.correct(Kind.REFUND, payment, part))
                    amount -= part
        expected += amount
    line = records + rng.sample(records, 10)
    rng.shuffle(line)
    while line:
        size = rng.randint(1, 6)
        batch, line = line[:size], line[size:]
        for verdict in shop.present(*batch):
            assert verdict.verdict in (Verdict.POSTED, Verdict.DUPLICATE, Verdict.UNKNOWN)
        ledger.check_books()
    assert {v.verdict for v in shop.present(*records)} == {Verdict.DUPLICATE}
    assert owed(ledger, account) == expected
    assert ledger.alarms() == ()
    assert ledger.verdicts() == {Verdict.POSTED: len(records)}


KINDS = st.sampled_from([Kind.REVERSAL, Kind.REFUND])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    amount=st.integers(1, 100),
    verdict=st.sampled_from(Verdict),
    steps=st.lists(st.tuples(KINDS, st.integers(1, 120)), max_size=12),
)
def test_judged_one_by_one_nothing_ever_goes_beyond_the_payment(
    amount: int, verdict: Verdict, steps: list[tuple[Kind, int]]
) -> None:
    posted = verdict is Verdict.POSTED
    charged = amount if posted else 0
    original = Original(verdict, "A", "T", charged, charged)
    for kind, part in steps:
        judged = judge(Correction(kind, uuid.UUID(int=0), part, 0), original)
        if judged.moves:
            assert judged.verdict is Verdict.POSTED
            original.left_minor -= part
            original.voided |= kind is Kind.REVERSAL
        assert 0 <= original.left_minor <= charged
        assert (judged.verdict is Verdict.UNKNOWN) == (verdict is Verdict.UNKNOWN)
        assert not (judged.moves and not posted)
