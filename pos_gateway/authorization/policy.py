"""What a gateway may approve on its own, and what its journal tells about how much it already has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The shop's and the issuer's bounds on one gateway. Amounts in the minor unit of its currency."""

    per_tap_cap_minor: int
    holder_verification_limit_minor: int
    """Above it the device must have verified its holder (CDCVM): there is no PIN pad."""
    unsynchronised_amount_cap_minor: int
    unsynchronised_count_cap: int
    unsynchronised_age_cap_s: int
    clock_tolerance_s: int


@dataclass(frozen=True, slots=True)
class Exposure:
    """What is approved and not yet acknowledged by the ledger. `online_amount_minor`: how much of it relied
    on grants and notes."""

    count: int
    amount_minor: int
    oldest_at_unix_ms: int | None
    online_amount_minor: int = 0


def clock_is_trusted(now_unix_ms: int, high_water_unix_ms: int, policy: Policy) -> bool:
    """A clock behind the latest time this gateway has recorded, by more than the tolerance, is wrong."""
    return now_unix_ms >= high_water_unix_ms - 1000 * policy.clock_tolerance_s


def cap_reached(exposure: Exposure, amount_minor: int, policy: Policy, now_unix_ms: int) -> str | None:
    """Which of the gateway's caps one more payment of this amount would pass; None if none."""
    if exposure.count + 1 > policy.unsynchronised_count_cap:
        return "unsynchronised_count"
    if exposure.amount_minor + amount_minor > policy.unsynchronised_amount_cap_minor:
        return "unsynchronised_amount"
    if (
        exposure.oldest_at_unix_ms is not None
        and now_unix_ms - exposure.oldest_at_unix_ms > 1000 * policy.unsynchronised_age_cap_s
    ):
        return "unsynchronised_age"
    return None
