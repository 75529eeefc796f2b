"""Allowances by use: never more than may still be owed, little where it cannot be got back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.allowance import PHONE, PLASTIC
from pos_gateway.ledger.config import Policy, policy_by_use
from pos_gateway.ledger.reserve import interval_set, measure, subtract
from pos_gateway.ledger.use import Debits, Use, UsePolicy, allowances, ceiling_for, stuck_minor
from pos_gateway.records import Verdict
from tests.ledger.shop import Clock, Shop

BY_USE = UsePolicy()
CARD = Use(spent_minor=14_000, cut_off_minor=1_400, largest_minor=2_000, returns=False)
PHONE_USE = replace(CARD, returns=True)
NO_DEBITS = Debits(0, 0)

minor = st.integers(0, 10**7)
use = st.builds(Use, minor, minor, minor, st.booleans(), st.integers(0, 3))


@given(st.lists(use, max_size=4), st.builds(Debits, minor, minor), st.integers(-(10**6), 10**7), minor)
def test_no_more_is_meant_for_all_tokens_than_may_still_be_owed(
    uses: list[Use], debits: Debits, owable_minor: int, limit_minor: int
) -> None:
    found = allowances(BY_USE, uses, debits, owable_minor=owable_minor, limit_minor=limit_minor)

    assert len(found) == len(uses)
    assert sum(each.note_minor for each in found) <= max(owable_minor, 0)
    assert all(0 <= each.snapshot_minor <= each.note_minor for each in found)


def test_plastic_leaves_what_debits_need() -> None:
    def plastic(debits: Debits) -> int:
        (found,) = allowances(BY_USE, [CARD], debits, owable_minor=20_000, limit_minor=50_000)
        return found.note_minor

    assert plastic(Debits(28_000, 9_000)) < plastic(NO_DEBITS) < 20_000


def test_plastic_beside_a_phone_gets_less_than_alone() -> None:
    (alone,) = allowances(BY_USE, [CARD], NO_DEBITS, owable_minor=50_000, limit_minor=50_000)
    beside, phone = allowances(BY_USE, [CARD, PHONE_USE], NO_DEBITS, owable_minor=50_000, limit_minor=50_000)

    assert beside.note_minor < alone.note_minor
    assert beside.snapshot_minor < alone.snapshot_minor
    assert phone.note_minor > beside.note_minor


def test_whoever_spends_more_without_a_line_gets_more() -> None:
    other = replace(CARD, cut_off_minor=12_000)
    one, two = (
        allowances(BY_USE, [each], NO_DEBITS, owable_minor=50_000, limit_minor=50_000)[0]
        for each in (CARD, other)
    )
    assert two.snapshot_minor > one.snapshot_minor


intervals = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=5).map(interval_set)


@given(intervals, st.integers(0, 500), minor, st.integers(-10, 500))
def test_a_ceiling_costs_no_more_than_is_free(
    claim: tuple[tuple[int, int], ...], highest: int, ahead_minor: int, free_minor: int
) -> None:
    ceiling = ceiling_for(claim, highest, ahead_minor=ahead_minor, free_minor=free_minor)

    assert highest <= ceiling <= highest + ahead_minor
    assert measure(subtract(interval_set([(highest, ceiling)]), claim)) <= max(free_minor, 0)


def test_stuck_is_what_no_token_can_use() -> None:
    claim = interval_set([(0, 10), (20, 50)])
    assert stuck_minor(claim, 30, may_pay=True) == 20
    assert stuck_minor(claim, 30, may_pay=False) == 40


def test_the_shipped_policy_is_a_policy() -> None:
    policy = policy_by_use()
    assert policy.use == UsePolicy()
    assert Policy().use is None


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"], indirect=True)
def test_the_publisher_goes_by_use(ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey) -> None:
    ledger.set_policy(policy_by_use())
    shop = Shop.enrol(ledger)
    account = ledger.open_account(holder="A. Customer", limit_minor=1_000_000)
    card = ledger.issue_token(account.id, assurance=PLASTIC, icc_key=icc_key)
    phone = ledger.issue_token(account.id, assurance=PHONE, icc_key=icc_key)

    def ahead_minor(token_id: str) -> int:
        token = next(t for t in ledger.account(account.id).tokens if t.id == token_id)
        assert token.ceiling is not None
        return token.ceiling - token.highest_counter

    ledger.publish()
    # Without a history, so much of the limit each, less beside a phone.
    assert ahead_minor(phone.token.id) == 50_000
    assert ahead_minor(card.token.id) == 12_500

    # The card is used, and presented as late as shops without a line do.
    plastic = VirtualCard(card.personalisation)
    taps = [shop.tap(plastic, 4_000) for _ in range(3)]
    clock.now_s += 5 * 86_400
    assert [told.verdict for told in shop.present(*taps)] == [Verdict.POSTED] * 3
    ledger.publish()
    # 12000 in fourteen days, all without a line: three days' worth, or half the largest, whichever is more.
    assert ahead_minor(card.token.id) == int(0.25 * max(12_000 / 14 * 3, 2_000))

    ledger.set_token_status(phone.token.id, TokenStatus.CLOSED)
    ledger.publish()
    assert ahead_minor(card.token.id) == int(max(12_000 / 14 * 3, 2_000))
    told = ledger.account(account.id)
    assert told.outstanding_minor + told.reserve_minor <= told.limit_minor
