"""What a till can still do alone, and what will stop it first."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.authorization.forecast import Forecast, forecast
from pos_gateway.authorization.policy import Exposure, Policy, cap_reached
from pos_gateway.limits.header import RiskPolicy, SnapshotHeader, SnapshotTerms

HOUR_S = 3600
NOW_S = 1_800_000_000
POLICY = Policy(
    per_tap_cap_minor=50_000,
    holder_verification_limit_minor=50_000,
    unsynchronised_amount_cap_minor=1_000_000,
    unsynchronised_count_cap=100,
    unsynchronised_age_cap_s=72 * HOUR_S,
    clock_tolerance_s=120,
)
TERMS = SnapshotTerms(
    issuer="Laboratory Bank",
    currency="CNY",
    version=7,
    nonce=bytes(16),
    valid_from_unix_s=NOW_S - HOUR_S,
    refresh_after_unix_s=NOW_S + 20 * HOUR_S,
    valid_until_unix_s=NOW_S + 100 * HOUR_S,
    token_key_epoch=1,
    policy=RiskPolicy(stale_per_tap_cap_minor=5_000, presentment_deadline_s=86_400, clock_tolerance_s=300),
)
HEADER = SnapshotHeader(
    **{each.name: getattr(TERMS, each.name) for each in fields(SnapshotTerms)},
    count=0,
    bucket_bits=0,
    root=bytes(32),
)
NOTHING = Exposure(0, 0, None)


def seen(exposure: Exposure = NOTHING, **changes: Any) -> Forecast:
    given: dict[str, Any] = {
        "exposure": exposure,
        "policy": POLICY,
        "header": HEADER,
        "now_unix_ms": NOW_S * 1000,
        "clock_high_water_unix_ms": NOW_S * 1000,
    }
    return forecast(**{**given, **changes})


def first(found: Forecast) -> str:
    assert found.first is not None
    return found.first.name


def test_an_idle_till_is_stopped_by_time_alone() -> None:
    found = seen()
    assert (found.amount_left_minor, found.count_left, found.stopped) == (1_000_000, 100, False)
    assert [bound.name for bound in found.bounds[:3]] == [
        "limits_stale",
        "unsynchronised_age",
        "limits_expire",
    ]
    assert found.bounds[0].at_unix_ms == HEADER.refresh_after_unix_s * 1000


def test_the_pace_so_far_tells_when_amount_and_count_are_reached() -> None:
    """In two hours 20 payments and a tenth of the amount: 8 hours more by count, 18 by amount."""
    found = seen(Exposure(20, 100_000, (NOW_S - 2 * HOUR_S) * 1000))
    at = {bound.name: bound.at_unix_ms for bound in found.bounds}
    assert at["unsynchronised_count"] == (NOW_S + 8 * HOUR_S) * 1000
    assert at["unsynchronised_amount"] == (NOW_S + 18 * HOUR_S) * 1000
    assert at["unsynchronised_age"] == (NOW_S + 70 * HOUR_S) * 1000
    assert first(found) == "unsynchronised_count"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"exposure": Exposure(100, 1, NOW_S * 1000)}, "unsynchronised_count"),
        ({"exposure": Exposure(1, 1_000_000, NOW_S * 1000)}, "unsynchronised_amount"),
        ({"exposure": Exposure(1, 1, (NOW_S - 73 * HOUR_S) * 1000)}, "unsynchronised_age"),
        ({"header": None}, "no_limits"),
        ({"header": replace(HEADER, valid_until_unix_s=NOW_S, refresh_after_unix_s=NOW_S)}, "limits_expire"),
        ({"clock_high_water_unix_ms": NOW_S * 1000 + 120_001}, "clock"),
    ],
)
def test_what_stops_it_now_comes_first(changes: dict[str, Any], name: str) -> None:
    found = seen(**changes)
    assert found.stopped
    assert first(found) == name


def test_stale_limits_make_taps_smaller() -> None:
    found = seen(header=replace(HEADER, refresh_after_unix_s=NOW_S - 1))
    assert found.per_tap_cap_minor == 5_000
    assert not found.stopped
    assert "limits_stale" not in [bound.name for bound in found.bounds]


@given(
    count=st.integers(0, 120),
    amount=st.integers(0, 1_200_000),
    age_s=st.integers(0, 80 * HOUR_S),
)
def test_it_agrees_with_the_caps_that_are_enforced(count: int, amount: int, age_s: int) -> None:
    exposure = Exposure(count, amount, (NOW_S - age_s) * 1000 if count else None)
    found = seen(exposure)
    if found.stopped and found.count_left:
        # A payment of one minor unit is the smallest there is.
        assert cap_reached(exposure, 1, POLICY, NOW_S * 1000 + 1000) is not None
    if cap_reached(exposure, 1, POLICY, NOW_S * 1000) is not None:
        assert found.stopped
    nearest = [bound.at_unix_ms for bound in found.bounds if bound.left > 0 and bound.at_unix_ms is not None]
    assert nearest == sorted(nearest)
