"""The judgement: pure functions of a limit record, policy, what the journal knows, and now.

The card stands between its parts. `judge_request` says whether the card may be asked for a TC, and up
to which ceiling; `judge_cryptogram` whether its answer is one; `judge_claim` whether that contradicts
what was seen before. Each tests its reasons in the order of `Reason` and gives the first that applies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from typing import Final
from uuid import UUID

from pos_gateway.authorization.at_hand import (
    ONLINE_PER_TAP,
    AtHand,
    Source,
    newest_record,
    online_cap_reached,
)
from pos_gateway.authorization.policy import Exposure, Policy, cap_reached, clock_is_trusted
from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import Iad
from pos_gateway.instalments import Offer, Quote
from pos_gateway.limits.header import Freshness, OnlineTerms
from pos_gateway.limits.record import LimitRecord, Status

NOTHING_ONLINE: Final = OnlineTerms()


@dataclass(frozen=True, slots=True)
class Decline:
    """No. `detail` is for staff and engineers; it holds no card data."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """The card may be asked for a TC that keeps its counter within `ceiling`.

    `single` is the grant or note that says so, None when the snapshot does. With `issuer_first` nothing at
    hand says so: the card is asked all the same, with ceiling 0, so that it gives an ARQC for its issuer.
    """

    ceiling: int
    single: AtHand | None = None
    issuer_first: bool = False

    @property
    def source(self) -> Source:
        return Source.SNAPSHOT if self.single is None else self.single.source


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
    `record` is the token's limit record in it, None if the snapshot proves that it has none. `singles` are
    the grants and notes at hand for this token, each verified; `online` what such may be relied on for, now
    (`at_hand.terms_in_force`). `issuer_reachable`: can the ledger be asked for a grant? `plan`: the
    instalments that are asked for; `offers`: those that the snapshot holds.
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
    singles: tuple[AtHand, ...] = ()
    online: OnlineTerms = NOTHING_ONLINE
    issuer_reachable: bool = False
    merchant_category: str = ""
    plan: Quote | None = None
    offers: tuple[Offer, ...] = ()


def judge_request(request: Request) -> Ask | Decline:
    """Decline what can be declined without the card's counter, or ask the card."""
    amount_minor, policy, record = request.amount_minor, request.policy, request.record
    if not request.card_effective <= request.today <= request.card_expires:
        return Decline(Reason.CARD_EXPIRED, "today is outside the card's validity")
    if not clock_is_trusted(request.now_unix_ms, request.clock_high_water_unix_ms, policy):
        return Decline(Reason.UNTRUSTED_CLOCK, "the clock is behind the latest recorded time")
    if not request.clock_was_trusted:
        return Decline(Reason.UNTRUSTED_CLOCK, "the clock was behind when this payment began: begin it anew")
    fresh_enough = request.freshness in (Freshness.FRESH, Freshness.STALE)
    if not fresh_enough and not any(single.valid for single in request.singles):
        found = request.freshness.value if request.freshness else "none"
        return Decline(Reason.NO_VALID_LIMITS, f"limit snapshot: {found}")
    cap = cap_reached(request.exposure, amount_minor, policy, request.now_unix_ms)
    if cap is not None:
        return Decline(Reason.GATEWAY_CAP, cap)
    newest = newest_record(record, request.singles)
    if newest is None:
        return _ask_issuer_or(request, Decline(Reason.UNKNOWN_TOKEN))
    if newest.status is Status.BLOCKED:
        return Decline(Reason.BLOCKED)
    if newest.status is Status.CLOSED:
        return Decline(Reason.CLOSED)
    tap_cap_minor = min(newest.per_tap_cap_minor, policy.per_tap_cap_minor)
    if amount_minor > tap_cap_minor:
        return Decline(Reason.OVER_TAP_CAP, f"cap {tap_cap_minor}")
    ask = _highest_ceiling(request)
    if isinstance(ask, Decline):
        ask = _ask_issuer_or(request, ask)
    if isinstance(ask, Decline):
        return ask
    if amount_minor > policy.holder_verification_limit_minor and not request.device_can_verify_holder:
        return Decline(Reason.HOLDER_NOT_VERIFIED, "this card cannot verify its holder")
    if request.plan is not None and (why := _refused(request.plan.offer, request, newest)) is not None:
        return Decline(Reason.PLAN_NOT_ALLOWED, why)
    return ask


