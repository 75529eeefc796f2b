"""The limit records a till has of one token, by whichever route they came. Pure.

One record stands in the snapshot's layers; grants and notes stand by themselves. The status and the per-tap
cap are those of the highest sequence, so a block beats every older note; the ceiling is the highest that is
valid, because each that was given out is reserved for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pos_gateway.authorization.policy import Exposure
from pos_gateway.limits.header import OnlineTerms, SnapshotHeader, freshness
from pos_gateway.limits.record import LimitRecord, Status
from pos_gateway.limits.single import Kind, SingleLimit, why_not

ONLINE_PER_TAP: Final = "online_per_tap"
ONLINE_AMOUNT: Final = "online_unsynchronised_amount"


class Source(Enum):
    """By which route the record came that a TC was asked to rely on."""

    SNAPSHOT = "snapshot"
    GRANT = "grant"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class AtHand:
    """A grant or note of this token, its signature verified. `valid`: it counts here and now; if not, it
    still tells how the token stood when it was issued."""

    source: Source
    record: LimitRecord
    digest: bytes
    valid: bool


def at_hand(single: SingleLimit, header: SnapshotHeader, *, terminal_id: str, now_unix_s: int) -> AtHand:
    """`header` is the newest: the one whose keys the single limit was verified with."""
    why = why_not(
        single,
        token_key=single.record.token_key,
        terminal_id=terminal_id,
        now_unix_s=now_unix_s,
        clock_tolerance_s=header.policy.clock_tolerance_s,
    )
    source = Source.GRANT if single.kind is Kind.GRANT else Source.NOTE
    in_force = freshness(header, now_unix_s).may_approve
    return AtHand(source, single.record, single.digest, why is None and in_force)


def terms_in_force(header: SnapshotHeader | None, now_unix_s: int) -> OnlineTerms:
    """What online keys may do now: nothing, once the newest header has expired."""
    if header is None or not freshness(header, now_unix_s).may_approve:
        return OnlineTerms()
    return header.online


def newest_record(record: LimitRecord | None, singles: Sequence[AtHand]) -> LimitRecord | None:
    """The issuer's last word that is known here. Should two of one sequence differ, the stricter counts."""
    known = [*([record] if record is not None else []), *(single.record for single in singles)]
    return max(known, key=lambda r: (r.sequence, r.status is not Status.ACTIVE), default=None)


def online_cap_reached(terms: OnlineTerms, exposure: Exposure, amount_minor: int) -> str | None:
    """Which bound on grants and notes this amount would pass; None if none."""
    if amount_minor > terms.per_tap_cap_minor:
        return ONLINE_PER_TAP
    if exposure.online_amount_minor + amount_minor > terms.unsynchronised_amount_cap_minor:
        return ONLINE_AMOUNT
    return None
