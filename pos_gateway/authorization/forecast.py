"""How much this gateway can still approve on its own, for how long, and what will stop it first. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pos_gateway.authorization.policy import Exposure, Policy, clock_is_trusted
from pos_gateway.limits.header import Freshness, SnapshotHeader, freshness


@dataclass(frozen=True, slots=True)
class Bound:
    """One thing that ends approvals. `left`: how much of it there is still, in its own unit (minor units,
    payments, seconds). `at_unix_ms`: when it is reached; None if the pace so far says nothing."""

    name: str
    left: int
    at_unix_ms: int | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """`bounds` with the nearest first. `per_tap_cap_minor` is what one tap may be now."""

    amount_left_minor: int
    count_left: int
    per_tap_cap_minor: int
    bounds: tuple[Bound, ...]

    @property
    def first(self) -> Bound | None:
        """What will stop approvals, or has, before anything else."""
        return self.bounds[0] if self.bounds else None

    @property
    def stopped(self) -> bool:
        """Nothing can be approved now."""
        return any(bound.left <= 0 for bound in self.bounds)


def forecast(
    *,
    exposure: Exposure,
    policy: Policy,
    header: SnapshotHeader | None,
    now_unix_ms: int,
    clock_high_water_unix_ms: int,
) -> Forecast:
    """As if the line stayed down from now on and payments came at the pace they have come since the oldest
    one that still waits. `header`: the snapshot most tokens stand in, None without one.

    Bounds: `unsynchronised_count`, `unsynchronised_amount`, `unsynchronised_age`, `limits_stale` (smaller
    taps only), `limits_expire`, and `clock` or `no_limits` when those stop approvals now.
    """
    now_unix_s = now_unix_ms // 1000
    count_left = max(0, policy.unsynchronised_count_cap - exposure.count)
    amount_left_minor = max(0, policy.unsynchronised_amount_cap_minor - exposure.amount_minor)
    oldest, age_cap_ms = exposure.oldest_at_unix_ms, 1000 * policy.unsynchronised_age_cap_s
    elapsed_ms = 0 if oldest is None else max(1, now_unix_ms - oldest)
    bounds = [
        Bound(
            "unsynchronised_count",
            count_left,
            _reached(now_unix_ms, count_left, exposure.count, elapsed_ms),
        ),
        Bound(
            "unsynchronised_amount",
            amount_left_minor,
            _reached(now_unix_ms, amount_left_minor, exposure.amount_minor, elapsed_ms),
        ),
        # The next payment becomes the oldest if none waits.
        Bound(
            "unsynchronised_age",
            max(0, age_cap_ms - elapsed_ms) // 1000,
            (now_unix_ms if oldest is None else oldest) + age_cap_ms,
        ),
    ]
    per_tap_cap_minor = policy.per_tap_cap_minor
    if not clock_is_trusted(now_unix_ms, clock_high_water_unix_ms, policy):
        bounds.append(Bound("clock", 0, now_unix_ms))
    if header is None or freshness(header, now_unix_s) is Freshness.NOT_YET_VALID:
        bounds.append(Bound("no_limits", 0, now_unix_ms))
    else:
        left_s = max(0, header.valid_until_unix_s - now_unix_s)
        bounds.append(Bound("limits_expire", left_s, 1000 * header.valid_until_unix_s))
        if freshness(header, now_unix_s) is Freshness.STALE:
            per_tap_cap_minor = min(per_tap_cap_minor, header.policy.stale_per_tap_cap_minor)
        elif left_s:
            # It ends large taps, not all of them.
            refresh_left_s = header.refresh_after_unix_s - now_unix_s
            bounds.append(Bound("limits_stale", refresh_left_s, 1000 * header.refresh_after_unix_s))
    return Forecast(
        amount_left_minor=amount_left_minor,
        count_left=count_left,
        per_tap_cap_minor=per_tap_cap_minor,
        bounds=tuple(sorted(bounds, key=_nearness)),
    )


def _reached(now_unix_ms: int, left: int, used: int, elapsed_ms: int) -> int | None:
    if left <= 0:
        return now_unix_ms
    return now_unix_ms + left * elapsed_ms // used if used > 0 and elapsed_ms > 0 else None


def _nearness(bound: Bound) -> tuple[bool, float]:
    return bound.left > 0, float("inf") if bound.at_unix_ms is None else bound.at_unix_ms