def why_not_ask_issuer(request: Request) -> str | None:
    """Why the ledger need not be asked for a grant; None if it may help."""
    if not request.issuer_reachable:
        return "no line to the issuer"
    if not request.online.keys:
        return "the limits here allow no grants"
    return online_cap_reached(request.online, request.exposure, request.amount_minor)


def judge_arqc(request: Request, asked: Ask) -> Decline | None:
    """The card wants its issuer asked. None: ask it; else why this ends here."""
    why = why_not_ask_issuer(request)
    if why is None:
        return None
    if asked.issuer_first:
        return Decline(Reason.UNKNOWN_TOKEN if request.record is None else Reason.OVER_TAP_CAP, why)
    return Decline(Reason.OVER_CEILING, f"the card's counter would pass the ceiling; {why}")


def judge_grant(request: Request, grant: AtHand, asked_ceiling: int) -> Ask | Decline:
    """After an ARQC: may the card be asked once more, with the ceiling of this grant? The same judgement as
    before it, of all that is known now."""
    judgement = judge_request(
        replace(request, singles=(*request.singles, grant), issuer_reachable=False),
    )
    if isinstance(judgement, Ask) and judgement.ceiling <= asked_ceiling:
        return Decline(Reason.OVER_CEILING, "the grant is no higher than what the card was asked for")
    return judgement


def _ask_issuer_or(request: Request, decline: Decline) -> Ask | Decline:
    return decline if why_not_ask_issuer(request) is not None else Ask(0, issuer_first=True)


def _highest_ceiling(request: Request) -> Ask | Decline:
    """Of everything valid that this amount may rely on, the highest ceiling; of equals the snapshot's."""
    asks: list[Ask] = []
    refused = Decline(Reason.OVER_CEILING)
    record, freshness = request.record, request.freshness
    if record is not None and record.status is Status.ACTIVE and freshness is not None:
        if freshness is Freshness.STALE and request.amount_minor > request.stale_per_tap_cap_minor:
            refused = Decline(Reason.OVER_TAP_CAP, f"cap {request.stale_per_tap_cap_minor} (limits stale)")
        elif freshness.may_approve:
            asks.append(Ask(record.ceiling))
    for single in request.singles:
        if single.valid and single.record.status is Status.ACTIVE:
            cap = online_cap_reached(request.online, request.exposure, request.amount_minor)
            if cap is None:
                asks.append(Ask(single.record.ceiling, single))
            elif not asks:
                reason = Reason.OVER_TAP_CAP if cap == ONLINE_PER_TAP else Reason.GATEWAY_CAP
                refused = Decline(reason, cap)
    return max(asks, key=lambda ask: ask.ceiling, default=refused)


def _refused(offer: Offer, request: Request, record: LimitRecord) -> str | None:
    if offer not in request.offers:
        return f"offer {offer.id} is not in the limits in use"
    if offer.categories and request.merchant_category not in offer.categories:
        return f"offer {offer.id} is not for this merchant's category"
    if record.instalment_class < offer.instalment_class:
        return f"offer {offer.id} is not for this card"
    return None


@dataclass(frozen=True, slots=True)
class Evidence:
    """An authenticated answer to GENERATE AC."""

    sale_id: UUID
    amount_minor: int
    ceiling: int
    kind: CryptogramKind
    iad: Iad
    policy: Policy


def claimed_by(sale_id: UUID, amount_minor: int, iad: Iad) -> Interval | None:
    """The points that a TC claims, whether it can be approved or not; None if it claims none that exist.

    Raises:
        InvalidCardData: its counter field is no clear counter.
    """
    after = iad.counter_after
    return Interval(after - amount_minor, after, sale_id) if 0 <= after - amount_minor < after else None


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
