"""The judgement: pure functions of a limit record, policy, what the journal knows, and now.

The card stands between its parts. `judge_request` says whether the card may be asked for a TC, and up
to which ceiling; `judge_cryptogram` whether its answer is one; `judge_claim` whether that contradicts
what was seen before. Each tests its reasons in the order of `Reason` and gives the first that applies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from uuid import UUID

from pos_gateway.authorization.policy import Exposure, Policy, cap_reached, clock_is_trusted
from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import Iad
from pos_gateway.limits.header import Freshness
from pos_gateway.limits.record import LimitRecord, Status


@dataclass(frozen=True, slots=True)
class Decline:
    """No. `detail` is for staff and engineers; it holds no card data."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """The card may be asked for a TC that keeps its counter within `ceiling`."""

    ceiling: int


@dataclass(frozen=True, slots=True)
class Interval:
    """Points (before, after] on a token's counter line, claimed by the payment `sale_id`."""

    before: int
    after: int
    sale_id: UUID

    def overlaps(self, other: Interval) -> bool:
        return self.before < other.after and other.before < self.after


@dataclass(frozen=True, slots=True)
class Claim:
    """A good TC, and the interval it claims."""

    interval: Interval


@dataclass(frozen=True, slots=True)
class Approve:
    """Yes. It counts once it is durable."""

    interval: Interval


@dataclass(frozen=True, slots=True)
class Request:
    """All that is known before the card is asked for a cryptogram.

    `clock_was_trusted`: when the payment started, whose time it will carry.
    `freshness` and `stale_per_tap_cap_minor` are those of the snapshot in use, None without one;
    `record` is the token's limit record in it, None if the snapshot proves that it has none.
    """

    amount_minor: int
    today: date
    now_unix_ms: int
    clock_high_water_unix_ms: int
    card_effective: date
    card_expires: date
    device_can_verify_holder: bool
    freshness: Freshness | None
    stale_per_tap_cap_minor: int
    record: LimitRecord | None
    exposure: Exposure
    policy: Policy
    clock_was_trusted: bool = True


def judge_request(request: Request) -> Ask | Decline:
    """Decline what can be declined without the card's counter, or ask the card."""
    amount_minor, policy, record = request.amount_minor, request.policy, request.record
    if not request.card_effective <= request.today <= request.card_expires:
        return Decline(Reason.CARD_EXPIRED, "today is outside the card's validity")
    if not clock_is_trusted(request.now_unix_ms, request.clock_high_water_unix_ms, policy):
        return Decline(Reason.UNTRUSTED_CLOCK, "the clock is behind the latest recorded time")
    if not request.clock_was_trusted:
        return Decline(Reason.UNTRUSTED_CLOCK, "the clock was behind when this payment began: begin it anew")
    if request.freshness not in (Freshness.FRESH, Freshness.STALE):
        found = request.freshness.value if request.freshness else "none"
        return Decline(Reason.NO_VALID_LIMITS, f"limit snapshot: {found}")
    cap = cap_reached(request.exposure, amount_minor, policy, request.now_unix_ms)
    if cap is not None:
        return Decline(Reason.GATEWAY_CAP, cap)
    if record is None:
        return Decline(Reason.UNKNOWN_TOKEN)
    if record.status is Status.BLOCKED:
        return Decline(Reason.BLOCKED)
    if record.status is Status.CLOSED:
        return Decline(Reason.CLOSED)
    tap_cap_minor = min(record.per_tap_cap_minor, policy.per_tap_cap_minor)
    if request.freshness is Freshness.STALE:
        tap_cap_minor = min(tap_cap_minor, request.stale_per_tap_cap_minor)
    if amount_minor > tap_cap_minor:
        return Decline(Reason.OVER_TAP_CAP, f"cap {tap_cap_minor} (limits {request.freshness.value})")
    if amount_minor > policy.holder_verification_limit_minor and not request.device_can_verify_holder:
        return Decline(Reason.HOLDER_NOT_VERIFIED, "this card cannot verify its holder")
    return Ask(record.ceiling)


@dataclass(frozen=True, slots=True)
class Evidence:
    """An authenticated answer to GENERATE AC."""

    sale_id: UUID
    amount_minor: int
    ceiling: int
    kind: CryptogramKind
    iad: Iad
    policy: Policy


def judge_cryptogram(evidence: Evidence) -> Claim | Decline:
    """Accept a TC that stays within its ceiling; decline anything else.

    Raises:
        InvalidCardData: the TC's counter field is no clear counter.
    """
    if evidence.kind is CryptogramKind.TC:
        return _judge_tc(evidence)
    if evidence.kind is CryptogramKind.ARQC:
        return Decline(Reason.OVER_CEILING, "the card's counter would pass the ceiling")
    return Decline(Reason.CARD_DECLINED)


def judge_claim(claim: Claim, seen: Iterable[Interval]) -> Approve | Decline:
    """Approve a claim that overlaps nothing this gateway has seen of the token before."""
    for other in seen:
        if claim.interval.overlaps(other):
            return Decline(Reason.INTERVAL_OVERLAP, f"overlaps payment {other.sale_id}")
    return Approve(claim.interval)


def _judge_tc(evidence: Evidence) -> Claim | Decline:
    if (
        evidence.amount_minor > evidence.policy.holder_verification_limit_minor
        and not evidence.iad.holder_verified_on_device
    ):
        return Decline(Reason.HOLDER_NOT_VERIFIED, "the device did not verify its holder")
    after = evidence.iad.counter_after
    before = after - evidence.amount_minor
    if before < 0 or after > evidence.ceiling:
        return Decline(Reason.AUTHENTICATION_FAILED, "the card's counter contradicts its ceiling")
    return Claim(Interval(before, after, evidence.sale_id))
