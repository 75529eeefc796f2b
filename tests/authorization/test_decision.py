"""The judgement, held to the precedence of its reasons by every combination of what can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import combinations
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.authorization.decision import (
    Approve,
    Ask,
    Claim,
    Decline,
    Evidence,
    Interval,
    Request,
    judge_claim,
    judge_cryptogram,
    judge_request,
)
from pos_gateway.authorization.policy import Exposure, Policy
from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import MAX_COUNTER, Iad, clear_counter_field, cvr
from pos_gateway.instalments import Charge, Offer, quote
from pos_gateway.limits.header import Freshness
from pos_gateway.limits.record import LimitRecord, Status
from pos_gateway.money import currency

NOW = 1_800_000_000_000
POLICY = Policy(
    per_tap_cap_minor=100_000,
    holder_verification_limit_minor=50_000,
    unsynchronised_amount_cap_minor=1_000_000,
    unsynchronised_count_cap=100,
    unsynchronised_age_cap_s=86_400,
    clock_tolerance_s=120,
)
RECORD = LimitRecord(token_key=bytes(16), ceiling=5_000_000, per_tap_cap_minor=60_000, sequence=1)
GOOD = Request(
    amount_minor=10_000,
    today=date(2027, 1, 15),
    now_unix_ms=NOW,
    clock_high_water_unix_ms=NOW - 1000,
    card_effective=date(2026, 1, 1),
    card_expires=date(2030, 12, 31),
    device_can_verify_holder=False,
    freshness=Freshness.FRESH,
    stale_per_tap_cap_minor=5_000,
    record=RECORD,
    exposure=Exposure(0, 0, None),
    policy=POLICY,
)

OFFER = Offer(
    id="o1",
    currency=currency("CNY"),
    charge=Charge.FLAT_FEE,
    periods=(3, 6),
    rate_per_period_bps=50,
    instalment_class=2,
    categories=("5411",),
)

FLAWS: dict[Reason, Callable[[Request], Request]] = {
    Reason.CARD_EXPIRED: lambda r: replace(r, card_expires=date(2027, 1, 14)),
    Reason.UNTRUSTED_CLOCK: lambda r: replace(r, clock_high_water_unix_ms=NOW + 120_001),
    Reason.NO_VALID_LIMITS: lambda r: replace(r, freshness=Freshness.EXPIRED),
    Reason.GATEWAY_CAP: lambda r: replace(r, exposure=Exposure(100, 0, NOW)),
    Reason.OVER_TAP_CAP: lambda r: replace(r, amount_minor=60_001),
    Reason.PLAN_NOT_ALLOWED: lambda r: replace(r, plan=quote(OFFER, 10_000, 3)),
}


@pytest.mark.parametrize(
    ("instalment_class", "category", "offers", "allowed"),
    [
        (2, "5411", (OFFER,), True),
        (3, "5411", (replace(OFFER, id="other"), OFFER), True),
        (2, "5411", (), False),
        (2, "5411", (replace(OFFER, rate_per_period_bps=40),), False),
        (1, "5411", (OFFER,), False),
        (2, "5412", (OFFER,), False),
    ],
)
def test_a_plan_must_be_offered_to_this_card_at_this_merchant(
    instalment_class: int, category: str, offers: tuple[Offer, ...], allowed: bool
) -> None:
    judgement = judge_request(
        replace(
            GOOD,
            plan=quote(OFFER, 10_000, 3),
            offers=offers,
            merchant_category=category,
            record=RECORD._replace(instalment_class=instalment_class),
        )
    )
    if allowed:
        assert judgement == Ask(RECORD.ceiling)
    else:
        assert isinstance(judgement, Decline)
        assert judgement.reason is Reason.PLAN_NOT_ALLOWED


def test_a_good_card_is_asked_with_its_own_ceiling() -> None:
    assert judge_request(GOOD) == Ask(RECORD.ceiling)


@pytest.mark.parametrize("size", range(1, len(FLAWS) + 1))
def test_of_several_reasons_the_first_in_the_enum_is_given(size: int) -> None:
    for reasons in combinations(FLAWS, size):
        request = GOOD
        for reason in reasons:
            request = FLAWS[reason](request)
        judgement = judge_request(request)
        assert isinstance(judgement, Decline)
        assert judgement.reason is min(reasons, key=lambda r: r.precedence)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, Reason.UNKNOWN_TOKEN),
        (RECORD._replace(status=Status.BLOCKED), Reason.BLOCKED),
        (RECORD._replace(status=Status.CLOSED), Reason.CLOSED),
        (RECORD._replace(per_tap_cap_minor=9_999), Reason.OVER_TAP_CAP),
    ],
)
def test_what_the_limit_record_says_decides(record: LimitRecord | None, reason: Reason) -> None:
    judgement = judge_request(replace(GOOD, record=record))
    assert isinstance(judgement, Decline)
    assert judgement.reason is reason


@pytest.mark.parametrize("freshness", [None, Freshness.EXPIRED, Freshness.NOT_YET_VALID])
def test_without_valid_limits_nothing_is_asked(freshness: Freshness | None) -> None:
    judgement = judge_request(replace(GOOD, freshness=freshness))
    assert isinstance(judgement, Decline)
    assert judgement.reason is Reason.NO_VALID_LIMITS


def test_stale_limits_allow_only_small_taps() -> None:
    stale = replace(GOOD, freshness=Freshness.STALE)
    assert isinstance(judge_request(replace(stale, amount_minor=5_000)), Ask)
    refused = judge_request(replace(stale, amount_minor=5_001))
    assert isinstance(refused, Decline)
    assert refused.reason is Reason.OVER_TAP_CAP


def test_a_large_tap_needs_a_device_that_verifies_its_holder() -> None:
    large = replace(GOOD, amount_minor=50_001)
    refused = judge_request(large)
    assert isinstance(refused, Decline)
    assert refused.reason is Reason.HOLDER_NOT_VERIFIED
    assert isinstance(judge_request(replace(large, device_can_verify_holder=True)), Ask)


def test_a_clock_behind_by_no_more_than_the_tolerance_is_trusted() -> None:
    assert isinstance(judge_request(replace(GOOD, clock_high_water_unix_ms=NOW + 120_000)), Ask)


@pytest.mark.parametrize(
    "exposure",
    [
        Exposure(99, 990_000, NOW - 86_400_000),
        Exposure(0, 990_000, None),
    ],
)
def test_caps_may_be_reached(exposure: Exposure) -> None:
    assert isinstance(judge_request(replace(GOOD, exposure=exposure)), Ask)


@pytest.mark.parametrize(
    ("exposure", "cap"),
    [
        (Exposure(100, 0, NOW), "unsynchronised_count"),
        (Exposure(1, 990_001, NOW), "unsynchronised_amount"),
        (Exposure(1, 0, NOW - 86_400_001), "unsynchronised_age"),
    ],
)
def test_caps_may_not_be_passed(exposure: Exposure, cap: str) -> None:
    assert judge_request(replace(GOOD, exposure=exposure)) == Decline(Reason.GATEWAY_CAP, cap)


def _evidence(
    *,
    kind: CryptogramKind = CryptogramKind.TC,
    after: int = 4_000_000,
    amount_minor: int = 10_000,
    verified: bool = False,
) -> Evidence:
    iad = Iad(
        key_index=1,
        cryptogram_version=1,
        cvr=cvr(holder_verified_on_device=verified),
        counter_field=clear_counter_field(after),
        previous_digest=bytes(8),
    )
    return Evidence(
        sale_id=UUID(int=1),
        amount_minor=amount_minor,
        ceiling=RECORD.ceiling,
        kind=kind,
        iad=iad,
        policy=POLICY,
    )


def test_a_tc_within_its_ceiling_claims_its_interval() -> None:
    assert judge_cryptogram(_evidence()) == Claim(Interval(3_990_000, 4_000_000, UUID(int=1)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(CryptogramKind.ARQC, Reason.OVER_CEILING), (CryptogramKind.AAC, Reason.CARD_DECLINED)],
)
def test_anything_but_a_tc_is_declined(kind: CryptogramKind, reason: Reason) -> None:
    judgement = judge_cryptogram(_evidence(kind=kind))
    assert isinstance(judgement, Decline)
    assert judgement.reason is reason


@given(st.integers(0, MAX_COUNTER), st.integers(1, 50_000))
def test_a_tc_is_never_approved_past_its_ceiling(after: int, amount_minor: int) -> None:
    judgement = judge_cryptogram(_evidence(after=after, amount_minor=amount_minor))
    assert isinstance(judgement, Claim) == (amount_minor <= after <= RECORD.ceiling)


@given(st.integers(3_900_000, 4_100_000), st.integers(1, 50_000))
def test_intervals_that_share_a_point_are_declined(before: int, length: int) -> None:
    other = Interval(before, before + length, UUID(int=2))
    claim = judge_cryptogram(_evidence())
    assert isinstance(claim, Claim)
    judgement = judge_claim(claim, [other])
    shares = bool(set(range(3_990_001, 4_000_001)) & set(range(before + 1, before + length + 1)))
    if shares:
        assert isinstance(judgement, Decline)
        assert judgement.reason is Reason.INTERVAL_OVERLAP
    else:
        assert isinstance(judgement, Approve)


def test_a_large_tc_without_verification_on_the_device_is_declined() -> None:
    judgement = judge_cryptogram(_evidence(amount_minor=50_001))
    assert isinstance(judgement, Decline)
    assert judgement.reason is Reason.HOLDER_NOT_VERIFIED
    assert isinstance(judge_cryptogram(_evidence(amount_minor=50_001, verified=True)), Claim)


def test_every_reason_is_told_to_everybody() -> None:
    for reason in Reason:
        told = reason.explanation
        assert len(told.response_code) == 2
        assert told.error_condition
        assert told.english.endswith(".")
        assert told.chinese.endswith("。")
